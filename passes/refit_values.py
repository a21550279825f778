"""Fit the values of the heads that stay, together with the output projection, to what all heads computed.

With attention fixed, a site's output is linear in its values: sum_i O_i T_g(i) z_i + b, where z_i are all of the
original's value channels behind the attention of query head i, O_i is that head's part of the output projection, and
T_g makes the values of KV head g out of the original's. Given T, O is a ridge regression; given O, T is one too, of
which the normal equations are solved by conjugate gradients (the heads' Gram matrices and O^T O precondition it). A
few rounds of both, each drawn to the weights that it replaces, lower the error that fitting O alone leaves: heads that
stay may take on values of those that went.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sqa_fx.passes.refit import Refit, Sums, drawn_to

GRID = (1.0, 1e-1, 1e-2, 1e-3)
"""lambda, relative to the mean diagonal of the second moments; strongest first, as each fit starts from the last."""
ROUNDS, STEPS = 3, 6


@dataclass(frozen=True)
class Maps:
    """``outputs`` [out, query_heads, head_dim] and ``values`` [kv_heads, head_dim, channels]: O and T."""

    outputs: Tensor
    values: Tensor

    def whole(self, reads: Tensor) -> Tensor:
        """The matrix [out, query_heads * channels] that takes all z_i to the output; ``reads`` [query_heads] says
        which KV head each query head reads."""
        return torch.einsum("oie,iec->oic", self.outputs, self.values[reads]).flatten(1)


def refit_values(
    train: Sums, held_out: Sums, old: Maps, bias: Tensor | None, reads: Tensor, better_than: Refit
) -> tuple[Maps, Refit] | None:
    """Fit on ``train``, choose lambda on ``held_out``, and fit again on both; None where the error on held-out rows is
    not below that of ``better_than``. The sums are over rows of all z_i [n, query_heads * channels], and targets."""
    spread = max(held_out.spread(), 1e-300)
    problem, has_bias = _Problem(train, old, reads, bias is not None), bias is not None
    best: tuple[float, float, Maps] | None = None
    found = old
    for ridge in GRID:
        found = problem.fit(found, ridge)
        weight = found.whole(reads)
        error = held_out.error(weight, train.offset(weight) if has_bias else None) / spread
        if best is not None and not error < best[0]:
            break
        best = (error, ridge, found)
    assert best is not None
    if not best[0] < better_than.after:
        return None
    total = train + held_out
    won = _Problem(total, old, reads, has_bias).fit(best[2], best[1])
    offset = total.offset(won.whole(reads)) if has_bias else None
    return won, Refit(won.outputs.flatten(1), offset, best[1], better_than.before, best[0])


class _Problem:
    """The sums, about the mean where there is a bias, in the dtype in which conjugate gradients run."""

    def __init__(self, sums: Sums, old: Maps, reads: Tensor, has_bias: bool) -> None:
        xx, tx = sums.centred() if has_bias else (sums.xx, sums.tx)
        self.old, self.reads = old, reads
        self.heads, self.channels = len(reads), old.values.size(2)
        self.scale = float(xx.diagonal().mean().clamp(min=1e-30))
        # The condition is bounded by the ridge; what is fitted is judged in float64.
        self.xx, self.tx = (xx / self.scale).float(), (tx / self.scale).float()
        split = self.xx.view(self.heads, self.channels, self.heads, self.channels)
        own = torch.stack([split[i, :, i] for i in range(self.heads)])
        self.grams = torch.stack([own[reads == g].mean(0) for g in range(old.values.size(0))])

    def fit(self, start: Maps, ridge: float, rounds: int = ROUNDS) -> Maps:
        """Rounds of both regressions."""
        values = start.values.float()
        eye = torch.eye(self.channels, device=values.device)
        inverse = torch.linalg.inv(self.grams + ridge * eye)
        for _ in range(rounds):
            outputs = self._outputs(values, ridge)
            values = self._values(outputs, values, ridge, inverse)
        return Maps(self._outputs(values, ridge).double(), values.double())

    def _outputs(self, values: Tensor, ridge: float) -> Tensor:
        """O [out, query_heads, head_dim] for these values."""
        of_heads = values[self.reads]
        size = of_heads.size(1)
        # T G and C T^T by heads: no matrix of all heads' values, which is mostly zeros.
        left = torch.einsum("iec,icn->ien", of_heads, self.xx.view(self.heads, self.channels, -1))
        both = left.view(self.heads, size, self.heads, self.channels)
        xx = torch.einsum("iejc,jfc->iejf", both, of_heads).reshape(self.heads * size, -1).double()
        tx = torch.einsum("oic,iec->oie", self.tx.view(-1, self.heads, self.channels), of_heads).flatten(1).double()
        found = drawn_to(self.old.outputs.flatten(1), (xx + xx.T) / 2, tx, ridge)
        return found.float().view(-1, self.heads, size)

    def _values(self, outputs: Tensor, values: Tensor, ridge: float, inverse: Tensor) -> Tensor:
        """T [kv_heads, head_dim, channels] for this output projection, from ``values`` on."""
        squares = self._by_kv(torch.einsum("oie,oif->ief", outputs, outputs))
        least = 1e-5 * squares.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-30)
        squares = squares + least * torch.eye(squares.size(1), device=squares.device)
        turned = torch.linalg.inv(squares)

        def normal(t: Tensor) -> Tensor:
            whole = torch.einsum("oie,iec->oic", outputs, t[self.reads]).flatten(1)
            seen = (whole @ self.xx).view(-1, self.heads, self.channels)
            return self._by_kv(torch.einsum("oie,oic->iec", outputs, seen)) + ridge * squares @ t

        wanted = torch.einsum("oie,oic->iec", outputs, self.tx.view(-1, self.heads, self.channels))
        residual = self._by_kv(wanted) + ridge * squares @ self.old.values.float() - normal(values)
        step = turned @ residual @ inverse
        direction, product = step, (residual * step).sum()
        for _ in range(STEPS):
            if not float(product) > 0:
                break
            image = normal(direction)
            length = product / (direction * image).sum()
            values, residual = values + length * direction, residual - length * image
            step = turned @ residual @ inverse
            product, before = (residual * step).sum(), product
            direction = step + product / before * direction
        return values

    def _by_kv(self, of_heads: Tensor) -> Tensor:
        """Sums over the query heads that read one KV head."""
        shape = (self.old.values.size(0), *of_heads.shape[1:])
        return torch.zeros(shape, device=of_heads.device).index_add_(0, self.reads, of_heads)
