"""Export to ONNX, TensorRT, torch_tensorrt or AOTInductor: one call, one file, one sidecar, checked where it can be."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sqa_fx.deferred import DeferredModule
from sqa_fx.errors import InputError, VerifyError
from sqa_fx.export_check import check_export, verdict
from sqa_fx.exporters.capture_program import capture_program
from sqa_fx.exporters.program_checks import precision_of, refuse_training_mode
from sqa_fx.exporters.ranges import Ranges, input_specs, output_specs
from sqa_fx.exporters.sdpa_translation import ATTENTION_OPSET, AttentionForm
from sqa_fx.exporters.sidecar import Sidecar, sidecar_path, versions
from sqa_fx.exporters.target_file import check_target, publish, staging
from sqa_fx.inputs import Inputs, example_inputs, vocabulary_size
from sqa_fx.module import ConvertedModule
from sqa_fx.partly import PartlyConvertedModule
from sqa_fx.passes.aten_call import argument, op_name
from sqa_fx.passes.capture_ways import automatic_shapes
from sqa_fx.plan import Plan
from sqa_fx.runners import module_dtype

FORMATS = ("onnx", "tensorrt", "tensorrt-rtx", "torch-tensorrt", "aoti", "huggingface")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SUFFIX = {".onnx": "onnx", ".pt2": "aoti", ".ep": "torch-tensorrt"}
_ENGINES = (".engine", ".plan")
_FORMS: dict[str, tuple[AttentionForm, ...]] = {
    "onnx": ("auto", "plain"),
    "tensorrt": ("causal", "masked", "plain"),
    "tensorrt-rtx": ("causal", "root", "masked", "plain"),
}
"""Ways to write attention, fastest first: the next one is taken when the check finds the one before wrong."""

_CHOICES = tuple(form for form in get_args(AttentionForm) if form != "root")
"""What can be asked for: "root" is right with some kernels only, and taken after a check or not at all."""

_GIVEN = frozenset("args dynamic_shapes flavour form kwargs notes opset overwrite plan progress ranges".split())
"""Keywords of the exporters that are no options here: ``export`` gives them itself."""


@dataclass(frozen=True)
class Artifact:
    """An exported file and what its sidecar (``<path>.json``) says of it."""

    path: Path
    sidecar: Sidecar

    @property
    def bytes(self) -> int:
        """The size of the file, with its external data."""
        return sum(int(entry["bytes"]) for entry in self.sidecar.files.values())


@dataclass(frozen=True)
class _Job:
    """All that the formats need to know."""

    program: torch.export.ExportedProgram
    plan: Plan | None
    ranges: Ranges | None
    options: dict[str, Any]
    notes: tuple[str, ...]
    progress: Callable[[str], None]

    @property
    def plan_json(self) -> dict[str, Any] | None:
        return None if self.plan is None else self.plan.to_json()


def export(
    model: nn.Module | torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "auto",
    precision: str | None = None,
    ranges: Ranges | None = None,
    opset: int = 24,
    attention: AttentionForm | None = None,
    check: bool = True,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Artifact:
    """Export a converted module, a plain module or an ExportedProgram to ``path``, with a sidecar ``<path>.json``.

    Args:
        model: a converted module brings its own example inputs and dynamic shapes.
        path: its suffix says the format where it can: ``.onnx``, ``.pt2`` (aoti), ``.ep`` (torch-tensorrt).
        to: the format: onnx, tensorrt, tensorrt-rtx, torch-tensorrt, aoti or huggingface, whose ``path`` is a directory
            (its sidecar is ``sqa_fx_export.json`` in it, and says how the directory loads).
        precision: fp32, fp16 or bf16: a copy of the model is cast before it is captured. None keeps the model's own; a
            converted module has its own already.
        ranges: ``{"input_ids.1": (min, opt, max)}`` for dynamic axes; engines need a maximum for each.
        attention: how attention is written for ONNX and TensorRT ("causal", "masked", "plain"); None tries them in this
            order until the check finds the file right, and the sidecar says which one was taken.
        check: run the file before it is published, where that is possible here, against the model in float64.
        options: those of the format: ``compute_capability``, ``workspace_bytes``, ``timing_cache`` (TensorRT),
            ``strict`` and torch_tensorrt's own, ``options`` (Inductor's, for aoti), ``output_names`` (ONNX),
            ``original``, ``surgery``, ``native`` and ``max_shard_size`` (huggingface)...

    Raises:
        InputError: unknown format, a path that exists or cannot be written, ranges that do not fit, a model without
            example inputs or one that was converted per submodule.
        VerifyError: the file computes something else than the model, in every form of attention; nothing is written.
        MissingError: a library or a GPU is missing. And whatever the exporter of the format raises.
    """
    form = format_of(Path(path), to)
    if form == "huggingface":
        if ranges or attention is not None or not check:
            raise InputError("ranges, attention and check=False belong to engines: huggingface has none of them")
        return _huggingface(model, Path(path), args, kwargs, precision, overwrite, progress, options)
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if attention is not None and attention not in _CHOICES:
        raise InputError(f"attention {attention!r} is not one of {', '.join(_CHOICES)}")
    if attention is not None and form not in _FORMS:
        raise InputError(f"attention belongs to {', '.join(_FORMS)}: {form} keeps attention as it is")
    if form == "onnx" and attention in ("causal", "masked") and opset < ATTENTION_OPSET:
        raise InputError(f"attention {attention!r} needs opset {ATTENTION_OPSET} or later, not {opset}; use 'plain'")
    target = check_target(Path(path), overwrite, beside=(sidecar_path(path), *_data_files(form, Path(path))))
    if isinstance(model, DeferredModule):
        model = model._done()
    if isinstance(model, PartlyConvertedModule):
        raise InputError(
            f"{path}: the model was converted per submodule ({', '.join(model.submodules)}), because it cannot be "
            f"exported whole; so it cannot be exported to {form} either. Each of these is an nn.Module that can: "
            "sqa_fx.export(model.eager.get_submodule(name), ...)"
        )
    notes: list[str] = []
    vocabulary = vocabulary_size(model) if isinstance(model, nn.Module) else None
    plan = model.plan if isinstance(model, ConvertedModule) else None
    program = _program(model, args, kwargs, dynamic_shapes, precision, notes)
    refuse_training_mode(program)
    input_specs(program, ranges)  # ranges that do not fit are told before the work
    job = _Job(program, plan, ranges, dict(options), tuple(notes), progress)
    device = "cuda" if any(t.is_cuda for t in program.state_dict.values()) else "cpu"
    if form in ("tensorrt", "tensorrt-rtx", "torch-tensorrt") and torch.cuda.is_available():
        device = "cuda"
    tried: list[str] = []
    for way in _ways(form, program) if attention is None else (attention,):
        with staging(target) as directory:
            staged = directory / target.name
            sidecar = _write(form, job, staged, way, opset)
            progress("checking")
            report, found = (
                check_export(staged, program, vocabulary, device=device) if check else (None, ("not asked for",))
            )
            if report is not None and not report.passed:
                worst = next(c for c in report.comparisons if not c.passed)
                tried.append(f"attention {way!r} is wrong here ({report.label(worst.input_set)}: {worst.problem})")
                continue
            final = replace(sidecar, validation=verdict(report, found), notes=(*sidecar.notes, *tried))
            done = final.write(staged)
            publish(staged, target, (sidecar_path(target), *_data_files(form, target)))
        return Artifact(target, done)
    raise VerifyError(f"{target.name} was not written: {'; '.join(tried)}")


def _huggingface(
    model: nn.Module | torch.export.ExportedProgram,
    path: Path,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    precision: str | None,
    overwrite: bool,
    progress: Callable[[str], None],
    options: Mapping[str, Any],
) -> Artifact:
    """A directory instead of a file: it has its own checks, and its sidecar inside."""
    from sqa_fx.exporters.to_huggingface import export_huggingface

    if precision is not None:
        raise InputError("precision: cast the model before converting it, sqa_fx.convert(model.to(dtype), ...)")
    if isinstance(model, DeferredModule):
        model = model._done()
    if not isinstance(model, nn.Module):
        raise InputError("an ExportedProgram is no transformers model: convert the model itself")
    _refuse_unknown("huggingface", export_huggingface, options)
    sidecar = export_huggingface(
        model, path, args=args, kwargs=kwargs, overwrite=overwrite, progress=progress, **options
    )
    return Artifact(path.absolute(), sidecar)


def format_of(path: Path, to: str | None) -> str:
    """The format of the file to write: ``to``, or what the suffix says. Raises InputError when they disagree or say
    nothing."""
    suggested = _SUFFIX.get(path.suffix)
    if to is None:
        if suggested is None:
            hint = "to='tensorrt' or 'tensorrt-rtx'" if path.suffix in _ENGINES else f"to= one of {', '.join(FORMATS)}"
            raise InputError(f"{path}: the suffix does not say the format (known: {', '.join(_SUFFIX)}): give {hint}")
        return suggested
    if to not in FORMATS:
        raise InputError(f"format {to!r} is not one of {', '.join(FORMATS)}")
    if suggested is not None and suggested != to:
        wanted = next((s for s, f in _SUFFIX.items() if f == to), ".engine")
        raise InputError(f"{path}: the suffix {path.suffix} belongs to {suggested}, not to {to}; use {wanted}")
    return to


def _ways(form: str, program: torch.export.ExportedProgram) -> tuple[AttentionForm, ...]:
    """The forms to try; those that differ in causal attention only come down to one where there is none."""
    ways = _FORMS.get(form, ("auto",))
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    if any(argument(n, "is_causal", False) for g in graphs for n in g.nodes if "scaled_dot_product" in op_name(n)):
        return ways
    return tuple(way for way in ways if way not in ("root", "masked"))


def _data_files(form: str, path: Path) -> tuple[Path, ...]:
    """Where ONNX keeps large weights."""
    return (path.with_name(path.name + ".data"),) if form == "onnx" else ()


def _program(
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    precision: str | None,
    notes: list[str],
) -> torch.export.ExportedProgram:
    if isinstance(model, torch.export.ExportedProgram):
        if precision is not None:
            raise InputError("an ExportedProgram has its precision already: cast the module before torch.export.export")
        return model
    if isinstance(model, ConvertedModule):
        if precision is not None and module_dtype(model) != PRECISIONS[precision]:
            # Its graph holds casts to the dtype that it was captured in; which of them follow the model's is not known.
            raise InputError(
                f"this module was converted in {module_dtype(model)}: cast the model before converting it, "
                f"sqa_fx.convert(model.to({PRECISIONS[precision]}), ...), and leave out precision"
            )
        module: nn.Module = model.graph_module
        given: Inputs = (tuple(model.example_args), dict(model.example_kwargs))
        shapes = model.dynamic_shapes
    else:
        module = model
        found = (tuple(args), dict(kwargs or {})) if args or kwargs else example_inputs(model)
        if found is None:
            raise InputError(f"{type(model).__name__} says nothing of its inputs: pass args= or kwargs=")
        given = found
        if precision is not None:
            module, given = in_precision(model, given, precision)
        shapes = automatic_shapes(module, *given) if isinstance(dynamic_shapes, str) else dynamic_shapes
    return capture_program(module, given[0], given[1], shapes, notes)


def in_precision(module: nn.Module, inputs: Inputs, precision: str) -> tuple[nn.Module, Inputs]:
    """A copy of ``module`` in fp32, fp16 or bf16, and ``(args, kwargs)`` with floating point tensors to match."""
    dtype = PRECISIONS[precision]
    args, kwargs = pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )
    return copy.deepcopy(module).to(dtype), (args, kwargs)


def _write(form: str, job: _Job, staged: Path, way: AttentionForm, opset: int) -> Sidecar:
    """The file of one format at ``staged``, and its sidecar."""
    if form == "onnx":
        from sqa_fx.exporters.to_onnx import export_onnx

        _refuse_unknown(form, export_onnx, job.options)
        return _write_onnx(job, staged, way, opset)
    common: dict[str, Any] = {"ranges": job.ranges, "plan": job.plan_json, "notes": job.notes, **job.options}
    if form == "aoti":
        from sqa_fx.exporters.to_aoti import export_aoti

        _refuse_unknown(form, export_aoti, job.options)
        return export_aoti(job.program, staged, **common)
    if form == "torch-tensorrt":
        from sqa_fx.exporters.to_torch_tensorrt import export_torch_tensorrt

        return export_torch_tensorrt(job.program, staged, progress=job.progress, **common)
    from sqa_fx.exporters.to_tensorrt import export_tensorrt

    _refuse_unknown(form, export_tensorrt, job.options)
    return export_tensorrt(job.program, staged, flavour=form, form=way, progress=job.progress, **common)


def _refuse_unknown(form: str, exporter: Callable[..., Any], options: Mapping[str, Any]) -> None:
    own = {n for n, p in inspect.signature(exporter).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    unknown = sorted(set(options) - (own - _GIVEN))
    if unknown:
        raise InputError(f"{form} has no option {', '.join(unknown)}; it has {', '.join(sorted(own - _GIVEN))}")


def _write_onnx(job: _Job, staged: Path, way: AttentionForm, opset: int) -> Sidecar:
    from sqa_fx.exporters.to_onnx import export_onnx

    artifact = export_onnx(job.program, staged, opset=opset, form=way, **job.options)
    names = dict(zip([s.name for s in input_specs(job.program)], artifact.input_names, strict=True))
    inputs = tuple(replace(s, name=names[s.name]) for s in input_specs(job.program, job.ranges))
    sidecar = Sidecar(
        format="onnx",
        inputs=inputs,
        outputs=output_specs(job.program, artifact.output_names),
        attention=tuple(f"{count} {op} nodes" for op, count in artifact.attention_ops.items()),
        opset=artifact.opset,
        precision=precision_of(job.program),
        plan=job.plan_json,
        versions={k: v for k, v in versions("onnx", "onnxscript", "onnxruntime").items() if k.startswith("onnx")},
        notes=(*job.notes, *artifact.notes),
    )
    return sidecar.write(staged, (staged, *([artifact.external_data] if artifact.external_data else [])))
