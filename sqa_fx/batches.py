"""Batches of model inputs, in whatever form the user's data gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sqa_fx.errors import InputError


def labels_last(args: tuple[Any, ...], room: int) -> bool:
    """Whether the last of ``args`` is one too many for a call of ``room`` arguments, and looks like labels: whole
    numbers, [batch]."""
    last = args[-1] if len(args) > 1 else None
    whole = isinstance(last, torch.Tensor) and last.dim() == 1 and not last.is_floating_point()
    return whole and len(args) == room + 1


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as (args, kwargs) of a call: a tensor is the one argument, a tuple or list are the arguments, a mapping
    the keyword arguments. Raises InputError for anything else."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {str(k): v for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise InputError(
        f"a batch is a {type(batch).__name__}: give a tensor, a tuple of the model's arguments, or a mapping of its "
        "keyword arguments"
    )
