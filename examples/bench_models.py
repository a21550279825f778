"""Models in the shapes that people run, with random weights and any number of layers: ViT-B, BERT-base, Llama-1B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 32000


@dataclass(frozen=True)
class Shape:
    """The sizes of one model; ``layers`` is what the real one has."""

    width: int
    heads: int
    kv_heads: int
    hidden: int
    layers: int
    build: Callable[[Shape, int, int], nn.Module]
    tokens: bool

    def inputs(self, batch: int, length: int, dtype: torch.dtype, device: str) -> Tensor:
        """Token ids, or patches [batch, length, width]."""
        if self.tokens:
            return torch.randint(VOCABULARY, (batch, length), device=device)
        return torch.randn(batch, length, self.width, dtype=dtype, device=device)


class Attention(nn.Module):
    """Grouped attention, causal and rotary where ``causal``; without masks."""

    def __init__(self, shape: Shape, causal: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal = shape.heads, shape.kv_heads, causal
        self.head_dim = shape.width // shape.heads
        self.q = nn.Linear(shape.width, shape.width, bias=not causal)
        self.k, self.v = (nn.Linear(shape.width, self.kv_heads * self.head_dim, bias=not causal) for _ in range(2))
        self.o = nn.Linear(shape.width, shape.width, bias=not causal)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [batch, length, width]."""
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k, v = (m(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2) for m in (self.k, self.v))
        if self.causal:
            q, k = rotated(q), rotated(k)
        grouped = self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=grouped)
        out: Tensor = self.o(y.transpose(1, 2).reshape(batch, length, -1))
        return out


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding of x [batch, heads, length, head_dim]."""
    half = x.shape[-1] // 2
    positions = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)
    rates = 10000 ** -torch.linspace(0, 1, half, device=x.device)
    angles = torch.cat([positions[:, None] * rates] * 2, -1)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    out: Tensor = x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)
    return out


class EncoderLayer(nn.Module):
    """Attention and a GELU MLP; layer norms before (ViT) or after (BERT)."""

    def __init__(self, shape: Shape, norm_first: bool) -> None:
        super().__init__()
        self.attention = Attention(shape, causal=False)
        self.up, self.down = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, shape.width)
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.norm_first = norm_first

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [batch, length, width]."""
        if self.norm_first:
            x = x + self.attention(self.norm1(x))
            out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
            return out
        x = self.norm1(x + self.attention(x))
        out = self.norm2(x + self.down(F.gelu(self.up(x))))
        return out  # noqa: RET504


class Vit(nn.Module):
    """A ViT after its patches are cut out."""

    def __init__(self, shape: Shape, layers: int, max_length: int) -> None:
        super().__init__()
        self.project = nn.Linear(shape.width, shape.width)
        self.positions = nn.Parameter(0.02 * torch.randn(max_length, shape.width))
        self.layers = nn.ModuleList([EncoderLayer(shape, norm_first=True) for _ in range(layers)])
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [batch, patches, width]."""
        x = self.project(x) + self.positions[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out


class Bert(nn.Module):
    """A BERT over token ids [batch, length], to its last hidden state."""

    def __init__(self, shape: Shape, layers: int, max_length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Parameter(0.02 * torch.randn(max_length, shape.width))
        self.norm = nn.LayerNorm(shape.width)
        self.layers = nn.ModuleList([EncoderLayer(shape, norm_first=False) for _ in range(layers)])

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, length] to [batch, length, width]."""
        x: Tensor = self.norm(self.words(input_ids) + self.positions[: input_ids.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return x


class LlamaLayer(nn.Module):
    """Causal rotary attention and a SwiGLU MLP, RMS norms before both."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape, causal=True)
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [batch, length, width]."""
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class Llama(nn.Module):
    """A Llama over token ids [batch, length], to its last hidden state (prefill needs no more)."""

    def __init__(self, shape: Shape, layers: int, max_length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, shape.width)
        self.layers = nn.ModuleList([LlamaLayer(shape) for _ in range(layers)])
        self.norm = nn.RMSNorm(shape.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, length] to [batch, length, width]."""
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out


SHAPES = {
    "vit-b": Shape(768, 12, 12, 3072, 12, Vit, tokens=False),
    "bert-base": Shape(768, 12, 12, 3072, 12, Bert, tokens=True),
    "llama-1b": Shape(2048, 32, 8, 8192, 16, Llama, tokens=True),
}


def build(name: str, layers: int | None, max_length: int, dtype: torch.dtype, device: str) -> nn.Module:
    """The model ``name`` with ``layers`` (None: its own number) in eval mode."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    return shape.build(shape, layers or shape.layers, max_length).to(device, dtype).eval()
