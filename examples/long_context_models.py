"""Models in today's shapes at long contexts, few layers each, and the head counts that they are converted to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from bench_models import SHAPES, Attention, Bert, Llama, Shape, Vit
from torch import Tensor, nn, zeros


class DiffusionLayer(nn.Module):
    """Bidirectional attention and a GELU MLP, shifted, scaled and gated by a condition (adaLN-Zero of DiT)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape, causal=False)
        self.modulation = nn.Linear(shape.width, 6 * shape.width)
        self.up, self.down = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, shape.width)
        self.norm = nn.LayerNorm(shape.width, elementwise_affine=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x and the result: [batch, length, width]; condition [width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6)
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        y = self.norm(x) * (1 + scale2) + shift2
        out: Tensor = x + gate2 * self.down(F.gelu(self.up(y), approximate="tanh"))
        return out


class DiffusionTransformer(nn.Module):
    """A diffusion transformer over latents that are cut into tokens, at one step's embedding."""

    def __init__(self, shape: Shape, layers: int, max_length: int) -> None:
        super().__init__()
        self.condition = nn.Parameter(zeros(shape.width).normal_())
        self.positions = nn.Parameter(zeros(max_length, shape.width).normal_(std=0.02))
        self.layers = nn.ModuleList([DiffusionLayer(shape) for _ in range(layers)])
        self.norm = nn.LayerNorm(shape.width, elementwise_affine=False)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [batch, length, width]."""
        x = x + self.positions[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, self.condition)
        out: Tensor = self.out(self.norm(x))
        return out


@dataclass(frozen=True)
class Case:
    """A shape, the lengths that it is measured at, and query and KV heads by the name of the conversion."""

    shape: Shape
    lengths: tuple[int, ...]
    heads: dict[str, tuple[int, int]]


def _variants(heads: int) -> dict[str, tuple[int, int]]:
    return {"SQA": (heads // 2, heads // 4), "sSQA": (heads // 2, heads // 2), "xSQA": (heads // 4, heads // 4)}


_GROUPED = {"(16, 8)": (16, 8), "(16, 4)": (16, 4)}
CASES = {
    # Head size 64: 32 query and 8 KV heads, and the same heads at head size 128.
    "llama-1b": Case(SHAPES["llama-1b"], (8192, 32768, 131072), _GROUPED),
    "llama-8b": Case(Shape(4096, 32, 8, 14336, 32, Llama, tokens=True), (8192, 32768, 131072), _GROUPED),
    # ViT-L/16 at 1024 x 1024 pixels, and at twice that.
    "vit-l-1024px": Case(Shape(1024, 16, 16, 4096, 24, Vit, tokens=False), (4096, 16384), _variants(16)),
    # 24 heads of 128 over 4096 image tokens (1024 x 1024 pixels), and at twice that.
    "diffusion": Case(Shape(3072, 24, 24, 12288, 19, DiffusionTransformer, tokens=False), (4096, 16384), _variants(24)),
    "document-encoder": Case(Shape(1024, 16, 16, 4096, 24, Bert, tokens=True), (32768,), _variants(16)),
}


def scaled(case: Case, head_dim: int | None) -> Case:
    """The case with heads of another size, and a width and an MLP to match."""
    if head_dim is None:
        return case
    shape = case.shape
    width = shape.heads * head_dim
    return replace(case, shape=replace(shape, width=width, hidden=shape.hidden * width // shape.width))
