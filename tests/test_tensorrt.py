"""TensorRT-RTX engines built without a GPU: attention kernels, profiles, refusals, and what the sidecar says."""

from __future__ import annotations

import importlib
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import onnx as onnx_library
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sqa_fx
from sqa_fx import Artifact, ConvertedModule
from sqa_fx.cli import main
from sqa_fx.errors import InputError, MissingError
from sqa_fx.export_check import check_export
from sqa_fx.exporters import tensorrt_library, to_tensorrt
from sqa_fx.exporters.ranges import input_specs
from sqa_fx.exporters.sidecar import AxisRange, Sidecar, TensorSpec
from sqa_fx.exporters.tensorrt_build import EngineBuildError, build_engine
from sqa_fx.exporters.tensorrt_library import canonical_capability, library
from sqa_fx.exporters.to_onnx import export_onnx
from sqa_fx.exporters.to_tensorrt import export_tensorrt
from sqa_fx.open_artifact import open_artifact
from sqa_fx.tensorrt_runner import TensorRtRunner

FLAVOUR = "tensorrt-rtx"
RANGES = {"x.0": (1, 2, 3), "x.1": (1, 16, 64)}
AUTO = torch.export.Dim.AUTO
EXTRAS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]


def _missing() -> str | None:
    try:
        library(FLAVOUR)
    except MissingError as error:
        return str(error)
    return None


MISSING = _missing()
needs_library = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


class Block(nn.Module):
    """Causal attention over ``[batch, seq, 64]`` with 4 heads of size 16."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


def captured(module: nn.Module, dtype: torch.dtype) -> torch.export.ExportedProgram:
    x = torch.randn(2, 5, 64, dtype=dtype)
    return torch.export.export(module.eval().to(dtype), (x,), dynamic_shapes={"x": {0: AUTO, 1: AUTO}})


@pytest.fixture(scope="module")
def half() -> torch.export.ExportedProgram:
    torch.manual_seed(3)
    return captured(Block(), torch.float16)


@pytest.fixture(scope="module")
def single() -> torch.export.ExportedProgram:
    torch.manual_seed(3)
    return captured(Block(), torch.float32)


@pytest.fixture(scope="module")
def onnx(half: torch.export.ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "block.onnx"
    export_onnx(half, path, form="causal")
    return path


@pytest.fixture(scope="module")
def converted() -> ConvertedModule:
    torch.manual_seed(3)
    module = sqa_fx.convert(Block().eval().half(), hq=2, hkv=1, args=(torch.randn(2, 5, 64).half(),))
    assert isinstance(module, ConvertedModule)
    return module


@pytest.fixture(scope="module")
def artifact(converted: ConvertedModule, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("engine") / "block.engine"
    cache = path.with_name("kernels.cache")
    return sqa_fx.export(converted, path, to=FLAVOUR, ranges=RANGES, compute_capability="SM89", timing_cache=cache)


# --- an engine of a converted module ---------------------------------------------------------------------------------


@needs_library
def test_the_sidecar_of_an_engine(artifact: Artifact, converted: ConvertedModule) -> None:
    said = Sidecar.read(artifact.path)
    assert said == artifact.sidecar
    assert (said.format, said.built_for, said.opset, said.precision) == (FLAVOUR, "sm_89", 24, "float16")
    assert said.plan == converted.plan.to_json()
    assert said.attention[0].startswith("1 attentions, form 'causal' (1 causal): one fused kernel each (")
    [x] = said.inputs
    assert [(n.min, n.opt, n.max) for n in x.shape if isinstance(n, AxisRange)] == list(RANGES.values())
    assert list(said.files) == ["block.engine"] and artifact.bytes == artifact.path.stat().st_size > 1000
    assert said.versions["torch"] == torch.__version__
    assert said.versions[library(FLAVOUR).__name__] == library(FLAVOUR).__version__


@needs_library
@needs_no_gpu
def test_an_engine_is_not_checked_without_a_gpu(artifact: Artifact) -> None:
    assert artifact.sidecar.validation == {
        "checked": False,
        "reason": "block.engine runs on a GPU of sm_89, and there is no GPU here",
    }


@needs_library
def test_the_timing_cache_is_written(artifact: Artifact) -> None:
    assert sorted(os.listdir(artifact.path.parent)) == ["block.engine", "block.engine.json", "kernels.cache"]
    assert artifact.path.with_name("kernels.cache").stat().st_size > 0


@needs_library
def test_the_timing_cache_is_read(
    half: torch.export.ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bytes | None] = []

    def build(*operands: Any, timing_cache: bytes | None, **others: Any) -> Any:
        given.append(timing_cache)
        raise EngineBuildError("far enough")

    monkeypatch.setattr(to_tensorrt, "build_engine", build)
    monkeypatch.setattr(to_tensorrt, "export_onnx", lambda *_, **__: None)
    (tmp_path / "kernels.cache").write_bytes(b"from before")
    settings: dict[str, Any] = {"flavour": FLAVOUR, "ranges": RANGES, "compute_capability": "sm_89"}
    for name in ("kernels.cache", "other.cache"):
        with pytest.raises(EngineBuildError, match="far enough"):
            export_tensorrt(half, tmp_path / "a.engine", timing_cache=tmp_path / name, **settings)
    assert given == [b"from before", None]
    with pytest.raises(InputError, match="no is not a directory; create it first"):
        export_tensorrt(half, tmp_path / "a.engine", timing_cache=tmp_path / "no" / "kernels.cache", **settings)
    assert os.listdir(tmp_path) == ["kernels.cache"]


# --- running it ------------------------------------------------------------------------------------------------------


@needs_library
@needs_no_gpu
def test_without_a_gpu_an_engine_does_not_run(artifact: Artifact) -> None:
    with pytest.raises(MissingError, match=r"block\.engine runs on a GPU of sm_89, and there is no GPU here"):
        TensorRtRunner(artifact.path)
    with pytest.raises(MissingError, match="no GPU here"):
        open_artifact(artifact.path)


def as_if_on(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    for module in ("sqa_fx.exporters.tensorrt_library", "sqa_fx.export_check", "sqa_fx.exporters.to_tensorrt"):
        monkeypatch.setattr(f"{module}.gpu_capability", lambda: capability)


@needs_library
def test_an_engine_runs_on_its_own_gpu_only(
    artifact: Artifact, half: torch.export.ExportedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_on(monkeypatch, "sm_90")
    with pytest.raises(InputError, match=r"was built for sm_89, and this GPU is sm_90: .*; export it again for this"):
        TensorRtRunner(artifact.path)
    # Building for another GPU than the one here is no error: the engine is only not checked.
    report, notes = check_export(artifact.path, half, None, device="cuda")
    assert report is None and notes == ("it is for sm_89, and this GPU is sm_90",)


def test_without_its_sidecar_or_its_file_an_engine_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no engine at .*a\.engine"):
        TensorRtRunner(tmp_path / "a.engine")
    (tmp_path / "a.engine").write_bytes(b"an engine")
    with pytest.raises(MissingError, match=r"has no a\.engine\.json beside it"):
        TensorRtRunner(tmp_path / "a.engine")


# --- how attention is built ------------------------------------------------------------------------------------------


@needs_library
def test_fp32_attention_is_decomposed_and_said_so(single: torch.export.ExportedProgram, tmp_path: Path) -> None:
    said = export_tensorrt(
        single, tmp_path / "a.engine", flavour=FLAVOUR, ranges=RANGES, compute_capability="sm_89", form="causal"
    )
    [attention] = said.attention
    assert attention.startswith("1 attentions, form 'causal' (1 causal): decomposed, since no fused kernel exists")
    assert said.precision == "float32" and (tmp_path / "a.engine").stat().st_size > 1000


@needs_library
@pytest.mark.parametrize(
    ("form", "opset", "attention"),
    [
        ("root", 24, "1 attentions, form 'root' (1 causal): one fused kernel each ("),
        pytest.param(
            *("masked", 24, "1 attentions, form 'masked' (0 causal): one fused kernel each ("), marks=pytest.mark.slow
        ),
        ("plain", 18, "1 attentions as MatMul and Softmax; whether they are fused is TensorRT's choice"),
    ],
)
def test_other_forms_build(
    half: torch.export.ExportedProgram, tmp_path: Path, form: Any, opset: int, attention: str
) -> None:
    said = export_tensorrt(
        half, tmp_path / "a.engine", flavour=FLAVOUR, ranges=RANGES, compute_capability="sm_89", form=form
    )
    assert said.opset == opset and said.attention[0].startswith(attention) and len(said.attention) == 1
    assert sorted(os.listdir(tmp_path)) == ["a.engine", "a.engine.json"]


@pytest.mark.parametrize(("given", "written"), [(None, 16**-0.25), (0.09, 0.3)])
def test_the_root_of_the_scale_where_attention_is_causal(tmp_path: Path, given: float | None, written: float) -> None:
    """For kernels that square it. Attention that is not causal keeps the scale."""

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (4, 16)).transpose(1, 2)
            causal = F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=given)
            return causal + F.scaled_dot_product_attention(q, q, q, scale=given)

    export_onnx(captured(Both(), torch.float16), tmp_path / "a.onnx", form="root")
    found = {}
    for node in onnx_library.load(str(tmp_path / "a.onnx")).graph.node:
        if node.op_type == "Attention":
            attributes = {a.name: onnx_library.helper.get_attribute_value(a) for a in node.attribute}
            found[attributes["is_causal"]] = attributes.get("scale")
    assert found == {1: pytest.approx(written), 0: given if given is None else pytest.approx(given)}


def test_forms_are_tried_where_they_make_a_difference(tmp_path: Path, half: torch.export.ExportedProgram) -> None:
    ways = importlib.import_module("sqa_fx.export")._ways
    whole = captured(Block(causal=False), torch.float16)
    assert ways(FLAVOUR, half) == ("causal", "root", "masked", "plain")
    assert ways(FLAVOUR, whole) == ("causal", "plain")
    assert ways("tensorrt", half) == ("causal", "masked", "plain")
    assert ways("onnx", half) == ways("onnx", whole) == ("auto", "plain") and ways("aoti", half) == ("auto",)
    # Without a check nobody would know whether it is right.
    with pytest.raises(InputError, match="attention 'root' is not one of auto, causal, masked, plain"):
        sqa_fx.export(half, tmp_path / "a.engine", to=FLAVOUR, ranges=RANGES, attention="root")


@needs_library
def test_only_what_lacks_a_kernel_is_decomposed(tmp_path: Path) -> None:
    """One attention with a head size that has a fused kernel, one with a head size that has none."""

    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            wide = x.unflatten(-1, (4, 16)).transpose(1, 2)
            narrow = x.unflatten(-1, (8, 8)).transpose(1, 2)
            a, b = (F.scaled_dot_product_attention(t, t * 2, t + 1) for t in (wide, narrow))
            return a.transpose(1, 2).flatten(2) + b.transpose(1, 2).flatten(2)

    said = export_tensorrt(
        captured(Two(), torch.float16),
        tmp_path / "a.engine",
        flavour=FLAVOUR,
        ranges=RANGES,
        compute_capability="sm_89",
    )
    fused, decomposed = said.attention
    assert fused.startswith("1 attentions, form 'causal' (0 causal): one fused kernel each (")
    assert decomposed.startswith("1 attentions, form 'causal' (0 causal): decomposed")


# --- refusals --------------------------------------------------------------------------------------------------------


@needs_library
def test_every_dynamic_axis_needs_a_range(half: torch.export.ExportedProgram, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"to": FLAVOUR, "compute_capability": "sm_89"}
    with pytest.raises(InputError, match=r"x\.0, x\.1 are dynamic without an upper bound.*--range x\.[01]=1,128,4096"):
        sqa_fx.export(half, tmp_path / "a.engine", **settings)
    with pytest.raises(InputError, match=r"^x\.0 .* without an upper bound.*--range x\.0=1,128,4096"):
        sqa_fx.export(half, tmp_path / "a.engine", ranges={"x.1": (1, 16, 64)}, **settings)
    assert os.listdir(tmp_path) == []


@needs_library
@pytest.mark.parametrize("capability", ["sm_42", "hopper", "none", "current", ""])
def test_unknown_capabilities(half: torch.export.ExportedProgram, tmp_path: Path, capability: str) -> None:
    with pytest.raises(InputError, match=rf"cannot build for '?{capability}'?; it knows .*sm_89"):
        sqa_fx.export(half, tmp_path / "a.engine", to=FLAVOUR, ranges=RANGES, compute_capability=capability)
    assert os.listdir(tmp_path) == []


def test_names_of_capabilities() -> None:
    assert {canonical_capability(c) for c in ("sm_89", "SM89", "sm89", "8.9", "SM_89")} == {"sm_89"}
    assert canonical_capability("12.0") == "sm_120"
    assert canonical_capability("hopper") == "hopper"


@needs_library
@needs_no_gpu
def test_without_a_gpu_the_capability_must_be_named(half: torch.export.ExportedProgram, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"builds for a GPU, and there is none here; .*compute_capability='sm_89'"):
        sqa_fx.export(half, tmp_path / "a.engine", to=FLAVOUR, ranges=RANGES)
    assert os.listdir(tmp_path) == []


@needs_library
def test_the_gpu_that_is_here_needs_no_name(
    half: torch.export.ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library has no name for sm_90, and builds on one all the same."""
    asked: list[str | None] = []

    def build(*operands: Any, compute_capability: str | None, **others: Any) -> Any:
        asked.append(compute_capability)
        raise EngineBuildError("far enough")

    as_if_on(monkeypatch, "sm_90")
    monkeypatch.setattr(to_tensorrt, "build_engine", build)
    monkeypatch.setattr(to_tensorrt, "export_onnx", lambda *_, **__: None)
    for capability in (None, "sm_90", "9.0", "sm_89"):
        with pytest.raises(EngineBuildError, match="far enough"):
            export_tensorrt(half, tmp_path / "a.engine", flavour=FLAVOUR, ranges=RANGES, compute_capability=capability)
    assert asked == [None, None, None, "sm_89"]


@needs_library
def test_names_of_the_profile(half: torch.export.ExportedProgram, onnx: Path) -> None:
    [x] = input_specs(half, RANGES)
    with pytest.raises(InputError, match="the network takes x, but ranges are given for y"):
        build_engine(onnx, FLAVOUR, [TensorSpec("y", x.dtype, x.shape)], compute_capability="sm_89")
    with pytest.raises(InputError, match="the network takes x, but ranges are given for x, y"):
        build_engine(onnx, FLAVOUR, [x, TensorSpec("y", x.dtype, x.shape)], compute_capability="sm_89")


@needs_library
def test_a_profile_that_is_no_range(half: torch.export.ExportedProgram, onnx: Path) -> None:
    [x] = input_specs(half, RANGES)
    backwards = TensorSpec("x", x.dtype, (2, AxisRange("s", 64, 16, 1), 64))
    with pytest.raises(InputError, match=r"refuses the profile \(min, opt, max\): x \(2, 64, 64\) \(2, 16, 64\)"):
        build_engine(onnx, FLAVOUR, [backwards], compute_capability="sm_89")


@needs_library
def test_a_broken_file_is_told_in_the_words_of_the_parser(
    half: torch.export.ExportedProgram, onnx: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(onnx.read_bytes()[:200])
    with pytest.raises(EngineBuildError, match=r"cannot read broken\.onnx: .*[Ff]ailed to parse"):
        build_engine(broken, FLAVOUR, input_specs(half, RANGES), compute_capability="sm_89")


@needs_library
def test_an_operator_that_tensorrt_lacks(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    node = helper.make_node("NoSuchThing", ["x"], ["y"], domain="elsewhere")
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in ("x", "y")]
    graph = helper.make_graph([node], "g", tensors[:1], tensors[1:])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("elsewhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports), tmp_path / "a.onnx")
    with pytest.raises(EngineBuildError, match="NoSuchThing"):
        build_engine(
            tmp_path / "a.onnx", FLAVOUR, [TensorSpec("x", "torch.float32", (2, 3))], compute_capability="sm_89"
        )


# --- without the libraries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", tensorrt_library.FLAVOURS)
def test_the_message_names_an_extra_that_exists(
    half: torch.export.ExportedProgram, tmp_path: Path, flavour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("sqa_fx.exporters.tensorrt_library.importlib.import_module", absent)
    library.cache_clear()
    try:
        with pytest.raises(MissingError, match=rf"pip install 'sqa-fx\[{flavour}\]'"):
            sqa_fx.export(half, tmp_path / "a.engine", to=flavour, ranges=RANGES, compute_capability="sm_89")
    finally:
        library.cache_clear()
    assert flavour in EXTRAS
    assert os.listdir(tmp_path) == []


def test_another_flavour_is_refused() -> None:
    with pytest.raises(InputError, match="'tensorrt-lite' is no TensorRT: it is one of tensorrt, tensorrt-rtx"):
        library("tensorrt-lite")


# --- the command line ------------------------------------------------------------------------------------------------


@needs_library
@needs_no_gpu
def test_export_command(
    half: torch.export.ExportedProgram,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.export.save(half, "model.pt2")
    given = ["export", "model.pt2", "-o", "a.engine", "--to", FLAVOUR, "--range", "x.0=1,2,3", "--range", "x.1=1,16,64"]
    assert main([*given, "--compute-capability", "sm_89", "--timing-cache", "k.cache", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)["artifacts"]
    assert entry["built_for"] == "sm_89" and not entry["validation"]["checked"]
    assert sorted(os.listdir()) == ["a.engine", "a.engine.json", "k.cache", "model.pt2"]
    assert main([*given, "--overwrite"]) == 3
    assert "compute_capability='sm_89'" in capsys.readouterr().err
