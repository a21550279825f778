"""The command line, called in this process on a small model: what it prints, what it writes, how it ends."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from factory_module import BLOCK, factory_module

import sqa_fx
from sqa_fx.cli import build_parser, main
from sqa_fx.cli_values import head_choice, head_count, request, tensor_sets
from sqa_fx.errors import InputError, MissingError

MODEL = f"""{BLOCK}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        return self.second(self.first(x))


def silent():
    torch.manual_seed(3)
    return Model()


def make():
    return silent(), (torch.randn(2, 5, 24),)


def other():
    torch.manual_seed(4)
    return Model(), (torch.randn(2, 5, 24),)


def linear():
    return nn.Linear(24, 24), (torch.randn(2, 24),)


def untraceable():
    class Choose(Model):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else x

    return Choose(), (torch.randn(2, 5, 24),)
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The name of a factory in a fresh folder, which is the current one."""
    module = factory_module(MODEL, tmp_path, monkeypatch)
    return lambda factory: f"{module}:{factory}"


Capture = pytest.CaptureFixture[str]


def run_json(capsys: Capture, *arguments: str, code: int = 0) -> dict[str, Any]:
    """The JSON object that a command prints, after checking how it ended."""
    assert main([*arguments, "--json"]) == code
    out, err = capsys.readouterr()
    assert err == ""
    value: dict[str, Any] = json.loads(out)
    return value


def files() -> set[str]:
    return {name for name in os.listdir() if name != "__pycache__"}


def test_inspect(model: Callable[[str], str], capsys: Capture) -> None:
    assert main(["inspect", model("make")]) == 0
    out = capsys.readouterr().out
    assert "first" in out and "second" in out
    report = run_json(capsys, "inspect", model("make"))
    module = importlib.import_module(model("make").partition(":")[0]).silent().eval()
    expected = json.loads(json.dumps(sqa_fx.inspect(module, args=(torch.randn(2, 5, 24),)).to_json()))
    assert report.pop("milliseconds").keys() == expected.pop("milliseconds").keys()
    assert report == expected
    line = MODEL.splitlines().index(next(text for text in MODEL.splitlines() if "dot_product" in text)) + 1
    assert [site["location"] for site in report["sites"]] == [f"{model('make').partition(':')[0]}.py:{line}"] * 2
    assert f".py:{line}" in out


def test_inspect_draws(model: Callable[[str], str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["inspect", model("make"), "--hq", "2", "--graph", "regions.svg"]
    assert main(arguments) == 0
    drawn = Path("regions.svg").read_text()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert "first" in drawn and "second" in drawn
    capsys.readouterr()
    Path("regions.svg").write_text("mine")
    assert main(arguments) == 2
    assert "regions.svg exists" in capsys.readouterr().err
    assert Path("regions.svg").read_text() == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert Path("regions.svg").read_text() == drawn
    assert main(["inspect", model("make"), "--graph", "no/such.svg"]) == 2
    assert main(["inspect", model("make"), "--graph", "regions.txt"]) == 2
    before = files()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    capsys.readouterr()
    assert main(["inspect", model("make"), "--graph", "other.svg"]) == 3
    assert "pip install matplotlib" in capsys.readouterr().err
    assert files() == before


def small() -> torch.nn.Module:
    namespace: dict[str, Any] = {"__name__": "small"}
    exec(MODEL, namespace)
    module: torch.nn.Module = namespace["silent"]()
    return module.eval()


def test_convert_then_validate_against_itself_in_every_form(model: Callable[[str], str], capsys: Capture) -> None:
    report = run_json(
        capsys, "convert", model("make"), "--hq", "2", "--hkv", "1", "-o", "out", "--save-plan", "plan.json"
    )
    assert report["output"] == "out"
    plan = sqa_fx.Plan.load("plan.json")
    assert [(site.hq, site.hkv) for site in plan.sites] == [(2, 1), (2, 1)]
    converted = sqa_fx.load("out")
    assert converted.plan == plan
    assert main(["validate", "out", "eager:out", "--input", "x:float32[3,7,24]"]) == 0
    capsys.readouterr()

    # The plan gives the same weights again.
    assert main(["convert", model("make"), "--plan", "plan.json", "-o", "again"]) == 0
    again = sqa_fx.load("again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in converted.state_dict().items())
    capsys.readouterr()

    # The conversion as ONNX agrees with itself, and not with the original.
    pytest.importorskip("onnxruntime")
    data = run_json(capsys, "export", "out", "-o", "out.onnx")
    assert [Path(a["path"]).name for a in data["artifacts"]] == ["out.onnx"]
    assert data["artifacts"][0]["validation"]["passed"] is True
    found = run_json(capsys, "validate", "out", "out.onnx", "onnx:out.onnx")
    assert found["passed"] is True
    assert main(["validate", model("make"), "out.onnx"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_requests_by_site(model: Callable[[str], str], capsys: Capture) -> None:
    names = [site.name for site in sqa_fx.inspect(small(), args=(torch.randn(2, 5, 24),)).sites]
    assert len(names) == 2
    arguments = ["--hq", f"{names[0]}=0.5", "--hq", f"{names[1]}=1", "--hkv", "*=1", "--heads", "first"]
    assert main(["convert", model("make"), *arguments, "-o", "out", "--static"]) == 0
    sites = sqa_fx.load("out").plan.sites
    assert [(site.hq, site.hkv, site.query_heads) for site in sites] == [(2, 1, (0, 1)), (1, 1, (0,))]
    capsys.readouterr()


def test_static_keeps_the_sizes(model: Callable[[str], str], capsys: Capture) -> None:
    assert main(["convert", model("make"), "--hq", "2", "-o", "out", "--static", "--no-verify"]) == 0
    capsys.readouterr()
    assert main(["validate", "out", "out"]) == 0
    assert main(["validate", "out", "out", "--input", "x:float32[3,7,24]"]) == 2


def test_export_converts_on_the_way(model: Callable[[str], str], capsys: Capture) -> None:
    pytest.importorskip("onnxruntime")
    assert main(["export", model("make"), "-o", "base.onnx"]) == 0
    assert main(["export", model("make"), "--hq", "sSQA", "--static", "-o", "sqa.onnx"]) == 0
    capsys.readouterr()
    assert Path("sqa.onnx").stat().st_size < Path("base.onnx").stat().st_size
    assert main(["validate", model("make"), "base.onnx"]) == 0
    assert main(["validate", model("make"), "sqa.onnx"]) == 1


def test_bench(model: Callable[[str], str], capsys: Capture) -> None:
    inputs = ["--input", "x:float32[1,3,24]", "--input", "x:float32[1,7,24]"]
    report = run_json(capsys, "bench", model("make"), model("other"), *inputs, "--iterations", "2", "--warmup", "1")
    assert [row["label"] for row in report["rows"]] == ["1x3x24", "1x3x24", "1x7x24", "1x7x24"]
    assert {row["iterations"] for row in report["rows"]} == {2}


def test_bench_plots(model: Callable[[str], str], capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["bench", model("make"), model("make"), "--iterations", "1", "--plot", "latency.png"]
    assert main(arguments) == 0
    assert Path("latency.png").read_bytes().startswith(b"\x89PNG")
    assert main(arguments) == 2
    assert "latency.png exists" in capsys.readouterr().err


def test_validate_finds_another_model(model: Callable[[str], str], capsys: Capture) -> None:
    assert run_json(capsys, "validate", model("make"), model("make"))["passed"] is True
    assert run_json(capsys, "validate", model("make"), model("other"), code=1)["passed"] is False
    assert run_json(capsys, "validate", model("make"), model("other"), "--atol", "100")["passed"] is True


def test_existing_output_is_kept(model: Callable[[str], str], capsys: Capture) -> None:
    Path("out").mkdir()
    Path("out", "mine.txt").write_text("mine")
    Path("out.onnx").write_text("mine")
    before = files()
    assert main(["convert", model("make"), "--hq", "2", "-o", "out"]) == 2
    assert "out exists" in capsys.readouterr().err
    assert main(["convert", model("make"), "--hq", "2", "-o", "out", "--overwrite"]) == 2
    assert main(["export", model("make"), "-o", "out.onnx"]) == 2
    assert main(["convert", model("make"), "--hq", "2", "-o", "no/such/out"]) == 2
    assert files() == before
    assert Path("out", "mine.txt").read_text() == Path("out.onnx").read_text() == "mine"


def test_overwrite(model: Callable[[str], str], capsys: Capture) -> None:
    for hq in ("2", "1"):
        assert main(["convert", model("make"), "--hq", hq, "-o", "out", "--overwrite", "--static"]) == 0
    assert sqa_fx.load("out").plan.sites[0].hq == 1
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hq", "3", "--hkv", "2"], "divide"),
        (["--hq", "9"], "9"),
        (["--hq", "much"], "'much' is not a number of heads"),
        (["--hq", "nowhere.*=2"], "nowhere"),
        (["--hq", "2", "--input", "x:float32"], "name:dtype[shape]"),
        (["--hq", "2", "--input", "y:float32[2,5,24]"], "its inputs are x"),
        (["--hq", "2", "--plan", "plan.json"], "--plan holds every choice"),
        ([], "--hq, --hkv, or a saved plan"),
    ],
)
def test_bad_requests(
    model: Callable[[str], str], capsys: Capture, arguments: list[str], message: str, tmp_path: Path
) -> None:
    before = files()
    assert main(["convert", model("make"), "--static", *arguments, "-o", "out"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sqa-fx: error: ")
    assert message in err
    assert "Traceback" not in err
    assert files() == before


def test_bad_models(model: Callable[[str], str], capsys: Capture) -> None:
    convert = ["--hq", "2", "-o", "out"]
    assert main(["convert", model("linear"), *convert]) == 2
    assert "attention" in capsys.readouterr().err
    assert main(["convert", model("silent"), *convert]) == 2
    assert "--input name:dtype[shape]" in capsys.readouterr().err
    assert main(["convert", model("untraceable"), *convert]) == 2
    assert capsys.readouterr().err.startswith("sqa-fx: error: ")
    assert main(["convert", "nothing", *convert]) == 2
    assert "package.module:factory" in capsys.readouterr().err
    assert "out" not in files()


def test_bad_plans(model: Callable[[str], str], capsys: Capture) -> None:
    arguments = ["convert", model("make"), "-o", "out", "--plan"]
    assert main([*arguments, "missing.json"]) == 3
    Path("foreign.json").write_text("{}")
    assert main([*arguments, "foreign.json"]) == 2
    assert main(["convert", model("make"), "--hq", "2", "-o", "good", "--save-plan", "plan.json", "--static"]) == 0
    text = Path("plan.json").read_text()
    Path("cut.json").write_text(text[: len(text) // 2])
    assert main([*arguments, "cut.json"]) == 2
    assert "truncated" in capsys.readouterr().err
    assert "out" not in files()


def test_truncated_conversion(model: Callable[[str], str], capsys: Capture) -> None:
    assert main(["convert", model("make"), "--hq", "2", "-o", "out", "--static"]) == 0
    path = Path("out", "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["validate", model("make"), "out"]) == 2
    assert "model.safetensors: SHA-256 mismatch" in capsys.readouterr().err


def test_artifacts_that_do_not_fit(model: Callable[[str], str], capsys: Capture) -> None:
    assert main(["validate", model("make")]) == 2
    assert main(["validate", "missing.onnx", model("make")]) == 2
    assert "must be a model" in capsys.readouterr().err
    assert main(["validate", model("make"), "missing.onnx"]) == 3
    assert "missing.onnx" in capsys.readouterr().err
    assert main(["validate", model("make"), f"onnx:{model('make')}"]) == 2
    assert "sqa-fx export" in capsys.readouterr().err


def test_errors_as_json(model: Callable[[str], str], capsys: Capture) -> None:
    error = run_json(capsys, "convert", model("make"), "--hq", "9", "-o", "out", code=2)["error"]
    assert error["exit_code"] == 2
    assert error["kind"] == "PlanError"
    assert "hq=9" in error["message"]
    assert run_json(capsys, "inspect", code=2)["error"]["kind"] == "InputError"


def test_debug_shows_the_traceback(capsys: Capture) -> None:
    assert main(["inspect", "nothing", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_ours_ends_in_one_message(
    model: Callable[[str], str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(sqa_fx, "inspect", fail)
    assert main(["inspect", model("make")]) == 2
    assert capsys.readouterr().err == "sqa-fx: error: unexpected ZeroDivisionError: by zero (--debug shows where)\n"


def test_failed_proof_ends_with_1(
    model: Callable[[str], str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise sqa_fx.errors.VerifyError("site first diverges")

    monkeypatch.setattr(sqa_fx, "convert", fail)
    assert main(["convert", model("make"), "--hq", "2", "-o", "out"]) == 1
    assert "out" not in files()
    assert "site first diverges" in capsys.readouterr().err


def test_usage_and_help(capsys: Capture) -> None:
    assert main([]) == 2
    assert "usage: sqa-fx" in capsys.readouterr().err
    assert main(["inspect", "x", "--nonsense"]) == 2
    assert "--nonsense" in capsys.readouterr().err
    text = build_parser().format_help()
    assert "exit codes: 0 fine; 1 a proof or a comparison failed; 2 bad usage or input; 3 a package" in text
    assert "package.module:factory" in text
    for command in ("inspect", "convert", "export", "validate", "bench"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert "exit codes: 0 fine" in capsys.readouterr().out


def test_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sqa_fx", "validate", "nothing", "nothing"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("sqa-fx: error: no model 'nothing'")
    assert result.stdout == ""


def test_values() -> None:
    assert [head_count(text) for text in ("8", "0.5", "xSMQA")] == [8, 0.5, "xSMQA"]
    assert type(head_count("1")) is int
    assert request(None, "--hq") is None
    assert request(["8"], "--hq") == 8
    assert request(["a.*=2", "b=SQA", "*=0.5"], "--hq") == {"a.*": 2, "b": "SQA", "*": 0.5}
    with pytest.raises(InputError, match=r"'\*=8'"):
        request(["a=2", "8"], "--hq")


def test_heads_file(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text('{"first": [0, 2]}')
    assert head_choice(str(path)) == {"first": [0, 2]}
    assert head_choice("first") == "first"
    for text in ('{"first": [true]}', "[1]", "{"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"heads\.json"):
            head_choice(str(path))
    with pytest.raises(MissingError, match="neither"):
        head_choice("middle")


def test_a_name_that_comes_again_starts_another_set() -> None:
    sets = tensor_sets(["x:float32[2,3]", "mask:bool[2]", "x:float32[5,3]", "mask:bool[5]"], None)
    assert [tuple(s["x"].shape) for s in sets] == [(2, 3), (5, 3)]
    with pytest.raises(InputError, match="mask is given for some"):
        tensor_sets(["x:float32[2,3]", "mask:bool[2]", "x:float32[5,3]"], None)
