"""Export by file name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sqa_fx.deferred import DeferredModule
from sqa_fx.errors import InputError
from sqa_fx.inputs import example_inputs
from sqa_fx.module import ConvertedModule
from sqa_fx.partly import PartlyConvertedModule
from sqa_fx.passes.capture_ways import automatic_shapes

if TYPE_CHECKING:
    from sqa_fx.exporters.to_onnx import OnnxArtifact


def export(
    model: nn.Module | torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "auto",
    opset: int = 24,
    overwrite: bool = False,
) -> OnnxArtifact:
    """Export a converted module, a plain module or an ExportedProgram to ``path``; ``.onnx`` says ONNX.

    A converted module brings its own example inputs and dynamic shapes. Raises InputError for another suffix, a path
    that exists or cannot be written, or a module without example inputs, and whatever the exporter raises.
    """
    from sqa_fx.exporters.to_onnx import export_onnx

    if Path(path).suffix != ".onnx":
        raise InputError(f"{path}: the suffix says the format, and the known one is .onnx")
    if isinstance(model, DeferredModule):
        model = model._done()
    if isinstance(model, PartlyConvertedModule):
        raise InputError(
            f"{path}: the model was converted per submodule ({', '.join(model.submodules)}), because it cannot be "
            "exported whole; so it cannot be exported to ONNX either. Each of these is an nn.Module that can: "
            "sqa_fx.export(model.eager.get_submodule(name), ...)"
        )
    if isinstance(model, ConvertedModule):
        return export_onnx(
            model.graph_module,
            path,
            args=tuple(model.example_args),
            kwargs=model.example_kwargs,
            dynamic_shapes=model.dynamic_shapes,
            opset=opset,
            overwrite=overwrite,
        )
    if isinstance(model, torch.export.ExportedProgram):
        return export_onnx(model, path, opset=opset, overwrite=overwrite)
    given: tuple[tuple[Any, ...], dict[str, Any]] | None = (tuple(args), dict(kwargs or {}))
    if not args and not kwargs:
        given = example_inputs(model)
    if given is None:
        raise InputError(f"{type(model).__name__} says nothing of its inputs: pass args= or kwargs=")
    shapes = automatic_shapes(model, *given) if isinstance(dynamic_shapes, str) else dynamic_shapes
    return export_onnx(
        model, path, args=given[0], kwargs=given[1], dynamic_shapes=shapes, opset=opset, overwrite=overwrite
    )
