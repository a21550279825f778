"""Every divisor pair (hq, hkv) of sites with eight query heads, on small models of different structure.

Each form is one attention (or one layer) with 8, 4 or 1 KV heads, where the form can have fewer of them than query
heads. A form is exported once for each number of KV heads; own head counts are asked of the module itself.

By default a part of the grid runs in which every form meets every hq and every hkv, and every hq every hkv; the marker
``slow`` is on the rest.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import EinsumAttention, converted, noise, perturb, tensors
from plan_arithmetic import load_masked
from torch import Tensor, nn

from sqa_fx.errors import PlanError

HEADS, DIM, WIDTH, BATCH, LENGTH = 8, 3, 11, 2, 5


class Separate(nn.Module):
    """Separate projections to [batch, heads, length, DIM]; KV heads are repeated for the query heads that read them."""

    def __init__(self, kv: int, width: int = WIDTH) -> None:
        super().__init__()
        self.kv = kv
        self.q, self.o = nn.Linear(width, HEADS * DIM), nn.Linear(HEADS * DIM, width)
        self.k, self.v = nn.Linear(width, kv * DIM), nn.Linear(width, kv * DIM)

    def split(self, t: Tensor) -> Tensor:
        heads: Tensor = t.unflatten(-1, (-1, DIM)).transpose(-3, -2)
        return heads

    def repeat(self, t: Tensor) -> Tensor:
        return t.repeat_interleave(HEADS // self.kv, -3)

    def join(self, t: Tensor) -> Tensor:
        out: Tensor = self.o(t.transpose(-3, -2).flatten(-2))
        return out

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.join((q @ self.repeat(k).mT / math.sqrt(DIM)).softmax(-1) @ self.repeat(v))


class RotaryDecoder(Separate):
    """Causal, with rotary positions on the first two channels of each head; SDPA serves the KV heads itself."""

    def turn(self, t: Tensor) -> Tensor:
        angles = torch.arange(t.shape[2], dtype=t.dtype)[:, None]
        a, b, rest = t.split(1, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = self.turn(q), self.turn(k)
        return self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv < HEADS))


class FusedEncoder(Separate):
    """One projection for q, k and v, and a mask of padding."""

    def __init__(self, kv: int) -> None:
        super().__init__(kv)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * kv) * DIM)
        del self.q, self.k, self.v

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        q, k, v = self.split(self.qkv(x)).split([HEADS, self.kv, self.kv], 1)
        k, v = self.repeat(k), self.repeat(v)
        return self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]))


class RelativeBias(Separate):
    """As in T5: no scale, a learned bias for each head and bucket of distances, softmax written as an op."""

    def __init__(self, kv: int) -> None:
        super().__init__(kv)
        self.bias = nn.Embedding(7, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        places = torch.arange(x.shape[1])
        distances = (places[None] - places[:, None]).clamp(-3, 3) + 3
        scores = q @ self.repeat(k).mT + self.bias(distances).permute(2, 0, 1)[None]
        return self.join(F.softmax(scores, -1) @ self.repeat(v))


class Windows(nn.Module):
    """As in Swin: windows of 2 x 3 in a rolled grid of 4 x 6, a bias table by head and a mask by window."""

    places: Tensor
    mask: Tensor

    def __init__(self, kv: int) -> None:
        super().__init__()
        assert kv == HEADS
        self.qkv, self.o = nn.Linear(WIDTH, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.table = nn.Parameter(torch.randn(15, HEADS))
        self.register_buffer("places", torch.randint(15, (36,)))
        self.register_buffer("mask", (torch.rand(4, 6, 6) < 0.3) * -100.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[0], x.shape[1]
        x = x.view(b, 4, 6, WIDTH).roll((-1, -1), (1, 2))
        x = x.view(b, 2, 2, 2, 3, WIDTH).transpose(2, 3).reshape(b * 4, 6, WIDTH)
        q, k, v = self.qkv(x).view(b * 4, 6, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        scores = (q / math.sqrt(DIM)) @ k.mT + self.table[self.places].view(6, 6, HEADS).permute(2, 0, 1)
        scores = (scores.view(b, 4, HEADS, 6, 6) + self.mask[:, None]).view(-1, HEADS, 6, 6)
        y = self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b * 4, 6, HEADS * DIM))
        y = y.view(b, 2, 2, 2, 3, WIDTH).transpose(2, 3).reshape(b, 4, 6, WIDTH).roll((1, 1), (1, 2))
        out: Tensor = y.reshape(b, n, WIDTH)
        return out


class LearnedQueries(Separate):
    """Cross attention of seven learned queries with a source of another width."""

    def __init__(self, kv: int) -> None:
        super().__init__(kv)
        self.k, self.v = nn.Linear(13, kv * DIM), nn.Linear(13, kv * DIM)
        self.latents = nn.Parameter(torch.randn(7, WIDTH))

    def forward(self, source: Tensor) -> Tensor:
        q = self.split(self.q(self.latents.expand(source.shape[0], -1, -1)))
        k, v = self.split(self.k(source)), self.split(self.v(source))
        return self.join(F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v)))


class Convolutions(nn.Module):
    """1 x 1 convolutions over an image; the heads' channels come first, positions last."""

    def __init__(self, kv: int) -> None:
        super().__init__()
        self.kv = kv
        self.qkv, self.o = nn.Conv2d(WIDTH, (HEADS + 2 * kv) * DIM, 1), nn.Conv2d(HEADS * DIM, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = self.qkv(x).view(b, HEADS + 2 * self.kv, DIM, h * w).split([HEADS, self.kv, self.kv], 1)
        k, v = (t.repeat_interleave(HEADS // self.kv, 1) for t in (k, v))
        weights = torch.softmax(q.transpose(-2, -1) @ k / math.sqrt(DIM), -1)
        out: Tensor = self.o((v @ weights.transpose(-2, -1)).reshape(b, HEADS * DIM, h, w))
        return out


class GroupedEinsum(nn.Module):
    """Einsums over weights with a head axis; products name the KV heads and the query heads of each."""

    def __init__(self, kv: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(WIDTH, n, DIM)) for n in (HEADS, kv, kv))
        self.o = nn.Parameter(torch.randn(HEADS, DIM, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bthd", x, w) for w in (self.q, self.k, self.v))
        q = q.unflatten(2, (self.k.shape[1], -1))
        weights = torch.softmax(torch.einsum("btkgd,bskd->bkgts", q, k), -1)
        y = torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2, 3)
        return torch.einsum("bthd,hdc->btc", y, self.o)


class FiveDimensions(Separate):
    """SDPA over [batch, KV heads, query heads of each, length, DIM]."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(1, (self.kv, -1)) for t in self.heads(x))
        k, v = (t.expand(-1, -1, HEADS // self.kv, -1, -1) for t in (k, v))
        return self.join(F.scaled_dot_product_attention(q, k, v).flatten(1, 2))


class LowRank(nn.Module):
    """As in MLA: queries and keys and values from normed latents, and a rotary part of the key that all heads share."""

    def __init__(self, kv: int) -> None:
        super().__init__()
        assert kv == HEADS
        self.q_down, self.q_norm, self.q_up = nn.Linear(WIDTH, 7), nn.RMSNorm(7), nn.Linear(7, HEADS * 5)
        self.kv_down, self.kv_norm, self.kv_up = nn.Linear(WIDTH, 5 + 2), nn.RMSNorm(5), nn.Linear(5, HEADS * 2 * DIM)
        self.o = nn.Linear(HEADS * DIM, WIDTH)

    def turn(self, t: Tensor) -> Tensor:
        angles = torch.arange(t.shape[-2], dtype=t.dtype)[:, None]
        return t * angles.cos() + torch.cat([-t[..., 1:], t[..., :1]], -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[0], x.shape[1]
        q = self.q_up(self.q_norm(self.q_down(x))).view(b, n, HEADS, 5).transpose(1, 2)
        plain, turned = q.split([DIM, 2], -1)
        latent, shared = self.kv_down(x).split([5, 2], -1)
        k, v = self.kv_up(self.kv_norm(latent)).view(b, n, HEADS, 2 * DIM).transpose(1, 2).split(DIM, -1)
        k = torch.cat([k, self.turn(shared[:, None]).expand(-1, HEADS, -1, -1)], -1)
        y = F.scaled_dot_product_attention(torch.cat([plain, self.turn(turned)], -1), k, v, is_causal=True)
        out: Tensor = self.o(y.transpose(1, 2).reshape(b, n, HEADS * DIM))
        return out


class NormOverHeads(Separate):
    """RMS norms over all heads of q and over all heads of k."""

    def __init__(self, kv: int) -> None:
        super().__init__(kv)
        self.q_norm, self.k_norm = nn.RMSNorm(HEADS * DIM), nn.RMSNorm(kv * DIM)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q_norm(self.q(x))), self.split(self.k_norm(self.k(x))), self.split(self.v(x))


class Differential(Separate):
    """Every head subtracts a second softmax from its first."""

    def __init__(self, kv: int) -> None:
        super().__init__(kv)
        self.q, self.k = nn.Linear(WIDTH, 2 * HEADS * DIM), nn.Linear(WIDTH, 2 * kv * DIM)
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[0], x.shape[1]
        q, k = (p(x).view(b, n, -1, 2, DIM).permute(3, 0, 2, 1, 4) for p in (self.q, self.k))
        first, second = (q @ self.repeat(k).mT / math.sqrt(DIM)).softmax(-1).unbind()
        return self.join(F.rms_norm((first - self.weight * second) @ self.repeat(self.split(self.v(x))), (DIM,)))


class Loop(Separate):
    """One head after the other."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        read = [(h, h * self.kv // HEADS) for h in range(HEADS)]
        out: Tensor = self.o(
            torch.cat([F.scaled_dot_product_attention(q[:, h], k[:, g], v[:, g]) for h, g in read], -1)
        )
        return out


class ListOfHeads(nn.Module):
    """Every head is a module with projections of its own."""

    def __init__(self, kv: int) -> None:
        super().__init__()
        assert kv == HEADS
        self.qs, self.ks, self.vs = (nn.ModuleList([nn.Linear(WIDTH, DIM) for _ in range(HEADS)]) for _ in range(3))
        self.o = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        each = [(q(x) @ k(x).mT).softmax(-1) @ v(x) for q, k, v in zip(self.qs, self.ks, self.vs, strict=True)]
        out: Tensor = self.o(torch.cat(each, -1))
        return out


class PositionScores(Separate):
    """A score term of the queries with learned positions beside the one with the keys."""

    def __init__(self, kv: int) -> None:
        super().__init__(kv)
        self.positions = nn.Parameter(torch.randn(HEADS, LENGTH, DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.join((q @ self.repeat(k).mT + q @ self.positions.mT).softmax(-1) @ self.repeat(v))


def _torch_encoder(kv: int) -> nn.Module:
    assert kv == HEADS
    layer = nn.TransformerEncoderLayer(HEADS * DIM, HEADS, 13, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def _einsum(kv: int) -> nn.Module:
    return EinsumAttention(WIDTH, HEADS, DIM) if kv == HEADS else GroupedEinsum(kv)


def _sequence(width: int = WIDTH, length: int = LENGTH) -> tuple[Tensor, ...]:
    return (noise(BATCH, length, width),)


def _masked_sequence() -> tuple[Tensor, ...]:
    return noise(BATCH, LENGTH, WIDTH), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


def _image() -> tuple[Tensor, ...]:
    return (noise(BATCH, WIDTH, 2, 3),)


@dataclass(frozen=True)
class Form:
    """One structure: how to build it with ``kv`` KV heads, its inputs, and which pairs cannot be had, and why."""

    build: Callable[[int], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]] = _sequence
    kv: tuple[int, ...] = (8, 4, 1)
    impossible: Callable[[int, int], bool] = lambda hq, hkv: False
    why: str = ""


FORMS: dict[str, Form] = {
    "rotary decoder": Form(RotaryDecoder),
    "fused encoder": Form(FusedEncoder, _masked_sequence),
    "torch encoder": Form(_torch_encoder, lambda: _sequence(HEADS * DIM), (8,)),
    "relative bias": Form(RelativeBias),
    "windows": Form(Windows, lambda: _sequence(length=24), (8,)),
    "learned queries": Form(LearnedQueries, lambda: _sequence(13)),
    "convolutions": Form(Convolutions, _image),
    "einsum": Form(_einsum),
    "five dimensions": Form(FiveDimensions, kv=(4,)),
    "low rank": Form(LowRank, kv=(8,)),
    "norm over heads": Form(NormOverHeads),
    "differential": Form(Differential),
    "loop": Form(Loop),
    # What belongs to one head alone can go with it, but two of them do not become one.
    "list of heads": Form(ListOfHeads, _sequence, (8,), lambda hq, hkv: hq != hkv, "can be dropped but not merged"),
    # rSQA averages queries; a score term that reads every kept one by itself leaves none to average.
    "position scores": Form(
        PositionScores, _sequence, (8, 4), lambda hq, hkv: hq < hkv, "score terms of their own read too"
    ),
}


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _site(name: str, kv: int) -> str:
    return f"{name}, 8 on {kv}" + (", no grouped variant" if FORMS[name].kv == (8,) else "")


OWN = [
    pytest.param(name, kv, id=_site(name, kv), marks=[] if kv == form.kv[turn % len(form.kv)] else pytest.mark.slow)
    for turn, (name, form) in enumerate(FORMS.items())
    for kv in form.kv
]


def _grid() -> Iterator[Any]:
    for turn, (name, form) in enumerate(FORMS.items()):
        for kv in form.kv:
            wanted, given = _divisors(HEADS), _divisors(kv)
            for (i, hq), (j, hkv) in itertools.product(enumerate(wanted), enumerate(given)):
                chosen = (i + turn) % len(given) == j if kv > 1 else (i + turn) % 2 == 0
                # Beside pairs that cannot be had, some that can.
                chosen = chosen or (bool(form.why) and hq == hkv)
                chosen = chosen and (kv == 1 or (j + turn) % 2 == 0)
                marks = [] if chosen else [pytest.mark.slow]
                yield pytest.param(name, kv, hq, hkv, id=f"{_site(name, kv)}, to {hq} on {hkv}", marks=marks)


GRID = list(_grid())


@functools.cache
def _model(name: str, kv: int) -> nn.Module:
    torch.manual_seed(3)
    return perturb(FORMS[name].build(kv).double().eval())


def _inputs(name: str) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in FORMS[name].inputs())


@functools.cache
def _program(name: str, kv: int) -> torch.export.ExportedProgram:
    return torch.export.export(_model(name, kv), _inputs(name))


def _eager(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output without torch.nn's native fast path, which rounds in another order."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            (out,) = tensors(model(*inputs))
            return out
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@pytest.mark.parametrize(("name", "kv", "hq", "hkv"), GRID)
def test_every_pair_of_head_counts(name: str, kv: int, hq: int, hkv: int) -> None:
    form, inputs = FORMS[name], _inputs(name)
    if form.impossible(hq, hkv):
        with pytest.raises(PlanError, match=form.why):
            converted(_program(name, kv), hq=hq, hkv=hkv)
        return
    result = converted(_program(name, kv), hq=hq, hkv=hkv)
    report = result.report
    (site,) = report.sites
    assert (site.heads, site.kv_heads, site.hq, site.hkv) == (HEADS, kv, hq, hkv)
    assert not report.refused and not site.inexact
    assert report.proof is not None and report.proof["precision"] == "float64"
    assert report.proof["error"] <= 1e-10
    if (hq, hkv) != (HEADS, kv):  # what stays as it is has no proof of its own
        assert site.proof_error is not None and site.proof_error <= 1e-10
    assert report.flops_before > 0 and report.flops_after * HEADS == report.flops_before * max(hq, hkv)
    out = _eager(result, inputs)
    assert torch.isfinite(out).all()
    oracle = copy.deepcopy(_model(name, kv))
    load_masked(oracle, result.plan.to_json())
    torch.testing.assert_close(out, _eager(oracle, inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "kv"), OWN)
def test_own_head_counts_change_no_bit(name: str, kv: int) -> None:
    model, inputs = _model(name, kv), _inputs(name)
    same = converted(model, hq=HEADS, hkv=kv, args=inputs, dynamic_shapes=None)
    (site,) = same.report.sites
    assert (site.heads, site.kv_heads, site.hq, site.hkv) == (HEADS, kv, HEADS, kv)
    assert torch.equal(_eager(same, inputs), _eager(model, inputs))
