"""Write an exported program as a TensorRT engine: by way of ONNX, for one GPU, with its sidecar."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sqa_fx.errors import InputError, MissingError
from sqa_fx.exporters.program_checks import precision_of
from sqa_fx.exporters.program_names import tensor_outputs
from sqa_fx.exporters.ranges import Ranges, input_specs, output_specs, require_bounds
from sqa_fx.exporters.sdpa_translation import AttentionForm
from sqa_fx.exporters.sidecar import Sidecar, sidecar_path
from sqa_fx.exporters.target_file import check_target, publish, staging
from sqa_fx.exporters.tensorrt_build import AttentionLayer, build_engine
from sqa_fx.exporters.tensorrt_library import canonical_capability, capability_name, gpu_capability, library
from sqa_fx.exporters.to_onnx import FALLBACK_OPSET, export_onnx
from sqa_fx.whole_file import write_whole

ATTENTION_OPSET = 24


def export_tensorrt(
    program: torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    *,
    flavour: str = "tensorrt",
    ranges: Ranges | None = None,
    form: AttentionForm = "causal",
    compute_capability: str | None = None,
    workspace_bytes: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    plan: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    notes: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Sidecar:
    """Build an engine of ``flavour`` ("tensorrt", "tensorrt-rtx") for ``program`` and write it to ``path``.

    Precision is that of the program: the network is strongly typed. ``ranges`` (see ``exporters.ranges``) gives min,
    opt and max of every dynamic axis. ``form`` says how attention reaches the network. ``compute_capability`` ("sm_89")
    names another GPU than the one here, which tensorrt-rtx can build for; no GPU is needed then. ``timing_cache`` is a
    file that is read where it exists, and written. Engine, sidecar and cache appear complete or not at all.

    Raises InputError (path, ranges, capability), MissingError (library, GPU), OnnxExportError, EngineBuildError.
    """
    trt = library(flavour)
    here = gpu_capability()
    built_for = here if compute_capability is None else canonical_capability(compute_capability)
    if built_for is None:
        raise MissingError(
            f"{flavour} builds for a GPU, and there is none here"
            + ("; name the one to build for: compute_capability='sm_89'" if hasattr(trt, "ComputeCapability") else "")
        )
    elsewhere = None if built_for == here else built_for  # not every GPU that can be here has a name in the library
    if elsewhere is not None:
        capability_name(trt, elsewhere)
    inputs = input_specs(program, ranges)
    require_bounds(inputs)
    target = check_target(Path(path), overwrite, beside=(sidecar_path(path),))
    cache_path = Path(timing_cache) if timing_cache is not None else None
    if cache_path is not None:
        check_target(cache_path, overwrite=True)
    with staging(target) as directory:
        onnx = directory / "model.onnx"
        opset = FALLBACK_OPSET if form == "plain" else ATTENTION_OPSET
        progress(f"writing ONNX, attention {form!r}")
        artifact = export_onnx(program, onnx, opset=opset, fallback_opset=None, form=form)
        built = build_engine(
            onnx,
            flavour,
            inputs,
            compute_capability=elsewhere,
            workspace_bytes=workspace_bytes,
            timing_cache=cache_path.read_bytes() if cache_path is not None and cache_path.is_file() else None,
            progress=progress,
        )
        staged = directory / target.name
        try:
            staged.write_bytes(built.data)
        except OSError as error:
            raise InputError(f"cannot write {target}: {error}; free some space or give another path") from error
        sidecar = Sidecar(
            format=flavour,
            inputs=inputs,
            outputs=tuple(replace(s) for s in output_specs(program, tensor_outputs(program))),
            attention=_described(built.attentions, artifact.attention_ops, form),
            built_for=built_for,
            opset=artifact.opset,
            precision=precision_of(program),
            plan=plan,
            versions={trt.__name__: str(trt.__version__)},
            notes=(*notes, *artifact.notes),
        ).write(staged)
        publish(staged, target, (sidecar_path(target),))
        if cache_path is not None and built.timing_cache:
            write_whole(cache_path, built.timing_cache, overwrite=True)
    return sidecar


def _described(layers: Sequence[AttentionLayer], counts: Mapping[str, int], form: str) -> tuple[str, ...]:
    if not layers:
        chains = counts.get("Softmax", 0) + counts.get("Attention", 0)
        return (f"{chains} attentions as MatMul and Softmax; whether they are fused is TensorRT's choice",)
    said = []
    for fused in (True, False):
        names = [layer.name for layer in layers if layer.fused == fused]
        if names:
            kernel = "one fused kernel each" if fused else "decomposed, since no fused kernel exists for them"
            causal = sum(layer.causal for layer in layers if layer.fused == fused)
            said.append(f"{len(names)} attentions, form {form!r} ({causal} causal): {kernel} ({', '.join(names)})")
    return tuple(said)
