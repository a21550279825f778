"""An export's own check: the file is run where it can be run, at the ends of its ranges, before it is published."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sqa_fx.errors import MissingError
from sqa_fx.exporters.sidecar import AxisRange, Sidecar, TensorSpec
from sqa_fx.exporters.tensorrt_library import gpu_capability
from sqa_fx.flat_program import FlatProgram
from sqa_fx.open_artifact import open_artifact
from sqa_fx.shape_sets import input_sets_at_shapes
from sqa_fx.validate import ValidationReport, validate

# Elements that the dynamic axes may have together in a check: it also runs in float64, whole scores and all.
_ELEMENTS = {"cpu": 2**10, "cuda": 2**13}


def check_export(
    path: str | os.PathLike[str],
    program: torch.export.ExportedProgram,
    vocabulary: int | None,
    *,
    device: str,
) -> tuple[ValidationReport | None, tuple[str, ...]]:
    """Compare the file at ``path`` with the ``program`` that it was made from, at min, opt, max and one odd size.

    The reference runs in float64 on ``device``. Sizes so large that this would take long are bounded, and a note says
    where. Without what the file needs to run (a GPU, a library) there is no report, and the note says why.
    """
    sidecar = Sidecar.read(path, check=False)  # the runner compares the digests
    built_for, here = sidecar.built_for, gpu_capability()
    if built_for is not None and built_for.startswith("sm_") and here not in (None, built_for):
        return None, (f"it is for {built_for}, and this GPU is {here}",)
    if sidecar.format == "onnx" and device == "cpu" and "bfloat16" in (sidecar.precision or ""):
        return None, ("onnxruntime has no bfloat16 kernels on the CPU",)
    try:
        runner = open_artifact(path, device=device)
    except MissingError as missing:
        return None, (str(missing),)
    bounded, notes = _bounded(sidecar.inputs, _ELEMENTS[device])
    sets = input_sets_at_shapes(bounded, vocabulary=vocabulary, device=device)
    reference = FlatProgram(program)
    report = validate(
        reference,
        [runner],
        [((), tensors) for _, tensors in sets],
        labels=[label for label, _ in sets],
    )
    return report, notes


def verdict(report: ValidationReport | None, notes: Sequence[str]) -> dict[str, Any]:
    """What the sidecar says of the check."""
    if report is None:
        return {"checked": False, "reason": notes[0] if notes else "not asked for"}
    return {"checked": True, **report.summary(), "notes": [*notes, *report.notes]}


def _bounded(specs: Sequence[TensorSpec], elements: int) -> tuple[tuple[TensorSpec, ...], tuple[str, ...]]:
    """The specs with maxima (and opt) lowered until all dynamic axes together have at most ``elements``."""
    axes = {n.name: n for s in specs for n in s.shape if isinstance(n, AxisRange)}
    highest = {name: max(1, axis.max if axis.max is not None else axis.opt) for name, axis in axes.items()}
    lowest = {name: max(1, axis.min) for name, axis in axes.items()}
    lowered: set[str] = set()
    while _product(highest) > elements:
        largest = max(highest, key=lambda name: highest[name] / lowest[name])
        if highest[largest] <= lowest[largest]:
            break
        highest[largest] = max(lowest[largest], highest[largest] // 2)
        lowered.add(largest)
    if not lowered:
        return tuple(specs), ()
    narrowed = {
        name: AxisRange(name, lowest[name], min(max(axis.opt, lowest[name]), highest[name]), highest[name])
        for name, axis in axes.items()
    }
    said = ", ".join(f"{name} up to {highest[name]}" for name in sorted(lowered))
    shapes = tuple(
        replace(s, shape=tuple(narrowed[n.name] if isinstance(n, AxisRange) else n for n in s.shape)) for s in specs
    )
    return shapes, (f"checked at {said}, not to the end of the range",)


def _product(sizes: dict[str, int]) -> int:
    total = 1
    for size in sizes.values():
        total *= size
    return total
