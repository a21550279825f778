"""The commands export and doctor: what they write, say and refuse."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factory_module import BLOCK, factory_module

import sqa_fx.doctor
from sqa_fx.cli import main
from sqa_fx.cli_values import axis_ranges
from sqa_fx.doctor import DoctorReport, Finding
from sqa_fx.exporters.sidecar import AxisRange, Sidecar

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

SOURCE = f"""{BLOCK.replace("(q, k, v)", "(q, k, v, is_causal=True)")}

def make():
    torch.manual_seed(3)
    return Block(), (torch.randn(2, 5, 24),)
"""
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The name of a factory in a fresh folder, which is the current one."""
    module = factory_module(SOURCE, tmp_path, monkeypatch)
    return lambda factory: f"{module}:{factory}"


def run_json(capsys: Capture, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == code
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def written() -> list[str]:
    return sorted(n for n in os.listdir() if not n.endswith(".py") and n != "__pycache__")


def test_export_command(model: Callable[[str], str], capsys: Capture) -> None:
    given = ["export", model("make"), "-o", "x.onnx", "--hq", "2", "--baseline", "--range", "x.1=1,16,64"]
    found = run_json(capsys, *given)["artifacts"]
    assert [Path(a["path"]).name for a in found] == ["x.onnx", "x.baseline.onnx"]
    assert written() == ["x.baseline.onnx", "x.baseline.onnx.json", "x.onnx", "x.onnx.json"]
    for entry in found:
        path = Path(entry["path"])
        said = Sidecar.read(path)
        length = said.inputs[0].shape[1]
        assert isinstance(length, AxisRange) and (length.min, length.opt, length.max) == (1, 16, 64)
        assert entry["validation"]["passed"] and entry["inputs"][0]["shape"][1]["max"] == 64
    assert found[0]["plan"] is not None and found[1]["plan"] is None
    assert Path("x.onnx").stat().st_size < Path("x.baseline.onnx").stat().st_size
    assert run_json(capsys, *given, code=2)["error"]["message"].startswith("x.onnx exists")


def test_export_command_in_words(model: Callable[[str], str], capsys: Capture) -> None:
    assert main(["export", model("make"), "-o", "x.onnx", "--no-check", "--precision", "fp16", "--hq", "2"]) == 0
    out = capsys.readouterr().out
    assert "x.onnx: onnx, opset 24, float16" in out
    assert "input x: torch.float16 [" in out and "attention: 1 Attention nodes" in out
    assert "not asked for" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--range", "x.1"], "--range x.1: write it as INPUT.AXIS=MIN,OPT,MAX, such as input_ids.1=1,128,4096"),
        (["--range", "x.1=1,16"], "--range x.1=1,16: write it as"),
        (["--range", "x.1=1,a,3"], "--range x.1=1,a,3: write it as"),
        (["--range", "z.1=1,2,3"], "range 'z.1': no such axis; there are x.0"),
        (["--compute-capability", "sm_89"], "--compute-capability belongs to --to tensorrt-rtx"),
        (["--timing-cache", "c"], "--timing-cache belongs to --to tensorrt or tensorrt-rtx"),
        (["--strict"], "--strict belongs to --to torch-tensorrt"),
        (["--baseline"], "--baseline exports the unconverted model beside the converted one: give --hq"),
        (["--to", "aoti"], "the suffix .onnx belongs to onnx, not to aoti; use .pt2"),
    ],
)
def test_export_command_refuses(
    model: Callable[[str], str], capsys: Capture, arguments: list[str], message: str
) -> None:
    assert main(["export", model("make"), "-o", "x.onnx", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert written() == []


def test_options_belong_to_the_format_of_the_suffix(
    model: Callable[[str], str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    assert main(["export", model("make"), "-o", "x.ep", "--strict"]) == 3
    assert "sqa-fx[torch-tensorrt]" in capsys.readouterr().err


def test_precision_of_a_saved_conversion_is_refused(model: Callable[[str], str], capsys: Capture) -> None:
    assert main(["convert", model("make"), "--hq", "2", "-o", "saved", "--no-verify"]) == 0
    capsys.readouterr()
    assert main(["export", "saved", "-o", "x.onnx", "--precision", "fp16"]) == 2
    assert "cast the model before converting it" in capsys.readouterr().err
    assert written() == ["saved"]


def test_axis_ranges() -> None:
    assert axis_ranges([]) is None
    assert axis_ranges(["a.0=1,2,3", "s0= 4, 5,6"]) == {"a.0": (1, 2, 3), "s0": (4, 5, 6)}


def test_doctor_command(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    report = DoctorReport(
        (Finding("eager", "usable", "CPU"), Finding("aoti", "missing", "no compiler", "apt install g++", {"g++": "9"}))
    )

    def diagnose(*, timeout: float) -> DoctorReport:
        asked.append(timeout)
        return report

    monkeypatch.setattr(sqa_fx.doctor, "diagnose", diagnose)
    found = run_json(capsys, "doctor", "--timeout", "7")
    assert asked == [7.0]
    assert [(b["backend"], b["status"], b["fix"]) for b in found["backends"]] == [
        ("eager", "usable", None),
        ("aoti", "missing", "apt install g++"),
    ]
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no compiler" in out and "fix aoti: apt install g++" in out
