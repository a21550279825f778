"""Rotations of heads, and other changes of basis, so that heads can be laid on each other.

Values may be turned by any orthogonal R when the output projection turns back: (v R) (W_o R)^T = v W_o^T. Queries and
keys may be turned together: (q R) (k R)^T = q k^T, wherever R commutes with what lies between the projections and the
scores: anything without rotary embedding, 2x2 rotations of its frequency pairs with it, nothing behind a norm with a
weight for each channel. Which of these a site allows is found out by trial: the original graph with turned weights
must compute what it computed before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqa_fx.errors import PlanError
from sqa_fx.passes.graph import attribute
from sqa_fx.plan import Rotation, from_ranges


@dataclass(frozen=True)
class Structure:
    """Which rotations of one head's channels are allowed: ``pairs`` of channels that turn as one, and ``free``
    channels, which turn in any way among themselves."""

    name: str
    free: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    linear: bool = True
    """Whether maps that change lengths are allowed too, where what reads the head undoes them."""

    def random(self, size: int, generator: torch.Generator) -> Tensor:
        """A random allowed rotation [size, size], in float64."""
        gram = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return self.nearest(gram)

    def stretched(self, size: int, generator: torch.Generator) -> Tensor:
        """A random allowed map that also changes lengths, by factors from 1/2 to 2: [size, size], in float64."""
        factors = torch.ones(size, dtype=torch.float64)
        free = list(self.free)
        factors[free] = 2 ** (2 * torch.rand(len(free), generator=generator, dtype=torch.float64) - 1)
        for a, b in self.pairs:
            factors[a] = factors[b] = 2 ** (2 * torch.rand((), generator=generator, dtype=torch.float64) - 1)
        return self.random(size, generator) * factors

    def nearest(self, cross: Tensor) -> Tensor:
        """The allowed rotation R that makes a R closest to b, for cross = a^T b [size, size]: orthogonal Procrustes
        (Schoenemann 1966) on the free channels, its closed form in the plane for each pair."""
        size = cross.size(0)
        turned = torch.eye(size, dtype=torch.float64, device=cross.device)
        cross = cross.double()
        if self.free:
            at = torch.tensor(self.free, device=cross.device)
            left, _, right = torch.linalg.svd(cross[at][:, at])
            turned[at[:, None], at] = left @ right
        if self.pairs:
            a, b = torch.tensor(self.pairs, device=cross.device).T
            # Maximise trace(R^T C) over R = [[c, -s], [s, c]].
            angle = torch.atan2(cross[b, a] - cross[a, b], cross[a, a] + cross[b, b])
            turned[a, a] = turned[b, b] = angle.cos()
            turned[b, a], turned[a, b] = angle.sin(), -angle.sin()
        return turned


def structures(size: int) -> list[Structure]:
    """Candidates for heads of ``size`` channels, the freest first: any rotation; frequency pairs in halves
    (i, i + r/2) or side by side (2i, 2i + 1), over the first r channels (partial rotary embedding: a quarter, two
    fifths or half of them) with the rest free, or over all."""
    found = [Structure("any", tuple(range(size)))]
    for rotary in dict.fromkeys((size // 4, 2 * size // 5, size // 2, size)):
        if rotary < 2 or rotary % 2:
            continue
        rest = tuple(range(rotary, size))
        half = rotary // 2
        found.append(Structure(f"halves of {rotary}", rest, tuple((i, i + half) for i in range(half))))
        if half > 1:
            found.append(Structure(f"neighbours in {rotary}", rest, tuple((2 * i, 2 * i + 1) for i in range(half))))
    return found


def rotated(tensor: Tensor, rotations: Sequence[Rotation], matrices: Mapping[str, Tensor]) -> Tensor:
    """``tensor`` with entries e along the axis of each rotation replaced by R^T e, computed in float64."""
    new = tensor.detach().double() if tensor.is_floating_point() else tensor
    for rotation in rotations:
        if rotation.matrix not in matrices:
            raise PlanError(
                f"the plan turns heads of {rotation.parameter}, but the rotation {rotation.matrix!r} is not with it: "
                "keep the .safetensors file beside the plan"
            )
        entries = torch.tensor(from_ranges(rotation.entries), device=tensor.device)
        turn = matrices[rotation.matrix].to(new)
        length = tensor.shape[rotation.axis] if rotation.axis < tensor.dim() else 0
        if turn.shape != (len(entries), len(entries)) or len(entries) == 0 or int(entries.max()) >= length:
            raise PlanError(
                f"rotation {rotation.matrix!r} does not fit entries {', '.join(rotation.entries)} of "
                f"{rotation.parameter} {list(tensor.shape)}: it is {list(turn.shape)}"
            )
        own = new.index_select(rotation.axis, entries).movedim(rotation.axis, -1) @ turn
        new = new.index_copy(rotation.axis, entries, own.movedim(-1, rotation.axis))
    return new.to(tensor.dtype)


def turned_weights(
    module: fx.GraphModule, rotations: Sequence[Rotation], matrices: Mapping[str, Tensor], wide: bool = False
) -> dict[str, Tensor]:
    """The tensors of all parameters that ``rotations`` change, by name; ``wide`` in float64."""
    by_parameter: dict[str, list[Rotation]] = {}
    for rotation in rotations:
        by_parameter.setdefault(rotation.parameter, []).append(rotation)
    found = {}
    for name, own in by_parameter.items():
        held = attribute(module, name).detach()
        found[name] = rotated(held.double() if wide else held, own, matrices)
    return found
