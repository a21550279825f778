"""Which heads a site can best do without, given that its output projection is fitted again: exact, without gradients.

The best least-squares fit of the site's output W x from the inputs x_S of a set S of heads leaves the error
tr(W C W^T) - tr(W C_:S C_SS^-1 C_S: W^T), C being the second moments of x. Heads are taken out one by one, each time
the one that raises this error least; then swaps of a head that went with one that stayed are tried until none helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Relative to the mean diagonal: keeps the inverse finite where channels repeat each other or are silent.
RIDGE = 1e-6


@dataclass
class Elimination:
    """Kept heads and the error that the best refit leaves, relative to the variance of the site's output.

    ``errors[n]`` is that of the best set of ``n`` heads on the way (before swaps).
    """

    kept: list[int]
    error: float
    errors: dict[int, float] = field(default_factory=dict)


class _Fit:
    """The least-squares fit of W x from the columns ``columns``: its coefficients A = W C_:S P and P = C_SS^-1."""

    def __init__(self, weight: Tensor, moments: Tensor, heads: Sequence[Tensor], kept: Sequence[int]) -> None:
        self.heads, self.kept = heads, list(kept)
        columns = torch.cat([heads[h] for h in self.kept])
        self.target = weight @ moments
        inverse = torch.linalg.inv(moments[columns][:, columns])
        self.moments, self.weight = moments, weight
        self.inverse = (inverse + inverse.T) / 2
        self.coefficients = self.target[:, columns] @ self.inverse

    def _where(self, head: int) -> tuple[Tensor, Tensor]:
        sizes = [self.heads[h].numel() for h in self.kept]
        position = self.kept.index(head)
        start = sum(sizes[:position])
        every = torch.arange(sum(sizes), device=self.moments.device)
        return every[start : start + sizes[position]], torch.cat([every[:start], every[start + sizes[position] :]])

    def cost(self, head: int) -> float:
        """By how much the squared error rises when ``head`` goes: tr(A_h P_hh^-1 A_h^T)."""
        own, _ = self._where(head)
        a = self.coefficients[:, own]
        return float((a * torch.linalg.solve(self.inverse[own][:, own], a.T).T).sum())

    def without(self, head: int) -> _Fit:
        """The fit after ``head`` went."""
        own, rest = self._where(head)
        found = object.__new__(_Fit)
        found.heads, found.kept = self.heads, [h for h in self.kept if h != head]
        found.moments, found.weight, found.target = self.moments, self.weight, self.target
        cross = torch.linalg.solve(self.inverse[own][:, own], self.inverse[own][:, rest])
        inverse = self.inverse[rest][:, rest] - self.inverse[rest][:, own] @ cross
        found.inverse = (inverse + inverse.T) / 2
        found.coefficients = self.coefficients[:, rest] - self.coefficients[:, own] @ cross
        return found

    def gain(self, head: int) -> float:
        """By how much the squared error falls when ``head`` comes."""
        own = self.heads[head]
        columns = torch.cat([own[:0], *(self.heads[h] for h in self.kept)])
        between = self.moments[columns][:, own]
        schur = self.moments[own][:, own] - between.T @ self.inverse @ between
        missing = self.target[:, own] - self.coefficients @ between
        return float((missing * torch.linalg.solve(schur, missing.T).T).sum())


def eliminate(
    weight: Tensor,
    moments: Tensor,
    heads: Sequence[Tensor],
    count: int,
    groups: Sequence[Sequence[int]] | None = None,
    tie_break: Tensor | None = None,
) -> Elimination:
    """Keep ``count`` heads, the same number from each of ``groups`` (default: one group of all).

    weight: W_o [out, in]; moments: C [in, in]; heads: the columns of each head; tie_break [heads]: among heads whose
    costs differ by less than a thousandth of the largest, the one with the lowest value goes first.
    """
    groups = groups or [list(range(len(heads)))]
    group_of = {h: i for i, group in enumerate(groups) for h in group}
    share = count // len(groups)
    moments = moments.double()
    weight, heads = weight.to(moments), [h.to(moments.device) for h in heads]
    total = float(((weight @ moments) * weight).sum())
    moments = moments + RIDGE * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)
    scale = max(total, 1e-300)
    fit = _Fit(weight, moments, heads, sorted(group_of))
    error = 0.0
    errors = {len(fit.kept): 0.0}
    while len(fit.kept) > count:
        left = [sum(group_of[h] == i for h in fit.kept) for i in range(len(groups))]
        costs = {h: fit.cost(h) for h in fit.kept if left[group_of[h]] > share}
        gone = _lowest(costs, tie_break)
        error += costs[gone]
        fit = fit.without(gone)
        errors[len(fit.kept)] = error / scale
    kept, error = _swapped(fit, error, group_of, scale)
    return Elimination(sorted(kept), error / scale, errors)


def _lowest(costs: dict[int, float], tie_break: Tensor | None) -> int:
    best = min(costs.values())
    close = [h for h, c in costs.items() if c - best <= 1e-3 * max(costs.values())]
    return min(close, key=lambda h: (float(tie_break[h]) if tie_break is not None else costs[h], costs[h], h))


def _swapped(fit: _Fit, error: float, group_of: dict[int, int], scale: float) -> tuple[list[int], float]:
    """Swap as long as the error falls by more than the ridge can account for."""
    while True:
        best: tuple[float, int, int] | None = None
        for gone in fit.kept:
            cost = fit.cost(gone)
            rest = fit.without(gone)
            for come in (h for h, g in group_of.items() if h not in fit.kept and g == group_of[gone]):
                change = cost - rest.gain(come)
                if best is None or change < best[0]:
                    best = change, gone, come
        if best is None or best[0] > -RIDGE * scale:
            return fit.kept, error
        change, gone, come = best
        kept = [h for h in fit.kept if h != gone] + [come]
        error += change
        fit = _Fit(fit.weight, fit.moments, fit.heads, sorted(kept))
