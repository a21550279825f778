"""Checks that share no code with the rewrite: weights sliced by hand in a hand-written SQA module, numbers on paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from plan_arithmetic import cut
from torch import Tensor, nn

import sqa_fx

WIDTH, HEAD_DIM, BATCH, LENGTH = 14, 5, 2, 7


class Original(nn.Module):
    """Attention in one of several weight layouts; ``split`` makes q, k, v [batch, heads, seq, d]."""

    def __init__(self, rows: int, heads: int, split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, rows), nn.Linear(heads * HEAD_DIM, WIDTH)
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


def _split_3hd(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, t, _ = y.shape
    q, k, v = y.view(b, t, 3, 6, HEAD_DIM).permute(2, 0, 3, 1, 4)
    return q, k, v


def _split_h3d(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, t, _ = y.shape
    q, k, v = y.view(b, t, 6, 3 * HEAD_DIM).transpose(1, 2).split(HEAD_DIM, dim=-1)
    return q, k, v


def _split_d3h(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, t, _ = y.shape
    q, k, v = y.view(b, t, HEAD_DIM, 3, 6).permute(3, 0, 4, 1, 2)
    return q, k, v


def _split_gqa(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, t, _ = y.shape
    q, k, v = y.split([8 * HEAD_DIM, 4 * HEAD_DIM, 4 * HEAD_DIM], dim=-1)
    q = q.view(b, t, 8, HEAD_DIM).transpose(1, 2)
    k, v = (z.view(b, t, 4, HEAD_DIM).transpose(1, 2).repeat_interleave(2, dim=1) for z in (k, v))
    return q, k, v


def _split_tiled(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, t, _ = y.shape
    q, k, v = y.split([8 * HEAD_DIM, 4 * HEAD_DIM, 4 * HEAD_DIM], dim=-1)
    q = q.view(b, t, 8, HEAD_DIM).transpose(1, 2)
    k, v = (z.view(b, t, 4, HEAD_DIM).transpose(1, 2).repeat(1, 2, 1, 1) for z in (k, v))
    return q, k, v


def _block(start: int) -> list[int]:
    return list(range(start, start + HEAD_DIM))


@dataclass(frozen=True)
class Layout:
    """Where head h of q, k and v lies among the rows of the fused weight, worked out by hand."""

    split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    rows: int
    heads: int
    q: Callable[[int], list[int]]
    k: Callable[[int], list[int]]
    v: Callable[[int], list[int]]


_D = HEAD_DIM
LAYOUTS = {
    "3hd": Layout(
        _split_3hd,
        18 * _D,
        6,
        lambda h: _block(h * _D),
        lambda h: _block((6 + h) * _D),
        lambda h: _block((12 + h) * _D),
    ),
    "h3d": Layout(
        _split_h3d, 18 * _D, 6, lambda h: _block(h * 15), lambda h: _block(h * 15 + 5), lambda h: _block(h * 15 + 10)
    ),
    "d3h": Layout(
        _split_d3h,
        18 * _D,
        6,
        lambda h: [18 * c + h for c in range(5)],
        lambda h: [18 * c + 6 + h for c in range(5)],
        lambda h: [18 * c + 12 + h for c in range(5)],
    ),
    "gqa": Layout(
        _split_gqa, 16 * _D, 8, lambda h: _block(h * _D), lambda h: _block(40 + h * _D), lambda h: _block(60 + h * _D)
    ),
    "tiled": Layout(
        _split_tiled, 16 * _D, 8, lambda h: _block(h * _D), lambda h: _block(40 + h * _D), lambda h: _block(60 + h * _D)
    ),
}

# (kept heads, their order in the result, KV heads merged into each new one): every row worked out by hand.
MHA = [
    ([0, 2, 3, 5], [0, 2, 3, 5], [[0, 2], [3, 5]]),
    ([1, 4, 5], [1, 4, 5], [[1, 4, 5]]),
    ([4, 0, 1], [0, 1, 4], [[0], [1], [4]]),
    ([2, 5], [2, 5], [[2, 5]]),
]
GQA = [
    ([1, 2, 5, 6], [1, 2, 5, 6], [[0, 1], [2, 3]]),
    ([2, 3, 4, 6], [2, 3, 4, 6], [[1, 2, 3]]),
    ([0, 3, 4, 7], [0, 3, 4, 7], [[0], [1], [2], [3]]),
    ([0, 1, 6, 7], [0, 1, 6, 7], [[0], [3]]),
]
# Head h of the tiled model reads KV head h % 4, so KV head 0 belongs to heads 0 and 4, and so on.
TILED = [
    ([0, 4, 1, 6], [0, 4, 1, 6], [[0], [1, 2]]),
    ([1, 2, 4, 7], [4, 1, 2, 7], [[0, 1], [2, 3]]),
    ([4, 5, 6, 7], [4, 5, 6, 7], [[0], [1], [2], [3]]),
    ([3, 5, 6, 7], [5, 6, 3, 7], [[1, 2, 3]]),
]
ROWS = [
    (name, kept, order, groups)
    for name in LAYOUTS
    for kept, order, groups in {"gqa": GQA, "tiled": TILED}.get(name, MHA)
]


class HandSQA(nn.Module):
    """SQA as the paper writes it: separate q, k, v, o; K and V heads repeated for the query heads that read them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, hq: int, hkv: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (self._linear(w[:, :-1], w[:, -1]) for w in (q, k, v))
        self.o = self._linear(o[:-1].T, o[-1])
        self.hq, self.hkv = hq, hkv

    @staticmethod
    def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        wide = max(self.hq, self.hkv)
        q = self.q(x).view(b, t, self.hq, -1).transpose(1, 2).repeat_interleave(wide // self.hq, dim=1)
        k, v = (
            f(x).view(b, t, self.hkv, -1).transpose(1, 2).repeat_interleave(wide // self.hkv, dim=1)
            for f in (self.k, self.v)
        )
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        mixed = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v)
        out: Tensor = self.o(mixed.reshape(b, t, -1))
        return out


def _hand(
    model: Original, layout: Layout, order: list[int], q_groups: list[list[int]], kv_groups: list[list[int]]
) -> HandSQA:
    """Slice by hand. Weight and bias travel together as columns [weight | bias]."""
    fused = torch.cat([model.qkv.weight, model.qkv.bias[:, None]], dim=1).detach()
    q = torch.cat([torch.stack([fused[layout.q(h)] for h in group]).mean(0) for group in q_groups])
    k = torch.cat([torch.stack([fused[layout.k(h)] for h in group]).mean(0) for group in kv_groups])
    v = torch.cat([torch.stack([fused[layout.v(h)] for h in group]).mean(0) for group in kv_groups])
    columns = [h * HEAD_DIM + c for h in order for c in range(HEAD_DIM)]
    o = torch.cat([model.out.weight[:, columns].T, model.out.bias[None]]).detach()
    return HandSQA(q, k, v, o, len(q_groups), len(kv_groups))


def _model(name: str) -> tuple[Original, Tensor]:
    layout = LAYOUTS[name]
    torch.manual_seed(3)
    return Original(layout.rows, layout.heads, layout.split).double().eval(), torch.randn(BATCH, LENGTH, WIDTH).double()


@pytest.mark.parametrize(("name", "kept", "order", "groups"), ROWS)
def test_equals_hand_sliced_weights(name: str, kept: list[int], order: list[int], groups: list[list[int]]) -> None:
    """The converted model computes what the hand-sliced module does, and its plan alone is enough to redo the
    slicing. The first row of all is captured with free sizes."""
    model, x = _model(name)
    free = (name, kept, order, groups) == ROWS[0]
    converted = sqa_fx.convert(
        model,
        hq=len(kept),
        hkv=len(groups),
        heads={"*": kept},
        args=(x,),
        dynamic_shapes="auto" if free else None,
    )
    site = converted.plan.sites[0]
    assert list(site.query_heads) == order
    assert [sorted(group) for group in site.kv_groups] == groups
    hand = _hand(model, LAYOUTS[name], order, [[h] for h in order], groups)
    for inputs in (x, torch.randn(3, 11, WIDTH).double()) if free else (x,):
        torch.testing.assert_close(converted(inputs), hand(inputs), rtol=0, atol=1e-12)

    expected, actual = cut(model.state_dict(), converted.plan.to_json()), converted.state_dict()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=0, atol=1e-15, msg=key)


@pytest.mark.parametrize("name", ["3hd", "h3d", "d3h"])
def test_fewer_query_than_kv_heads(name: str) -> None:
    model, x = _model(name)
    converted = sqa_fx.convert(model, hq=2, hkv=4, heads={"*": [0, 2, 3, 5]}, args=(x,), dynamic_shapes=None)
    hand = _hand(model, LAYOUTS[name], [0, 2, 3, 5], [[0, 2], [3, 5]], [[0], [2], [3], [5]])
    torch.testing.assert_close(converted(x), hand(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["3hd", "gqa", "tiled"])
def test_selected_kv_head_is_one_of_the_originals(name: str) -> None:
    model, x = _model(name)
    kept, order, groups = {"3hd": MHA, "gqa": GQA, "tiled": TILED}[name][0]
    converted = sqa_fx.convert(model, hq=4, hkv=2, heads={"*": kept}, kv_merge="select", args=(x,), dynamic_shapes=None)
    choices = [[[a], [b]] for a in groups[0] for b in groups[1]]
    hands = [_hand(model, LAYOUTS[name], order, [[h] for h in order], choice) for choice in choices]
    assert sum(bool(torch.allclose(converted(x), hand(x), rtol=0, atol=1e-12)) for hand in hands) == 1


class TwoHeads(nn.Module):
    """Two heads of size 1 over width 2: small enough to compute on paper."""

    def __init__(self) -> None:
        super().__init__()
        rows = {
            "q": [[0.0, math.log(2) / 2], [math.log(3) / 2, 0.0]],
            "k": [[4.0, 0.0], [0.0, 0.0]],
            "v": [[5.0, 0.0], [3.0, 4.0]],
            "o": [[1.0, 2.0], [3.0, -1.0]],
        }
        for name, weight in rows.items():
            layer = nn.Linear(2, 2, bias=False, dtype=torch.float64)
            layer.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (getattr(self, n)(x).view(b, t, 2, 1).transpose(1, 2) for n in "qkv")
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.get_submodule("o")(y.transpose(1, 2).reshape(b, t, 2))  # type: ignore[no-any-return]


def test_one_of_two_heads_by_hand() -> None:
    """Head 0 alone. Tokens (1,0), (0,1): q = 0, ln2/2; k = 4, 0; v = 5, 0.

    Token 0 scores (0, 0), so it reads (5 + 0)/2 = 2.5. Token 1 scores (2 ln2, 0), weights (4/5, 1/5): it reads 4.
    Column 0 of o is (1, 3).
    """
    x = torch.eye(2, dtype=torch.float64)[None]
    converted = sqa_fx.convert(TwoHeads().eval(), hq=1, hkv=1, heads={"*": [0]}, args=(x,))
    expected = torch.tensor([[[2.5, 7.5], [4.0, 12.0]]], dtype=torch.float64)
    torch.testing.assert_close(converted(x), expected, rtol=0, atol=1e-13)


def test_two_heads_on_one_merged_kv_head_by_hand() -> None:
    """Both heads read K = mean((4,0), (0,0)) = (2,0) and V = mean((5,0), (3,4)) = (4,2): k = 2, 0 and v = 4, 2.

    Head 0: token 0 scores (0, 0) and reads 3; token 1 scores (ln2, 0), weights (2/3, 1/3), and reads 10/3.
    Head 1: token 0 scores (ln3, 0), weights (3/4, 1/4), and reads 7/2; token 1 scores (0, 0) and reads 3.
    Output: head 0 times (1, 3) plus head 1 times (2, -1).
    """
    x = torch.eye(2, dtype=torch.float64)[None]
    converted = sqa_fx.convert(TwoHeads().eval(), hq=2, hkv=1, args=(x,))
    expected = torch.tensor([[[3 + 7, 9 - 3.5], [10 / 3 + 6, 10 - 3]]], dtype=torch.float64)
    torch.testing.assert_close(converted(x), expected, rtol=0, atol=1e-13)
