"""New integer arguments for an op whose tensors lose heads: sizes, bounds, repeats and indices."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from sqa_fx.passes.aten_call import argument, moved_from, op_name
from sqa_fx.passes.hints import concrete, hint, shape_of, value_of
from sqa_fx.passes.layout import NewShape
from sqa_fx.passes.site import Refused

Emit = Callable[..., fx.Node]
_ALONG_DIMENSIONS = ("roll", "flip", "constant_pad_nd", "pad", "unfold", "diagonal", "rot90")


@dataclass(frozen=True)
class Resizer:
    """Rewrites the arguments of single ops.

    ``emit(target, *args)`` adds a node before the one being rewritten;
    ``constant(tensor)`` adds a constant to the module and returns its node; ``index_value(node)`` is the value of an
    index that the graph fixes, or None."""

    emit: Emit
    constant: Callable[[torch.Tensor], fx.Node]
    index_value: Callable[[fx.Node], torch.Tensor | None]

    def scaled(self, size: Any, old: int, new: int) -> Any:
        """The size argument ``size`` (number, -1 or node) of a dimension that goes from ``old`` to ``new``."""
        if old == new or (isinstance(size, int) and size == -1):
            return size
        ratio = Fraction(new, old)
        if not isinstance(size, fx.Node):
            return int(hint(size) * ratio)
        if isinstance(value_of(size), int):
            return int(value_of(size) * ratio)
        times = self.emit(operator.mul, size, ratio.numerator) if ratio.numerator != 1 else size
        return self.emit(operator.floordiv, times, ratio.denominator) if ratio.denominator != 1 else times

    def sizes(self, given: Sequence[Any], shape: NewShape, first: int = 0) -> list[Any]:
        """A list of sizes for output dimensions ``first``, ``first + 1``, ..."""
        return [self.scaled(s, shape.old[first + i], shape.new[first + i]) for i, s in enumerate(given)]

    def move(
        self, node: fx.Node, swap: Callable[[Any], Any], out: NewShape, source: NewShape | None
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """(target, args, kwargs) of the resized move ``node``; ``source`` is the new shape of its (first) source."""
        maker = moved_from(node)
        name = op_name(maker)
        if name.endswith("_as"):
            return torch.ops.aten.reshape.default, (swap(maker.args[0]), list(out.new)), {}
        args = [swap(a) for a in maker.args]
        kwargs = {k: swap(v) for k, v in maker.kwargs.items()}
        if maker is not node or name in ("slice", "select", "narrow"):
            return self._part(node, maker, name, args, kwargs, out, source)
        if name in ("view", "_unsafe_view", "view_copy", "reshape", "expand", "broadcast_to"):
            given = args[1]
            args[1] = self.sizes(given, out, len(out.old) - len(given))
        elif name in ("repeat", "tile"):
            args[1] = self._repeats(maker, args[1], out, source)
        elif name == "repeat_interleave":
            dim = _dim(maker, out)
            before = source.new[dim] if source is not None else shape_of(_first(maker))[dim]
            args[1] = out.new[dim] // before
            kwargs.pop("output_size", None)
        elif name == "unflatten":
            dim = int(concrete(argument(maker, "dim"))) % len(shape_of(_first(maker)))
            args[2] = self.sizes(args[2], out, dim)
        elif name in ("slice_scatter", "select_scatter"):
            return self._scatter(node, maker, name, args, kwargs, out)
        elif name in ("index", "index_select") and source is not None:
            self._index(maker, name, args, out, source)
        elif name in _ALONG_DIMENSIONS and source is not None and self._touches(maker, source):
            raise Refused(f"{name} runs along the head axis", node, kind="layout")
        return maker.target, tuple(args), kwargs

    @staticmethod
    def _touches(maker: fx.Node, source: NewShape) -> bool:
        name = op_name(maker)
        rank = len(source.old)
        if name in ("constant_pad_nd", "pad"):
            pads = concrete(maker.args[1])
            dims = {rank - 1 - i // 2 for i, p in enumerate(pads) if p != 0}
        elif name == "roll":
            dims = {int(d) % rank for d in (concrete(argument(maker, "dims")) or range(rank))}
        else:
            found = argument(maker, "dims") or argument(maker, "dimension") or argument(maker, "dim1") or 0
            dims = {int(d) % rank for d in (found if isinstance(found, list | tuple) else [found])}
        return any(source.old[d] != source.new[d] for d in dims)

    def _part(
        self,
        node: fx.Node,
        maker: fx.Node,
        name: str,
        args: list[Any],
        kwargs: dict[str, Any],
        out: NewShape,
        source: NewShape | None,
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """A contiguous part of the source along one dimension: an element of a split, a slice, a selected entry."""
        dim = int(concrete(argument(maker, "dim", 0))) % len(shape_of(_first(maker)))
        if source is None or not source.changes(dim):
            if maker is node:
                return maker.target, tuple(args), kwargs
            whole = self.emit(maker.target, *args, **kwargs)
            return operator.getitem, (whole, node.args[1]), {}
        if name == "slice" and source.old == out.old:
            return torch.ops.aten.alias.default, (args[0],), {}
        if not isinstance(value_of(_first(maker)).shape[dim], int):
            raise Refused(f"{name} cuts heads that are folded with a dimension of free size", node, kind="layout")
        if source.kept is None:
            # In a grid of heads only the entries of this role are left: a part that holds them all is the whole.
            if name in ("select", "unbind") or source.new[dim] != out.new[dim]:
                raise Refused(f"{name} cuts a grid of heads", node, kind="layout")
            return torch.ops.aten.alias.default, (args[0],), {}
        kept = source.kept[dim]
        if name in ("select", "unbind"):
            index = int(concrete(argument(maker, "index"))) if name == "select" else _position(node)
            index %= source.old[dim]
            if not bool(kept[index]):
                raise Refused("a single head is taken out by number", node, kind="heads combined")
            return torch.ops.aten.select.int, (args[0], dim, int(kept[:index].sum())), {}
        start, step = self._start(node, maker, name, dim, source)
        if step != 1:
            raise Refused("a strided slice runs along the head axis", node, kind="layout")
        begin = int(kept[:start].sum())
        return torch.ops.aten.slice.Tensor, (args[0], dim, begin, begin + out.new[dim]), {}

    @staticmethod
    def _scatter(
        node: fx.Node, maker: fx.Node, name: str, args: list[Any], kwargs: dict[str, Any], out: NewShape
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """A part of the first tensor overwritten by the second, where heads may lie along the same dimension."""
        dim = int(concrete(argument(maker, "dim", 0))) % len(out.old)
        if not out.changes(dim):
            return maker.target, tuple(args), kwargs
        if out.kept is None:
            raise Refused(f"{name} writes into a grid of heads", node, kind="layout")
        if name == "select_scatter":
            start = int(concrete(argument(maker, "index"))) % out.old[dim]
            end, step = start + 1, 1
        else:
            start, end = (concrete(argument(maker, which)) for which in ("start", "end"))
            start, end = (0 if start is None else int(start)), (out.old[dim] if end is None else int(end))
            start, end = (min(n + (out.old[dim] if n < 0 else 0), out.old[dim]) for n in (start, end))
            step = int(concrete(argument(maker, "step", 1)))
        kept = out.kept[dim]
        written = int(kept[start:end].sum())
        if written == 0:
            return torch.ops.aten.alias.default, (args[0],), {}
        if step != 1:
            raise Refused(f"{name} writes into every so many heads", node, kind="layout")
        before = int(kept[:start].sum())
        if name == "select_scatter":
            return maker.target, (args[0], args[1], dim, before), {}
        if written == out.new[dim]:
            return torch.ops.aten.alias.default, (args[1],), {}
        return maker.target, (args[0], args[1], dim, before, before + written), {}

    @staticmethod
    def _start(node: fx.Node, maker: fx.Node, name: str, dim: int, source: NewShape) -> tuple[int, int]:
        if name in ("slice", "narrow"):
            start = concrete(argument(maker, "start")) or 0
            step = concrete(argument(maker, "step", 1)) if name == "slice" else 1
            return (min(int(start) + (source.old[dim] if start < 0 else 0), source.old[dim]), int(step))
        pieces = value_of(maker)
        chosen = _position(node)
        chosen %= len(pieces)
        return sum(int(hint(p.shape[dim])) for p in pieces[:chosen]), 1

    def _repeats(self, maker: fx.Node, repeats: Sequence[Any], out: NewShape, source: NewShape | None) -> list[Any]:
        shape = shape_of(_first(maker))
        old, new = (source.old, source.new) if source is not None else (shape, shape)
        lead = len(repeats) - len(shape)
        result = []
        for i, given in enumerate(repeats):
            ratio = Fraction(out.new[i], out.old[i])
            if i >= lead:
                ratio /= Fraction(new[i - lead], old[i - lead])
            result.append(self.scaled(given, ratio.denominator, ratio.numerator))
        return result

    def _index(self, maker: fx.Node, name: str, args: list[Any], out: NewShape, source: NewShape) -> None:
        """Renumber a constant index that runs along the head axis; an index along other dimensions stays."""
        if name == "index_select":
            dims, holder, position = [int(concrete(args[1])) % len(source.old)], args, 2
        else:
            args[1] = list(args[1])
            dims = [i for i, n in enumerate(args[1]) if n is not None]
            holder, position = args[1], dims[0]
        if not any(source.changes(d) for d in dims):
            return
        if not isinstance(value_of(_first(maker)).shape[dims[0]], int):
            raise Refused(
                "an index runs over heads that are folded with a dimension of free size", maker, kind="layout"
            )
        index = self.index_value(holder[position])
        if source.kept is None or out.kept is None or len(dims) > 1 or index is None or index.dim() != 1:
            raise Refused(
                "heads are gathered by an index that is not a fixed list", maker, kind="data-dependent routing"
            )
        kept = source.kept[dims[0]]
        out_kept = out.kept.get(dims[0], torch.ones(index.numel(), dtype=torch.bool))
        place = torch.cumsum(kept.long(), 0) - 1
        chosen = index[out_kept]
        if not bool(kept[chosen].all()):
            raise Refused("an index repeats heads in an order that merged heads cannot follow", maker, kind="layout")
        holder[position] = self.constant(place[chosen])


def _position(node: fx.Node) -> int:
    """Which result of a split or unbind ``node`` takes."""
    position = node.args[1]
    assert isinstance(position, int)
    return position


def _first(maker: fx.Node) -> fx.Node:
    source = maker.args[0]
    if isinstance(source, list | tuple):
        source = source[0]
    assert isinstance(source, fx.Node)
    return source


def _dim(maker: fx.Node, out: NewShape) -> int:
    dim = concrete(argument(maker, "dim"))
    if dim is None:
        raise Refused("repeat_interleave without a dimension", maker)
    return int(dim) % len(out.old)
