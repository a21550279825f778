"""Write a module as an ONNX file: one call, named inputs and outputs, nothing half written."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sqa_fx.errors import InputError, MissingError, SqaError
from sqa_fx.exporters.capture_program import capture_program, quiet
from sqa_fx.exporters.program_checks import refuse_training_mode, root_cause
from sqa_fx.exporters.program_names import tensor_inputs, tensor_outputs, user_inputs
from sqa_fx.exporters.sdpa_translation import OLDEST_OPSET, AttentionForm, translation_table
from sqa_fx.exporters.target_file import check_target, publish, staging

DEFAULT_OPSET = 24
FALLBACK_OPSET = 18
EXTERNAL_DATA_OVER = 2**31 - 2**27
"""Bytes of weights above which they go to a file of their own: protobuf ends at 2 GiB, and the graph needs room too."""

INSTALL = "pip install 'sqa-fx[onnx]' (or: pip install onnx onnxscript onnxruntime)"


class OnnxExportError(SqaError):
    """The captured model could not be written as ONNX at any of the opsets tried; the message has each reason."""


@dataclass(frozen=True)
class OnnxArtifact:
    """What was written.

    ``dynamic_axes`` maps an input or output to its axes of dynamic size and their symbols, ``bytes`` counts the model
    and its external data, ``attention_ops`` counts ``Attention`` and ``Softmax`` nodes, and ``notes`` says everything
    that differs from what was asked for.
    """

    path: Path
    opset: int
    external_data: Path | None
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_axes: dict[str, dict[int, str]]
    bytes: int
    attention_ops: dict[str, int]
    notes: tuple[str, ...]


def export_onnx(
    module: torch.nn.Module | torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset: int = DEFAULT_OPSET,
    fallback_opset: int | None = FALLBACK_OPSET,
    form: AttentionForm = "auto",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    overwrite: bool = False,
    check: bool = True,
    external_data_over: int = EXTERNAL_DATA_OVER,
) -> OnnxArtifact:
    """Export ``module``, called as ``module(*args, **kwargs)``, to ``path``.

    ``dynamic_shapes`` is that of ``torch.export.export``; an ExportedProgram brings its own, and needs no ``args``.
    Where ``opset`` fails, ``fallback_opset`` is tried and ``notes`` says why. ``form`` says how attention is written
    (see ``sdpa_translation.AttentionForm``). Weights of more than ``external_data_over`` bytes go to ``<path>.data``.
    The files appear complete or not at all.

    Raises InputError (path, names, training mode), CaptureError (torch.export), OnnxExportError (no opset worked) and
    MissingError (onnx or onnxscript not installed).
    """
    _require_onnx()
    for version in (opset, fallback_opset):
        if version is not None and version < OLDEST_OPSET:
            raise InputError(f"opset {version} is below {OLDEST_OPSET}, the oldest that torch.onnx writes")
    target = check_target(Path(path), overwrite, beside=(_data_path(Path(path)),))

    notes: list[str] = []
    program = capture_program(module, args, dict(kwargs or {}), dynamic_shapes, notes)
    refuse_training_mode(program)
    inputs = _names("input", input_names, tensor_inputs(program))
    outputs = _names("output", output_names, tensor_outputs(program))
    axis_names = _compare_dynamic_shapes(module, program, dynamic_shapes, notes)

    reasons: list[str] = []
    for version in dict.fromkeys(v for v in (opset, fallback_opset) if v is not None):
        with staging(target) as directory:
            staged = directory / target.name
            try:
                model = _translate(program, version, form, inputs, outputs, axis_names)
                _save(model, staged, external_data_over)
                if check:
                    _check_model(staged)
            except OSError as e:
                raise InputError(f"cannot write {target}: {e}; free some space or give another path") from e
            except Exception as e:  # torch.onnx and the checker raise whatever went wrong below them
                reasons.append(f"opset {version} failed: {root_cause(e)}")
                error = e
                continue
            if reasons:
                notes.append(f"{reasons[0]}; written with opset {version} instead")
            data = _data_path(target)
            publish(staged, target, (data,))
            return _describe(model, target, data if data.exists() else None, notes)
    raise OnnxExportError(f"cannot write {target.name} as ONNX: " + "; ".join(reasons)) from error


# --- before ----------------------------------------------------------------------------------------------------------


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript"):
        try:
            __import__(name)
        except ImportError as e:
            raise MissingError(f"exporting to ONNX needs {name}, which is not installed: {INSTALL}") from e


def _data_path(path: Path) -> Path:
    return path.with_name(path.name + ".data")


# --- names and shapes ------------------------------------------------------------------------------------------------


def _names(what: str, given: Sequence[str] | None, own: list[str]) -> list[str]:
    if given is None:
        return own
    if len(given) != len(own) or len(set(given)) != len(given):
        raise InputError(f"{what}_names must be {len(own)} different names, for {', '.join(own)}, but is {list(given)}")
    return list(given)


def _compare_dynamic_shapes(
    module: torch.nn.Module | torch.export.ExportedProgram,
    program: torch.export.ExportedProgram,
    dynamic_shapes: Any,
    notes: list[str],
) -> dict[str, str]:
    """Note every axis that was asked to be dynamic and is not; returns the user's names for the symbols."""
    if dynamic_shapes is None or isinstance(module, torch.export.ExportedProgram):
        return {}
    parameters = list(inspect.signature(module.forward).parameters)
    specs = user_inputs(program)
    assert program.call_spec.in_spec is not None
    tree = pytree.tree_unflatten(range(len(specs)), program.call_spec.in_spec)
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    axis_names: dict[str, str] = {}
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        value = values.get(specs[leaf].arg.name)
        if not isinstance(value, torch.Tensor):
            continue
        for axis, asked in _asked(dynamic_shapes, path, parameters).items():
            size = str(value.shape[axis])  # a symbol that the model pinned is still a SymInt, but prints as a number
            if size.isdecimal():
                if asked not in (None, torch.export.Dim.STATIC) and not isinstance(asked, int):
                    name = specs[leaf].arg.name
                    notes.append(f"input {name} axis {axis} was to be dynamic, but the model fixes it at {size}")
            elif isinstance(getattr(asked, "__name__", None), str):
                axis_names[size] = asked.__name__
    return axis_names


def _asked(dynamic_shapes: Any, path: tuple[Any, ...], parameters: list[str]) -> dict[int, Any]:
    """The entry of ``dynamic_shapes``, per axis, for the input at ``path``: args or kwargs, which argument, ..."""
    which, argument, *rest = path
    entry = dynamic_shapes
    keys: list[Any] = [k.idx if hasattr(k, "idx") else getattr(k, "key", None) for k in rest]
    try:
        if which.idx == 0 and isinstance(entry, Mapping):
            entry = entry[parameters[argument.idx]]
        elif which.idx == 0:
            entry = entry[argument.idx]
        elif isinstance(entry, Mapping):
            entry = entry[argument.key]
        else:
            entry = entry[parameters.index(argument.key)]
        for key in keys:
            entry = entry[key]
    except (LookupError, TypeError, ValueError):
        return {}  # nothing was asked for this input
    if isinstance(entry, Mapping):
        return {axis: asked for axis, asked in entry.items() if isinstance(axis, int)}
    return dict(enumerate(entry)) if isinstance(entry, (tuple, list)) else {}


# --- writing ---------------------------------------------------------------------------------------------------------


def _translate(
    program: torch.export.ExportedProgram,
    opset: int,
    form: AttentionForm,
    input_names: list[str],
    output_names: list[str],
    axis_names: dict[str, str],
) -> Any:
    """The onnx_ir model at ``opset``."""
    with quiet():
        onnx_program = torch.onnx.export(
            program,
            input_names=input_names,
            output_names=output_names,
            opset_version=opset,
            custom_translation_table=translation_table(opset, form),
            verbose=False,
        )
    assert onnx_program is not None
    model = onnx_program.model
    written = model.opset_imports.get("", opset)
    if written != opset:  # torch.onnx keeps the version it has when a conversion fails, with a log line only
        raise OnnxExportError(f"torch.onnx wrote opset {written} instead of {opset}")
    if axis_names:
        onnx_program.rename_axes(axis_names)
    for value in (*model.graph.inputs, *model.graph.outputs):
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and str(size).isdecimal():
                value.shape[axis] = int(str(size))  # torch.onnx writes a pinned symbol as one that is named "5"
    for node in model.graph:
        # Stack traces name files of the machine that exported, and are most of a small file.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    return model


def _save(model: Any, path: Path, external_data_over: int) -> None:
    import onnx_ir

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    external = _data_path(path).name if size > external_data_over else None
    onnx_ir.save(model, path, external_data=external)


def _check_model(path: Path) -> None:
    import onnx

    onnx.checker.check_model(str(path), full_check=True)  # by path: a model in memory must be below 2 GiB


def _describe(model: Any, path: Path, data: Path | None, notes: list[str]) -> OnnxArtifact:
    counts: dict[str, int] = {}
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        for node in graph.all_nodes():
            if node.op_type in ("Attention", "Softmax"):
                counts[node.op_type] = counts.get(node.op_type, 0) + 1
    axes: dict[str, dict[int, str]] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        dynamic = {i: str(d) for i, d in enumerate(value.shape or ()) if not isinstance(d, int)}
        if dynamic:
            axes[value.name] = dynamic
    return OnnxArtifact(
        path=path,
        opset=model.opset_imports[""],
        external_data=data,
        input_names=tuple(v.name for v in model.graph.inputs),
        output_names=tuple(v.name for v in model.graph.outputs),
        dynamic_axes=axes,
        bytes=path.stat().st_size + (data.stat().st_size if data else 0),
        attention_ops=counts,
        notes=tuple(notes),
    )
