"""Ops that pick entries by value or by position, and that write into a tensor at given positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from sqa_fx.passes.aten_call import argument
from sqa_fx.passes.broadcast import broadcast_dims
from sqa_fx.passes.hints import concrete, is_tensor, shape_of, value_of
from sqa_fx.passes.op_kinds import Aligned, Opaque, Operand, Step


def selection(maker: fx.Node, node: fx.Node) -> Step:
    """Values or indices that topk, sort and the like pick along one dimension: positions there mean nothing after."""
    source = maker.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(node):
        return Opaque(f"op {maker.target}")
    rank = len(shape_of(source))
    dim = int(concrete(argument(maker, "dim", -1))) % rank
    return Aligned((Operand(source, tuple(-1 - i if i == dim else i for i in range(rank))),))


def _single_selection(node: fx.Node) -> Step:
    return selection(node, node)


def _gather(node: fx.Node) -> Step:
    source, index = node.args[0], node.args[2]
    assert isinstance(source, fx.Node) and isinstance(index, fx.Node)
    dim = int(concrete(node.args[1])) % len(shape_of(source))
    out = shape_of(node)
    if any(s != o for i, (s, o) in enumerate(zip(shape_of(source), out, strict=True)) if i != dim):
        return Opaque("gather from a part of its source")
    dims = tuple(range(len(out)))
    return Aligned((Operand(source, tuple(-1 - i if i == dim else i for i in dims)), Operand(index, dims)))


def _scatter(node: fx.Node) -> Step:
    source, index = node.args[0], node.args[2]
    assert isinstance(source, fx.Node) and isinstance(index, fx.Node)
    dim = int(concrete(node.args[1])) % len(shape_of(source))
    out = shape_of(node)
    if any(s != o for i, (s, o) in enumerate(zip(shape_of(index), out, strict=True)) if i != dim):
        return Opaque("scatter into a part of its target")
    dims = tuple(range(len(out)))
    inner = tuple(-1 - i if i == dim else i for i in dims)
    operands = [Operand(source, dims), Operand(index, inner)]
    if len(node.args) > 3 and isinstance(node.args[3], fx.Node) and is_tensor(node.args[3]):
        operands.append(Operand(node.args[3], inner if shape_of(node.args[3]) else ()))
    return Aligned(tuple(operands), frozenset({dim}))


def _index_copy(node: fx.Node) -> Step:
    """Slices of the first tensor along one dimension overwritten by those of another, at given positions."""
    source, index, new = node.args[0], node.args[2], node.args[3]
    assert isinstance(source, fx.Node) and isinstance(index, fx.Node) and isinstance(new, fx.Node)
    rank = len(shape_of(source))
    dim = int(concrete(node.args[1])) % max(1, rank)
    own = tuple(range(rank))
    inner = tuple(-1 - i if i == dim else i for i in own)
    places = (-1 - dim,) if shape_of(index) else ()
    return Aligned((Operand(source, own), Operand(new, inner), Operand(index, places)), frozenset({dim}))


def _index_put(node: fx.Node) -> Step:
    """Entries of the first tensor at given positions of some dimensions overwritten by those of another."""
    source, indices, new = node.args[0], list(node.args[1]), node.args[2]  # type: ignore[arg-type]
    assert isinstance(source, fx.Node) and isinstance(new, fx.Node)
    rank = len(shape_of(source))
    chosen = [i for i, n in enumerate(indices) if n is not None]
    holders = [n for n in indices if isinstance(n, fx.Node)]
    if not chosen or any(value_of(n).dtype == torch.bool for n in holders):
        return Opaque("index_put by a mask")
    width = max(len(shape_of(n)) for n in holders)
    joined = chosen == list(range(chosen[0], chosen[-1] + 1))
    kept = [i for i in range(rank) if i not in chosen]
    places = [-1 - rank - i for i in range(width)]
    before = [i for i in kept if joined and i < chosen[0]]
    written = [*before, *places, *(i for i in kept if i not in before)]
    shape = shape_of(new)
    sizes = {i: shape_of(source)[i] for i in kept}
    dims: list[int | None] = list(written[len(written) - len(shape) :])
    for i, size in enumerate(shape):
        own = dims[i]
        if size == 1 and own is not None and own >= 0 and sizes[own] != 1:
            dims[i] = None
    operands = [Operand(source, tuple(range(rank))), Operand(new, tuple(dims))]
    operands += [Operand(n, tuple(places[width - len(shape_of(n)) :])) for n in holders]
    return Aligned(tuple(operands), frozenset(chosen))


def _copy_into(node: fx.Node) -> Step:
    """A tensor written into another: what is written counts from here on."""
    new = node.args[1]
    assert isinstance(new, fx.Node)
    if len(shape_of(new)) > len(shape_of(node)):
        return Opaque("copy_ from a larger tensor")
    return Aligned((Operand(new, broadcast_dims(new, shape_of(node))),))


INDEXING: dict[str, Callable[[fx.Node], Step]] = {
    "gather": _gather,
    "scatter": _scatter,
    "index_copy": _index_copy,
    "index_put": _index_put,
    "copy_": _copy_into,
    "argsort": _single_selection,
}
