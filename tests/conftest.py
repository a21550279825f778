"""Test session set-up: one torch thread per worker, and torchvision importable beside a CPU-only torch."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; more threads than cores only slow each other down

_libraries: list[torch.library.Library] = []  # a library's operators live as long as the object


def _declare_torchvision_ops() -> None:
    """Declare the operators whose fake kernels torchvision registers at import, where no compiled ones are loaded."""
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


try:
    import torchvision  # noqa: F401
except ImportError:
    pass  # not installed: what needs it skips with this reason
except RuntimeError:
    # A failed import of torchvision leaves half of its modules behind; they must go before the second try.
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_torchvision_ops()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
