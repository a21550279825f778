"""Where something was measured: device, driver, and versions of the libraries that are installed."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from sqa_fx.version import __version__

_LIBRARIES = (
    *("onnxruntime", "onnxruntime-gpu", "onnx", "tensorrt", "tensorrt-rtx-cu13-libs", "triton"),
    *("transformers", "timm", "diffusers", "numpy"),
)


def device_name(device: torch.device | None) -> str:
    """The GPU's name for a CUDA ``device``; "CPU" with its architecture for None."""
    return f"CPU ({platform.machine()})" if device is None else torch.cuda.get_device_name(device)


def environment(device: torch.device | None) -> dict[str, str]:
    """What a measurement on ``device`` (None: the CPU) depends on, as names and texts; unknown is "unknown"."""
    found = {"device": device_name(device), "processor": _processor()}
    if device is not None:
        found |= {
            "compute capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
            "driver": _driver() or "unknown",
            "CUDA": str(torch.version.cuda or torch.version.hip or "unknown"),
        }
    found |= {
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sqa-fx": __version__,
    }
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # it took no part
    return found


def _processor() -> str:
    """The processor's name where Linux tells, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    """The version of NVIDIA's driver, which no function of torch tells; None where nvidia-smi does not say."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None
