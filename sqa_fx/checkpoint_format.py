"""The safetensors format as bytes: read and check a header without touching the data, and write the header of a file
whose data follows later.

A file is 8 bytes (the length of the header, little endian), the header (JSON: for every tensor its dtype, shape and
first and last byte, counted from the end of the header), and the data without holes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sqa_fx.errors import InputError

_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The dtypes that can be cut; a tensor of another one can still be copied."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype as the file names it, its shape, and its bytes [start, stop) behind the
    header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """The size of the data in bytes."""
        return self.stop - self.start

    @property
    def elements(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The header of one file: its tensors in the order of their data, and where the data starts (bytes)."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str] | None
    data_start: int
    digest: str
    """SHA-256 of the header."""

    @property
    def data_bytes(self) -> int:
        """The size of all data in bytes."""
        return self.entries[-1].stop if self.entries else 0


def read_header(path: Path) -> Header:
    """The header of the safetensors file at ``path``; no data is read.

    Raises InputError when the file cannot be read, is truncated or longer than its header says, or has a header that is
    no safetensors header.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _LENGTH:
                raise InputError(f"{path} holds {size} bytes: it is truncated, or no safetensors file. {_GET_AGAIN}")
            length = int.from_bytes(file.read(_LENGTH), "little")
            if length > min(_LONGEST_HEADER, size - _LENGTH):
                raise InputError(
                    f"{path} says that its header has {length} bytes, and holds {size}: it is truncated, or no "
                    f"safetensors file. {_GET_AGAIN}"
                )
            text = file.read(length)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        data = json.loads(text)
        metadata = data.pop("__metadata__", None)
        entries = sorted((_entry(name, row) for name, row in data.items()), key=lambda e: (e.start, e.stop))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: its header is damaged ({type(error).__name__}: {error}). {_GET_AGAIN}") from error
    _check(path, entries, size - _LENGTH - length)
    return Header(tuple(entries), metadata, _LENGTH + length, hashlib.sha256(text).hexdigest())


_GET_AGAIN = "Fetch or save the file again"


def _entry(name: str, row: Any) -> Entry:
    start, stop = row["data_offsets"]
    shape = row["shape"]
    if not all(type(n) is int and n >= 0 for n in (start, stop, *shape)):
        raise ValueError(f"tensor {name!r} has shape {shape} and offsets {[start, stop]}")
    return Entry(name, str(row["dtype"]), tuple(shape), start, stop)


def _check(path: Path, entries: Sequence[Entry], held: int) -> None:
    at = 0
    for entry in entries:
        if entry.start != at or entry.stop < entry.start:
            raise InputError(
                f"{path}: its header is damaged: the data of {entry.name!r} is said to be bytes {entry.start} to "
                f"{entry.stop}, behind byte {at}. {_GET_AGAIN}"
            )
        at = entry.stop
        dtype = DTYPES.get(entry.dtype)
        if dtype is not None and entry.bytes != entry.elements * dtype.itemsize:
            raise InputError(
                f"{path}: its header is damaged: {entry.name!r} of shape {list(entry.shape)} and dtype {entry.dtype} "
                f"has {entry.bytes} bytes. {_GET_AGAIN}"
            )
    if at != held:
        what = "truncated" if held < at else "longer than its header says"
        raise InputError(f"{path} is {what}: its tensors take {at} bytes, it holds {held}. {_GET_AGAIN}")


def make_header(tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None) -> bytes:
    """The first bytes of a file whose data are ``tensors`` (name, dtype, shape, bytes) in this order, padded to 8 bytes
    as the safetensors library does."""
    rows: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape, size in tensors:
        rows[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH, "little") + text
