"""Attention written in less common ways: one small module per form, all of six query heads unless said otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, DIM = 22, 6, 5


class Base(nn.Module):
    """Separate projections to [batch, heads, seq, head_dim], plain attention and an output projection."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k = nn.Linear(WIDTH, self.kv_heads * DIM)
        self.v = nn.Linear(WIDTH, self.kv_heads * DIM)
        self.o = nn.Linear(HEADS * DIM, WIDTH)

    def split(self, t: Tensor) -> Tensor:
        return t.view(*t.shape[:2], -1, DIM).transpose(1, 2)

    def join(self, t: Tensor) -> Tensor:
        out: Tensor = self.o(t.transpose(1, 2).flatten(2))
        return out

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        repeat = HEADS // self.kv_heads
        k, v = (self.split(p(x)).repeat_interleave(repeat, 1) for p in (self.k, self.v))
        return self.split(self.q(x)), k, v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT / math.sqrt(DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.join(self.scores(q, k).softmax(-1) @ v)


class NormOverHeads(Base):
    """An RMS norm over all heads of the query and of the key together, written out."""

    kv_heads = 3

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([torch.rand(HEADS * DIM) + 0.5, torch.rand(3 * DIM) + 0.5])

    def norm(self, t: Tensor, gain: Tensor) -> Tensor:
        return gain * (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (self.split(self.norm(p(x), g)) for p, g in zip((self.q, self.k), self.gains, strict=True))
        k, v = (t.repeat_interleave(2, 1) for t in (k, self.split(self.v(x))))
        return q, k, v


class FusedNormOverHeads(Base):
    """Layer norms over all heads of q and k, behind one projection for q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)
        self.norms = nn.ModuleList([nn.LayerNorm(HEADS * DIM) for _ in range(2)])
        del self.q, self.k, self.v

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.split(self.norms[0](q)), self.split(self.norms[1](k)), self.split(v)


class OneKeyValueHead(Base):
    """One key and value head, repeated for every query head, with a rotary table longer than the sequence."""

    kv_heads = 1
    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.rand(50, DIM))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        turn = self.angles[: x.shape[1]]
        return q * turn.cos(), k * turn.cos(), v


class Sigmoid(Base):
    """Sigmoid weights instead of a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.join((self.scores(q, k) - 2).sigmoid() @ v)


class SquaredRelu(Base):
    """Squared relu weights."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.join((self.scores(q, k).relu().pow(2) / x.shape[1]) @ v)


class WrittenOut(Base):
    """A softmax written out, normalised after the values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        s = self.scores(q, k)
        e = (s - s.amax(-1, keepdim=True)).exp()
        return self.join((e @ v) / (1 + e.sum(-1, keepdim=True)))


class LogSoftmax(Base):
    """The exponential of a log softmax, over the other dimension of transposed scores."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.join(self.scores(k, q).log_softmax(-2).exp().mT @ v)


class Distances(Base):
    """Negative squared distances as scores."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return -torch.cdist(q, k).pow(2)


class TopK(Base):
    """Only the two best keys of every query and head."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        s = super().scores(q, k)
        return s.masked_fill(s < s.topk(2, dim=-1).values[..., -1:], float("-inf"))


class Gathered(Base):
    """Position scores of the query with a table, gathered by distance (as in disentangled attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(HEADS, 30, DIM))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[2]
        places = (torch.arange(n)[:, None] - torch.arange(n)[None, :]).abs().clamp(max=29)
        position = (q @ self.table.mT).gather(-1, places.expand(q.shape[0], HEADS, n, n))
        return super().scores(q, k) + position


class Differential(Base):
    """Two softmaxes per head of which one is subtracted; a norm within each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(WIDTH, 2 * HEADS * DIM) for _ in range(2))
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k = (self.split(p(x)) for p in (self.q, self.k))
        p = self.scores(q, k).softmax(-1).view(b, HEADS, 2, n, n)
        out = (p[:, :, 0] - self.weight * p[:, :, 1]) @ self.split(self.v(x))
        return self.join(F.rms_norm(out, (DIM,)))


class PairedOutputs(Base):
    """Head i and head i + 3 are combined before the output projection: three pairs."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        a, b = F.scaled_dot_product_attention(q, k, v).chunk(2, 1)
        return self.join(torch.cat([a - 0.3 * b, a + b], 1))


class TwoSources(Base):
    """Attention over the sequence and over a second source, added before one output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.ModuleList([nn.Linear(WIDTH, HEADS * DIM) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k2, v2 = (self.split(p(x[:, ::2])) for p in self.other)
        first, second = F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k2, v2)
        return self.join(first + 0.5 * second)


class Loop(Base):
    """One head after the other, from fused projections."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], HEADS, DIM) for p in (self.q, self.k, self.v))
        each = [F.scaled_dot_product_attention(q[:, :, h], k[:, :, h], v[:, :, h]) for h in range(HEADS)]
        out: Tensor = self.o(torch.cat(each, -1))
        return out


class ListOfHeads(nn.Module):
    """Every head is a module with projections of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(
            [nn.ModuleList([nn.Linear(WIDTH, DIM, bias=i != 1) for i in range(3)]) for _ in range(HEADS)]
        )
        self.o = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for head in self.each:
            assert isinstance(head, nn.ModuleList)
            q, k, v = (p(x) for p in head)
            outs.append((q @ k.mT).softmax(-1) @ v)
        out: Tensor = self.o(torch.cat(outs, -1))
        return out


class StackedHeads(Base):
    """Heads split by stacking chunks."""

    def split(self, t: Tensor) -> Tensor:
        return torch.stack(t.chunk(HEADS, -1), 1)


class GroupNorm(Base):
    """A group norm with one group per head before the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(HEADS, HEADS * DIM)

    def join(self, t: Tensor) -> Tensor:
        flat = t.transpose(1, 2).flatten(2)
        normed = self.norm(flat.flatten(0, 1)).view_as(flat)
        out: Tensor = self.o(normed)
        return out


class WeightNorm(Base):
    """Projections with weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.utils.parametrizations.weight_norm(p) for p in (self.q, self.k))


class MatrixPerHead(Base):
    """Bilinear scores with a matrix for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Parameter(torch.randn(HEADS, DIM, DIM))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(torch.einsum("bhld,hde->bhle", q, self.middle), k)


class ProjectedPositions(nn.Module):
    """Keys and values of a fixed length are projected along positions."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.shorter = Base(), nn.Parameter(torch.randn(4, 9))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.base.heads(x)
        k, v = (torch.einsum("rn,bhnd->bhrd", self.shorter, t) for t in (k, v))
        return self.base.join(self.base.scores(q, k).softmax(-1) @ v)


class GroupedConvolutions(Base):
    """Projections that are convolutions with channel groups."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv1d(24, HEADS * DIM, 1, groups=2) for _ in range(3))  # type: ignore[assignment]
        self.wide = nn.Linear(WIDTH, 24)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.wide(x).mT
        q, k, v = (p(y).unflatten(1, (HEADS, DIM)).mT for p in (self.q, self.k, self.v))
        return q, k, v


class ValuesGate(Base):
    """A score bias made from all values, one for each key and value head."""

    kv_heads = 3

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Linear(3 * DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        bias = F.softplus(self.bias(self.v(x))).transpose(1, 2).repeat_interleave(2, 1)
        return self.join((self.scores(q, k) + bias[:, :, None]).softmax(-1) @ v)


class LearnedQueries(Base):
    """Queries made from parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, WIDTH))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, k, v = super().heads(x)
        q = self.q(self.latents).view(4, HEADS, DIM).transpose(0, 1)
        return q, k, v

    def join(self, t: Tensor) -> Tensor:
        return super().join(t)


class DataDependentLength(Base):
    """A table cut to a length that is computed from the data."""

    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(WIDTH, HEADS * DIM)
        self.register_buffer("rows", torch.randn(40, WIDTH))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        n = int((x.abs().amax() * 0 + 4).long().item())
        torch._check(n >= 1)
        torch._check(n <= 40)
        rows = self.split(self.table(self.rows[:n][None]))
        return q + rows.mean(2, keepdim=True), k, v


class LongTable(Base):
    """A bias table with a head axis, longer than the sequence, cut to its length."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.randn(HEADS, 40, 40))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[2]
        return super().scores(q, k) + self.bias[:, :n, :n]


class ScatteredBias(Base):
    """A fused bias whose key part is set to zero in place."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)
        del self.q, self.k, self.v

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.qkv.bias.clone()
        bias[HEADS * DIM : 2 * HEADS * DIM].zero_()
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return self.split(q), self.split(k), self.split(v)


FORMS: dict[str, Callable[[], nn.Module]] = {
    c.__name__: c
    for c in (
        NormOverHeads, FusedNormOverHeads, OneKeyValueHead, Sigmoid, SquaredRelu, WrittenOut, LogSoftmax, Distances,
        TopK, Gathered, Differential, PairedOutputs, TwoSources, Loop, ListOfHeads, StackedHeads, GroupNorm,
        WeightNorm, MatrixPerHead, ProjectedPositions, GroupedConvolutions, ValuesGate, LearnedQueries,
        DataDependentLength, LongTable, ScatteredBias,
    )
}  # fmt: skip
# Query heads and KV heads of the forms that have not six of both.
COUNTS = {
    "NormOverHeads": (6, 3),
    "OneKeyValueHead": (6, 1),
    "PairedOutputs": (3, 3),
    "ValuesGate": (6, 3),
}
