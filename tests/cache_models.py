"""Attention over KV caches of several kinds: inputs that grow, inputs and buffers that are written in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 6, 3, 5, 28
ROOM = 11


class Cached(nn.Module):
    """Grouped-query attention with a cache [batch, KV heads, positions, head dim]; how it is kept, subclasses say."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM), nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [batch, heads, length, head dim] of x [batch, length, width]."""
        q, k, v = (p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention output [batch, length, width]."""
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


def seen(position: Tensor, length: int) -> Tensor:
    """Which of ROOM positions each of ``length`` new ones may read: [length, ROOM]."""
    return torch.arange(ROOM) <= position + torch.arange(length)[:, None]


class Growing(Cached):
    """Takes past keys and values, and returns longer ones."""

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.heads(x)
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return self.attend(q, k, v), k, v


class Stacked(Cached):
    """One tensor [2, batch, KV heads, positions, head dim] for keys and values, in and out."""

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.heads(x)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.attend(q, k, v), torch.stack([k, v])


class Written(Cached):
    """Writes into cache inputs in place, at positions that are an input."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        at = position + torch.arange(x.shape[1])
        for cache, new in ((cache_k, k), (cache_v, v)):
            if self.way == "index_copy":
                cache.index_copy_(2, at, new)
            elif self.way == "index_put":
                cache[:, :, at] = new
            elif self.way == "scatter":
                cache.scatter_(2, at[:, None].expand(new.shape), new)
            else:
                cache.copy_(torch.where(torch.arange(ROOM)[:, None] == at[0], new, cache))
        return self.attend(q, cache_k, cache_v, seen(position, x.shape[1]))


class Buffered(Cached):
    """Keeps its cache in buffers of its own."""

    cache_k: Tensor
    cache_v: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("cache_k", "cache_v"):
            self.register_buffer(name, torch.zeros(2, KV_HEADS, ROOM, HEAD_DIM))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        at = position + torch.arange(x.shape[1])
        self.cache_k[:, :, at] = k
        self.cache_v[:, :, at] = v
        return self.attend(q, self.cache_k, self.cache_v, seen(position, x.shape[1]))


class Crossing(Cached):
    """Reads keys and values that were made elsewhere, as an encoder-decoder does after its first step."""

    def forward(self, x: Tensor, cross_k: Tensor, cross_v: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        return self.attend(q, cross_k, cross_v)


class Summing(Crossing):
    """Also reads the cache in a way that is no attention."""

    def forward(self, x: Tensor, cross_k: Tensor, cross_v: Tensor) -> Tensor:
        return super().forward(x, cross_k, cross_v) + cross_k.mean()


class Elsewhere(Crossing):
    """Also returns keys joined to its input, and writes them into a buffer that no attention reads."""

    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(2, KV_HEADS, 3, HEAD_DIM))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = self.heads(x)
        self.kept.copy_(k)
        return self.attend(q, k, v), torch.cat([k.transpose(1, 2).flatten(2), x], -1)
