"""Test session set-up: one torch thread per worker, no network, torchvision importable beside a CPU-only torch, and a
garbage collector that looks at what is new only.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config: pytest.Config) -> None:
    """Before the tests are imported; the process that hands them out to workers runs none and needs no torch."""
    worker = "PYTEST_XDIST_WORKER" in os.environ
    if config.getoption("dist", "no") != "no" and not worker:
        return
    import torch

    from sqa_fx.torchvision_ops import make_torchvision_importable

    if worker:
        torch.set_num_threads(1)  # the workers share the cores; more threads than cores only slow each other down
    make_torchvision_importable()


# Tracing makes millions of short-lived objects beside the millions that torch and transformers keep: with Python's own
# thresholds, a quarter of the tests' time goes into walking the latter again and again.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def _freeze() -> Iterator[None]:
    """What libraries hold when a module's tests begin is looked at no more."""
    gc.collect()
    gc.freeze()
    yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing that other tests compiled is there, nor anything left for them."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
