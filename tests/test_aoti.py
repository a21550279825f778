"""export_aoti and AotiRunner: right at other sizes, and refusing what compiled code would not notice."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sqa_fx
from sqa_fx import ConvertedModule
from sqa_fx.aoti_runner import AotiRunner
from sqa_fx.cli import main
from sqa_fx.errors import InputError, MissingError
from sqa_fx.exporters.sidecar import AxisRange, Sidecar
from sqa_fx.exporters.size_conditions import check_conditions, size_conditions
from sqa_fx.exporters.to_aoti import AotiExportError, attention_forms, export_aoti
from sqa_fx.runners import named_outputs
from sqa_fx.validate import validate

AUTO = torch.export.Dim.AUTO


class Encoder(nn.Module):
    """Attention over ``[batch, seq, 19]`` with 6 heads; answers with None and a number among the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(19, 42), nn.Linear(19, 84), nn.Linear(42, 19)

    def forward(self, hidden: Tensor, keep: Tensor | None = None) -> dict[str, Any]:
        b, s, _ = hidden.shape
        q = self.q(hidden).view(b, s, 6, 7).transpose(1, 2)
        k, v = self.kv(hidden).view(b, s, 2, 6, 7).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if keep is None else keep[:, None, None, :])
        y = self.o(y.transpose(1, 2).reshape(b, s, 42))
        return {"nothing": None, "last_hidden_state": y, "number": 3, "states": (hidden, y * 2)}


def example(b: int = 3, s: int = 11) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(b * 1000 + s)
    hidden = torch.randn(b, s, 19, generator=generator)
    return {"hidden": hidden, "keep": torch.arange(s).expand(b, s) < max(1, s - 2)}


def captured(module: nn.Module, *args: Any, **shapes: Any) -> torch.export.ExportedProgram:
    return torch.export.export(module, args, dynamic_shapes=shapes or None, strict=False)


def has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="AOTInductor needs a C++ compiler, and there is none")


@pytest.fixture(scope="module")
def converted() -> ConvertedModule:
    torch.manual_seed(0)
    done = sqa_fx.convert(Encoder().eval(), hq=4, hkv=2, kwargs=example())
    assert isinstance(done, ConvertedModule)
    return done


@pytest.fixture(scope="module")
def program(converted: ConvertedModule) -> torch.export.ExportedProgram:
    return converted.exported_program()


@pytest.fixture(scope="module")
def package(
    tmp_path_factory: pytest.TempPathFactory, program: torch.export.ExportedProgram, converted: ConvertedModule
) -> Path:
    if not has_compiler():
        pytest.skip("AOTInductor needs a C++ compiler, and there is none")
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    export_aoti(program, path, ranges={"hidden.1": (1, 11, 64)}, plan=converted.plan, notes=["a note"])
    return path


@pytest.fixture(scope="module")
def runner(package: Path) -> AotiRunner:
    return AotiRunner(package)


@needs_compiler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Encoder().eval().to("cuda", dtype)

    def inputs(b: int, s: int) -> dict[str, Tensor]:
        return {k: v.cuda().to(dtype) if v.is_floating_point() else v.cuda() for k, v in example(b, s).items()}

    done = sqa_fx.convert(model, hq=4, hkv=2, kwargs=inputs(3, 11))
    assert isinstance(done, ConvertedModule)
    sidecar = export_aoti(done.exported_program(), tmp_path / "model.pt2")
    major, minor = torch.cuda.get_device_capability()
    assert sidecar.built_for == f"sm_{major}{minor}"
    runner = AotiRunner(tmp_path / "model.pt2")
    assert runner.dtype == dtype
    report = validate(done, [runner], [((), inputs(b, s)) for b, s in [(3, 11), (1, 1), (2, 1), (1, 13), (5, 257)]])
    assert report.passed, report.table()
    on_cpu = runner.run((), {k: v.cpu() for k, v in inputs(3, 11).items()})
    assert all(t.device.type == "cuda" for t in on_cpu)
    torch.testing.assert_close(on_cpu[0], runner.run((), inputs(3, 11))[0])
    with pytest.raises(InputError, match="must be equal"):
        runner.run((), {**inputs(3, 11), "keep": inputs(3, 12)["keep"]})


@pytest.mark.parametrize(("b", "s"), [(3, 11), (1, 1), (2, 1), (1, 13), (5, 64)])
def test_gives_what_eager_gives(runner: AotiRunner, converted: ConvertedModule, b: int, s: int) -> None:
    inputs = example(b, s)
    with torch.no_grad():
        expected = [t for _, t in named_outputs(converted(**inputs))]
    for args, kwargs in [((), inputs), (tuple(inputs.values()), {}), ((inputs["keep"],), {"hidden": inputs["hidden"]})]:
        got = runner.run(args, kwargs)
        assert len(got) == len(expected) == 3
        for have, want in zip(got, expected, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


def test_takes_tensors_in_any_layout(runner: AotiRunner, converted: ConvertedModule) -> None:
    inputs = example()
    want = runner.run((), inputs)
    hidden = inputs["hidden"].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    shifted = torch.cat([torch.zeros(1), inputs["hidden"].flatten()])[1:].view(3, 11, 19)
    assert not hidden.is_contiguous() and shifted.data_ptr() % 16
    for other in (hidden, shifted):
        for a, b in zip(runner.run((), {**inputs, "hidden": other}), want, strict=True):
            torch.testing.assert_close(a, b)


def test_validates(runner: AotiRunner, converted: ConvertedModule) -> None:
    report = validate(converted, [runner], [((), example()), ((), example(2, 17))])
    assert report.passed, report.table()
    assert {c.candidate for c in report.comparisons} == {"aoti"}
    assert (runner.kind, runner.dtype) == ("aoti", torch.float32)


def test_sidecar_says_what_it_is(package: Path, converted: ConvertedModule) -> None:
    assert sorted(os.listdir(package.parent)) == ["model.pt2", "model.pt2.json"]
    sidecar = Sidecar.read(package)
    hidden, keep = sidecar.inputs
    assert (hidden.name, keep.name, keep.dtype) == ("hidden", "keep", "torch.bool")
    batch, length, width = hidden.shape
    assert isinstance(batch, AxisRange) and (batch.min, batch.opt, batch.max) == (1, 3, None)
    assert isinstance(length, AxisRange) and (length.min, length.opt, length.max) == (1, 11, 64)
    assert width == 19
    assert [s.name for s in sidecar.outputs] == ["last_hidden_state", "states_0", "states_1"]
    assert (sidecar.format, sidecar.precision, sidecar.built_for) == ("aoti", "float32", "cpu")
    assert sidecar.attention == ("1 scaled_dot_product_attention (1 grouped with mask)",)
    assert sidecar.plan == converted.plan.to_json()
    assert sidecar.notes == ("a note",)
    assert sidecar.versions["torch"] == torch.__version__


def long(s: int) -> dict[str, Tensor]:
    return example(3, s)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: long(65), r"in 1\.\.64"),
        (lambda x: long(0), r"in 1\.\.64"),
        (lambda x: example(0), "in 1.."),
        (lambda x: {**x, "keep": example(3, 12)["keep"]}, "must be equal"),
        (lambda x: {**x, "keep": example(2, 11)["keep"]}, "must be equal"),
        (lambda x: {**x, "hidden": x["hidden"].double()}, r"torch\.float32, but got torch\.float64"),
        (lambda x: {**x, "hidden": x["hidden"][..., :18]}, "has size 19 at axis 2"),
        (lambda x: {**x, "hidden": x["hidden"][0]}, "has 3 axes"),
        (lambda x: {"hidden": x["hidden"]}, "takes 2 tensors"),
    ],
)
def test_refuses_other_inputs(runner: AotiRunner, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runner.run((), change(example()))


def test_an_error_of_the_compiled_code_is_told(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops:
        def run(self, _: list[Tensor]) -> list[Tensor]:
            raise RuntimeError("index out of bounds: tmp7 < ks2\nframe #0")

    runner = AotiRunner(package)
    monkeypatch.setattr(runner, "_loader", Stops())
    with pytest.raises(InputError, match=r"stops on hidden \[3, 11, 19\], keep \[3, 11\]: .*tmp7 < ks2; compare"):
        runner.run((), example())


@pytest.fixture
def copied(package: Path, tmp_path: Path) -> Path:
    for file in package.parent.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path / package.name


def edit_sidecar(path: Path, **changes: Any) -> None:
    file = Path(f"{path}.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_changed_package_is_refused(copied: Path) -> None:
    with copied.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(InputError, match="SHA-256"):
        AotiRunner(copied)


def test_missing_files_are_named(copied: Path) -> None:
    with pytest.raises(MissingError, match="no AOTInductor package"):
        AotiRunner(copied.with_name("other.pt2"))
    Path(f"{copied}.json").unlink()
    with pytest.raises(MissingError, match=r"no model\.pt2\.json"):
        AotiRunner(copied)


def test_a_package_for_a_gpu_needs_that_gpu(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_sidecar(copied, built_for="sm_90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError, match="built for a GPU of sm_90"):
        AotiRunner(copied)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(InputError, match="Some GPU is sm_80; export again"):
        AotiRunner(copied)


@pytest.mark.parametrize("built_on", ["aarch64 DEFAULT", "x86_64 AVX1024"])
def test_a_package_for_another_processor_is_refused(copied: Path, built_on: str) -> None:
    edit_sidecar(copied, versions={"machine": built_on})
    with pytest.raises(InputError, match=f"processor with {built_on}"):
        AotiRunner(copied)


def test_another_package_is_refused(copied: Path) -> None:
    copied.write_bytes(b"no archive")
    Sidecar(format="aoti", inputs=(), outputs=()).write(copied)
    with pytest.raises(InputError, match="cannot load"):
        AotiRunner(copied)
    Sidecar(format="onnx", inputs=(), outputs=()).write(copied)
    with pytest.raises(InputError, match="format onnx"):
        AotiRunner(copied)


def test_bad_paths(tmp_path: Path, program: torch.export.ExportedProgram) -> None:
    existing = tmp_path / "there.pt2"
    existing.write_bytes(b"mine")
    Path(f"{tmp_path / 'half.pt2'}.json").write_text("mine")
    for name, message in [
        ("there.pt2", "overwrite=True"),
        ("half.pt2", r"half\.pt2\.json exists"),
        ("model.onnx", r"end in \.pt2"),
        ("no/model.pt2", "create it"),
        ("", "is a directory"),
    ]:
        with pytest.raises(InputError, match=message):
            export_aoti(program, tmp_path / name)
    assert existing.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["half.pt2.json", "there.pt2"]


@needs_compiler
@pytest.mark.parametrize("before", [None, b"mine"])
def test_a_failed_compilation_leaves_nothing(
    tmp_path: Path, program: torch.export.ExportedProgram, monkeypatch: pytest.MonkeyPatch, before: bytes | None
) -> None:
    import torch._inductor

    def half(_: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        Path(package_path).write_bytes(b"half")
        raise RuntimeError("the compiler ran out of registers")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", half)
    path = tmp_path / "model.pt2"
    if before:
        path.write_bytes(before)
    with pytest.raises(AotiExportError, match="out of registers"):
        export_aoti(program, path, overwrite=True)
    assert os.listdir(tmp_path) == (["model.pt2"] if before else [])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("option", ["no_such_option", "aot_inductor.output_path"])
def test_other_options_are_refused(tmp_path: Path, program: torch.export.ExportedProgram, option: str) -> None:
    with pytest.raises(InputError, match=option):
        export_aoti(program, tmp_path / "model.pt2", options={option: "there"})
    assert os.listdir(tmp_path) == []


def test_no_compiler_is_missing(tmp_path: Path, program: torch.export.ExportedProgram) -> None:
    from torch._inductor import config

    # Not by monkeypatch, whose undoing deletes what stands in a table of defaults.
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(MissingError, match="CXX"):
        export_aoti(program, tmp_path / "model.pt2")
    assert os.listdir(tmp_path) == []


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.25)


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.BatchNorm1d(5), Drops()])
def test_training_mode_is_refused(tmp_path: Path, module: nn.Module) -> None:
    x = torch.randn(2, 5, 7) if not isinstance(module, Drops) else torch.randn(2, 3, 5, 7)
    with pytest.raises(InputError, match=r"model\.eval\(\)"):
        export_aoti(captured(module.train(), x), tmp_path / "model.pt2")


def test_other_memory_order_is_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    with pytest.raises(InputError, match=r"x\.contiguous\(\)|input\.contiguous\(\)"):
        export_aoti(captured(nn.Conv2d(3, 4, 1), x), tmp_path / "model.pt2")


def test_ranges_wider_than_the_program_are_refused(tmp_path: Path) -> None:
    limited = captured(nn.Linear(5, 7), torch.randn(4, 5), input={0: torch.export.Dim("n", min=3, max=8)})
    for given in [(1, 4, 8), (3, 4, 9)]:
        with pytest.raises(InputError, match=r"takes 3\.\.8"):
            export_aoti(limited, tmp_path / "model.pt2", ranges={"input.0": given})


class Patches(nn.Module):
    """Sums patches of 4 of ``[batch, seq, 5]`` in a dict: the length must be divisible."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        b, s, _ = inputs["x"].shape
        return inputs["x"].view(b, s // 4, 4, 5).sum(2) + inputs["y"][:, :1]


def test_conditions_on_sizes_are_checked() -> None:
    tensors = {"x": torch.randn(3, 12, 5), "y": torch.randn(3, 6, 5)}
    shapes = {"x": {1: AUTO}, "y": {1: AUTO}}
    conditions, unsaid = size_conditions(captured(Patches(), tensors, inputs=shapes))
    assert conditions and not unsaid
    check_conditions(conditions, {"inputs_x": torch.randn(3, 20, 5), "inputs_y": tensors["y"]})
    with pytest.raises(InputError, match=r"size\('inputs_x', 1\).* fails for inputs_x \[3, 13, 5\]"):
        check_conditions(conditions, {"inputs_x": torch.randn(3, 13, 5), "inputs_y": tensors["y"]})


def test_equal_symbols_are_no_condition(program: torch.export.ExportedProgram) -> None:
    assert size_conditions(program) == ((), ())


class Forms(nn.Module):
    def forward(self, q: Tensor, mask: Tensor) -> Tensor:
        sdpa = F.scaled_dot_product_attention
        q = sdpa(q, q, q, is_causal=True) + sdpa(q, q, q, mask) + sdpa(q, q, q, is_causal=True)
        return torch.softmax(q @ q.mT, -1) @ q


def test_attention_forms() -> None:
    graph = captured(Forms(), torch.randn(2, 3, 5, 7), torch.randn(5, 5)).graph
    assert attention_forms(graph) == ["3 scaled_dot_product_attention (2 causal without mask, 1 with mask)"]
    assert attention_forms(captured(nn.Linear(3, 5), torch.randn(2, 3)).graph) == []


@needs_compiler
def test_validate_on_the_command_line(
    package: Path, converted: ConvertedModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted.save(tmp_path / "saved")
    assert main(["validate", str(tmp_path / "saved"), str(package)]) == 0
    said = capsys.readouterr().out
    assert all(f"{package} " in said and which in said for which in ("min 1x", "opt 3x", "odd "))
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"")
    assert main(["validate", str(tmp_path / "saved"), str(engine)]) == 2
    assert "model.engine.json" in capsys.readouterr().err
