"""A module as the exported program that every exporter starts from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sqa_fx.errors import CaptureError, InputError
from sqa_fx.exporters.program_checks import root_cause


def capture_program(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    notes: list[str],
) -> torch.export.ExportedProgram:
    """``module`` as an ExportedProgram (itself, if it is one); ``notes`` gets what the user must know of it.

    Raises CaptureError with torch's reason, and InputError for ``dynamic_shapes`` of an ExportedProgram.
    """
    if isinstance(module, torch.export.ExportedProgram):
        if dynamic_shapes is not None:
            raise InputError("dynamic_shapes has no effect on an ExportedProgram; give it to torch.export.export")
        return module
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # With it, nn.TransformerEncoderLayer is one opaque operator that no translation knows.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with quiet():
            try:
                return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            except Exception as first:
                try:
                    program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=True)
                except Exception:
                    raise CaptureError(
                        f"torch.export cannot capture {type(module).__name__}: {root_cause(first)}; check args, "
                        "kwargs and dynamic_shapes against forward, or pass an ExportedProgram"
                    ) from first
                notes.append(f"captured in strict mode, because non-strict failed: {root_cause(first)}")
                return program
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.onnx prints and warns a lot that is not about the user's model."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
