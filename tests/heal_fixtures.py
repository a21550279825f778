"""What the tests of healing share: a short run's options, teacher and student as fixtures, comparisons of weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from heal_models import student, teacher
from torch import Tensor, nn

import sqa_fx

QUICK: dict[str, Any] = {"steps": 6, "lr": 3e-3, "warmup": 2, "progress": False, "device": "cpu", "log_every": 1}


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return teacher()


@pytest.fixture(scope="module")
def _converted(original: nn.Module) -> sqa_fx.ConvertedModule:
    return student(original)


@pytest.fixture
def converted(_converted: sqa_fx.ConvertedModule) -> sqa_fx.ConvertedModule:
    return copy.deepcopy(_converted)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def changed_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {n for n in a if not torch.equal(a[n], b[n])}
