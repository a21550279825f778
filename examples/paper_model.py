"""The dense model of the paper in plain PyTorch, with any numbers of query and KV heads, and the paper's variants.

Source of sizes and variants: arXiv 2510.01817 and docs/research/sparse_query_attention.md of RxAI-dev/RxNN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from small_gpt import turned
from torch import Tensor, nn

VARIANTS = {
    "MHA": (16, 16),
    "GQA": (16, 4),
    "MQA": (16, 1),
    "SQA": (8, 4),
    "sSQA": (8, 8),
    "xSQA": (4, 4),
    "xSMQA": (4, 1),
    "lSQA": (12, 4),
    "rSQA": (4, 8),
}
"""Query and KV heads of 16; one number of lSQA and of rSQA, which the paper leaves open, is as in `sqa_fx.request`."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the dense model; 12 million parameters with 16 KV heads."""

    width: int = 256
    layers: int = 8
    heads: int = 16
    hidden: int = 768
    vocabulary: int = 10_000

    @property
    def head_dim(self) -> int:
        """Of every head, however many are left."""
        return self.width // self.heads


class Attention(nn.Module):
    """Causal rotary attention; with fewer query heads than KV heads, query heads repeat (rSQA)."""

    def __init__(self, sizes: Sizes, hq: int, hkv: int) -> None:
        super().__init__()
        self.hq, self.hkv, self.head_dim = hq, hkv, sizes.head_dim
        self.q = nn.Linear(sizes.width, hq * self.head_dim, bias=False)
        self.k, self.v = (nn.Linear(sizes.width, hkv * self.head_dim, bias=False) for _ in range(2))
        self.o = nn.Linear(max(hq, hkv) * self.head_dim, sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x and the result: [batch, length, width]; cos and sin: [length, head_dim]."""
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.hq, self.head_dim).transpose(1, 2)
        k, v = (m(x).view(batch, length, self.hkv, self.head_dim).transpose(1, 2) for m in (self.k, self.v))
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        if self.hq < self.hkv:
            q = q.repeat_interleave(self.hkv // self.hq, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.hq > self.hkv)
        out: Tensor = self.o(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class Block(nn.Module):
    """Attention and a SwiGLU MLP, each behind an RMS norm and added to the residual stream."""

    def __init__(self, sizes: Sizes, hq: int, hkv: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(sizes.width), nn.RMSNorm(sizes.width)
        self.attention = Attention(sizes, hq, hkv)
        self.gate, self.up = (nn.Linear(sizes.width, sizes.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x and the result: [batch, length, width]."""
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class DenseModel(nn.Module):
    """Token ids [batch, length] to logits [batch, length, vocabulary]; embedding and output have weights of their
    own, without which the paper's 12 million parameters are not reached."""

    def __init__(self, sizes: Sizes, hq: int, hkv: int) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.words = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList([Block(sizes, hq, hkv) for _ in range(sizes.layers)])
        self.norm = nn.RMSNorm(sizes.width)
        self.out = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                scale = 0.02 / (2 * sizes.layers) ** 0.5 if name.endswith(("o.weight", "down.weight")) else 0.02
                nn.init.normal_(p, std=scale)

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, length] to [batch, length, vocabulary]."""
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        rates = 10000 ** -torch.linspace(0, 1, self.head_dim // 2, device=ids.device)
        angles = torch.cat([positions[:, None] * rates] * 2, -1)
        cos, sin = angles.cos(), angles.sin()
        x = self.words(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        out: Tensor = self.out(self.norm(x))
        return out
