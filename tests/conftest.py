"""Test session set-up: one torch thread per worker, no network, and torchvision importable beside a CPU-only torch."""

from __future__ import annotations

import os

import pytest
import torch

from sqa_fx.torchvision_ops import make_torchvision_importable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; more threads than cores only slow each other down

make_torchvision_importable()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
