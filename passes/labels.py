"""Head labels: which heads each tensor element serves, moved through a graph by running its own ops.

A label is an interval of head numbers ``[low, high]``, packed in one int64: ``low == high`` is one head, an interval
inside one KV group is a KV head (an element that several query heads read), a wider one is shared by heads that have
nothing else in common, and the empty interval means that no head needs the element. The join of two labels is the
smallest interval that holds both, so an element that an op repeats to several heads collects all of them.

A label tensor has the rank of the tensor it describes, with size 1 along every dimension on which it does not vary.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqa_fx.passes.aten_call import moved_from, op_name
from sqa_fx.passes.collapse import passage
from sqa_fx.passes.evaluate import constant_tensor
from sqa_fx.passes.hints import concrete, hint, is_tensor, shape_of, value_of
from sqa_fx.passes.op_kinds import Aligned, Move, Operand
from sqa_fx.passes.ops import IDENTITY_MOVES, step

_SHIFT = 24
_TOP = (1 << _SHIFT) - 1
EMPTY = (_TOP << _SHIFT) | 0
Labels = Tensor


def pack(low: Tensor, high: Tensor) -> Labels:
    """Labels from interval ends; an empty interval has ``high == -1`` and ``low`` at the top."""
    return (low.long() << _SHIFT) | (high.long() + 1)


def heads(numbers: Tensor) -> Labels:
    """Labels of single heads; -1 is no head."""
    numbers = numbers.long()
    return torch.where(numbers < 0, torch.full_like(numbers, EMPTY), pack(numbers, numbers))


def low(labels: Labels) -> Tensor:
    """First head of each interval (a huge number when empty)."""
    return labels >> _SHIFT


def high(labels: Labels) -> Tensor:
    """Last head of each interval (-1 when empty)."""
    return (labels & _TOP) - 1


def compress(labels: Tensor) -> Tensor:
    """The same labels with size 1 along every dimension on which they do not vary."""
    for dim in range(labels.dim()):
        if labels.size(dim) > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels.contiguous()


def join(first: Labels, second: Labels) -> Labels:
    """The smallest intervals that hold both, broadcasting."""
    return compress(pack(torch.minimum(low(first), low(second)), torch.maximum(high(first), high(second))))


def join_over(labels: Labels, dims: Sequence[int]) -> Labels:
    """Join along ``dims``, keeping them with size 1."""
    dims = [d for d in dims if labels.size(d) > 1]
    if not dims:
        return labels
    return pack(low(labels).amin(dims, keepdim=True), high(labels).amax(dims, keepdim=True))


def single(labels: Labels) -> Tensor:
    """True where the label is exactly one head."""
    return low(labels) == high(labels)


def varying(labels: Tensor) -> list[int]:
    """The dimensions on which compressed labels vary."""
    return [d for d, size in enumerate(labels.shape) if size > 1]


def run_move(node: fx.Node, values: dict[fx.Node, Tensor], indices: dict[fx.Node, Tensor]) -> Tensor:
    """Run the move ``node`` on other data: ``values`` for its sources, ``indices`` for its index operands."""
    maker = moved_from(node)
    name = op_name(maker)

    def swap(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if argument in values:
                return values[argument]
            if argument in indices:
                return indices[argument]
            value = value_of(argument)
            if isinstance(value, torch.Tensor):
                return value if not name.endswith("_as") else torch.empty(shape_of(argument), dtype=torch.long)
            return hint(value)
        if isinstance(argument, list | tuple):
            return type(argument)(swap(a) for a in argument)
        return argument

    args, kwargs = swap(tuple(maker.args)), {k: swap(v) for k, v in maker.kwargs.items()}
    if name in IDENTITY_MOVES:
        result: Any = args[0]
    elif name in ("view", "_unsafe_view", "view_copy"):
        result = args[0].reshape(args[1])
    elif name in ("im2col", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"):
        result = maker.target(args[0].double(), *args[1:], **kwargs).long()  # type: ignore[operator]
    elif name in ("constant_pad_nd", "pad"):
        if name == "pad" and len(args) > 2 and args[2] != "constant":
            result = torch.nn.functional.pad(args[0].double(), args[1], mode=args[2]).long()
        else:
            result = torch.nn.functional.pad(args[0], args[1], value=-1)
    else:
        result = maker.target(*args, **kwargs)  # type: ignore[operator]
    if maker is not node:
        result = operator.getitem(result, node.args[1])
    assert isinstance(result, Tensor)
    return result


def fill_gaps(labels: Labels, present: Tensor) -> Labels:
    """Label every element that is ``present``, also those that no head asked for, like its neighbours.

    Slices and shifts ask for some positions only, but what is cut are heads, not positions: a present element belongs
    to the head that its neighbours along the other dimensions belong to. Irregular labels are returned as they are.
    """
    labels, present = torch.broadcast_tensors(labels, present)
    needed = labels != EMPTY
    if bool((needed | ~present).all()):
        return compress(labels)
    dims = [d for d in range(labels.dim()) if labels.size(d) > 1]
    for kept in [*([d] for d in dims), *([a, b] for a in dims for b in dims if a < b)]:
        line = join_over(labels, [d for d in dims if d not in kept])
        if bool(((labels == line) | ~needed).all()) and bool(((line != EMPTY) | ~present).all()):
            return compress(torch.where(present, line, torch.full_like(labels, EMPTY)))
    return compress(labels)


class Carrier:
    """Moves labels over single ops, remembering what it has computed for equal ops and equal labels.

    Layers repeat, so that nearly every question after the first layer is answered from memory.
    """

    def __init__(self, owner: fx.GraphModule, constants: set[fx.Node]) -> None:
        self._maps: dict[Any, tuple[Tensor, list[tuple[int, ...]]]] = {}
        self._answers: dict[Any, Any] = {}
        self._owner, self._constants = owner, constants

    def _key(self, node: fx.Node) -> Any:
        known = node.meta.get("sqa_key")
        if known is None:
            maker = moved_from(node)

            def plain(argument: Any) -> Any:
                if isinstance(argument, fx.Node):
                    if is_tensor(argument):
                        indexed = argument.name if argument in self._index_nodes(node) else ""
                        return ("tensor", shape_of(argument), indexed)
                    value = value_of(argument)
                    return "tuple" if isinstance(value, tuple | list) else hint(value)
                if isinstance(argument, list | tuple):
                    return tuple(plain(a) for a in argument)
                return argument if not isinstance(argument, torch.dtype | torch.device) else str(argument)

            def full(n: fx.Node) -> Any:
                return (str(n.target), plain(n.args), tuple((k, plain(v)) for k, v in n.kwargs.items()))

            known = (full(maker), node.args[1]) if maker is not node else (full(node),)
            value = value_of(node)
            if maker.args and maker.args[0] in self._constants and isinstance(value, torch.Tensor):
                known = (*known, tuple(isinstance(n, int) for n in value.shape))
            # Equal source nodes twice (cat of the same tensor) must not look like two different ones.
            s = step(node)
            if isinstance(s, Move):
                known = (*known, tuple(s.sources.index(n) for n in s.sources))
            node.meta["sqa_key"] = known
        return known

    def _index_nodes(self, node: fx.Node) -> dict[fx.Node, Tensor]:
        """Index operands of a gather-like move, with their values where the graph fixes them."""
        maker = moved_from(node)
        if op_name(maker) not in ("index", "index_select"):
            return {}
        found: dict[fx.Node, Tensor] = {}
        for n in maker.all_input_nodes:
            if n is not maker.args[0] and is_tensor(n):
                found[n] = self._index_value(n)
        return found

    def _index_value(self, node: fx.Node) -> Tensor:
        value = constant_tensor(node, self._owner)
        if value is not None:
            return value
        # Unknown at this point: any index gives the same labels unless heads lie along the indexed dimension.
        fake = value_of(node)
        dtype = fake.dtype if isinstance(fake, torch.Tensor) else torch.long
        return torch.zeros(shape_of(node), dtype=dtype)

    def move_forward(self, node: fx.Node, labels: dict[fx.Node, Tensor], missing: int = EMPTY) -> Tensor:
        """Labels of a move's output from those of its sources (``missing`` for a source without)."""
        move = step(node)
        assert isinstance(move, Move)
        known = tuple(
            (tuple(labels[s].shape), labels[s].numpy().tobytes()) if s in labels else None for s in move.sources
        )
        key = ("forward", self._key(node), known, missing)
        answer = self._answers.get(key)
        if answer is None:
            given = {s: labels.get(s, torch.full((1,) * len(shape_of(s)), missing)) for s in move.sources}
            # Sources of fewer dimensions (what select_scatter writes) only occur in moves that run at their full size.
            rank = len(shape_of(move.sources[0]))
            varies = [any(t.dim() == rank and t.size(d) > 1 for t in given.values()) for d in range(rank)]
            moved = self._run_small(node, given, varies, [False] * len(shape_of(node)))
            if op_name(moved_from(node)) in ("constant_pad_nd", "pad"):
                moved = torch.where(moved == -1, missing, moved)
            answer = compress(moved)
            self._answers[key] = answer
        return answer

    def move_backward(self, node: fx.Node, labels: Labels) -> dict[fx.Node, Labels]:
        """Labels of a move's sources from those of its output: each source element joins all the places it went to."""
        move = step(node)
        assert isinstance(move, Move)
        key = ("backward", self._key(node), tuple(labels.shape), labels.numpy().tobytes())
        answer = self._answers.get(key)
        sources = list(dict.fromkeys(move.sources))
        if answer is None:
            varies = [size > 1 for size in labels.shape]
            index, shapes = self._source_index(node, sources, varies)
            flat, index = labels.expand(index.shape).reshape(-1), index.reshape(-1)
            keep = index >= 0
            index, flat = index[keep], flat[keep]
            total = sum(map(_numel, shapes))
            lows = torch.full((total,), _TOP).scatter_reduce_(0, index, low(flat), "amin")
            highs = torch.full((total,), -1).scatter_reduce_(0, index, high(flat), "amax")
            answer = []
            start = 0
            for shape in shapes:
                part = slice(start, start + _numel(shape))
                moved = pack(lows[part], highs[part]).view(shape)
                answer.append(compress(self._whole_table(node, labels, moved)))
                start = part.stop
            self._answers[key] = answer
        return dict(zip(sources, answer, strict=True))

    def _whole_table(self, node: fx.Node, labels: Labels, moved: Labels) -> Labels:
        """A table looked up by an index belongs to its heads as a whole, not only in the rows that were looked up."""
        maker = moved_from(node)
        if maker.args[0] not in self._constants:
            return moved
        if op_name(maker) in ("slice", "narrow"):
            # A table cut to a free length belongs to its heads at every position, also beyond the example's.
            dim = int(concrete(maker.args[1] if len(maker.args) > 1 else 0)) % moved.dim()
            if isinstance(value_of(node).shape[dim], int) or labels.size(dim) > 1:
                return moved
            return join_over(moved, [dim])
        if op_name(maker) == "index_select":
            first, width = int(concrete(maker.args[1])) % moved.dim(), 1
            dims = [first]
        elif op_name(maker) == "index":
            entries = list(maker.args[1])  # type: ignore[arg-type]
            dims = [i for i, n in enumerate(entries) if n is not None]
            if dims != list(range(dims[0], dims[-1] + 1)):
                return moved
            first = dims[0]
            width = labels.dim() - (moved.dim() - len(dims))
        else:
            return moved
        if any(labels.size(d) > 1 for d in range(first, first + width)):
            return moved
        return join_over(moved, dims)

    def _source_index(
        self, node: fx.Node, sources: list[fx.Node], varies: list[bool]
    ) -> tuple[Tensor, list[tuple[int, ...]]]:
        """For each output element the source element it was, in the order of ``sources``, and the sizes of these:
        dimensions that are passed through and do not vary have size 1."""
        key = (self._key(node), tuple(varies))
        known = self._maps.get(key)
        if known is None:
            way = passage(node, sources)
            shapes = [shape_of(s) for s in sources]
            if way is not None:
                gone = way.unvarying([False] * len(way.source), varies)
                lost = {d for i in gone for d in way.groups[i][0]}
                shapes = [tuple(1 if d in lost else n for d, n in enumerate(shape)) for shape in shapes]
            values = {}
            start = 0
            for source, shape in zip(sources, shapes, strict=True):
                values[source] = torch.arange(start, start + _numel(shape)).view(shape)
                start += _numel(shape)
            index = self._run_small(node, values, [False] * len(shape_of(sources[0])), varies)
            if way is None and tuple(index.shape) != shape_of(node):
                raise ValueError(f"which elements {node.name} takes depends on data")
            known = self._maps[key] = index, shapes
        return known

    def _run_small(
        self, node: fx.Node, given: dict[fx.Node, Tensor], source_varies: list[bool], out_varies: list[bool]
    ) -> Tensor:
        """Run the move ``node`` on ``given`` (compressed, one for each source) at sizes without the dimensions that it
        passes through and that vary on neither side."""
        move = step(node)
        assert isinstance(move, Move)
        way = passage(node, move.sources)
        if way is None:
            return run_move(node, {s: given[s].expand(shape_of(s)) for s in move.sources}, self._index_nodes(node))
        gone = way.unvarying(source_varies, out_varies)
        lost = {d for i in gone for d in way.groups[i][0]}
        values = {s: given[s].expand([1 if d in lost else n for d, n in enumerate(shape_of(s))]) for s in move.sources}
        if way.run is not None:
            return way.run(values[move.sources[0]], way.sizes(gone)[1])
        return run_move(node, values, self._index_nodes(node))

    @staticmethod
    def align_backward(operand: Operand, labels: Labels) -> Labels:
        """Labels of one operand of an aligned op from those of its output."""
        present = [d for d in operand.dims if d is not None and d >= 0]
        labels = join_over(labels, [d for d in range(labels.dim()) if d not in present])
        kept = labels.permute(*present, *[d for d in range(labels.dim()) if d not in present])
        kept = kept.reshape([labels.size(d) for d in present])
        for position, dim in enumerate(operand.dims):
            if dim is None or dim < 0:
                kept = kept.unsqueeze(position)
        return kept.contiguous()

    @staticmethod
    def align_forward(operand: Operand, labels: Labels, rank: int) -> tuple[Labels, bool]:
        """Labels of an aligned op's output from one operand's, and whether they varied along a mixed dimension."""
        mixed = [i for i, d in enumerate(operand.dims) if d is None or d < 0]
        crossing = any(labels.size(i) > 1 for i in mixed)
        labels = join_over(labels, mixed)
        order = sorted((d, i) for i, d in enumerate(operand.dims) if d is not None and d >= 0)
        shape = [1] * rank
        for dim, position in order:
            shape[dim] = labels.size(position)
        flat = labels.permute([*(i for _, i in order), *mixed])
        return flat.reshape(shape).contiguous(), crossing


def mixed_dims(description: Aligned, labels: Labels) -> list[int]:
    """The output dimensions along which a norm or softmax mixes entries of different labels."""
    found = [d for d in description.locked if labels.size(d) > 1]
    for dim, length in description.blocks:
        if labels.size(dim) > 1:
            parts = labels.unflatten(dim, (-1, length))
            if not bool((parts == parts.narrow(dim + 1, 0, 1)).all()):
                found.append(dim)
    return found


def aligned(node: fx.Node) -> Aligned | None:
    """The aligned description of ``node``, or None."""
    found = step(node)
    return found if isinstance(found, Aligned) else None


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def run_length(labels: torch.Tensor) -> int:
    """How many equal labels stand in a row at the start."""
    different = torch.nonzero(labels != labels[0]).reshape(-1)
    return int(different[0]) if different.numel() else labels.numel()
