"""Cut one tensor of a file as a plan says, piece by piece: the result is written in order, and never held whole."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sqa_fx.checkpoint_format import DTYPES, Entry
from sqa_fx.errors import InputError
from sqa_fx.passes.parameters import cut_tensor, mean
from sqa_fx.passes.rotation import rotated
from sqa_fx.passes.verify import refitted_tensor
from sqa_fx.plan import ParameterPlan, Plan, Rotation, from_ranges

CHUNK = 8 * 2**20
"""Bytes that are read, and written, at a time."""
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu}


class Sink(Protocol):
    """Where the bytes of a result go, in order."""

    def write(self, data: memoryview) -> None:
        """Take ``data``, all of it."""


class Source:
    """A file that is read at given places, into one buffer that is used again and again."""

    def __init__(self, path: str | os.PathLike[str], data_start: int) -> None:
        self._path, self._data_start = path, data_start
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._buffer = bytearray(0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def read(self, start: int, size: int) -> memoryview:
        """``size`` bytes from byte ``start`` of the data, valid until the next call. Raises InputError when the file
        ends before."""
        if len(self._buffer) < size:
            self._buffer = bytearray(max(size, CHUNK))
        view = memoryview(self._buffer)[:size]
        at = 0
        while at < size:
            got = os.preadv(self._file, [view[at:]], self._data_start + start + at)
            if got == 0:
                raise InputError(f"{self._path} ends at byte {self._data_start + start + at}: it was cut off just now")
            at += got
        return view

    def copy(self, start: int, size: int, sink: Sink) -> None:
        """Pass ``size`` bytes from byte ``start`` of the data on to ``sink``."""
        for at in range(0, size, CHUNK):
            sink.write(self.read(start + at, min(CHUNK, size - at)))

    def tensor(self, start: int, size: int, dtype: torch.dtype) -> Tensor:
        """The same bytes as a flat tensor, with memory of its own."""
        return torch.frombuffer(bytearray(self.read(start, size)), dtype=dtype)


@dataclass(frozen=True)
class TensorCut:
    """What happens to one tensor: rotations, a cut along an axis, and new values, each if any."""

    name: str
    parameter: ParameterPlan | None
    rotations: tuple[Rotation, ...] = ()
    refitted: Tensor | None = None
    matrices: Mapping[str, Tensor] = field(default_factory=dict)

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """The shape of the result."""
        if self.parameter is None:
            return entry.shape
        axis = self.parameter.axis
        return (*entry.shape[:axis], self.parameter.size[1], *entry.shape[axis + 1 :])

    def bytes(self, entry: Entry) -> int:
        """The size of the result in bytes."""
        return math.prod(self.shape(entry)) * DTYPES[entry.dtype].itemsize

    def write(self, source: Source, entry: Entry, sink: Sink) -> None:
        """Write the result. At most about 100 MB are held at a time; a tensor that is rotated or refitted is held
        whole, a few times over."""
        if not entry.bytes:
            return
        dtype = DTYPES[entry.dtype]
        if self.parameter is None or self.rotations or self.refitted is not None:
            _put(self._whole(source, entry, dtype), sink)
            return
        entries = self.parameter.size[0]
        outer = math.prod(entry.shape[: self.parameter.axis])
        row = entry.bytes // outer  # everything behind one index of the outer axes
        if outer == 1 or row > CHUNK:
            width = row // entries
            for start in range(entry.start, entry.stop, row):
                for part in _parts(self.parameter, max(1, CHUNK // width)):
                    self._rows(source, start, dtype, width, part, sink)
            return
        parts = list(_parts(self.parameter, entries))
        step = CHUNK // row
        for at in range(0, outer, step):
            count = min(step, outer - at)
            piece = source.tensor(entry.start + at * row, count * row, dtype).view(count, entries, -1)
            made = piece.new_empty(count, self.parameter.size[1], piece.shape[2])
            to = 0
            for part in parts:
                own = _mean([piece[:, a:b] for a, b in part])
                made[:, to : to + own.shape[1]] = own
                to += own.shape[1]
            _put(made, sink)

    def _rows(
        self, source: Source, start: int, dtype: torch.dtype, width: int, part: Sequence[tuple[int, int]], sink: Sink
    ) -> None:
        """The mean of the ranges in ``part``; entries of ``width`` bytes lie behind byte ``start``."""
        if len(part) == 1:
            first, last = part[0]
            source.copy(start + first * width, (last - first) * width, sink)
            return
        _put(_mean([source.tensor(start + a * width, (b - a) * width, dtype) for a, b in part]), sink)

    def _whole(self, source: Source, entry: Entry, dtype: torch.dtype) -> Tensor:
        held = source.tensor(entry.start, entry.bytes, dtype).view(entry.shape)
        if self.rotations:
            held = rotated(held, self.rotations, self.matrices)
        made = cut_tensor(held, self.parameter) if self.parameter is not None else held
        if self.refitted is None:
            return made
        if self.refitted.shape != made.shape:
            raise InputError(
                f"the plan refits {self.name} with a tensor of shape {list(self.refitted.shape)}; cut, it has "
                f"shape {list(made.shape)}"
            )
        return self.refitted.to(made)


def cuts_by_key(plan: Plan, keys: Mapping[str, Sequence[str]]) -> dict[str, TensorCut]:
    """The cut of every tensor of a checkpoint that ``plan`` changes; ``keys`` are its names for each parameter.

    Raises PlanError when the plan came without its tensors.
    """
    parameters = {p.name: p for p in plan.parameters}
    found: dict[str, TensorCut] = {}
    for name in changed_names(plan):
        own = tuple(r for r in plan.rotations if r.parameter == name)
        refitted = refitted_tensor(plan, name) if name in plan.refitted else None
        for key in keys.get(name, ()):
            found[key] = TensorCut(name, parameters.get(name), own, refitted, plan.tensors)
    return found


def changed_names(plan: Plan) -> list[str]:
    """The parameters that ``plan`` cuts, turns or gives new values, each once."""
    names = (*(p.name for p in plan.parameters), *(r.parameter for r in plan.rotations), *plan.refitted)
    return list(dict.fromkeys(names))


def _parts(parameter: ParameterPlan, most: int) -> Iterator[list[tuple[int, int]]]:
    """The result in order, as runs of at most ``most`` entries: for each the ranges [first, last) of the original whose
    mean it is. A run of one range may be longer."""
    sources: list[tuple[int, ...]] = [()] * parameter.size[1]
    for block in parameter.blocks:
        for to, *own in zip(from_ranges(block.to), *(from_ranges(s) for s in block.sources), strict=True):
            sources[to] = tuple(own)
    at = 0
    while at < len(sources):
        first, stop = sources[at], at + 1
        while stop < len(sources) and sources[stop] == tuple(i + stop - at for i in first):
            if len(first) > 1 and stop - at >= most:
                break
            stop += 1
        yield [(i, i + stop - at) for i in first]
        at = stop


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """As cut_tensor averages, and for 8-bit floats too, which torch does not promote."""
    if len(parts) == 1 or parts[0].dtype not in _FLOAT8:
        return mean(parts)
    return mean([p.to(torch.float64) for p in parts]).to(parts[0].dtype)


def _put(tensor: Tensor, sink: Sink) -> None:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    view = memoryview(flat.numpy())  # type: ignore[arg-type]
    for at in range(0, len(view), CHUNK):
        sink.write(view[at : at + CHUNK])
