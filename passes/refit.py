"""Ridge regression of an output projection from sums over calibration data, kept only where it helps on data held out.

The new weight minimises sum |t - W x - b|^2 + lambda |W - W_0|^2: it is drawn to the weight that it replaces. lambda is
the best of a grid on the part of the data that was held out, and without any gain there the old weight stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GRID = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""lambda, relative to the mean diagonal of the second moments."""


@dataclass
class Sums:
    """Sums over rows x [n, in] and targets t [n, out]: x^T x, t^T x, sum x, sum t, |t|^2, n. Float64."""

    xx: Tensor
    tx: Tensor
    x: Tensor
    t: Tensor
    tt: Tensor
    count: float = 0.0

    @staticmethod
    def zeros(width: int, out: int, device: torch.device) -> Sums:
        """Empty sums."""

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return Sums(empty(width, width), empty(out, width), empty(width), empty(out), empty())

    def add(self, x: Tensor, t: Tensor) -> None:
        """Add rows and their targets."""
        x, t = x.float(), t.float()
        self.xx += (x.T @ x).double()
        self.tx += (t.T @ x).double()
        self.x += x.sum(0).double()
        self.t += t.sum(0).double()
        self.tt += t.square().sum().double()
        self.count += x.shape[0]

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.xx + other.xx,
            self.tx + other.tx,
            self.x + other.x,
            self.t + other.t,
            self.tt + other.tt,
            self.count + other.count,
        )

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """The mean over rows of |t - W x - b|^2."""
        b = torch.zeros_like(self.t) if bias is None else bias
        squares = self.tt - 2 * (weight * self.tx).sum() + ((weight @ self.xx) * weight).sum()
        squares = squares - 2 * b @ self.t + 2 * b @ (weight @ self.x) + self.count * b.square().sum()
        return float(squares) / max(self.count, 1.0)

    def spread(self) -> float:
        """The mean over rows of |t - mean|^2."""
        return float(self.tt - self.t.square().sum() / max(self.count, 1.0)) / max(self.count, 1.0)

    def centred(self) -> tuple[Tensor, Tensor]:
        """x^T x and t^T x about the means."""
        return (
            self.xx - torch.outer(self.x, self.x) / self.count,
            self.tx - torch.outer(self.t, self.x) / self.count,
        )

    def fit(self, old: Tensor, has_bias: bool, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias [out] with lambda ``ridge`` (relative to the mean diagonal)."""
        xx, tx = self.centred() if has_bias else (self.xx, self.tx)
        weight = drawn_to(old, xx, tx, ridge)
        return weight, self.offset(weight) if has_bias else None

    def offset(self, weight: Tensor) -> Tensor:
        """The best bias [out] beside ``weight``."""
        return (self.t - weight @ self.x) / self.count


def drawn_to(old: Tensor, xx: Tensor, tx: Tensor, ridge: float) -> Tensor:
    """W [out, in] that minimises sum |t - W x|^2 + lambda |W - ``old``|^2, lambda being ``ridge`` times the mean
    diagonal of ``xx``."""
    strength = ridge * xx.diagonal().mean().clamp(min=1e-30)
    eye = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    found: Tensor = torch.linalg.solve(xx + strength * eye, (tx + strength * old).T).T
    return found


@dataclass(frozen=True)
class Refit:
    """The weight and bias that won, and the errors on held-out rows relative to the spread of the targets."""

    weight: Tensor | None
    bias: Tensor | None
    ridge: float
    before: float
    after: float


def refit(train: Sums, held_out: Sums, old: Tensor, old_bias: Tensor | None) -> Refit:
    """Fit on ``train``, choose lambda on ``held_out``; the winner is fitted again on both. ``weight`` is None where
    nothing beats the old weight there."""
    spread = max(held_out.spread(), 1e-300)
    before = held_out.error(old, old_bias)
    tried: list[tuple[float, float]] = []
    for ridge in GRID:
        tried.append((held_out.error(*train.fit(old, old_bias is not None, ridge)), ridge))
    after, best = min(tried)
    if not after < before:
        return Refit(None, None, 0.0, before / spread, before / spread)
    weight, bias = (train + held_out).fit(old, old_bias is not None, best)
    return Refit(weight, bias, best, before / spread, after / spread)
