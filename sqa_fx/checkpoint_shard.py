"""Write one shard: under a temporary name, hashed on the way, read again and compared, and then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sqa_fx.checkpoint_cut import CHUNK, Source, TensorCut
from sqa_fx.checkpoint_format import Header, make_header
from sqa_fx.errors import InputError

_FLUSH = 64 * 2**20  # bytes after which the disk is given work, while the next ones are read and hashed
TEMPORARY = ".tmp"
"""What the name of a file ends with until it is complete."""


@dataclass(frozen=True)
class FileFacts:
    """The size (bytes) and the SHA-256 of a file."""

    bytes: int
    sha256: str

    def to_json(self) -> dict[str, int | str]:
        """As JSON-ready data."""
        return {"bytes": self.bytes, "sha256": self.sha256}


class Stopped(Exception):
    """Another shard failed, or the user interrupted: this one is given up."""


class HashingFile:
    """A new file that counts and hashes what is written to it."""

    def __init__(self, path: Path, stop: threading.Event, written: Callable[[int], None]) -> None:
        self._path, self._stop, self._written = path, stop, written
        self._hash = hashlib.sha256()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="sqa-fx-flush")
        self._flushing: Future[None] | None = None
        self._flushed = 0
        self.bytes = 0

    def write(self, data: memoryview) -> None:
        """Write all of ``data``. Raises OSError, and Stopped when the work was given up."""
        if self._stop.is_set():
            raise Stopped
        self._hash.update(data)
        at = 0
        while at < len(data):
            at += os.write(self._file, data[at:])
        self.bytes += len(data)
        if self.bytes - self._flushed >= _FLUSH and (self._flushing is None or self._flushing.done()):
            self._wait()
            self._flushing = self._flusher.submit(os.fdatasync, self._file)
            self._flushed = self.bytes
        self._written(len(data))

    def _wait(self) -> None:
        if self._flushing is not None:
            self._flushing.result()

    def facts(self) -> FileFacts:
        """What was written so far."""
        return FileFacts(self.bytes, self._hash.hexdigest())

    def close(self) -> None:
        """Close the file. Raises OSError when what was written could not be brought to the disk."""
        self._flusher.shutdown()
        os.close(self._file)
        self._wait()


def file_facts(path: Path) -> FileFacts:
    """Size and SHA-256 of the file at ``path``, read in pieces. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        size = 0
        buffer = memoryview(bytearray(CHUNK))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileFacts(size, digest.hexdigest())


def shard_bytes(header: Header, cuts: Mapping[str, TensorCut]) -> int:
    """The size of the shard that :func:`write_shard` makes, in bytes."""
    return len(_new_header(header, cuts)) + sum(
        cuts[e.name].bytes(e) if e.name in cuts else e.bytes for e in header.entries
    )


def _new_header(header: Header, cuts: Mapping[str, TensorCut]) -> bytes:
    return make_header(
        [
            (e.name, e.dtype, cuts[e.name].shape(e), cuts[e.name].bytes(e))
            if e.name in cuts
            else (e.name, e.dtype, e.shape, e.bytes)
            for e in header.entries
        ],
        header.metadata,
    )


def write_shard(
    source_path: Path,
    header: Header,
    cuts: Mapping[str, TensorCut],
    target: Path,
    *,
    stop: threading.Event,
    written: Callable[[int], None] = lambda count: None,
) -> FileFacts:
    """Write the shard at ``source_path`` under the temporary name of ``target``, with the tensors in ``cuts`` cut and
    all others as they are; returns what was written. ``written`` is told of bytes as they are written.

    Raises InputError when the disk is full, the target cannot be written, or the source cannot be read; Stopped when
    ``stop`` was set. Then there is no file under the temporary name either.
    """
    temporary = temporary_name(target)
    try:
        facts = _write(source_path, header, cuts, temporary, stop, written)
        if facts.bytes != shard_bytes(header, cuts):
            raise InputError(f"{temporary} has {facts.bytes} bytes instead of {shard_bytes(header, cuts)}")
    except BaseException as error:
        _forget(temporary)
        if isinstance(error, OSError):
            raise write_error(error, target, source_path) from error
        raise
    return facts


def finish_shard(target: Path, facts: FileFacts, verify: bool = True) -> None:
    """Bring what :func:`write_shard` wrote to the disk, and give it its name. With ``verify`` it is read again, and
    must have the size and the SHA-256 of ``facts``.

    Raises InputError when the disk is full or the file differs. Then there is no file under the temporary name either.
    """
    temporary = temporary_name(target)
    try:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if verify and file_facts(temporary) != facts:
            raise InputError(f"{temporary} is not what was written to it: check the disk, and run again")
        os.replace(temporary, target)
    except BaseException as error:
        _forget(temporary)
        if isinstance(error, OSError):
            raise write_error(error, target) from error
        raise


def temporary_name(target: Path) -> Path:
    """The name of ``target`` until it is complete."""
    return target.with_name(target.name + TEMPORARY)


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _write(
    source_path: Path,
    header: Header,
    cuts: Mapping[str, TensorCut],
    temporary: Path,
    stop: threading.Event,
    written: Callable[[int], None],
) -> FileFacts:
    with (
        contextlib.closing(Source(source_path, header.data_start)) as source,
        contextlib.closing(HashingFile(temporary, stop, written)) as sink,
    ):
        sink.write(memoryview(_new_header(header, cuts)))
        untouched: list[int] = []  # first and last byte of tensors in a row that are copied together
        for entry in header.entries:
            if entry.name not in cuts:
                untouched = [untouched[0] if untouched else entry.start, entry.stop]
                continue
            if untouched:
                source.copy(untouched[0], untouched[1] - untouched[0], sink)
                untouched = []
            cuts[entry.name].write(source, entry, sink)
        if untouched:
            source.copy(untouched[0], untouched[1] - untouched[0], sink)
        return sink.facts()


def write_error(error: OSError, target: Path, source: Path | None = None) -> InputError:
    """What the user is told when ``target`` could not be written (or ``source`` not read)."""
    why = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free some space and run the same command again: finished shards are kept"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        fix = "give a directory that you may write"
    else:
        fix = "run the same command again when that is mended: finished shards are kept"
    reading = f" from {source}" if source is not None else ""
    return InputError(f"cannot write {target}{reading}: {why}; {fix}")
