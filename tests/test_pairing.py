"""KV heads are merged with those that they are like once they are turned."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sqa_fx.passes.pairing import Likeness, grouped
from sqa_fx.passes.rotation import Structure, structures

SIZE, HALVES = 6, structures(6)[-2]


def twins(structure: Structure, noise: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    """Second moments of heads 0 to 5, where 3 is a turned 0, 4 a turned 2, and 5 a turned 1; and the rotations."""
    generator = torch.Generator().manual_seed(1)
    heads = [torch.randn(200, SIZE, generator=generator, dtype=torch.float64) for _ in range(3)]
    turns = [structure.random(SIZE, generator) for _ in range(3)]
    heads += [heads[i] @ turn for i, turn in zip((0, 2, 1), turns, strict=True)]
    x = torch.cat(heads, 1)
    x = x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x.T @ x, turns


def distances(likeness: Likeness, heads: int) -> Tensor:
    return torch.tensor([[likeness.distance(a, b) for b in range(heads)] for a in range(heads)])


@pytest.mark.parametrize("structure", [structures(SIZE)[0], HALVES], ids=lambda s: s.name)
def test_turned_twins_are_paired(structure: Structure) -> None:
    second, turns = twins(structure, noise=0.05)
    likeness = Likeness(second, SIZE, structure)
    found = distances(likeness, 6)
    assert grouped(range(6), 3, found) == [[0, 3], [1, 5], [2, 4]]
    assert float(found[0, 3]) < 0.01
    assert float(found[0, 1]) > 0.3
    torch.testing.assert_close(likeness.turns([0, 3])[3], turns[0].T, atol=0.05, rtol=0)


def test_exact_twins_are_at_no_distance() -> None:
    second, turns = twins(HALVES)
    likeness = Likeness(second, SIZE, HALVES)
    assert abs(likeness.distance(1, 5)) < 1e-12
    made = likeness.turns([1, 5])
    assert torch.equal(made[1], torch.eye(SIZE, dtype=torch.float64))
    torch.testing.assert_close(made[5], turns[2].T)


def test_heads_that_cannot_be_turned_are_compared_as_they_are() -> None:
    second, _ = twins(HALVES)
    likeness = Likeness(second, SIZE, None)
    assert torch.equal(likeness.turns([0, 3])[3], torch.eye(SIZE, dtype=torch.float64))
    assert likeness.distance(0, 0) == pytest.approx(0)
    assert likeness.distance(0, 3) > 0.3
    assert Likeness(torch.zeros(4, 4), 2, None).distance(0, 1) == 0  # silent heads


def test_three_heads_are_turned_onto_their_mean() -> None:
    """Of three turned copies of one head with noise, the mean after turning is nearer to the head than after turning
    each onto the first alone would explain: all distances to the mean fall, none rises above the noise."""
    generator = torch.Generator().manual_seed(2)
    structure = structures(SIZE)[0]
    base = torch.randn(300, SIZE, generator=generator, dtype=torch.float64)
    turns = [structure.random(SIZE, generator) for _ in range(3)]
    heads = [base @ r + 0.1 * torch.randn(base.shape, generator=generator, dtype=base.dtype) for r in turns]
    x = torch.cat(heads, 1)
    made = Likeness(x.T @ x, SIZE, structure).turns([0, 1, 2])
    laid = [head @ made[i] for i, head in enumerate(heads)]
    mean = torch.stack(laid).mean(0)
    for own in laid:
        assert float((own - mean).square().mean()) < 0.01


def inside(groups: list[list[int]], found: Tensor) -> float:
    return sum(float(found[a, b]) for g in groups for a, b in itertools.combinations(g, 2))


@pytest.mark.parametrize(("heads", "count", "sizes"), [(6, 3, [2, 2, 2]), (7, 3, [2, 2, 3]), (8, 2, [4, 4]),
                                                       (5, 5, [1] * 5), (5, 4, [1, 1, 1, 2]), (4, 1, [4])])  # fmt: skip
def test_sizes(heads: int, count: int, sizes: list[int]) -> None:
    found = torch.rand(heads, heads, generator=torch.Generator().manual_seed(heads))
    found = found + found.T
    members = [10 + h for h in range(heads)]
    wide = torch.zeros(10 + heads, 10 + heads)
    wide[10:, 10:] = found
    made = grouped(members, count, wide)
    assert sorted(map(len, made)) == sizes
    assert sorted(h for g in made for h in g) == members
    assert [g[0] for g in made] == sorted(g[0] for g in made)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_near_the_best_of_all(seed: int) -> None:
    """Against every way to pair six heads; greedy choice alone is further off."""
    found = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed))
    found = found + found.T
    orders = itertools.permutations(range(6))
    best = min(inside([[p[0], p[1]], [p[2], p[3]], [p[4], p[5]]], found) for p in orders)
    assert inside(grouped(range(6), 3, found), found) <= 1.15 * best


def test_a_swap_mends_a_greedy_choice() -> None:
    """0 and 1 are nearest, but then 2 and 3 must go together, at 9: better are 0 with 2 and 1 with 3."""
    found = torch.tensor([[0, 1, 2, 8], [1, 0, 8, 2], [2, 8, 0, 9], [8, 2, 9, 0.0]])
    assert grouped(range(4), 2, found) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("structure", [structures(SIZE)[0], HALVES], ids=lambda s: s.name)
def test_one_head_that_tells_of_all(structure: Structure) -> None:
    """What is lost is what the mean of the mapped heads, mapped back, misses of them; turning alone loses more."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(400, 2 * SIZE, generator=generator, dtype=torch.float64)
    heads = [
        shared @ torch.randn(2 * SIZE, SIZE, generator=generator, dtype=torch.float64) * scale for scale in (1, 0.5, 2)
    ]
    x = torch.cat(heads, 1)
    likeness = Likeness(x.T @ x, SIZE, structure)
    made = likeness.joint([0, 1, 2], [torch.eye(SIZE, dtype=torch.float64)] * 3)

    def missed(down: Sequence[Tensor], back: Sequence[Tensor]) -> float:
        merged = torch.stack([h @ d for h, d in zip(heads, down, strict=True)]).mean(0)
        left = sum(float((h - merged @ b.T).square().sum()) for h, b in zip(heads, back, strict=True))
        return left / float(x.square().sum())

    assert made.lost == pytest.approx(missed(made.down, made.back), rel=1e-2)
    turns = likeness.turns([0, 1, 2])
    aligned = missed(list(turns.values()), list(turns.values()))
    assert made.lost < 0.9 * aligned
    if not structure.pairs:  # then it is the best of all linear maps: principal components of all heads together
        values = torch.linalg.eigvalsh(x.T @ x)
        assert made.lost == pytest.approx(float(values[:-SIZE].sum() / values.sum()), rel=1e-2)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("structure", [structures(SIZE)[0], HALVES], ids=lambda s: s.name)
def test_a_merged_head_has_the_scale_of_its_heads(structure: Structure, scale: float) -> None:
    """Whatever reads the heads: half precision and an optimizer need weights as large as they were."""
    generator = torch.Generator().manual_seed(5)
    heads = [torch.randn(300, SIZE, generator=generator, dtype=torch.float64) for _ in range(3)]
    reads = [scale * torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64) for _ in range(3)]
    x = torch.cat(heads, 1)
    made = Likeness(x.T @ x, SIZE, structure).joint([0, 1, 2], [m.T @ m for m in reads])
    assert sum(float(b.square().sum()) for b in made.back) == pytest.approx(3 * SIZE)
    merged = torch.stack([h @ d for h, d in zip(heads, made.down, strict=True)]).mean(0)
    assert 0.2 < float(merged.square().mean().sqrt()) < 2
    alone = Likeness(heads[0].T @ heads[0], SIZE, structure).joint([0], [reads[0].T @ reads[0]])
    unit = torch.eye(SIZE, dtype=torch.float64)
    torch.testing.assert_close(alone.down[0], unit)
    torch.testing.assert_close(alone.back[0], unit)
