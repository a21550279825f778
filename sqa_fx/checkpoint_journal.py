"""What is known of a conversion on the disk: the journal of one that goes on, the manifest of one that is complete.

While ``OUT`` is made it is called ``OUT.partial`` and holds the journal ``.sqa_fx_journal.json``. A complete one holds
the manifest ``sqa_fx_checkpoint.json``::

    {"format": "sqa-fx-checkpoint", "version": 1, "request": {...},
     "inputs": {"model-00001-of-00002.safetensors": {"bytes": 4967215360, "header_sha256": "..."}, ...},
     "plan": {"file": "sqa_fx_plan.json", "sha256": "..."},
     "keys": {"model.layers.0.self_attn.q_proj.weight": ["model.layers.0.self_attn.q_proj.weight"], ...},
     "notes": [...],
     "files": {"model-00001-of-00002.safetensors": {"bytes": 4161802400, "sha256": "..."}, "config.json": ..., ...}}

``keys`` are the tensors of the checkpoint for each parameter of the plan. The journal has in ``files`` the shards that
are done, and in ``inputs`` the time of their last change (nanoseconds) too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqa_fx.checkpoint_layout import CheckpointFiles
from sqa_fx.checkpoint_shard import TEMPORARY, FileFacts, file_facts, write_error
from sqa_fx.errors import InputError, MissingError
from sqa_fx.plan import Plan

FORMAT = "sqa-fx-checkpoint"
VERSION = 1
MANIFEST = "sqa_fx_checkpoint.json"
JOURNAL = ".sqa_fx_journal.json"
PLAN = "sqa_fx_plan.json"
PLAN_TENSORS = "sqa_fx_plan.safetensors"


@dataclass(frozen=True)
class Record:
    """The content of a journal or a manifest."""

    request: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, Any]]
    plan_sha256: str
    keys: Mapping[str, list[str]]
    notes: tuple[str, ...] = ()
    files: Mapping[str, FileFacts] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As JSON."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "request": self.request,
            "inputs": self.inputs,
            "plan": {"file": PLAN, "sha256": self.plan_sha256},
            "keys": self.keys,
            "notes": list(self.notes),
            "files": {name: facts.to_json() for name, facts in sorted(self.files.items())},
        }
        return json.dumps(data, indent=1).encode()

    def finished(self) -> Record:
        """Without what belongs to the journal only."""
        inputs = {
            name: {what: value for what, value in own.items() if what != "mtime_ns"}
            for name, own in self.inputs.items()
        }
        return replace(self, inputs=inputs)


def read_record(path: Path) -> Record:
    """The journal or manifest at ``path``. Raises InputError when it is damaged or of another version."""
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise InputError(f"{path}: format {data['format']!r}, version {data['version']!r} is not known here")
        return Record(
            data["request"],
            data["inputs"],
            data["plan"]["sha256"],
            data["keys"],
            tuple(data["notes"]),
            {name: FileFacts(own["bytes"], own["sha256"]) for name, own in data["files"].items()},
        )
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): delete {path.parent}") from error


def input_facts(files: CheckpointFiles) -> dict[str, dict[str, Any]]:
    """What says that the input of a resumed run is the same as before: size, time and header of every shard."""
    found: dict[str, dict[str, Any]] = {}
    for name, header in files.shards.items():
        status = (files.directory / name).stat()
        found[name] = {"bytes": status.st_size, "header_sha256": header.digest, "mtime_ns": status.st_mtime_ns}
    return found


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole, even after a power cut, or not at all. Raises InputError."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_error(error, path) from error


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else converts into ``folder`` meanwhile; the lock ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{folder} is being written by another process: wait for it, or stop it") from error
        yield
    finally:
        os.close(descriptor)


def save_plan(plan: Plan, folder: Path) -> str:
    """Write ``plan`` into ``folder`` and return its digest."""
    plan.save(folder / PLAN, overwrite=True)
    for name in (PLAN, PLAN_TENSORS):
        if (folder / name).exists():
            write_durably(folder / name, (folder / name).read_bytes())
    return plan_digest(folder)


def plan_digest(folder: Path) -> str:
    """SHA-256 of the plan in ``folder``; that of its tensors is a part of its JSON."""
    try:
        return hashlib.sha256((folder / PLAN).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {folder / PLAN}: {error.strerror or error}") from error


def verify_checkpoint(directory: str | os.PathLike[str]) -> dict[str, FileFacts]:
    """Check every file of a directory that :func:`sqa_fx.convert_checkpoint` made against its manifest: sizes (bytes)
    and SHA-256. Returns them by file name.

    Raises MissingError when the directory or its manifest is not there; InputError when a file is missing, truncated or
    altered, or the directory is not complete.
    """
    folder = Path(directory)
    if (folder / JOURNAL).exists():
        raise InputError(f"{folder} is not complete: run the conversion again to finish it")
    if not (folder / MANIFEST).is_file():
        raise MissingError(f"{folder} holds no {MANIFEST}: it was not made by convert-checkpoint, or is not complete")
    record = read_record(folder / MANIFEST)
    for name, facts in record.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            found = file_facts(path) if size == facts.bytes else None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}; convert again") from error
        if size != facts.bytes:
            raise InputError(f"{path} has {size} bytes instead of {facts.bytes}: it was cut off or altered")
        if found != facts:
            raise InputError(f"{path}: its SHA-256 is not that of the manifest: it was altered")
    return dict(record.files)
