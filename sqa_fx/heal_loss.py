"""What healing minimises, as sums over what counts, so that parts of a batch add up whatever their padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sqa_fx.errors import InputError
from sqa_fx.model_calls import both_outputs, row_count, valid_positions

LossFunction = Callable[[Any, Any, Any], Tensor]
"""(the student's outputs, the teacher's outputs, the batch) -> the mean loss, a scalar."""


@dataclass(frozen=True)
class Measured:
    """A loss ``total`` (scalar, with gradient) over ``weight`` things that count (positions or rows).

    ``agreed`` of them have the same most likely class; None where there are no classes.
    """

    total: Tensor
    weight: Tensor
    agreed: Tensor | None = None


def measure(loss: str | LossFunction, student: Any, teacher: Any, batch: Any) -> Measured:
    """The loss "kl", "embedding", "auto" (kl for outputs with logits, else embedding) or a function's of one batch.

    "kl" is KL(teacher || student) over the last axis of logits ``[..., classes]`` at temperature 1, in float32, summed
    over the valid positions ``[batch, sequence]``. "embedding" is 1 - cosine plus the mean squared difference of each
    valid vector of ``[batch, sequence, width]``, or of each row of anything else, which covers any pooling.

    Raises InputError when outputs do not fit each other or no loss.
    """
    if callable(loss):
        value = loss(student, teacher, batch)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise InputError(
                f"the loss function must return a scalar tensor, but returned {getattr(value, 'shape', type(value))}"
            )
        rows = torch.tensor(float(row_count(batch)), device=value.device)
        return Measured(value.float() * rows, rows)
    field, own, wanted = both_outputs(student, teacher)
    if loss == "kl" or (loss == "auto" and field == "logits"):
        return divergence(*_counted(own, wanted, batch))
    return embedding_distance(*_counted(own, wanted, batch))


def divergence(own: Tensor, wanted: Tensor) -> Measured:
    """KL(wanted || own) summed over rows of logits ``[rows, classes]``. A class that has no chance adds nothing."""
    log_own, log_wanted = F.log_softmax(own.float(), -1), F.log_softmax(wanted.float(), -1)
    chance = log_wanted.exp()
    total = (chance * torch.where(chance > 0, log_wanted - log_own, 0.0)).sum()
    return Measured(total, _count(own), (own.argmax(-1) == wanted.argmax(-1)).sum())


def embedding_distance(own: Tensor, wanted: Tensor) -> Measured:
    """1 - cosine plus mean squared difference, summed over vectors ``[rows, width]``."""
    own, wanted = own.float(), wanted.float()
    total = (1 - F.cosine_similarity(own, wanted, dim=-1)).sum() + (own - wanted).square().mean(-1).sum()
    return Measured(total, _count(own))


def sites_distance(own: Sequence[Tensor], wanted: Sequence[Tensor], batch: Any) -> Measured:
    """The squared difference of what each site adds, relative to its square, summed over valid positions of all sites.
    Outputs are ``[batch, sequence, width]`` or ``[batch * sequence, width]``."""
    parts, counts = [], []
    for a, b in zip(own, wanted, strict=True):
        a, b = _counted(a, b, batch)
        a, b = a.float(), b.float()
        parts.append(((a - b).square().sum(-1) / (b.square().sum(-1) + 1e-6 * b.shape[-1])).sum())
        counts.append(_count(a))
    return Measured(torch.stack(parts).sum(), torch.stack(counts).sum())


def _counted(own: Tensor, wanted: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Both as ``[what counts, width]``."""
    if own.dim() > 3:
        own, wanted = own.flatten(1), wanted.flatten(1)
    leading = own.shape[:-1]
    mask = valid_positions(batch, leading) if len(leading) == 2 else _flat_mask(batch, leading)
    if mask is None:
        return own.reshape(-1, own.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    return own[mask], wanted[mask]


def _flat_mask(batch: Any, leading: torch.Size) -> Tensor | None:
    """The mask of positions that a graph has folded into one axis, in the same order."""
    mask = batch.get("attention_mask") if hasattr(batch, "get") else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] == leading[0] or mask.numel() != leading[0]:
        return None
    found = valid_positions(batch, mask.shape)
    return None if found is None else found.flatten()


def _count(rows: Tensor) -> Tensor:
    return torch.tensor(float(rows.shape[0]), device=rows.device)
