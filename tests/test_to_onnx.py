"""export_onnx: names, paths, the fallback, external data, and nothing left behind by a failure."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqa_fx.errors import CaptureError, InputError, MissingError
from sqa_fx.exporters.sdpa_translation import translation_table
from sqa_fx.exporters.to_onnx import OnnxExportError, export_onnx

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

AUTO = torch.export.Dim.AUTO


class Encoder(nn.Module):
    """Grouped-query attention over ``[batch, seq, 19]`` that answers as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(19, 6 * 7), nn.Linear(19, 2 * 2 * 7), nn.Linear(6 * 7, 19)
        self.drop = nn.Dropout(0.5)

    def forward(self, hidden: Tensor, keep: Tensor | None = None, *, scale: bool = True) -> dict[str, Any]:
        b, s, _ = hidden.shape
        q = self.q(hidden).view(b, s, 6, 7).transpose(1, 2)
        k, v = self.kv(hidden).view(b, s, 2, 2, 7).permute(2, 0, 3, 1, 4)
        mask = None if keep is None else keep[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        y = self.drop(self.o(y.transpose(1, 2).reshape(b, s, 42)))
        return {"last_hidden_state": y, "hidden_states": (hidden, y * 2 if scale else y), "nothing": None}


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


def example(b: int = 3, s: int = 11) -> dict[str, Tensor]:
    return {"hidden": torch.randn(b, s, 19), "keep": torch.arange(s).expand(b, s) < s - 2}


DYNAMIC = {"hidden": {0: AUTO, 1: AUTO}, "keep": {0: AUTO, 1: AUTO}}


def run(path: Path, inputs: dict[str, Tensor]) -> list[Any]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: value.numpy() for name, value in inputs.items()}))


def break_opset(monkeypatch: pytest.MonkeyPatch, *broken: int) -> None:
    """Make the translation of attention fail at these opsets, as an unsupported operator would."""
    real = translation_table

    def table(opset: int, form: Any) -> Any:
        def fail(*_: Any, **__: Any) -> Any:
            raise NotImplementedError("attention is out of order")

        return dict.fromkeys(real(opset, form), fail) if opset in broken else real(opset, form)

    monkeypatch.setattr("sqa_fx.exporters.to_onnx.translation_table", table)


@pytest.mark.parametrize("opset", [18, 24])
def test_exports_and_runs_at_another_shape(tmp_path: Path, opset: int, capfd: pytest.CaptureFixture[str]) -> None:
    model = encoder()
    artifact = export_onnx(
        model, tmp_path / "model.onnx", kwargs=example(), dynamic_shapes=DYNAMIC, opset=opset, fallback_opset=None
    )
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    assert artifact.opset == opset
    assert artifact.notes == ()
    assert artifact.attention_ops == ({"Attention": 1} if opset == 24 else {"Softmax": 1})
    assert artifact.external_data is None
    assert artifact.bytes == artifact.path.stat().st_size
    assert os.listdir(tmp_path) == ["model.onnx"]

    assert artifact.input_names == ("hidden", "keep")
    assert artifact.output_names == ("last_hidden_state", "hidden_states_0", "hidden_states_1")
    assert set(artifact.dynamic_axes["hidden"]) == {0, 1}
    assert artifact.dynamic_axes["hidden"] == artifact.dynamic_axes["keep"]

    inputs = example(2, 5)
    want = model(**inputs)
    got = run(artifact.path, inputs)
    for have, tensor in zip(got, [want["last_hidden_state"], *want["hidden_states"]], strict=True):
        torch.testing.assert_close(torch.from_numpy(have), tensor, atol=1e-5, rtol=1e-5)


def test_exported_program_and_own_names(tmp_path: Path) -> None:
    program = torch.export.export(encoder(), (), kwargs=example(), dynamic_shapes=DYNAMIC)
    names = ["one", "two", "three"]
    artifact = export_onnx(program, tmp_path / "m.onnx", input_names=["x", "mask"], output_names=names)
    assert artifact.input_names == ("x", "mask")
    assert artifact.output_names == tuple(names)
    with pytest.raises(InputError, match="3 different names"):
        export_onnx(program, tmp_path / "n.onnx", output_names=["one", "two"])
    with pytest.raises(InputError, match="dynamic_shapes"):
        export_onnx(program, tmp_path / "n.onnx", dynamic_shapes=DYNAMIC)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_names_of_plain_outputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, output: Tensor, pair: tuple[Tensor, Tensor]) -> Any:
            return output + pair[0], pair[1] * 2

    class One(nn.Module):
        def forward(self, output: Tensor) -> Tensor:
            return output + 1

    x = torch.randn(3)
    two = export_onnx(Two(), tmp_path / "2.onnx", args=(x, (x, x)))
    assert two.input_names == ("output", "pair_0", "pair_1")
    assert two.output_names == ("output_0", "output_1")
    assert export_onnx(One(), tmp_path / "1.onnx", args=(x,)).output_names == ("output_out",)


def test_axis_names_and_specialised_axes_are_reported(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1, 5, 7) + torch.ones(x.shape[0], 5, 7)

    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch, 1: AUTO}}
    artifact = export_onnx(Fixed(), tmp_path / "m.onnx", args=(torch.randn(3, 5, 7),), dynamic_shapes=shapes)
    assert artifact.dynamic_axes["x"] == {0: "batch"}
    assert artifact.notes == ("input x axis 1 was to be dynamic, but the model fixes it at 5",)
    session = ort.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 5, 7]


def test_fallback_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_opset(monkeypatch, 24)
    artifact = export_onnx(encoder(), tmp_path / "m.onnx", kwargs=example(), dynamic_shapes=DYNAMIC)
    assert artifact.opset == 18
    [note] = artifact.notes
    assert "opset 24 failed" in note and "attention is out of order" in note and "opset 18" in note
    run(artifact.path, example(2, 5))


def test_a_model_that_fails_the_check_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    real = onnx.checker.check_model

    def check(path: str, **options: Any) -> None:
        if onnx.load(path).opset_import[0].version == 24:
            raise onnx.checker.ValidationError("not in order")
        real(path, **options)

    monkeypatch.setattr(onnx.checker, "check_model", check)
    artifact = export_onnx(encoder(), tmp_path / "m.onnx", kwargs=example())
    assert artifact.opset == 18 and "not in order" in artifact.notes[0]


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None) -> None:
    break_opset(monkeypatch, 18, 24)
    path = tmp_path / "m.onnx"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(OnnxExportError) as caught:
        export_onnx(encoder(), path, kwargs=example(), overwrite=True)
    assert "opset 24 failed" in str(caught.value) and "opset 18 failed" in str(caught.value)
    assert os.listdir(tmp_path) == ([] if before is None else ["m.onnx"])
    assert before is None or path.read_bytes() == before


def test_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    def full(model: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(InputError, match="No space left"):
        export_onnx(encoder(), tmp_path / "m.onnx", kwargs=example())
    assert os.listdir(tmp_path) == []


def test_external_data(tmp_path: Path) -> None:
    path, options = tmp_path / "m.onnx", {"kwargs": example(), "dynamic_shapes": DYNAMIC}
    artifact = export_onnx(encoder(), path, external_data_over=1000, **options)  # type: ignore[arg-type]
    data = tmp_path / "m.onnx.data"
    assert artifact.external_data == data and data.stat().st_size > 1000
    assert artifact.bytes == path.stat().st_size + data.stat().st_size
    inputs = example(2, 5)
    want = encoder()(**inputs)["last_hidden_state"]
    torch.testing.assert_close(torch.from_numpy(run(path, inputs)[0]), want, atol=1e-5, rtol=1e-5)

    # Moved together, the pair still works: the location inside is relative.
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    path.rename(moved / path.name)
    with pytest.raises(InputError, match=r"m\.onnx\.data exists"):
        export_onnx(encoder(), path, **options)  # type: ignore[arg-type]
    data.rename(moved / data.name)
    run(moved / path.name, inputs)

    # An overwrite that needs no external data takes the old file away.
    again = export_onnx(encoder(), moved / path.name, overwrite=True, **options)  # type: ignore[arg-type]
    assert again.external_data is None
    assert os.listdir(moved) == ["m.onnx"]


def test_replaced_data_comes_back_when_the_move_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    path.write_bytes(b"old model")
    data.write_bytes(b"old data")
    real = os.replace

    def replace(source: Any, destination: Any) -> None:
        if Path(destination) == path:
            raise PermissionError(13, "not yours")
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(InputError, match="not yours"):
        export_onnx(encoder(), path, kwargs=example(), overwrite=True, external_data_over=1000)
    assert (path.read_bytes(), data.read_bytes()) == (b"old model", b"old data")
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]


def test_bad_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = encoder(), example()
    existing = tmp_path / "there.onnx"
    existing.write_bytes(b"mine")
    with pytest.raises(InputError, match="overwrite=True"):
        export_onnx(model, existing, kwargs=inputs)
    assert existing.read_bytes() == b"mine"
    with pytest.raises(InputError, match="create it"):
        export_onnx(model, tmp_path / "no" / "m.onnx", kwargs=inputs)
    with pytest.raises(InputError, match="is a directory"):
        export_onnx(model, tmp_path, kwargs=inputs)

    def refuse(**_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        export_onnx(model, tmp_path / "m.onnx", kwargs=inputs)
    assert os.listdir(tmp_path) == ["there.onnx"]


def test_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.eval\(\)"):
        export_onnx(encoder().train(), tmp_path / "m.onnx", kwargs=example())


def test_capture_failure_says_why(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="Encoder"):
        export_onnx(encoder(), tmp_path / "m.onnx", kwargs={"no_such_argument": torch.randn(3)})
    assert os.listdir(tmp_path) == []


def test_old_opset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="18"):
        export_onnx(encoder(), tmp_path / "m.onnx", kwargs=example(), opset=17)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingError, match=f"{package}.*pip install"):
        export_onnx(encoder(), tmp_path / "m.onnx", kwargs=example())
