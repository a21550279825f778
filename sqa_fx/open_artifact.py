"""The Runner of an exported file, by what its sidecar says it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sqa_fx.errors import InputError
from sqa_fx.exporters.sidecar import Sidecar, sidecar_path
from sqa_fx.runners import Runner

SUFFIXES = (".onnx", ".pt2", ".engine", ".plan", ".ep")


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is an exported file that a runner exists for: an .onnx, or one with a sidecar."""
    return Path(path).suffix == ".onnx" or (Path(path).suffix in SUFFIXES and sidecar_path(path).is_file())


def open_artifact(
    path: str | os.PathLike[str], name: str | None = None, *, device: str = "cpu", **options: Any
) -> Runner:
    """The runner of the exported file at ``path``, called ``name`` (default: its format) in reports.

    ``device`` ("cpu", "cuda") is where an .onnx runs; other files have theirs. ``options`` go to the runner. Raises
    InputError and MissingError as the runner does.
    """
    target = Path(path)
    kind = "onnx" if target.suffix == ".onnx" else Sidecar.read(target, check=False).format
    if kind == "onnx":
        from sqa_fx.runners import CPU_PROVIDER, OnnxRunner

        providers = ("CUDAExecutionProvider", CPU_PROVIDER) if device == "cuda" else (CPU_PROVIDER,)
        return OnnxRunner(target, name or "onnx", providers=providers, **options)
    if kind == "aoti":
        from sqa_fx.aoti_runner import AotiRunner

        return AotiRunner(target, name or kind, **options)
    if kind in ("tensorrt", "tensorrt-rtx"):
        from sqa_fx.tensorrt_runner import TensorRtRunner

        return TensorRtRunner(target, name or kind, **options)
    if kind == "torch-tensorrt":
        from sqa_fx.torch_tensorrt_runner import TorchTensorRtRunner

        return TorchTensorRtRunner(target, name or kind, **options)
    raise InputError(f"{target} is of format {kind!r}, which this version of sqa-fx cannot run")
