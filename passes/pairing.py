"""Which KV heads to merge: those that are most alike once they are turned onto each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqa_fx.passes.joint_heads import JointMaps, joint_maps
from sqa_fx.passes.rotation import Structure


@dataclass(frozen=True)
class Likeness:
    """Second moments of one kind of head (keys, or values) and the rotations that it allows.

    second: [kv_heads * size, kv_heads * size], summed over tokens, heads in canonical order.
    """

    second: Tensor
    size: int
    structure: Structure | None

    def block(self, a: int, b: int) -> Tensor:
        """The cross moments x_a^T x_b [size, size]."""
        return self.second[a * self.size : (a + 1) * self.size, b * self.size : (b + 1) * self.size]

    def turn(self, cross: Tensor) -> Tensor:
        """The best allowed rotation for cross moments; the identity where none is allowed."""
        if self.structure is None:
            return torch.eye(self.size, dtype=torch.float64, device=cross.device)
        return self.structure.nearest(cross)

    def distance(self, a: int, b: int) -> float:
        """What the mean of heads a and b, turned onto each other, leaves of their energy: 0 for equal heads up to a
        rotation, 1 for unrelated ones."""
        cross = self.block(a, b)
        own = float(self.block(a, a).trace() + self.block(b, b).trace())
        shared = float((self.turn(cross) * cross).sum())
        return (own - 2 * shared) / own if own > 0 else 0.0

    def joint(self, group: Sequence[int], metrics: Sequence[Tensor]) -> JointMaps:
        """The maps of the heads of a group onto the one head that tells most about them, and back."""
        assert self.structure is not None
        second = [[self.block(a, b) for b in group] for a in group]
        return joint_maps(second, metrics, self.structure)

    def turns(self, group: Sequence[int], rounds: int = 3) -> dict[int, Tensor]:
        """For every head of a group the rotation that lays it on the mean of the group (generalised Procrustes: the
        first head stays, the others are turned onto the mean of all in turn)."""
        turned = {g: self.turn(self.block(g, group[0])) for g in group}
        turned[group[0]] = torch.eye(self.size, dtype=torch.float64, device=self.second.device)
        if len(group) > 2:
            for _ in range(rounds):
                for g in group[1:]:
                    others = sum(self.block(g, other) @ turned[other] for other in group if other != g)
                    assert isinstance(others, Tensor)
                    turned[g] = self.turn(others)
        return turned


def grouped(members: Sequence[int], count: int, distances: Tensor) -> list[list[int]]:
    """``members`` in ``count`` groups of equal size (larger by one at most) with a small sum of distances inside:
    nearest pairs first, then swaps between groups as long as one helps.

    distances: [heads, heads], symmetric.
    """
    sizes = [len(members) // count + (i < len(members) % count) for i in range(count)]
    groups: list[list[int]] = [[] for _ in sizes]
    left = list(members)
    for group, size in zip(groups, sizes, strict=True):
        if size == 1:
            continue
        if len(left) >= 2:
            pairs = [(float(distances[a, b]), a, b) for i, a in enumerate(left) for b in left[i + 1 :]]
            _, a, b = min(pairs)
            group.extend((a, b))
            left = [m for m in left if m not in group]
        while len(group) < size:
            nearest = min(left, key=lambda m: (sum(float(distances[m, g]) for g in group), m))
            group.append(nearest)
            left.remove(nearest)
    for group in groups:
        if not group:
            group.append(left.pop(0))
    return sorted((sorted(g) for g in _improved(groups, distances)), key=lambda g: g[0])


def _improved(groups: list[list[int]], distances: Tensor) -> list[list[int]]:
    def inside(group: Sequence[int]) -> float:
        return sum(float(distances[a, b]) for i, a in enumerate(group) for b in group[i + 1 :])

    better = True
    while better:
        better = False
        for i, first in enumerate(groups):
            for second in groups[i + 1 :]:
                now = inside(first) + inside(second)
                for x in range(len(first)):
                    for y in range(len(second)):
                        first[x], second[y] = second[y], first[x]
                        if inside(first) + inside(second) < now - 1e-12:
                            now = inside(first) + inside(second)
                            better = True
                        else:
                            first[x], second[y] = second[y], first[x]
    return groups
