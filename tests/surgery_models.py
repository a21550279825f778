"""Small attention modules that take their head counts from attributes, or do not; and what a model's whole state is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, HEAD_DIM = 30, 6, 5


class Plain(nn.Module):
    """Three projections; ``heads`` and ``inner`` are read on every call."""

    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.heads, self.inner, self.scale = heads, heads * HEAD_DIM, HEAD_DIM**-0.5
        self.q, self.k, self.v = (nn.Linear(WIDTH, self.inner) for _ in range(3))
        self.o = nn.Linear(self.inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, length, width]."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = (q * self.scale @ k.transpose(-1, -2)).softmax(-1)
        out: Tensor = x + self.o((weights @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], self.inner))
        return out


class PerHead(nn.Module):
    """A fused projection in the layout [heads, (q, k, v), head_dim], its pieces in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (HEADS, 3 * HEAD_DIM)
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, length, width]."""
        q, k, v = self.qkv(x).unflatten(-1, self.sizes).transpose(1, 2).chunk(3, -1)
        out: Tensor = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Literal(nn.Module):
    """Head counts in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, length, width]."""
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 6, 5).permute(2, 0, 3, 1, 4)
        out: Tensor = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return out


class TwoMeanings(nn.Module):
    """``width`` is both the width of the attention and that of the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = HEADS, WIDTH
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, length, width]."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, x.shape[1], self.width)
        out: Tensor = x + self.o(mixed).view(-1, x.shape[1], self.width)
        return out


@dataclass
class Config:
    """What modules share."""

    heads: int = HEADS


class FromConfig(nn.Module):
    """Reads its heads from a config that others hold, too."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, length, width]."""
        q, k, v = (p(x).unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        out: Tensor = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Scaled(nn.Module):
    """No attention: a factor that happens to be the number of heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, length, width]."""
        return x / self.config.heads


def state(model: nn.Module) -> list[Any]:
    """Everything that must be as it was: classes, modes, hooks, plain attributes, and tensors with their bits."""
    found: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        own = {n: v for n, v in vars(module).items() if n not in ("_parameters", "_buffers", "_modules")}
        found.append((path, type(module), {n: (id(v), repr(v)) for n, v in own.items()}))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.append((path, name, id(tensor), tensor.requires_grad, tensor.data_ptr(), tensor.tolist()))
    return found


def inputs() -> Tensor:
    """[batch, length, width]."""
    return torch.randn(3, 7, WIDTH)


class Remembering(Plain):
    """Keeps a bias [heads] that it computed from its weights in a table, by device."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS))
        self.known: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, length, width]."""
        fresh = self.bias * 2
        bias = fresh if torch.compiler.is_compiling() else self.known.setdefault(str(x.device), fresh)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        scores = q * self.scale @ k.transpose(-1, -2) + bias[:, None, None] * distance
        out: Tensor = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out
