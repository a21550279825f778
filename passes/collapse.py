"""Moves at smaller sizes: dimensions that a move only passes through, and that no label varies along, need one entry.

Labels of a [1, 32768, 1024] tensor are found by running its moves on indices. What happens along the 32768 positions is
the same everywhere, so the index tensors leave them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqa_fx.passes.aten_call import argument, moved_from, op_name
from sqa_fx.passes.hints import concrete, is_tensor, shape_of
from sqa_fx.passes.ops import IDENTITY_MOVES

_RESHAPES = frozenset(
    "view _unsafe_view view_copy reshape flatten unflatten squeeze unsqueeze squeeze_copy view_as reshape_as".split()
)
_PERMUTES = frozenset("permute transpose t mT numpy_T adjoint swapaxes swapdims movedim moveaxis".split())
_EXPANDS = frozenset("expand expand_as broadcast_to".split())
_ALONG_ONE = frozenset(
    """cat concat concatenate slice narrow split split_with_sizes unsafe_split chunk tensor_split
    repeat_interleave""".split()
)


@dataclass(frozen=True)
class Passage:
    """What a move does to dimensions: groups of source and output dimensions that hold the same entries in the same
    order (one group may be new or repeated: no source dimension), and how to run it on tensors of other sizes."""

    source: tuple[int, ...]
    out: tuple[int, ...]
    groups: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    run: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None
    """The move of one source, given its output sizes; None runs the op itself, whose arguments name no sizes."""

    def unvarying(self, source: Sequence[bool], out: Sequence[bool]) -> set[int]:
        """The groups without a dimension that varies on either side."""
        return {
            i
            for i, (own, made) in enumerate(self.groups)
            if not any(source[d] for d in own) and not any(out[d] for d in made)
        }

    def sizes(self, gone: set[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Source and output sizes with the dimensions of the groups ``gone`` of size 1."""
        source, out = list(self.source), list(self.out)
        for i in gone:
            for d in self.groups[i][0]:
                source[d] = 1
            for d in self.groups[i][1]:
                out[d] = 1
        return tuple(source), tuple(out)


def passage(node: fx.Node, sources: Sequence[fx.Node]) -> Passage | None:
    """How the move ``node`` passes dimensions on; None when that is not known for its op."""
    if not is_tensor(node):
        return None
    maker = moved_from(node)
    name = op_name(maker)
    source, out = shape_of(sources[0]), shape_of(node)
    same = tuple(((d,), (d,)) for d in range(len(out)))
    if name in IDENTITY_MOVES:
        return Passage(source, out, same, lambda t, sizes: t)
    if name in _RESHAPES and maker is node:
        return Passage(source, out, _reshape_groups(source, out), lambda t, sizes: t.reshape(sizes))
    if name in _PERMUTES:
        order = _permutation(maker, len(source))
        return Passage(source, out, tuple(((o,), (d,)) for d, o in enumerate(order)), lambda t, sizes: t.permute(order))
    if name in _EXPANDS:
        lead = len(out) - len(source)
        groups = tuple(
            ((d - lead,) if d >= lead and source[d - lead] == size else (), (d,)) for d, size in enumerate(out)
        )
        return Passage(source, out, groups, lambda t, sizes: t.expand(sizes))
    if name in _ALONG_ONE and len(source) == len(out) and all(len(shape_of(s)) == len(out) for s in sources):
        found = concrete(argument(maker, "dim", 0))
        if found is None:
            return None
        along = int(found) % len(out)
        return Passage(source, out, tuple(g for g in same if g != ((along,), (along,))))
    if name == "select" or (name == "unbind" and maker is not node):
        along = int(concrete(argument(maker, "dim", 0))) % len(source)
        return Passage(source, out, tuple(((d + (d >= along),), (d,)) for d in range(len(out))))
    return None


def _permutation(maker: fx.Node, rank: int) -> tuple[int, ...]:
    """For every output dimension of a permuting op, the source dimension it was."""
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    arguments = [concrete(a) for a in maker.args[1:]]
    made = maker.target(probe, *arguments, **{k: concrete(v) for k, v in maker.kwargs.items()})  # type: ignore[operator]
    return tuple(size - 2 for size in made.shape)


def _reshape_groups(source: Sequence[int], out: Sequence[int]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """The smallest runs of source and output dimensions that hold equally many entries, from the left."""
    groups = []
    i = j = 0
    while i < len(source) or j < len(out):
        own, made = [], []
        if i < len(source):
            own, i = [i], i + 1
        if j < len(out):
            made, j = [j], j + 1
        while math.prod(source[d] for d in own) != math.prod(out[d] for d in made):
            if math.prod(source[d] for d in own) < math.prod(out[d] for d in made) and i < len(source):
                own.append(i)
                i += 1
            elif j < len(out):
                made.append(j)
                j += 1
            else:
                return ()  # tensors without entries
        groups.append((tuple(own), tuple(made)))
    return tuple(groups)
