"""Which heads a layer can best do without once its output projection is fitted again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sqa_fx.passes.eliminate import eliminate

HEADS, SIZE, OUT, ROWS = 6, 3, 7, 300


def layer(seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Inputs x [rows, heads * size] whose heads partly tell each other, W [out, heads * size], columns by head: every
    head has every HEADS-th column."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, HEADS * SIZE - 4, generator=generator, dtype=torch.float64)
    x = hidden @ torch.randn(HEADS * SIZE - 4, HEADS * SIZE, generator=generator, dtype=torch.float64)
    x = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(OUT, HEADS * SIZE, generator=generator, dtype=torch.float64)
    return x, weight, [torch.arange(h, HEADS * SIZE, HEADS) for h in range(HEADS)]


def lost(x: Tensor, weight: Tensor, heads: Sequence[Tensor], kept: Sequence[int]) -> float:
    """What a direct least-squares fit of W x from the kept heads leaves, relative to |W x|^2."""
    y = x @ weight.T
    own = x[:, torch.cat([heads[h] for h in kept])]
    left = y - own @ torch.linalg.lstsq(own, y).solution
    return float(left.square().sum() / y.square().sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_as_good_as_the_best_of_all_sets(seed: int, count: int) -> None:
    x, weight, heads = layer(seed)
    found = eliminate(weight, x.T @ x, heads, count)
    assert len(found.kept) == count
    assert found.kept == sorted(found.kept)
    assert found.error == pytest.approx(lost(x, weight, heads, found.kept), rel=1e-3)
    best = min(lost(x, weight, heads, s) for s in itertools.combinations(range(HEADS), count))
    assert found.error <= 1.02 * best


def test_groups_keep_their_shares() -> None:
    x, weight, heads = layer(0)
    groups = [[0, 1, 2], [3, 4, 5]]
    found = eliminate(weight, x.T @ x, heads, 2, groups)
    sets = [(a, b) for a in groups[0] for b in groups[1]]
    best = min(sets, key=lambda s: lost(x, weight, heads, s))
    assert tuple(found.kept) == best
    assert found.error == pytest.approx(lost(x, weight, heads, best), rel=1e-3)


def test_a_copy_goes_and_costs_nothing() -> None:
    x, weight, heads = layer(1)
    x[:, heads[4]] = -2 * x[:, heads[1]]
    found = eliminate(weight, x.T @ x, heads, 5)
    assert set(range(HEADS)) - set(found.kept) <= {1, 4}
    assert found.error < 1e-5


def test_a_silent_head_goes_first() -> None:
    x, weight, heads = layer(2)
    x[:, heads[3]] = 0
    assert 3 not in eliminate(weight, x.T @ x, heads, 5).kept
    weight[:, heads[3]] = 0  # neither heard
    assert 3 not in eliminate(weight, x.T @ x, heads, 5).kept


def test_among_equals_the_tie_break_decides() -> None:
    """Heads 0 and 1 are the same: either may go."""
    x, weight, heads = layer(3)
    x[:, heads[1]] = x[:, heads[0]]
    for low in (0, 1):
        ranks = torch.ones(HEADS)
        ranks[low] = 0.5
        assert low not in eliminate(weight, x.T @ x, heads, 5, tie_break=ranks).kept


def test_all_and_the_way_there() -> None:
    x, weight, heads = layer(0)
    whole = eliminate(weight, x.T @ x, heads, HEADS)
    assert whole.kept == list(range(HEADS))
    assert whole.error == 0
    found = eliminate(weight, x.T @ x, heads, 1)
    assert sorted(found.errors) == [1, 2, 3, 4, 5, 6]
    assert [found.errors[n] for n in (6, 5, 4, 3, 2, 1)] == sorted(found.errors.values())
    assert found.error <= found.errors[1] + 1e-12
