"""The order of training batches: a function of seed and epoch, so that a resumed run finds its place again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.data import DistributedSampler

from sqa_fx.errors import InputError
from sqa_fx.heal_random import RandomState, mixed, random_kept, seed_all
from sqa_fx.model_calls import row_count

Data = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches, or a function that returns them anew."""


class Batches:
    """The batches of ``data``, epoch after epoch without end.

    The data draws its random numbers from generators of its own, seeded by (seed, epoch): neither does training change
    its order, nor the other way round. ``set_epoch`` of the data is called, if it has that.

    Raises InputError for data that ends before it begins or that can be read only once.
    """

    def __init__(self, data: Data, seed: int) -> None:
        if isinstance(getattr(data, "sampler", None), DistributedSampler):
            raise InputError("the data has a DistributedSampler: leave it out, batches are split among processes here")
        self._data, self._seed = data, seed
        self.epoch, self.position = 0, 0
        self._iterator: Iterator[Any] | None = None
        self._random: RandomState | None = None

    def seek(self, epoch: int, position: int) -> None:
        """Go to batch ``position`` of ``epoch``. Raises InputError when the data has fewer batches now."""
        self.epoch, self.position, self._iterator = epoch, 0, None
        for _ in range(position):
            if self._next() is None:
                raise InputError(
                    f"the checkpoint was written after {position} batches of an epoch, but the data has only "
                    f"{self.position}: resume with the same data"
                )

    def take(self) -> Any:
        """The next batch."""
        batch = self._next()
        if batch is None:
            if self.position == 0:
                raise InputError("the data holds no batches: there is nothing to train on")
            self.epoch, self.position, self._iterator = self.epoch + 1, 0, None
            batch = self._next()
            if batch is None:
                raise InputError(
                    f"the data gave no batches in epoch {self.epoch}: give batches that can be iterated again, or a "
                    "function that returns new ones"
                )
        return batch

    def _next(self) -> Any:
        with random_kept():
            if self._iterator is None:
                seed_all(mixed("data", self._seed, self.epoch))
                self._iterator = self._begin()
            elif self._random is not None:
                self._random.use()
            batch = next(self._iterator, None)
            self._random = RandomState.now()
        if batch is not None:
            self.position += 1
        return batch

    def _begin(self) -> Iterator[Any]:
        made = batches_of(self._data)
        if self.epoch and iter(made) is made and made is self._data:
            raise InputError(
                "the data is an iterator and is used up after one epoch: give batches that can be iterated again "
                "(a list, a DataLoader), a function that returns new ones, or fewer steps"
            )
        if hasattr(made, "set_epoch"):
            made.set_epoch(self.epoch)
        generator = getattr(made, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(mixed("loader", self._seed, self.epoch))
        return iter(made)


def batches_of(data: Data) -> Iterable[Any]:
    """What ``data`` gives when it is iterated. Raises InputError when it is no iterable and returns none."""
    made: Any = data if hasattr(data, "__iter__") or not callable(data) else data()
    if not hasattr(made, "__iter__") or isinstance(made, Tensor | str | bytes):
        raise InputError(
            f"data is a {type(made).__name__}: give an iterable of batches, or a function that returns one"
        )
    return made  # type: ignore[no-any-return]


def share_of(batch: Any, rank: int, world: int) -> Any | None:
    """The rows of process ``rank`` of ``world``, where the number of rows divides; else None.

    Tensors whose first axis has the size of the batch are cut, everything else is the same for all.
    """
    rows = row_count(batch)
    if world == 1:
        return batch
    if rows % world:
        return None
    each = rows // world

    def cut(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.dim() and value.shape[0] == rows
        return value[rank * each : (rank + 1) * each] if whole else value

    return pytree.tree_map(cut, dict(batch) if hasattr(batch, "keys") else batch)
