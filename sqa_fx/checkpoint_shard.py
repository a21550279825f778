"""Write one shard: under a temporary name, hashed on the way, read again and compared, and then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sqa_fx.checkpoint_cut import CHUNK, Source, TensorCut
from sqa_fx.checkpoint_format import Header, make_header
from sqa_fx.errors import InputError

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
        self._written(len(data))

    def finish(self) -> FileFacts:
        """Bring everything to the disk."""
        os.fsync(self._file)
        return FileFacts(self.bytes, self._hash.hexdigest())

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


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
    verify: bool = True,
) -> FileFacts:
    """Write the shard at ``source_path`` as ``target``, with the tensors in ``cuts`` cut and all others as they are.

    The file has a temporary name until it is complete and on the disk; with ``verify`` it is read again, and must have
    the size and the SHA-256 of what was written. ``written`` is told of bytes as they are written; ``stop`` gives up.

    Raises InputError when the disk is full, the target cannot be written, the source cannot be read, or the file that
    was written differs. Then there is no file under the temporary name either.
    """
    temporary = target.with_name(target.name + TEMPORARY)
    try:
        facts = _write(source_path, header, cuts, temporary, stop, written)
        if facts.bytes != shard_bytes(header, cuts):
            raise InputError(f"{temporary} has {facts.bytes} bytes instead of {shard_bytes(header, cuts)}")
        if verify and file_facts(temporary) != facts:
            raise InputError(f"{temporary} is not what was written to it: check the disk, and run again")
        os.replace(temporary, target)
    except OSError as error:
        raise write_error(error, target, source_path) from error
    finally:
        temporary.unlink(missing_ok=True)
    return facts


def _write(
    source_path: Path,
    header: Header,
    cuts: Mapping[str, TensorCut],
    temporary: Path,
    stop: threading.Event,
    written: Callable[[int], None],
) -> FileFacts:
    source = Source(source_path, header.data_start)
    try:
        sink = HashingFile(temporary, stop, written)
        try:
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
            return sink.finish()
        finally:
            sink.close()
    finally:
        source.close()


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
