"""``sqa-fx bench``: the files that it writes, and what it refuses before it measures anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from factory_module import factory_module
from torch import nn

from sqa_fx import cli_compare
from sqa_fx.cli import main
from sqa_fx.cli_bench import with_cuda_graphs
from sqa_fx.errors import InputError, MissingError
from sqa_fx.runners import EagerRunner

Capture = pytest.CaptureFixture[str]
SHORT = ["--iterations", "2", "--warmup", "1", "--max-warmup", "1"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a factory in a fresh folder, which is the current one."""
    source = "import torch\ndef make():\n    return torch.nn.Linear(5, 7), (torch.randn(3, 5),)\n"
    return f"{factory_module(source, tmp_path, monkeypatch)}:make"


def test_files(model: str, capsys: Capture) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    command = ["bench", model, model, *SHORT, "--burst", "4", "--html", "b.html", "--markdown", "b.md", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["iterations"], row["burst"], row["warmup_calls"]) for row in report["rows"]] == [(2, 4, 1)] * 2
    page, text = Path("b.html").read_text(), Path("b.md").read_text()
    script = page.partition('id="bench">')[2].partition("</script>")[0]
    assert json.loads(script)["bench"] == report
    assert f"{report['rows'][1]['p50_ms']:.3f}" in text and f"{report['rows'][1]['p50_ms']:.3f}" in page
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--html", "b.txt"], "ends in .html"),
        (["--markdown", "b.html"], "ends in .md"),
        (["--plot", "b.jpg"], "ends in .png"),
        (["--html", "none/b.html"], "no folder none"),
        (["--markdown", "taken.md"], "taken.md exists"),
        (["--burst", "0"], "burst"),
        (["--warmup", "9", "--max-warmup", "8"], "max_warmup is 8"),
    ],
)
def test_refused_before_anything_is_measured(
    model: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    Path("taken.md").write_text("mine")
    monkeypatch.setattr(EagerRunner, "run", lambda *_: pytest.fail("it was measured"))
    assert main(["bench", model, *options]) == 2
    assert message in capsys.readouterr().err
    assert Path("taken.md").read_text() == "mine"


def test_no_matplotlib_is_said_first(model: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_compare, "bench", lambda *_, **__: pytest.fail("it was measured"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", model, "--html", "b.html"]) == 3
    assert "pip install matplotlib" in capsys.readouterr().err


def test_cuda_graphs_without_cuda(model: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", model, "--cuda-graphs"]) == 3
    assert "CUDA graphs need a CUDA device" in capsys.readouterr().err


def test_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class Engine(EagerRunner):
        kind = "onnx"

    eager, engine = EagerRunner(nn.Linear(5, 7), "a"), Engine(nn.Linear(5, 7), "b")
    runners: list[Any] = with_cuda_graphs([eager, engine], True)
    assert [runner.name for runner in runners] == ["a", "a + CUDA graph", "b"]
    assert with_cuda_graphs([eager, engine], False) == [eager, engine]
    with pytest.raises(InputError, match="there is none"):
        with_cuda_graphs([engine], True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError):
        with_cuda_graphs([eager], True)


def test_ideal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """The table says what the dropped heads allow; without a conversion to judge, the command says what it needs."""
    (tmp_path / "ideal_model.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n"
        "    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)\n"
        "    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()\n"
        "    return model, (torch.randn(2, 37, 32),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert main(["convert", "ideal_model:make", "--hq", "2", "--static", "-o", "half"]) == 0
    capsys.readouterr()
    assert main(["bench", "ideal_model:make", "half", *SHORT, "--ideal", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (entry,) = report["ideal"]
    # 4 FLOPs for each of 2 batches, heads of 8, 37 x 37 scores.
    assert [row["attention_flops"] for row in report["rows"]] == [4 * 2 * h * 37 * 37 * 8 for h in (4, 2)]
    assert all(row["attention_tflops"] > 0 for row in report["rows"])
    assert entry["runner"] == "half"
    assert 1 < entry["ideal_speedup"] < 2
    assert entry["share"] > 0
    assert main(["bench", "ideal_model:make", "ideal_model:make", *SHORT, "--ideal"]) == 2
    assert "--ideal compares conversions" in capsys.readouterr().err
