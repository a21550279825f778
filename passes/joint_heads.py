"""Merge heads into one that tells most about all of them: the best linear map down to one head, and back to each.

For heads x_1 .. x_m of a group, x^ = sum_i P_i x_i and x_i ~ B_i x^ with the least error sum_i E |A_i (x_i - B_i x^)|^2
is given by the principal components of the stacked A_i x_i. The maps back go where the heads are read: into the query
heads (q^T B k^ = (B^T q)^T k^, A^T A being the second moments of the queries, so that the error is that of the scores),
or into the output projection (W B v^, A^T A being W^T W). Where rotary embedding turns pairs of channels, maps are
complex numbers for each pair, which commute with it. Of all x^ that tell the same, the one is taken whose maps back are
closest to leaving their heads as they are: weights keep their scale, which half precision and an optimizer need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqa_fx.passes.rotation import Structure

# Relative to the mean diagonal: keeps the maps back finite where nothing is read.
RIDGE = 1e-4


@dataclass(frozen=True)
class JointMaps:
    """Maps of the heads of one group, in its order: ``down`` [size, size] each, whose mean over the group is the merged
    head, and ``back`` [size, size] each; both are applied as entries -> R^T entries."""

    down: tuple[Tensor, ...]
    back: tuple[Tensor, ...]
    lost: float
    """The share of the (weighted) energy of the group that is lost."""


def joint_maps(second: Sequence[Sequence[Tensor]], metrics: Sequence[Tensor], structure: Structure) -> JointMaps:
    """The maps for a group of m heads. second[i][j]: moments x_i^T x_j [size, size]; metrics[i]: A_i^T A_i."""
    count, size = len(metrics), metrics[0].size(0)
    device = metrics[0].device
    down = [torch.zeros(size, size, dtype=torch.float64, device=device) for _ in range(count)]
    back = [torch.zeros(size, size, dtype=torch.float64, device=device) for _ in range(count)]
    total = lost = 0.0
    if structure.free:
        at = torch.tensor(structure.free, device=device)
        roots = [_root(m[at][:, at]) for m in metrics]
        stacked = torch.cat(
            [torch.cat([roots[i][0] @ second[i][j][at][:, at] @ roots[j][0].T for j in range(count)], 1)
             for i in range(count)]
        )  # fmt: skip
        values, vectors = torch.linalg.eigh((stacked + stacked.T) / 2)
        total += float(values.clamp(min=0).sum())
        lost += float(values[: -len(at)].clamp(min=0).sum())
        parts = vectors[:, -len(at) :].split(len(at))
        maps = [root[1] @ part for root, part in zip(roots, parts, strict=True)]
        gauge, inverse = _gauge(maps)
        for i, part in enumerate(parts):
            down[i][at[:, None], at] = count * roots[i][0].T @ part @ gauge.T
            back[i][at[:, None], at] = maps[i] @ inverse
    if structure.pairs:
        a, b = torch.tensor(structure.pairs, device=device).T
        weights = torch.stack([(m[a, a] + m[b, b]) / 2 for m in metrics])
        weights = (weights + RIDGE * weights.mean().clamp(min=1e-300)).sqrt()
        hermitian = torch.zeros(len(a), count, count, dtype=torch.complex128, device=device)
        for i in range(count):
            for j in range(count):
                c = second[i][j]
                # x conj(y) of x = a + ib, y = a' + ib'
                each = torch.complex(c[a, a] + c[b, b], c[b, a] - c[a, b])
                hermitian[:, i, j] = each * weights[i] * weights[j]
        values, vectors = torch.linalg.eigh(hermitian)
        total += float(values.clamp(min=0).sum())
        lost += float(values[:, :-1].clamp(min=0).sum())
        best = vectors[:, :, -1]
        # x^ = sum conj(u_i) w_i x_i and x_i ~ u_i / w_i x^, times and by the gauge
        factors = best.T / weights
        phase = torch.sgn(factors.sum(0))
        gauge = factors.abs().square().mean(0).sqrt() * torch.where(phase == 0, 1, phase)
        for i in range(count):
            _put(down[i], a, b, count * weights[i] * best[:, i].conj() * gauge)
            _put(back[i], a, b, (factors[i] / gauge).conj())
    return JointMaps(tuple(down), tuple(back), lost / max(total, 1e-300))


def _put(target: Tensor, a: Tensor, b: Tensor, factor: Tensor) -> None:
    """Let entries -> target^T entries multiply the pairs (a, b), as complex numbers, with ``factor``."""
    target[a, a] = target[b, b] = factor.real
    target[b, a], target[a, b] = -factor.imag, factor.imag


def _gauge(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """G and its inverse: the maps back B_i G^-1 keep lengths on average (sum_i G^-T B_i^T B_i G^-1 is that of as many
    identities), and are turned such that their sum is closest to them."""
    stretch, inverse = _root(torch.stack([m.T @ m for m in maps]).mean(0), ridge=1e-12)
    left, _, right = torch.linalg.svd(torch.stack([m @ inverse for m in maps]).sum(0))
    turn = left @ right
    return turn @ stretch, inverse @ turn.T


def _root(metric: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """The symmetric A with A^T A = metric (made definite), and its inverse."""
    metric = (metric + metric.T) / 2
    least = ridge * metric.diagonal().mean().clamp(min=1e-300)
    values, vectors = torch.linalg.eigh(metric)
    values = (values.clamp(min=0) + least).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
