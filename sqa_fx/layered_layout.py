"""Coordinates for a small directed graph drawn in layers from top to bottom (Sugiyama, Tagawa and Toda, 1981)."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_SWEEPS = 12
_RELAXATIONS = 24


@dataclass(frozen=True)
class Layering:
    """Where every node goes: its layer (0 is the top) and the x of its centre; per edge the x at each layer between."""

    layers: tuple[int, ...]
    x: tuple[float, ...]
    bends: tuple[tuple[float, ...], ...]
    width: float


def layered(edges: Sequence[tuple[int, int]], widths: Sequence[float], gap: float) -> Layering:
    """Lay out nodes of the given ``widths`` with ``gap`` between neighbours, in the unit of these two.

    ``edges`` are pairs of node numbers and hold no cycle. Nodes without inputs stand right above their first reader.
    Edges that cross layers bend around the nodes there.
    """
    count = len(widths)
    layers = _layers(count, edges)
    # An edge over several layers becomes a chain of narrow invisible nodes, which take part in the layout.
    places, sizes, chains = list(layers), list(widths), []
    pairs: list[tuple[int, int]] = []
    for start, end in edges:
        chain = [start]
        for layer in range(layers[start] + 1, layers[end]):
            chain.append(len(places))
            places.append(layer)
            sizes.append(gap / 2)
        chain.append(end)
        chains.append(chain)
        pairs.extend(itertools.pairwise(chain))
    above: dict[int, list[int]] = defaultdict(list)
    below: dict[int, list[int]] = defaultdict(list)
    for start, end in pairs:
        below[start].append(end)
        above[end].append(start)
    rows: list[list[int]] = [[] for _ in range(max(places, default=0) + 1)]
    for node, layer in enumerate(places):
        rows[layer].append(node)
    rows = _ordered(rows, above, below, pairs)
    x = _coordinates(rows, above, below, sizes, gap)
    left = min((x[n] - sizes[n] / 2 for n in range(len(places))), default=0.0)
    x = [value - left for value in x]
    width = max((x[n] + sizes[n] / 2 for n in range(len(places))), default=0.0)
    bends = tuple(tuple(x[n] for n in chain[1:-1]) for chain in chains)
    return Layering(tuple(layers), tuple(x[:count]), bends, width)


def _layers(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    below: dict[int, list[int]] = defaultdict(list)
    waiting = [0] * count
    for start, end in edges:
        below[start].append(end)
        waiting[end] += 1
    sources = [n for n in range(count) if not waiting[n]]
    layers, ready = [0] * count, list(sources)
    for node in ready:
        for end in below[node]:
            layers[end] = max(layers[end], layers[node] + 1)
            waiting[end] -= 1
            if not waiting[end]:
                ready.append(end)
    if len(ready) != count:
        raise ValueError("the graph holds a cycle")
    for node in sources:
        if below[node]:
            layers[node] = min(layers[end] for end in below[node]) - 1
    return layers


def _ordered(
    rows: list[list[int]], above: dict[int, list[int]], below: dict[int, list[int]], pairs: Sequence[tuple[int, int]]
) -> list[list[int]]:
    """The rows in the order with the fewest crossings that sweeps of barycentres found."""
    best, fewest = [list(row) for row in rows], _crossings(rows, pairs)
    for sweep in range(_SWEEPS):
        neighbours, order = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        position = {node: i for row in rows for i, node in enumerate(row)}
        for row in order:
            centre = {
                n: sum(position[m] for m in neighbours[n]) / len(neighbours[n]) if neighbours[n] else position[n]
                for n in row
            }
            row.sort(key=centre.__getitem__)
            position.update({node: i for i, node in enumerate(row)})
        crossings = _crossings(rows, pairs)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _crossings(rows: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]) -> int:
    position = {node: (layer, i) for layer, row in enumerate(rows) for i, node in enumerate(row)}
    by_layer: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, end in pairs:
        by_layer[position[start][0]].append((position[start][1], position[end][1]))
    return sum(
        (a - c) * (b - d) < 0 for ends in by_layer.values() for i, (a, b) in enumerate(ends) for c, d in ends[:i]
    )


def _coordinates(
    rows: Sequence[Sequence[int]],
    above: dict[int, list[int]],
    below: dict[int, list[int]],
    sizes: Sequence[float],
    gap: float,
) -> list[float]:
    """Every node as near to the middle of its neighbours as the order and the gaps allow."""
    x = [0.0] * len(sizes)
    for row in rows:
        _spread(row, [0.0] * len(row), x, sizes, gap)
    for turn in range(_RELAXATIONS):
        for row in rows if turn % 2 == 0 else rows[::-1]:
            wanted = []
            for node in row:
                near = (above if turn % 2 == 0 else below)[node] if turn < _RELAXATIONS - 2 else []
                near = near or [*above[node], *below[node]]
                wanted.append(sum(x[n] for n in near) / len(near) if near else x[node])
            _spread(row, wanted, x, sizes, gap)
    return x


def _spread(row: Sequence[int], wanted: Sequence[float], x: list[float], sizes: Sequence[float], gap: float) -> None:
    """Set x in ``row`` nearest to ``wanted`` (least squares) with no overlap: isotonic regression by pooling
    neighbours."""
    offsets = [0.0]
    for left, right in itertools.pairwise(row):
        offsets.append(offsets[-1] + (sizes[left] + sizes[right]) / 2 + gap)
    pools: list[list[float]] = []  # sum, count
    for want, offset in zip(wanted, offsets, strict=False):
        pools.append([want - offset, 1.0])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, number = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += number
    values = [total / number for total, number in pools for _ in range(int(number))]
    for node, value, offset in zip(row, values, offsets, strict=False):
        x[node] = value + offset
