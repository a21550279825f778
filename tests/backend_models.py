"""What the tests of the torch.compile backend share: small models, and how they are compiled and compared."""

from __future__ import annotations

import copy
from typing import Any

import torch
from attention_models import FusedAttention, perturb, tensors
from plan_arithmetic import load_masked
from torch import Tensor, nn

import sqa_fx

HALF: dict[str, Any] = {"hq": 0.5, "hkv": 0.5, "inner": "eager"}


def compile_model(model: Any, **options: Any) -> Any:
    """The model with half of its heads, run in eager, where ``options`` do not say otherwise."""
    return torch.compile(model, backend="sqa_fx", options={**HALF, **options})


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Blocks(nn.Module):
    """Two attentions with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([FusedAttention(24, 8), FusedAttention(24, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def small() -> Blocks:
    torch.manual_seed(0)
    model = Blocks()
    perturb(model)
    return model.eval()


def masked(model: nn.Module, plan: sqa_fx.Plan) -> nn.Module:
    """A copy of the original that computes what the plan should make of it."""
    oracle = copy.deepcopy(model)
    load_masked(oracle, plan.to_json())
    return oracle


class Breaking(nn.Module):
    """Two attentions with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FusedAttention(24, 8), FusedAttention(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        torch._dynamo.graph_break()
        out: Tensor = x + self.second(x)
        return out
