"""A small config of the same class, for proofs about a model that does not fit into memory.

Nothing is known of what fields mean. Every whole number in the config is lowered as far as the class still builds a
model with the same kinds of tensors (names without layer numbers), in which what the plan cuts has the same sizes, or
all of them divided by one number (a smaller head size). Whether its sites have the same heads is seen when it is
converted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sqa_fx.inputs import example_inputs
from sqa_fx.module_names import kind_of
from sqa_fx.plan import Plan
from sqa_fx.stock_model import FieldPath, Stock, quiet, value_of, with_values

LARGEST = 16_000_000
"""Parameters that a sibling may have: it is converted in float32 and compared in float64."""
_SMALLER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
_SMALLEST_HEAD = 8
_SMALLEST = 16
"""Of what is no count of layers: with a vocabulary of one token, say, nothing would depend on attention."""


@dataclass(frozen=True)
class _Facts:
    """What a sibling must keep, and what it is to lose."""

    kinds: frozenset[str]
    cuts: Mapping[str, int]
    """Size along the axis of the cut, by kind of parameter."""
    names: int
    parameters: int


@dataclass(frozen=True)
class _Rules:
    """How far an attempt goes."""

    smaller_heads: bool
    layers_only: bool = False


def small_siblings(stock: Stock, plan: Plan) -> Iterator[Stock]:
    """Smaller and smaller claims to be like ``stock``: first the smallest config found, then ones that keep more (the
    head size, all but the number of layers). None that is larger than LARGEST."""
    seen: list[Any] = []
    for rules in (_Rules(True), _Rules(False), _Rules(False, layers_only=True)):
        made = _lowered(stock, plan, rules)
        if made.fields not in seen and _facts(made.bare(), plan).parameters <= LARGEST:
            seen.append(made.fields)
            yield made


def _lowered(stock: Stock, plan: Plan, rules: _Rules) -> Stock:
    full = _facts(stock.bare(), plan)
    heads = {n for site in plan.sites for n in (site.heads, site.kv_heads)}
    head_dims = {site.head_dim for site in plan.sites}
    best, current = stock, full
    # What counts layers comes first: every trial after it is fast.
    layers = _layer_counts(stock)
    runs, used = _runs(stock.bare()), set[int]()
    fields = sorted(stock.integer_fields(), key=lambda entry: (entry[1] not in layers, -entry[1]))
    for path, value in fields:
        for small in (n for n in _SMALLER if n < value):
            trial = _with(best, path, value, small)
            if trial is None:
                continue
            try:
                model = trial.bare()
                found = _facts(model, plan)
            except Exception:  # whatever the class raises: this is no config of it
                continue
            if not _alike(full, found, head_dims, rules):
                continue
            if found.parameters >= current.parameters:
                break  # no size of the model
            if found.names == current.names and (small < _SMALLEST or small in used):
                continue  # too small, or another size already: two that are equal hide what is mixed up
            if runs and not _runs(model):
                continue
            if found.names == current.names and (value in heads or rules.layers_only):
                break  # it may be what must stay
            best, current = trial, found
            used.add(small)
            break
    return best


def _with(stock: Stock, path: FieldPath, value: int, small: int) -> Stock | None:
    """``stock`` with the field lowered, and lists of that length beside it shortened; None where one of them would lose
    a kind of entry."""
    values: list[tuple[FieldPath, Any]] = [(path, small)]
    beside = value_of(stock.fields, path[:-1]) if len(path) > 1 else stock.fields
    for name, held in beside.items():
        if isinstance(held, list) and len(held) == value:
            if {repr(x) for x in held[:small]} != {repr(x) for x in held}:
                return None
            values.append(((*path[:-1], name), held[:small]))
    return replace(stock, fields=with_values(stock.fields, values))


def _runs(model: nn.Module) -> bool:
    """True when the model runs on the meta device (experts of which more are asked for than there are do not)."""
    inputs = example_inputs(model)
    if inputs is None:
        return False
    try:
        with torch.no_grad(), quiet():
            model(*inputs[0], **inputs[1])
    except Exception:  # whatever it raises
        return False
    return True


def _facts(model: nn.Module, plan: Plan) -> _Facts:
    axes = {kind_of(p.name): p.axis for p in plan.parameters}
    state = model.state_dict()
    cuts: dict[str, int] = {}
    for name, held in state.items():
        kind = kind_of(name)
        if kind in axes and axes[kind] < held.dim():
            cuts[kind] = held.shape[axes[kind]]
    return _Facts(frozenset(map(kind_of, state)), cuts, len(state), sum(t.numel() for t in state.values()))


def _alike(full: _Facts, found: _Facts, head_dims: set[int], rules: _Rules) -> bool:
    if found.kinds != full.kinds or found.cuts.keys() != full.cuts.keys():
        return False
    ratios = set()
    for kind, size in found.cuts.items():
        if size == 0 or full.cuts[kind] % size:
            return False
        ratios.add(full.cuts[kind] // size)
    ratios.discard(1)
    if not ratios:
        return True
    if not rules.smaller_heads or len(ratios) > 1:
        return False
    ratio = ratios.pop()
    return all(d % ratio == 0 and d // ratio >= _SMALLEST_HEAD and d // ratio % 2 == 0 for d in head_dims)


def _layer_counts(stock: Stock) -> set[int]:
    """How many numbers follow one another at each place in the names of tensors."""
    numbers: dict[tuple[str, ...], set[int]] = {}
    for name in stock.bare().state_dict():
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                numbers.setdefault(tuple(parts[:i]), set()).add(int(part))
    return {len(found) for found in numbers.values()}


def same_sites(full: Plan, small: Sequence[Any]) -> bool:
    """True when the sites of a sibling are of the kinds of the full model's, with the same heads before and after."""
    kinds = {(kind_of(s.name), s.heads, s.kv_heads, s.hq, s.hkv) for s in full.sites}
    return {(kind_of(s.name), s.heads, s.kv_heads, s.hq, s.hkv) for s in small} == kinds
