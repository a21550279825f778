"""Compile an exported program with torch_tensorrt, count what fell back to PyTorch, and save it."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqa_fx.errors import InputError, MissingError, SqaError, first_line
from sqa_fx.exporters.program_checks import precision_of
from sqa_fx.exporters.program_names import tensor_outputs
from sqa_fx.exporters.ranges import Ranges, input_specs, output_specs, require_bounds
from sqa_fx.exporters.sidecar import AxisRange, Sidecar, TensorSpec, sidecar_path
from sqa_fx.exporters.target_file import check_target, publish, staging
from sqa_fx.exporters.tensorrt_library import gpu_capability

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class FallbackError(SqaError):
    """Operators stayed in PyTorch although ``strict`` forbids it; the message counts them."""


@dataclass(frozen=True)
class Partition:
    """What became of the graph: how many TensorRT engines, and how often each operator stayed in PyTorch."""

    engines: int
    fallback: Mapping[str, int]

    def __str__(self) -> str:
        left = ", ".join(f"{count} {name}" for name, count in self.fallback.items()) or "none"
        return f"{self.engines} TensorRT engines; operators in PyTorch: {left}"


def torch_tensorrt_library() -> ModuleType:
    """The module. Raises MissingError when it is not installed or cannot load: beside a CPU build of torch it raises
    AssertionError or OSError."""
    try:
        return importlib.import_module("torch_tensorrt")
    except (ImportError, OSError, AssertionError) as error:
        raise MissingError(
            f"torch_tensorrt does not load ({first_line(error)}): pip install 'sqa-fx[torch-tensorrt]', on a machine "
            "with a GPU and a CUDA build of torch"
        ) from error


def compile_program(
    program: torch.export.ExportedProgram, inputs: Sequence[TensorSpec], *, strict: bool = False, **options: Any
) -> tuple[nn.Module, Partition]:
    """``program`` compiled for the profile of ``inputs``, and what became of it.

    ``strict`` raises FallbackError when any operator stayed in PyTorch. ``options`` go to torch_tensorrt.
    """
    trt = torch_tensorrt_library()
    ready = with_equal_heads(program)
    settings: dict[str, Any] = {
        # By default torch_tensorrt takes any bias of an attention for a causal mask.
        "attn_bias_is_causal": False,
        "use_explicit_typing": True,
        "min_block_size": 1,
        "truncate_double": False,
        **options,
    }
    accepted = getattr(trt.dynamo._settings.CompilationSettings, "__dataclass_fields__", {})
    unknown = [name for name in options if name not in accepted]
    if unknown:
        raise InputError(f"torch_tensorrt {trt.__version__} knows no option {', '.join(unknown)}")
    compiled = trt.dynamo.compile(
        ready,
        arg_inputs=[_input(trt, spec) for spec in inputs],
        **{name: value for name, value in settings.items() if name in accepted},
    )
    partition = partition_of(compiled)
    if strict and partition.fallback:
        raise FallbackError(f"not all of the graph runs in TensorRT: {partition}")
    return compiled, partition


def export_torch_tensorrt(
    program: torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    *,
    ranges: Ranges | None = None,
    strict: bool = False,
    plan: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    notes: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Sidecar:
    """Compile ``program`` with torch_tensorrt for the GPU that is here, and save it to ``path`` (``.ep``) with its
    sidecar. ``torch.export.load`` reads it again once torch_tensorrt is imported.

    Raises InputError (path, ranges, options), MissingError (library, GPU) and FallbackError (``strict``).
    """
    trt = torch_tensorrt_library()
    here = gpu_capability()
    if here is None:
        raise MissingError("torch_tensorrt builds for the GPU that is here, and there is none")
    inputs = input_specs(program, ranges)
    require_bounds(inputs)
    target = check_target(Path(path), overwrite, beside=(sidecar_path(path),))
    with staging(target) as directory:
        progress("compiling with torch_tensorrt")
        compiled, partition = compile_program(program, inputs, strict=strict, **options)
        staged = directory / target.name
        example = [_example(spec) for spec in inputs]
        trt.save(compiled, str(staged), output_format="exported_program", arg_inputs=example, retrace=False)
        attentions = len(program.graph.find_nodes(op="call_function", target=SDPA))
        left = sum(count for name, count in partition.fallback.items() if "attention" in name)
        sidecar = Sidecar(
            format="torch-tensorrt",
            inputs=inputs,
            outputs=output_specs(program, tensor_outputs(program)),
            attention=(f"{attentions - left} of {attentions} attentions in TensorRT, {left} in PyTorch",),
            built_for=here,
            precision=precision_of(program),
            plan=plan,
            versions={"torch_tensorrt": str(trt.__version__)},
            notes=(*notes, str(partition)),
        ).write(staged)
        publish(staged, target, (sidecar_path(target),))
    return sidecar


def with_equal_heads(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with the KV heads of grouped attention repeated: torch_tensorrt leaves ``enable_gqa`` to PyTorch.

    Query heads, which are what attention costs, stay as they are. Without grouped attention, ``program`` itself.
    """
    grouped = [
        n for n in program.graph.find_nodes(op="call_function", target=SDPA) if n.kwargs.get("enable_gqa", False)
    ]
    if not grouped:
        return program
    copied: torch.export.ExportedProgram = program.run_decompositions(
        {}
    )  # a copy: the caller's program keeps its graph
    graph = copied.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=SDPA):
        if node.kwargs.get("enable_gqa", False):
            _repeat_kv(graph, node)
    graph.lint()
    copied.graph_module.recompile()
    return copied


def _repeat_kv(graph: fx.Graph, node: fx.Node) -> None:
    query, *kv = (node.args[i] for i in range(3))
    assert isinstance(query, fx.Node)
    heads = int(query.meta["val"].shape[-3])
    with graph.inserting_before(node):
        for position, operand in enumerate(kv, start=1):
            assert isinstance(operand, fx.Node)
            value: Tensor = operand.meta["val"]
            times = heads // int(value.shape[-3])
            repeated = graph.call_function(torch.ops.aten.repeat_interleave.self_int, (operand, times, -3))
            repeated.meta["val"] = value.repeat_interleave(times, -3)
            node.update_arg(position, repeated)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "enable_gqa"}


def partition_of(compiled: nn.Module) -> Partition:
    """Engines of a module that torch_tensorrt made, and the operators outside of them."""
    engines = sum("TorchTensorRTModule" in type(m).__name__ for m in compiled.modules())
    left: Counter[str] = Counter()
    for module in compiled.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                # Placeholders, outputs and tuple items compute nothing.
                if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                    if node.target.namespace == "tensorrt":
                        engines += 1
                    else:
                        left[str(node.target)] += 1
    return Partition(engines, dict(left.most_common()))


def _input(trt: Any, spec: TensorSpec) -> Any:
    dtype = spec.torch_dtype
    if not any(isinstance(n, AxisRange) for n in spec.shape):
        return trt.Input(shape=spec.sizes("opt"), dtype=dtype, name=spec.name)
    shapes = {f"{which}_shape": spec.sizes(which) for which in ("min", "opt", "max")}
    return trt.Input(**shapes, dtype=dtype, name=spec.name)


def _example(spec: TensorSpec) -> Tensor:
    return torch.zeros(spec.sizes("opt"), dtype=spec.torch_dtype, device="cuda")
