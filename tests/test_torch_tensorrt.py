"""torch_tensorrt: what is prepared for it and read off its results, without it; compiling where a GPU is."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sqa_fx
from sqa_fx.errors import InputError, MissingError
from sqa_fx.exporters import to_torch_tensorrt
from sqa_fx.exporters.ranges import input_specs
from sqa_fx.exporters.to_torch_tensorrt import (
    SDPA,
    FallbackError,
    Partition,
    compile_program,
    partition_of,
    torch_tensorrt_library,
    with_equal_heads,
)

AUTO = torch.export.Dim.AUTO
ops = torch.ops.aten


class Grouped(nn.Module):
    """Two attentions over ``[batch, heads, seq, d]``: one grouped with 6 query, 2 key and 3 value heads, one
    with as many of each, though it says ``enable_gqa``."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        grouped = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        equal = F.scaled_dot_product_attention(k, k, k + 1, enable_gqa=True)
        return grouped, equal


def example(b: int = 2, s: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(b * 100 + s)
    q, k, v = (torch.randn(b, h, s, d, generator=g) for h, d in ((6, 5), (2, 5), (3, 7)))
    return q, k, v


@pytest.fixture(scope="module")
def grouped() -> torch.export.ExportedProgram:
    axes = {0: AUTO, 2: AUTO}
    return torch.export.export(Grouped(), example(), dynamic_shapes={"q": axes, "k": axes, "v": axes})


def with_gqa(program: torch.export.ExportedProgram) -> list[fx.Node]:
    nodes = program.graph.find_nodes(op="call_function", target=SDPA)
    return [n for n in nodes if "enable_gqa" in n.kwargs]


# --- equal heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 11), (3, 17), (1, 1)])
def test_equal_heads_compute_the_same(grouped: torch.export.ExportedProgram, shape: tuple[int, int]) -> None:
    equal = with_equal_heads(grouped)
    want, got = grouped.module()(*example(*shape)), equal.module()(*example(*shape))
    assert len(want) == len(got) == 2
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)


def test_no_grouped_attention_is_left(grouped: torch.export.ExportedProgram) -> None:
    before = str(grouped.graph)
    assert len(with_gqa(grouped)) == 2
    equal = with_equal_heads(grouped)
    assert with_gqa(equal) == []
    nodes = equal.graph.find_nodes(op="call_function", target=SDPA)
    assert len(nodes) == 2
    for node in nodes:
        heads = {operand.meta["val"].shape[1] for operand in node.args[:3]}
        assert len(heads) == 1
    first = nodes[0]
    assert first.kwargs["scale"] == 0.3 and first.args[5] is True  # the rest of the call is as it was
    assert str(grouped.graph) == before


def test_a_program_without_grouped_attention_is_itself() -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    program = torch.export.export(Plain(), (torch.randn(2, 3, 5, 7),))
    assert with_equal_heads(program) is program


def test_equal_heads_of_a_converted_module() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (self.q, self.k, self.v))
            out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return out

    x = torch.randn(2, 11, 24)
    converted = sqa_fx.convert(Block().eval(), hq=4, hkv=2, args=(x,))
    program = torch.export.export(converted, (x,))
    assert len(with_gqa(program)) == 1
    equal = with_equal_heads(program)
    assert with_gqa(equal) == []
    torch.testing.assert_close(equal.module()(x), converted(x), atol=1e-6, rtol=1e-5)


# --- what fell back --------------------------------------------------------------------------------------------------


class TorchTensorRTModule(nn.Module):
    """Stands for an engine; the one of torch_tensorrt is told by this name too."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def graph_module(root: nn.Module, *targets: Any) -> fx.GraphModule:
    """A chain of calls: of submodules where the target is a name, of operators otherwise."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for target in targets:
        value = (
            graph.call_module(target, (value,)) if isinstance(target, str) else graph.call_function(target, (value,))
        )
    graph.output(value)
    return fx.GraphModule(root, graph)


def test_engines_and_fallbacks_are_counted() -> None:
    inner = graph_module(nn.Module(), ops.relu.default, ops.neg.default)
    root = nn.ModuleDict({"run_0": TorchTensorRTModule(), "run_1": inner, "run_2": TorchTensorRTModule()})
    outer = graph_module(root, "run_0", "run_1", ops.neg.default, "run_2", len)
    found = partition_of(outer)
    assert found == Partition(2, {"aten.neg.default": 2, "aten.relu.default": 1})
    assert list(found.fallback) == ["aten.neg.default", "aten.relu.default"]  # the most frequent first
    assert str(found) == "2 TensorRT engines; operators in PyTorch: 2 aten.neg.default, 1 aten.relu.default"


def test_a_graph_that_is_one_engine_and_one_that_has_none() -> None:
    whole = partition_of(graph_module(nn.ModuleDict({"run_0": TorchTensorRTModule()}), "run_0"))
    assert whole == Partition(1, {}) and str(whole) == "1 TensorRT engines; operators in PyTorch: none"
    assert partition_of(graph_module(nn.Module(), ops.relu.default)) == Partition(0, {"aten.relu.default": 1})


def test_engines_that_are_operators_are_counted() -> None:
    with torch.library._scoped_library("tensorrt", "FRAGMENT") as fragment:
        fragment.define("fake_engine(Tensor x) -> Tensor")
        engine = torch.ops.tensorrt.fake_engine.default
        found = partition_of(graph_module(nn.Module(), engine, ops.neg.default, engine))
    assert found == Partition(2, {"aten.neg.default": 1})


# --- with a library that only looks like it --------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A torch_tensorrt that keeps the settings of its last compilation and leaves one operator to PyTorch."""
    module: Any = ModuleType("torch_tensorrt")

    class Settings:
        __dataclass_fields__ = dict.fromkeys(("attn_bias_is_causal", "min_block_size", "optimization_level"))

    class Dynamo:
        class _settings:
            CompilationSettings = Settings

        @staticmethod
        def compile(program: Any, arg_inputs: Any, **settings: Any) -> nn.Module:
            module.last = (program, arg_inputs, settings)
            return graph_module(nn.ModuleDict({"run_0": TorchTensorRTModule()}), "run_0", ops.neg.default)

    module.dynamo, module.__version__ = Dynamo, "0.0"
    module.Input = lambda **settings: settings
    monkeypatch.setattr(to_torch_tensorrt, "torch_tensorrt_library", lambda: module)
    found: ModuleType = module
    return found


def test_settings_that_are_known_reach_the_library(fake: Any, grouped: torch.export.ExportedProgram) -> None:
    specs = input_specs(grouped, {"q.0": (1, 2, 3), "q.2": (1, 16, 64)})
    _, partition = compile_program(grouped, specs, optimization_level=5)
    program, inputs, settings = fake.last
    assert settings == {"attn_bias_is_causal": False, "min_block_size": 1, "optimization_level": 5}
    assert with_gqa(program) == [] and len(with_gqa(grouped)) == 2
    assert [i["name"] for i in inputs] == ["q", "k", "v"]
    assert [inputs[0][f"{which}_shape"] for which in ("min", "opt", "max")] == [
        (1, 6, 1, 5),
        (2, 6, 16, 5),
        (3, 6, 64, 5),
    ]
    assert inputs[0]["dtype"] == torch.float32
    assert partition == Partition(1, {"aten.neg.default": 1})


def test_strict_and_unknown_options(fake: Any, grouped: torch.export.ExportedProgram) -> None:
    specs = input_specs(grouped)
    with pytest.raises(FallbackError, match=r"not all of the graph runs in TensorRT: 1 .* PyTorch: 1 aten\.neg"):
        compile_program(grouped, specs, strict=True)
    with pytest.raises(InputError, match=r"torch_tensorrt 0\.0 knows no option optimisation_level"):
        compile_program(grouped, specs, optimisation_level=5)


# --- without the library ---------------------------------------------------------------------------------------------


class Breaks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """torch_tensorrt is installed, and importing it raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name == "torch_tensorrt" else None

    def exec_module(self, module: ModuleType) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled"),
        (OSError("libcudart.so.13: cannot open\nmore"), "libcudart.so.13: cannot open"),
        (AssertionError(), "AssertionError"),
        (ModuleNotFoundError("No module named 'tensorrt'"), "No module named 'tensorrt'"),
    ],
)
def test_a_library_that_does_not_load(
    error: Exception,
    reason: str,
    grouped: torch.export.ExportedProgram,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Breaks(error), *sys.meta_path])
    with pytest.raises(MissingError) as caught:
        sqa_fx.export(grouped, tmp_path / "a.ep")
    assert f"torch_tensorrt does not load ({reason}): pip install 'sqa-fx[torch-tensorrt]'" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_the_extra_of_the_message_exists() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["torch-tensorrt"] == ["torch-tensorrt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_nothing_is_compiled(fake: Any, grouped: torch.export.ExportedProgram, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="for the GPU that is here, and there is none"):
        sqa_fx.export(grouped, tmp_path / "a.ep")
    assert os.listdir(tmp_path) == []


# --- with it ---------------------------------------------------------------------------------------------------------


def _absent() -> str | None:
    if not torch.cuda.is_available():
        return "compiling with torch_tensorrt needs a GPU"
    try:
        torch_tensorrt_library()
    except MissingError as error:
        return str(error)
    return None


ABSENT = _absent()


@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
def test_compile_save_and_run(tmp_path: Path) -> None:
    axes = {0: AUTO, 2: AUTO}
    inputs = tuple(x.cuda().half() for x in example())
    program = torch.export.export(Grouped().cuda(), inputs, dynamic_shapes={"q": axes, "k": axes, "v": axes})
    done = sqa_fx.export(program, tmp_path / "a.ep", ranges={"q.0": (1, 2, 3), "q.2": (1, 16, 64), "k.2": (1, 16, 64)})
    assert done.sidecar.validation is not None and done.sidecar.validation["passed"]
    assert done.sidecar.attention == ("2 of 2 attentions in TensorRT, 0 in PyTorch",)
