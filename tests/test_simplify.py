"""Decomposed attention becomes SDPA, causal masks become is_causal, other masks stay, and nothing changes in value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import converted as convert_now
from plan_arithmetic import load_masked
from torch import Tensor, fx, nn

import sqa_fx

WIDTH, HEADS, HEAD_DIM = 26, 6, 5
Mask = Callable[[Tensor, int], Tensor | None]


class Attention(nn.Module):
    """Attention with a mask of one's choice, by SDPA or step by step."""

    def __init__(self, mask: Mask, style: str = "sdpa", kv_heads: int = HEADS) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv_heads * HEAD_DIM), nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.kv_heads, self.mask, self.style = kv_heads, mask, style

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, HEAD_DIM).transpose(1, 2)
        k, v = (f(x).view(b, t, self.kv_heads, HEAD_DIM).transpose(1, 2) for f in (self.k, self.v))
        k, v = (y.repeat_interleave(HEADS // self.kv_heads, dim=1) if self.kv_heads < HEADS else y for y in (k, v))
        y = self.attend(q, k, v, self.mask(x, t))
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.style == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.style == "scaled query":
            scores = (q / math.sqrt(HEAD_DIM)) @ k.transpose(-2, -1)
        elif self.style == "divided":
            scores = q @ k.transpose(-2, -1) / math.sqrt(HEAD_DIM)
        else:
            scores = torch.matmul(q, k.transpose(2, 3)) * 0.37
        if mask is not None:
            scores = scores + mask if mask.dtype != torch.bool else scores.masked_fill(~mask, float("-inf"))
        weights = scores.float().softmax(-1).to(q.dtype) if self.style == "upcast" else scores.softmax(-1)
        return weights @ v


def _lower(t: int) -> Tensor:
    return torch.ones(t, t, dtype=torch.bool).tril()


def _additive(keep: Tensor, value: float) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, value)


def _window(width: int) -> Mask:
    def mask(x: Tensor, t: int) -> Tensor:
        i = torch.arange(t)
        return (i[:, None] >= i[None]) & (i[:, None] - i[None] < width)

    return mask


def _prefix(length: int) -> Mask:
    return lambda x, t: _lower(t) | (torch.arange(t) < length)


def _table(causal_until: int, size: int) -> Mask:
    """A stored mask that is causal up to some length only."""
    held = _lower(size)
    held[causal_until:, :2] = False
    return lambda x, t: held[:t, :t]


def _positions(x: Tensor, t: int) -> Tensor:
    i = torch.arange(t)
    return i[:, None] >= i[None]


CAUSAL: dict[str, Mask] = {
    "tril": lambda x, t: _lower(t),
    "compared": _positions,
    "four axes": lambda x, t: _lower(t)[None, None],
    "additive inf": lambda x, t: _additive(_lower(t), float("-inf")),
    "additive min": lambda x, t: _additive(_lower(t), torch.finfo(torch.float32).min),
    "triu": lambda x, t: torch.triu(torch.full((t, t), float("-inf")), diagonal=1),
    "stored": lambda x, t: _lower(16)[:t, :t],
}
OTHERS: dict[str, Mask] = {
    "window": _window(3),
    "wide window": _window(9),
    "very wide window": _window(40),
    "prefix": _prefix(2),
    "strict": lambda x, t: (
        _lower(t).logical_or(torch.eye(t, dtype=torch.bool)) & (torch.arange(t) != 1)[:, None]
        | torch.eye(t, dtype=torch.bool)
    ),
    "upper": lambda x, t: _lower(t).T,
    "two ahead": lambda x, t: torch.ones(t, t, dtype=torch.bool).tril(1),
    "padding": lambda x, t: (x[:, None, None, :, 0] > -0.5) | torch.eye(t, dtype=torch.bool),
    "causal and padding": lambda x, t: _lower(t) & ((x[:, None, None, :, 0] > -0.5) | torch.eye(t, dtype=torch.bool)),
    "small additive": lambda x, t: _additive(_lower(t), -3.0),
    "distance": lambda x, t: (
        _additive(_lower(t), float("-inf")) - 0.1 * (torch.arange(t)[:, None] - torch.arange(t)[None]).abs()
    ),
    "causal to 13": _table(13, 24),
}


def _attention_nodes(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]


def _settings(node: fx.Node) -> dict[str, Any]:
    names = [a.name for a in torch.ops.aten.scaled_dot_product_attention.default._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _check_values(model: Attention, converted: nn.Module, plan: dict[str, Any], lengths: tuple[int, ...]) -> None:
    load_masked(model, plan)
    for length in lengths:
        x = torch.randn(3, length, WIDTH, dtype=next(model.parameters()).dtype)
        torch.testing.assert_close(converted(x), model(x), rtol=0, atol=2e-6)


# The rest are seen in the same way.
SHORT = ("tril", "additive min", "stored", "window", "prefix", "upper", "padding", "distance", "causal to 13")


def _marked(names: Iterable[str]) -> list[Any]:
    return [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _marked(CAUSAL))
def test_causal_masks_become_is_causal(name: str) -> None:
    model = Attention(CAUSAL[name]).eval()
    converted = convert_now(model, hq=4, hkv=2, args=(torch.randn(2, 7, WIDTH),))
    (node,) = _attention_nodes(converted.graph_module)
    settings = _settings(node)
    assert settings.get("is_causal") is True and settings.get("attn_mask") is None
    assert "causal" in converted.report.sites[0].attention
    _check_values(model, converted, converted.plan.to_json(), (7, 11, 15))


@pytest.mark.parametrize("name", _marked(OTHERS))
def test_other_masks_stay(name: str) -> None:
    """Also those that look causal at short lengths: the values at long ones would be wrong."""
    model = Attention(OTHERS[name]).eval()
    converted = convert_now(model, hq=4, hkv=2, args=(torch.randn(2, 7, WIDTH),))
    assert converted.report.dynamic, converted.report.notes
    _check_values(model, converted, converted.plan.to_json(), (2, 7, 11, 24) if "causal to" in name else (2, 7, 11, 50))
    (node,) = _attention_nodes(converted.graph_module)
    settings = _settings(node)
    assert not settings.get("is_causal") and isinstance(settings["attn_mask"], fx.Node)


@pytest.mark.parametrize("name", ["window", "prefix", "tril"])
def test_static_masks(name: str) -> None:
    mask = {**CAUSAL, **OTHERS}[name]
    model = Attention(mask).eval()
    converted = convert_now(model, hq=4, hkv=2, args=(torch.randn(2, 7, WIDTH),), dynamic_shapes=None)
    (node,) = _attention_nodes(converted.graph_module)
    assert bool(_settings(node).get("is_causal")) == (name == "tril")
    load_masked(model, converted.plan.to_json())
    x = torch.randn(2, 7, WIDTH)
    torch.testing.assert_close(converted(x), model(x), rtol=0, atol=2e-6)


STYLES, MASKS = ("divided", "multiplied", "scaled query", "upcast"), ("none", "additive inf", "small additive")
DECOMPOSED = [  # every pair of values occurs
    (style, mask, (HEADS, 3)[(i + j) % 2]) for i, style in enumerate(STYLES) for j, mask in enumerate(MASKS)
]


@pytest.mark.parametrize(("style", "mask", "kv_heads"), DECOMPOSED)
def test_decomposed_attention_becomes_sdpa(style: str, mask: str, kv_heads: int) -> None:
    made: Mask = (lambda x, t: None) if mask == "none" else {**CAUSAL, **OTHERS}[mask]
    model = Attention(made, style, kv_heads).eval()
    free = kv_heads < HEADS and style == "divided"
    shapes = "auto" if free else None
    converted = convert_now(model, hq=4, hkv=2, args=(torch.randn(3, 7, WIDTH),), dynamic_shapes=shapes)
    (node,) = _attention_nodes(converted.graph_module)
    settings = _settings(node)
    assert settings.get("enable_gqa") is True
    assert bool(settings.get("is_causal")) == (mask == "additive inf")
    assert not any(n.target is torch.ops.aten.softmax.int for n in converted.graph_module.graph.nodes)
    _check_values(model, converted, converted.plan.to_json(), (7, 11) if free else (7,))


@pytest.mark.parametrize(
    ("style", "hq", "hkv", "gqa"),
    [
        ("sdpa", 4, 2, True),
        ("divided", 4, 4, False),
        ("divided", 3, 1, True),
        ("sdpa", 6, 6, False),
        ("divided", 6, 6, False),
        ("sdpa", 1, 1, False),
    ],
)
def test_enable_gqa_only_where_heads_differ(style: str, hq: int, hkv: int, gqa: bool) -> None:
    model = Attention(lambda x, t: None, style).eval()
    x = torch.randn(2, 7, WIDTH)
    converted = convert_now(model, hq=hq, hkv=hkv, heads="first", args=(x,), dynamic_shapes=None)
    nodes = _attention_nodes(converted.graph_module)
    if hq == HEADS and style != "sdpa":
        assert not nodes or len(nodes) == 1  # identity: bit-exact, so it may keep its own form
        assert torch.equal(converted(x), model(x))
        return
    (node,) = nodes
    assert bool(_settings(node).get("enable_gqa")) == gqa
    shapes = [tuple(argument.meta["val"].shape) for argument in node.args[:3] if isinstance(argument, fx.Node)]
    assert [s[1] for s in shapes] == [hq, hkv, hkv], "K and V must not be expanded"
    assert all(s[3] == HEAD_DIM for s in shapes)


def test_grouped_model_loses_its_repeats() -> None:
    model = Attention(lambda x, t: None, "sdpa", 3).eval()
    converted = convert_now(model, hq=4, hkv=2, args=(torch.randn(2, 7, WIDTH),), dynamic_shapes=None)
    (node,) = _attention_nodes(converted.graph_module)
    assert _settings(node).get("enable_gqa") is True
    targets = {str(n.target) for n in converted.graph_module.graph.nodes}
    assert not any("repeat" in t or "expand" in t for t in targets)


def test_simplified_graph_equals_the_rewritten_one() -> None:
    """The pass alone, in double: before and after it, on the same graph."""
    from sqa_fx.passes.capture import capture, clone_graph
    from sqa_fx.passes.pipeline import find_sites, make_plan
    from sqa_fx.passes.rewrite import rewrite
    from sqa_fx.passes.simplify import simplify

    model = Attention(CAUSAL["additive inf"], "divided", 3).double().eval()
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    model.mask = lambda x, t: _additive(_lower(t), float("-inf")).double()
    captured = capture(model, (x,))
    analysis = find_sites(captured.graph_module)
    done = rewrite(analysis.facts, analysis.sites, make_plan(analysis, 4, 2, "first", "mean"))
    before = clone_graph(captured.graph_module)
    assert not _attention_nodes(before)
    simplify(captured.graph_module, {name for names in done.cores.values() for name in names})
    assert len(_attention_nodes(captured.graph_module)) == 1
    for length in (7, 11):
        x = torch.randn(3, length, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(captured.graph_module(x), before(x), rtol=0, atol=1e-12)


class SoftCapped(Attention):
    """Scores that pass through tanh: no SDPA computes this, so it must stay."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.tanh(q @ k.transpose(-2, -1) / 5.0) * 5.0
        return scores.softmax(-1) @ v


class Returned(Attention):
    """Attention that also returns its probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, HEADS, HEAD_DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2)) + weights.mean((1, 3))[..., None] * 0.1
        return out


class MaskedThenScaled(Attention):
    """The mask is added before the scaling, so SDPA's order does not fit."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        bias = torch.arange(q.shape[-2])[None, :] * 0.1
        return ((q @ k.transpose(-2, -1) + bias) * 0.5).softmax(-1) @ v


class WrongAxis(Attention):
    """A second softmax-like step: probabilities are normalised again."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = (q @ k.transpose(-2, -1) * 0.4).softmax(-1)
        weights = weights * weights
        return (weights / weights.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("kind", [SoftCapped, MaskedThenScaled, WrongAxis])
def test_forms_that_are_no_sdpa_keep_their_values(kind: type[Attention]) -> None:
    model, free = kind(lambda x, t: None, "multiplied").eval(), kind is MaskedThenScaled
    shapes = "auto" if free else None
    converted = convert_now(model, hq=4, hkv=2, args=(torch.randn(3, 7, WIDTH),), dynamic_shapes=shapes)
    assert len(converted.report.sites) == 1
    if kind is not MaskedThenScaled:
        assert not _attention_nodes(converted.graph_module)
    _check_values(model, converted, converted.plan.to_json(), (7, 11) if free else (7,))


def test_probabilities_that_are_used_elsewhere_are_not_lost() -> None:
    """A mean over heads of the probabilities depends on how many heads there are: never silently changed."""
    model = Returned(lambda x, t: None).eval()
    x = torch.randn(2, 7, WIDTH)
    with pytest.raises(sqa_fx.SqaError):
        sqa_fx.convert(model, hq=4, hkv=2, args=(x,), dynamic_shapes=None)
