"""``sqa-fx convert`` and ``export`` with calibration data, on a small model and a text file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sqa_fx
from sqa_fx.cli import main

MODEL = '''
import torch
from torch import nn


class Model(nn.Module):
    """Next byte from bytes; ``attention_mask`` hides padding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, 20), nn.Linear(20, 256)
        self.q, self.k, self.v = (nn.Linear(20, 18) for _ in range(3))
        self.o = nn.Linear(18, 20)

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        q, k, v = (p(x).unflatten(-1, (6, 3)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return {"logits": self.head(x + 3 * self.o(y.transpose(1, 2).flatten(2)))}


def silent():
    torch.manual_seed(3)
    return Model()


def make():
    return silent(), (), {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
'''


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Arguments of a command with calibration on a text file; the current folder is a fresh one."""
    module = f"calibrated_{abs(hash(tmp_path))}"
    (tmp_path / f"{module}.py").write_text(MODEL)
    (tmp_path / "text.txt").write_text("the cat sat on the mat\nthe dog sat on the log, and slept; \n\nwell\n" * 6)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def arguments(command: str, *more: str, model: str = "make", data: str | None = "text.txt") -> list[str]:
        rows = ["--calibration", data, "--tokenizer", "bytes", "--sequence", "8", "--batch", "4"] if data else []
        return [command, f"{module}:{model}", *rows, *more]

    return arguments


def test_convert_by_data(case: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--hq", "4", "--hkv", "2", "--kv-merge", "aligned", "--save-plan", "plan.json", "-o", "out"]
    assert main(case("convert", *wanted)) == 0
    printed = capsys.readouterr().out
    assert "held-out error" in printed
    assert "proved against the masked original" in printed
    converted = sqa_fx.load("out")
    [site] = converted.plan.sites
    assert (site.hq, site.hkv, site.heads_by, site.kv_merge) == (4, 2, "reconstruct", "aligned")
    assert converted.plan.rotations
    assert converted.plan.refitted == ("v.weight", "v.bias", "o.weight", "o.bias")
    assert Path("plan.safetensors").is_file()
    # The saved plan needs no data, and gives the same weights.
    assert main([*case("convert", "--plan", "plan.json", "-o", "again", data=None)]) == 0
    again = sqa_fx.load("again").state_dict()
    assert all(torch.equal(again[name], held) for name, held in converted.state_dict().items())
    capsys.readouterr()
    assert main(case("convert", "--hq", "4", "--save-plan", "plan.json", "-o", "other")) == 2
    Path("plan.json").unlink()
    assert main(case("convert", "--hq", "4", "--save-plan", "plan.json", "-o", "other")) == 2
    assert "plan.safetensors exists" in capsys.readouterr().err


def test_choices_and_fewer_batches(case: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--hq", "3", "--heads", "fisher", "--no-repair", "--calibration-batches", "1", "-o", "out", "--json"]
    assert main(case("convert", *wanted)) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["sites"][0]["error_after_repair"] is None
    [site] = sqa_fx.load("out").plan.sites
    assert (site.hq, site.heads_by) == (3, "fisher")


def test_values_stay(case: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(case("convert", "--hq", "4", "--hkv", "2", "--keep-values", "-o", "out")) == 0
    assert "held-out error" in capsys.readouterr().out
    assert sqa_fx.load("out").plan.refitted == ("o.weight", "o.bias")


def test_padded_rows_bring_their_mask(case: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(case("convert", "--hq", "auto:0.5", "--pad", "-o", "out")) == 0
    assert "attention saw it" not in capsys.readouterr().out
    converted = sqa_fx.load("out")
    assert sorted(converted.example_kwargs) == ["attention_mask", "input_ids"]
    assert converted.plan.sites[0].hq == 3


def test_data_tells_what_the_inputs_are(case: Callable[..., list[str]]) -> None:
    assert main(case("convert", "--hq", "3", "-o", "out", model="silent")) == 0
    assert sqa_fx.load("out").example_kwargs["input_ids"].shape == (4, 8)


def test_export(case: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    wanted = ["--hq", "3", "--hkv", "3", "--heads", "importance", "-o", "model.onnx", "--no-check"]
    assert main(case("export", *wanted)) == 0
    assert Path("model.onnx").exists()
    capsys.readouterr()
    assert main(case("export", "-o", "other.onnx")) == 2
    assert "--calibration and --no-verify belong to a conversion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "data", "message"),
    [
        (["--hq", "3", "--heads", "reconstruct"], None, "--heads reconstruct needs data to tell: give --calibration"),
        (["--hq", "3", "--kv-merge", "aligned"], None, "--kv-merge aligned needs data to tell"),
        (["--hq", "auto:0.5"], None, "--hq auto:0.5 needs data to tell"),
        (["--hq", "3", "--no-repair"], None, "--no-repair needs data to tell"),
        (["--hq", "3", "--keep-values"], None, "--keep-values needs data to tell"),
        (["--hq", "3", "--heads", "best"], None, "it is neither one of first, weights, reconstruct"),
        (["--plan", "plan.json"], "text.txt", "leave out --hq, --hkv, --heads, --kv-merge and --calibration"),
        (["--hq", "3", "--calibration-batches", "0"], "text.txt", "give at least 1"),
        (["--hq", "3"], "nothing.txt", "there is no data at nothing.txt"),
        (["--hq", "3", "--input", "input_ids:int64[2,6]", "--static"], "text.txt", "calibration batch 0: input"),
    ],
)
def test_what_is_wrong(
    case: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    data: str | None,
    message: str,
) -> None:
    assert main(case("convert", *more, "-o", "out", data=data)) in (2, 3)
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_help_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--calibration PATH", "reconstruct (default then)", "--calibration-batches N", "--no-repair",
                 "auto:0.5"):  # fmt: skip
        assert part in text
