"""sqa_fx.export: the file, what its sidecar says of it, the check, and every refusal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sqa_fx
from sqa_fx import Artifact, ConvertedModule
from sqa_fx.errors import InputError, MissingError, VerifyError
from sqa_fx.exporters import sdpa_translation, to_onnx
from sqa_fx.exporters.sidecar import AxisRange, Sidecar, sha256
from sqa_fx.exporters.to_onnx import OnnxExportError
from sqa_fx.runners import OnnxRunner

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

RANGES = {"x.0": (1, 2, 3), "x.1": (1, 16, 64)}
AUTO = torch.export.Dim.AUTO


class Block(nn.Module):
    """Causal attention over ``[batch, seq, 24]`` with 4 heads of size 6."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


def block() -> nn.Module:
    torch.manual_seed(3)
    return Block().eval()


def example(b: int = 2, s: int = 5) -> Tensor:
    return torch.randn(b, s, 24, generator=torch.Generator().manual_seed(b * 100 + s))


@pytest.fixture(scope="module")
def converted() -> ConvertedModule:
    module = sqa_fx.convert(block(), hq=2, hkv=1, args=(example(),))
    assert isinstance(module, ConvertedModule)
    return module


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    """One free axis and two fixed ones, without a conversion; the free one from 3 to 100."""
    shapes = {"x": {1: torch.export.Dim("length", min=3, max=100)}}
    return torch.export.export(block(), (example(),), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def free() -> torch.export.ExportedProgram:
    """The unconverted block with batch and length free."""
    return torch.export.export(block(), (example(),), dynamic_shapes={"x": {0: AUTO, 1: AUTO}})


@pytest.fixture(scope="module")
def artifact(converted: ConvertedModule, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("export") / "block.onnx"
    return sqa_fx.export(converted, path, ranges=RANGES)


def run(path: Path, x: Tensor) -> Tensor:
    return OnnxRunner(path).run((x,), {})[0]


# --- what is written -------------------------------------------------------------------------------------------------


def test_sidecar_says_what_was_written(artifact: Artifact, converted: ConvertedModule) -> None:
    assert sorted(os.listdir(artifact.path.parent)) == ["block.onnx", "block.onnx.json"]
    said = Sidecar.read(artifact.path)
    assert said == Sidecar.read(artifact.path, check=False)
    assert (said.format, said.opset, said.precision, said.built_for) == ("onnx", 24, "float32", None)
    [x] = said.inputs
    assert (x.name, x.dtype) == ("x", "torch.float32")
    batch, length, width = x.shape
    assert isinstance(batch, AxisRange) and (batch.min, batch.opt, batch.max) == RANGES["x.0"]
    assert isinstance(length, AxisRange) and (length.min, length.opt, length.max) == RANGES["x.1"]
    assert width == 24
    [y] = said.outputs
    assert [n.name if isinstance(n, AxisRange) else n for n in y.shape] == [batch.name, length.name, 24]
    assert said.attention == ("1 Attention nodes",)
    assert said.plan == converted.plan.to_json()
    assert said.files == {
        "block.onnx": {"sha256": sha256(artifact.path), "bytes": artifact.path.stat().st_size},
    }
    assert artifact.bytes == artifact.path.stat().st_size
    assert {"python", "torch", "sqa_fx", "onnx", "onnxscript", "onnxruntime"} <= said.versions.keys()
    assert said.versions["torch"] == torch.__version__ and said.versions["sqa_fx"] == sqa_fx.__version__
    assert said.notes == ()


def test_the_check_is_told(artifact: Artifact) -> None:
    said = artifact.sidecar.validation
    assert said is not None
    assert (said["checked"], said["passed"], said["failed"]) == (True, True, 0)
    assert said["labels"] == ["min", "opt", "max", "odd"] and said["compared"] == 4
    assert 0 < said["error"] <= said["tolerance"] < 1e-3
    assert said["reference_dtype"] == "float64" and said["notes"] == []


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 64), (2, 37)])
def test_the_file_is_the_module(artifact: Artifact, converted: ConvertedModule, batch: int, length: int) -> None:
    x = example(batch, length)
    with torch.no_grad():
        torch.testing.assert_close(run(artifact.path, x), converted(x), atol=1e-5, rtol=1e-5)


def test_a_changed_file_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    for name in os.listdir(artifact.path.parent):
        (tmp_path / name).write_bytes((artifact.path.parent / name).read_bytes())
    path = tmp_path / artifact.path.name
    Sidecar.read(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"block\.onnx is not the file .* export again"):
        Sidecar.read(path)
    assert Sidecar.read(path, check=False) == artifact.sidecar
    path.unlink()
    with pytest.raises(MissingError, match=r"block\.onnx, which is not beside it"):
        Sidecar.read(path)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"format_of_this": "sqa-fx-artifact", "version": 2}'])
def test_a_broken_sidecar_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.onnx.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.onnx\.json is no sidecar"):
        Sidecar.read(tmp_path / "a.onnx")
    with pytest.raises(MissingError, match=r"b\.onnx has no b\.onnx\.json"):
        Sidecar.read(tmp_path / "b.onnx")


@pytest.mark.parametrize("name", ["large.onnx", "large.bin"])
def test_external_data_comes_along(program: torch.export.ExportedProgram, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    done = sqa_fx.export(program, path, to="onnx", external_data_over=0)
    assert sorted(os.listdir(tmp_path)) == [name, f"{name}.data", f"{name}.json"]
    assert sorted(done.sidecar.files) == [name, f"{name}.data"]
    assert done.bytes == path.stat().st_size + (tmp_path / f"{name}.data").stat().st_size
    Sidecar.read(path)
    run(path, example(2, 11))
    (tmp_path / f"{name}.data").write_bytes(b"other weights")
    with pytest.raises(InputError, match="SHA-256"):
        Sidecar.read(path)


def test_a_module_is_captured_with_its_sizes_free(tmp_path: Path) -> None:
    done = sqa_fx.export(block(), tmp_path / "plain.onnx", args=(example(),), check=False)
    assert done.sidecar.plan is None
    assert done.sidecar.validation == {"checked": False, "reason": "not asked for"}
    assert [isinstance(n, AxisRange) for n in done.sidecar.inputs[0].shape] == [True, True, False]
    with torch.no_grad():
        torch.testing.assert_close(run(done.path, example(3, 11)), block()(example(3, 11)), atol=1e-5, rtol=1e-5)


def test_a_check_of_a_large_range_is_bounded(free: torch.export.ExportedProgram, tmp_path: Path) -> None:
    done = sqa_fx.export(free, tmp_path / "long.onnx", ranges={"x.1": (1, 8, 100_000)})
    said = done.sidecar.validation
    assert said is not None and said["passed"]
    [note] = said["notes"]
    assert note.startswith("checked at ") and note.endswith("not to the end of the range")
    length = done.sidecar.inputs[0].shape[1]
    assert isinstance(length, AxisRange) and length.max == 100_000


# --- precision -------------------------------------------------------------------------------------------------------


def test_precision_casts_a_copy(tmp_path: Path) -> None:
    module = block()
    done = sqa_fx.export(module, tmp_path / "half.onnx", args=(example(),), precision="fp16")
    assert done.sidecar.precision == "float16"
    assert [s.dtype for s in (*done.sidecar.inputs, *done.sidecar.outputs)] == ["torch.float16"] * 2
    assert done.sidecar.validation is not None and done.sidecar.validation["passed"]
    assert next(module.parameters()).dtype == torch.float32
    x = example(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(run(done.path, x.half()).float(), module(x), atol=5e-3, rtol=5e-3)


def test_bfloat16_is_written_and_not_checked(tmp_path: Path) -> None:
    done = sqa_fx.export(block(), tmp_path / "b.onnx", args=(example(),), precision="bf16")
    assert done.sidecar.precision == "bfloat16"
    said = done.sidecar.validation
    assert said is not None and not said["checked"] and "bfloat16" in said["reason"]


def test_precision_comes_before_the_conversion(
    converted: ConvertedModule, program: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"converted in torch\.float32: .*model\.to\(torch\.float16\)"):
        sqa_fx.export(converted, tmp_path / "half.onnx", precision="fp16")
    with pytest.raises(InputError, match=r"cast the module before torch\.export"):
        sqa_fx.export(program, tmp_path / "half.onnx", precision="fp16")
    with pytest.raises(InputError, match="'int8' is not one of fp32, fp16, bf16"):
        sqa_fx.export(converted, tmp_path / "half.onnx", precision="int8")
    assert os.listdir(tmp_path) == []
    sqa_fx.export(converted, tmp_path / "same.onnx", precision="fp32", check=False)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("a.onnx", "onnxx", "format 'onnxx' is not one of onnx, tensorrt, tensorrt-rtx, torch-tensorrt, aoti"),
        ("a.engine", None, "give to='tensorrt' or 'tensorrt-rtx'"),
        ("a.plan", None, "give to='tensorrt' or 'tensorrt-rtx'"),
        ("a.bin", None, r"does not say the format \(known: .onnx, .pt2, .ep\): give to= one of onnx, tensorrt"),
        ("a.pt2", "onnx", "suffix .pt2 belongs to aoti, not to onnx; use .onnx"),
        ("a.onnx", "aoti", "suffix .onnx belongs to onnx, not to aoti; use .pt2"),
        ("a.onnx", "tensorrt-rtx", "not to tensorrt-rtx; use .engine"),
        ("a.onnx", "torch-tensorrt", "not to torch-tensorrt; use .ep"),
        ("no/a.onnx", None, "no is not a directory; create it first"),
        (".", "onnx", "is a directory; give the path of the file"),
    ],
)
def test_formats_that_do_not_fit(
    converted: ConvertedModule, tmp_path: Path, name: str, to: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sqa_fx.export(converted, tmp_path / name, to=to)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"y.1": (1, 2, 3)}, r"range 'y\.1': no such axis; there are x\.0, x\.1, x\.2"),
        ({"x.0": (1, 2, 3)}, "this axis has the fixed size 2; export with dynamic shapes"),
        ({"x.2": (24, 24, 24)}, "this axis has the fixed size 24; export with dynamic shapes"),
        ({"x.1": (9, 4, 16)}, "give min, opt and max, in order and positive"),
        ({"x.1": (0, 4, 16)}, "give min, opt and max, in order and positive"),
        ({"x.1": (4, 16)}, "give min, opt and max, in order and positive"),
        ({"x.1": (4, 16, 101)}, r"4\.\.101, but the exported program takes 3\.\.100; export with other dynamic_shapes"),
        ({"x.1": (2, 16, 64)}, r"2\.\.64, but the exported program takes 3\.\.100"),
    ],
)
def test_ranges_that_do_not_fit(
    program: torch.export.ExportedProgram,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranges: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(to_onnx, "export_onnx", None)  # they are told before the work
    with pytest.raises(InputError, match=message):
        sqa_fx.export(program, tmp_path / "a.onnx", ranges=ranges)
    assert os.listdir(tmp_path) == []


def test_two_ranges_of_one_symbol(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    shapes = {"x": {0: AUTO}, "y": {0: AUTO}}
    program = torch.export.export(Two(), (torch.randn(5, 3), torch.randn(5, 3)), dynamic_shapes=shapes)
    with pytest.raises(InputError, match=r"range 'y\.0' is \[1, 2, 4\], but the same size .* was given \(1, 2, 3\)"):
        sqa_fx.export(program, tmp_path / "a.onnx", ranges={"x.0": (1, 2, 3), "y.0": (1, 2, 4)})
    done = sqa_fx.export(program, tmp_path / "a.onnx", ranges={"x.0": (1, 2, 3), "y.0": (1, 2, 3)})
    assert done.sidecar.inputs[0].shape == done.sidecar.inputs[1].shape


def test_options_of_another_format(program: torch.export.ExportedProgram, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"onnx has no option compute_capability; it has check, external_data_over"):
        sqa_fx.export(program, tmp_path / "a.onnx", compute_capability="sm_89")
    with pytest.raises(InputError, match=r"aoti has no option strict; it has options"):
        sqa_fx.export(program, tmp_path / "a.pt2", strict=True)
    with pytest.raises(InputError, match=r"tensorrt-rtx has no option output_names; it has compute_capability"):
        sqa_fx.export(program, tmp_path / "a.engine", to="tensorrt-rtx", output_names=["y"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "attention", "opset", "message"),
    [
        ("a.onnx", "fast", 24, "attention 'fast' is not one of auto, causal, masked, plain"),
        ("a.onnx", "causal", 18, "attention 'causal' needs opset 23 or later, not 18; use 'plain'"),
        ("a.pt2", "plain", 24, "attention belongs to onnx, tensorrt, tensorrt-rtx: aoti keeps attention as it is"),
    ],
)
def test_attention_that_does_not_fit(
    program: torch.export.ExportedProgram, tmp_path: Path, name: str, attention: Any, opset: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sqa_fx.export(program, tmp_path / name, attention=attention, opset=opset)
    assert os.listdir(tmp_path) == []


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Block says nothing of its inputs: pass args= or kwargs="):
        sqa_fx.export(block(), tmp_path / "a.onnx")
    with pytest.raises(InputError, match=r"eval\(\)"):
        sqa_fx.export(nn.Sequential(block(), nn.Dropout(0.5)).train(), tmp_path / "a.onnx", args=(example(),))
    assert os.listdir(tmp_path) == []


# --- the check decides -----------------------------------------------------------------------------------------------


def lose_causal(monkeypatch: pytest.MonkeyPatch, *forms: str) -> None:
    """Make the ONNX of these forms attend to the future."""
    real = sdpa_translation.translate_sdpa

    def wrong(*operands: Any, form: str, is_causal: bool, **others: Any) -> Any:
        return real(*operands, form=form, is_causal=is_causal and form not in forms, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(sdpa_translation, "translate_sdpa", wrong)


def test_the_next_form_is_taken(
    free: torch.export.ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_causal(monkeypatch, "auto")
    done = sqa_fx.export(free, tmp_path / "a.onnx", ranges=RANGES)
    assert done.sidecar.attention == ("1 Softmax nodes",)
    [note] = done.sidecar.notes
    assert note.startswith("attention 'auto' is wrong here (opt: ")
    assert done.sidecar == Sidecar.read(done.path)
    assert done.sidecar.validation is not None and done.sidecar.validation["passed"]
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "a.onnx.json"]
    x = example(3, 11)
    with torch.no_grad():
        torch.testing.assert_close(run(done.path, x), block()(x), atol=1e-5, rtol=1e-5)


def test_without_a_form_that_is_right_nothing_is_written(
    free: torch.export.ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_causal(monkeypatch, "auto", "plain", "causal")
    with pytest.raises(VerifyError, match=r"not written: attention 'causal' is wrong here \(opt: [^;]*$"):
        sqa_fx.export(free, tmp_path / "a.onnx", ranges=RANGES, attention="causal")
    assert os.listdir(tmp_path) == []
    (tmp_path / "a.onnx").write_text("mine")
    with pytest.raises(VerifyError, match=r"a\.onnx was not written: attention 'auto' is wrong .*; attention 'plain'"):
        sqa_fx.export(free, tmp_path / "a.onnx", ranges=RANGES, overwrite=True)
    assert os.listdir(tmp_path) == ["a.onnx"] and (tmp_path / "a.onnx").read_text() == "mine"


def test_a_form_that_is_asked_for(free: torch.export.ExportedProgram, tmp_path: Path) -> None:
    done = sqa_fx.export(free, tmp_path / "a.onnx", attention="plain")
    assert done.sidecar.attention == ("1 Softmax nodes",) and done.sidecar.notes == ()
    assert done.sidecar.validation is not None and done.sidecar.validation["passed"]


def test_a_failing_exporter_leaves_nothing(
    free: torch.export.ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any, path: Path, external_data_over: int) -> None:
        path.write_bytes(b"half of it")
        raise RuntimeError("out of order")

    monkeypatch.setattr(to_onnx, "_save", fail)
    with pytest.raises(OnnxExportError, match="out of order"):
        sqa_fx.export(free, tmp_path / "a.onnx", fallback_opset=None)
    assert os.listdir(tmp_path) == []


def test_overwrite(free: torch.export.ExportedProgram, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    for name in ("a.onnx", "a.onnx.json", "a.onnx.data"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(InputError, match=rf"{name} exists already; pass overwrite=True"):
            sqa_fx.export(free, path)
        assert (tmp_path / name).read_text() == "mine"
        if name != "a.onnx.data":
            (tmp_path / name).unlink()
    path.write_text("mine")
    done = sqa_fx.export(free, path, overwrite=True, check=False)
    assert Sidecar.read(path) == done.sidecar
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "a.onnx.json"]  # the data belonged to what was replaced
