"""The two libraries that build TensorRT engines, ``tensorrt`` (10, 11) and ``tensorrt_rtx``, as one.

What a version has is asked of the library itself (``hasattr``), never read off a version number.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import torch

from sqa_fx.errors import InputError, MissingError, first_line

log = logging.getLogger(__name__)
FLAVOURS = ("tensorrt", "tensorrt-rtx")
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_INSTALL = {
    "tensorrt": "pip install 'sqa-fx[tensorrt]'",
    "tensorrt-rtx": "pip install 'sqa-fx[tensorrt-rtx]'",
}


@functools.cache
def library(flavour: str) -> ModuleType:
    """The Python module of ``flavour``. Raises InputError for another flavour, MissingError when it is not installed or
    does not load."""
    if flavour not in FLAVOURS:
        raise InputError(f"{flavour!r} is no TensorRT: it is one of {', '.join(FLAVOURS)}")
    reasons = []
    for name in _MODULES[flavour]:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:  # a library that lacks its CUDA raises OSError
            reasons.append(f"{name}: {first_line(error)}")
    raise MissingError(f"{flavour} is not here ({'; '.join(reasons)}): {_INSTALL[flavour]}")


def logger(trt: Any) -> Any:
    """A logger of the library that keeps what it is told: ``.errors()`` are the messages worth showing to a user, and
    all goes to Python's logging too."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            name = str(severity).rsplit(".", 1)[-1]
            self.messages.append((name, message))
            log.debug("%s: %s", name, message)

        def errors(self, last: int = 3) -> list[str]:
            found = [m.strip() for name, m in self.messages if name in ("ERROR", "INTERNAL_ERROR")]
            return found[-last:]

    return Logger()


def capability_name(trt: Any, capability: str) -> Any:
    """The library's value for a compute capability as in "sm_89". Raises InputError when it cannot build for it."""
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        raise InputError(f"{trt.__name__} builds for the GPU that is here only: leave out the compute capability")
    wanted = canonical_capability(capability).replace("sm_", "SM")
    found = getattr(known, wanted, None)
    if found is None or not wanted.startswith("SM"):
        names = sorted(n.replace("SM", "sm_") for n in dir(known) if n.startswith("SM"))
        raise InputError(
            f"{trt.__name__} {trt.__version__} cannot build for {capability}; it knows {', '.join(names)}, and the GPU "
            "that is here"
        )
    return found


def canonical_capability(capability: str) -> str:
    """As sidecars and :func:`gpu_capability` write it: "sm_89" for "SM89", "sm89" and "8.9"."""
    digits = capability.lower().removeprefix("sm").removeprefix("_").replace(".", "")
    return f"sm_{digits}" if digits.isdecimal() else capability


def gpu_capability(device: torch.device | None = None) -> str | None:
    """The compute capability of ``device`` (None: the current GPU) as "sm_90"; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def require_gpu(name: str, built_for: str | None) -> None:
    """Raise MissingError without a GPU, and InputError for one that the engine ``name`` was not built for."""
    here = gpu_capability()
    if here is None:
        raise MissingError(f"{name} runs on a GPU of {built_for}, and there is no GPU here")
    if here != built_for:
        raise InputError(
            f"{name} was built for {built_for}, and this GPU is {here}: engines can be silently wrong elsewhere; "
            "export it again for this GPU"
        )
