"""A small GPT in plain PyTorch: rotary positions, RMS norms, a GELU MLP, any number of query and KV heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal attention with ``hq`` query heads on ``hkv`` KV heads."""

    def __init__(self, width: int, head_dim: int, hq: int, hkv: int) -> None:
        super().__init__()
        self.hq, self.hkv, self.head_dim = hq, hkv, head_dim
        self.q = nn.Linear(width, hq * head_dim, bias=False)
        self.k, self.v = (nn.Linear(width, hkv * head_dim, bias=False) for _ in range(2))
        self.o = nn.Linear(hq * head_dim, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x and the result: [batch, length, width]; cos and sin: [length, head_dim]."""
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.hq, self.head_dim).transpose(1, 2)
        k, v = (m(x).view(batch, length, self.hkv, self.head_dim).transpose(1, 2) for m in (self.k, self.v))
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.hq != self.hkv)
        out: Tensor = self.o(y.transpose(1, 2).reshape(batch, length, -1))
        return out


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [batch, heads, length, head_dim]."""
    half = x.shape[-1] // 2
    other = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos.to(x.dtype) + other * sin.to(x.dtype)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, width: int, head_dim: int, hq: int, hkv: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, head_dim, hq, hkv)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x and the result: [batch, length, width]."""
        x = x + self.attention(self.norm1(x), cos, sin)
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Gpt(nn.Module):
    """Token ids [batch, length] to logits [batch, length, vocabulary]."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, hq: int, hkv: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.words = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width, self.head_dim, hq, hkv) for _ in range(layers)])
        self.norm = nn.RMSNorm(width)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                scale = 0.02 / (2 * layers) ** 0.5 if name.endswith(("o.weight", "down.weight")) else 0.02
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
        return F.linear(self.norm(x), self.words.weight)
