"""Write an exported program as an AOTInductor package: native code that runs without Python or a compiler."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import ConstantArgument, OutputKind

from sqa_fx.errors import InputError, MissingError, SqaError
from sqa_fx.exporters.program_checks import precision_of, refuse_training_mode, root_cause
from sqa_fx.exporters.program_names import tensor_outputs, user_inputs
from sqa_fx.exporters.ranges import Ranges, input_specs, output_specs
from sqa_fx.exporters.sidecar import Sidecar, sidecar_path
from sqa_fx.exporters.size_conditions import size_conditions
from sqa_fx.exporters.target_file import check_target, publish, staging
from sqa_fx.exporters.tensorrt_library import gpu_capability
from sqa_fx.passes.aten_call import argument, op_name
from sqa_fx.plan import Plan

SUFFIX = ".pt2"
CONDITIONS, OUTPUTS, DEVICE = "sqa_fx_conditions", "sqa_fx_outputs", "sqa_fx_device"
"""Keys of the package's own metadata: size conditions, positions of the tensors among the outputs, and device type."""

_METADATA = "aot_inductor.metadata"


class AotiExportError(SqaError):
    """AOTInductor could not compile the program; the message has its reason."""


def export_aoti(
    program: torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    *,
    ranges: Ranges | None = None,
    plan: Plan | Mapping[str, Any] | None = None,
    overwrite: bool = False,
    options: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Sidecar:
    """Compile ``program`` to the package ``path`` (``.pt2``) and write ``<path>.json`` beside it; the sidecar.

    The package runs on the kind of device that the program is on, and only there: a GPU of the same compute capability,
    or a CPU with the vector instructions of this one. ``ranges`` narrows dynamic sizes, which start at 1 (at 0 compiled
    code may end the process by a division), ``options`` are those of Inductor, ``plan`` and ``notes`` go into the
    sidecar. Both files appear complete or not at all.

    Raises InputError (path, ranges, options, training mode, inputs of several devices or in another memory order than
    the plain one), MissingError (no C++ compiler) and AotiExportError (compilation failed).
    """
    target = check_target(Path(path), overwrite, beside=(sidecar_path(path),), suffix=SUFFIX)
    refuse_training_mode(program)
    _require_known(options or {})
    inputs = input_specs(program, ranges)
    device = _device(program)
    _require_plain_order(program)
    _require_compiler()
    conditions, unsaid = size_conditions(program)
    sidecar = Sidecar(
        format="aoti",
        inputs=inputs,
        outputs=output_specs(program, tensor_outputs(program)),
        attention=tuple(attention_forms(program.graph)),
        built_for=capability(device),
        precision=precision_of(program),
        plan=plan.to_json() if isinstance(plan, Plan) else plan,
        versions={"machine": machine()},
        notes=(*notes, *(f"not checked before a run: {guard}" for guard in unsaid), *_state_notes(program)),
    )
    positions = ",".join(map(str, _tensor_positions(program)))
    own = {CONDITIONS: json.dumps(conditions), OUTPUTS: positions, DEVICE: device.type}
    settings = dict(options or {})
    settings[_METADATA] = {**settings.get(_METADATA, {}), **own}
    with staging(target) as directory:
        staged = directory / target.name
        _compile(program, staged, settings)
        written = sidecar.write(staged)
        publish(staged, target, (sidecar_path(target),))
    return written


def capability(device: torch.device) -> str:
    """What a package built on ``device`` runs on: ``sm_90``, or ``cpu``."""
    return (gpu_capability(device) if device.type == "cuda" else None) or device.type


def machine() -> str:
    """The processor's architecture and vector instructions, as in ``x86_64 AVX2``."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def attention_forms(graph: fx.Graph) -> list[str]:
    """One line for each operator that computes attention whole, with its forms.

    As in ``3 scaled_dot_product_attention (2 causal without mask, 1 with mask)``; empty where all attention is spelled
    out in matmuls and softmaxes.
    """
    forms: dict[str, Counter[str]] = {}
    for node in graph.nodes:
        name = op_name(node)
        if "scaled_dot_product" not in name or not isinstance(node.target, torch._ops.OpOverload):
            continue
        mask = argument(node, "attn_mask") if argument(node, "attn_mask") is not None else argument(node, "attn_bias")
        causal = "causal " if argument(node, "is_causal", False) else ""
        grouped = "grouped " if argument(node, "enable_gqa", False) else ""
        form = f"{grouped}{causal}{'with' if mask is not None else 'without'} mask"
        forms.setdefault(name, Counter())[form] += 1
    return [
        f"{counts.total()} {name} ({', '.join(f'{n} {form}' for form, n in counts.items())})"
        for name, counts in forms.items()
    ]


# --- checks ----------------------------------------------------------------------------------------------------------


def _values(program: torch.export.ExportedProgram) -> dict[str, Any]:
    return {node.name: node.meta.get("val") for node in program.graph.nodes}


def _device(program: torch.export.ExportedProgram) -> torch.device:
    values = _values(program)
    arguments = {s.arg.name: values[s.arg.name] for s in user_inputs(program)}
    inputs = {name: value.device for name, value in arguments.items() if isinstance(value, Tensor)}
    weights = [t.device for t in _tensors((*program.state_dict.values(), *program.constants.values()))]
    found = set(inputs.values()) or set(weights)
    if len(found) > 1 or {d.type for d in found} - {"cpu", "cuda"}:
        listed = ", ".join(f"{name} on {device}" for name, device in inputs.items()) or ", ".join(map(str, found))
        raise InputError(
            f"a package takes all inputs on one CPU or CUDA device, but has {listed}; move the model there"
        )
    device = found.pop() if found else torch.device("cpu")
    if device.type == "cpu" and any(d.type == "cuda" for d in weights):
        raise InputError("the weights are on CUDA and the inputs on the CPU; capture with inputs on the GPU")
    return device


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor)]


def _require_plain_order(program: torch.export.ExportedProgram) -> None:
    """The compiled code reads inputs by the strides of the example, and the runner lays them out plainly."""
    values = _values(program)
    for spec in user_inputs(program):
        value = values[spec.arg.name]
        if isinstance(value, Tensor) and not value.is_contiguous():
            raise InputError(
                f"input {spec.arg.name} was captured with shape {list(value.shape)} and strides "
                f"{list(value.stride())}; capture with x.contiguous()"
            )


def _require_known(options: Mapping[str, Any]) -> None:
    from torch._inductor import config

    known = config.shallow_copy_dict()
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(f"options {', '.join(unknown)} are unknown; torch._inductor.config lists what there is")
    if options.get("aot_inductor.output_path"):
        raise InputError("options give aot_inductor.output_path; the path to write is the argument path")


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as e:
        raise MissingError("AOTInductor needs a C++ compiler: apt-get install g++, or name one in CXX") from e


# --- what it is ------------------------------------------------------------------------------------------------------


def _tensor_positions(program: torch.export.ExportedProgram) -> list[int]:
    """Where the tensors stand among the outputs: a package returns None and numbers between them."""
    values = _values(program)
    outputs = [s.arg for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    return [
        i
        for i, arg in enumerate(outputs)
        if not isinstance(arg, ConstantArgument) and isinstance(values[arg.name], Tensor)
    ]


def _state_notes(program: torch.export.ExportedProgram) -> list[str]:
    changed = sorted(program.run_decompositions({}).graph_signature.buffers_to_mutate.values())
    return [f"the package keeps state from run to run: {', '.join(changed)}"] if changed else []


# --- compiling -------------------------------------------------------------------------------------------------------


def _compile(program: torch.export.ExportedProgram, staged: Path, settings: dict[str, Any]) -> None:
    import torch._inductor

    if program.example_inputs is None:
        raise InputError(
            "the program holds no example inputs, which AOTInductor needs; capture with torch.export.export"
        )
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            torch._inductor.aoti_compile_and_package(program, package_path=str(staged), inductor_configs=settings)
    except OSError as e:
        raise InputError(f"cannot write {staged.name}: {e}; free some space or give another path") from e
    except Exception as e:  # whatever Inductor and the compilers below it raise
        raise AotiExportError(f"AOTInductor cannot compile the program: {root_cause(e)}") from e
    if not staged.is_file():
        raise AotiExportError(f"AOTInductor wrote no {staged.name}")
