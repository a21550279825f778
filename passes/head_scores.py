"""Scores of heads from calibration data: how much a site would lose without each one. Larger is better to keep."""

from __future__ import annotations

import torch
from torch import Tensor

from sqa_fx.passes.statistics import SiteStatistics

DATA_SCORES = ("importance", "activation", "wifv", "taylor", "fisher")
"""Scores that need data; ``reconstruct`` chooses sets of heads instead, see eliminate."""
GRADIENT_SCORES = ("taylor", "fisher")


def data_scores(own: SiteStatistics, how: str) -> Tensor:
    """[heads], canonical order, float64.

    - ``importance``: the variance that the head's output brings to the site's output, tr(W_h C_hh W_h^T).
    - ``activation``: mean Euclidean norm of the head's output (Minitron, arXiv 2407.14679).
    - ``wifv``: variance of every channel times the squared norm of its column of W_o (FLAP, arXiv 2312.11983).
    - ``taylor``: mean magnitude, over samples, of output times gradient (arXiv 1905.10650).
    - ``fisher``: mean square of the same: the diagonal of the Fisher information of a gate on the head
      (arXiv 2204.09656).
    """
    if how == "activation":
        return own.norms / max(own.output.count, 1)
    if how in GRADIENT_SCORES:
        return (own.taylor if how == "taylor" else own.fisher) / max(own.samples, 1)
    centred = own.output.centred() / max(own.output.count, 1)
    weight = own.weight.to(centred)
    found = []
    for columns in (c.to(centred.device) for c in own.projection.heads):
        block = centred[columns][:, columns]
        part = weight[:, columns]
        if how == "wifv":
            found.append((block.diagonal() * part.square().sum(0)).sum())
        elif how == "importance":
            found.append(((part @ block) * part).sum())
        else:
            raise ValueError(f"no score {how!r}")
    return torch.stack(found).cpu()
