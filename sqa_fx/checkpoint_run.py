"""The steps of a conversion on the disk: open the place where it is made, write the shards, publish it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqa_fx.checkpoint_cut import TensorCut, changed_names
from sqa_fx.checkpoint_journal import (
    JOURNAL,
    MANIFEST,
    PLAN,
    PLAN_TENSORS,
    Record,
    input_facts,
    locked,
    plan_digest,
    read_record,
    save_plan,
    sync_directory,
    write_durably,
)
from sqa_fx.checkpoint_layout import CheckpointFiles
from sqa_fx.checkpoint_names import check_entry, check_scales, match_names
from sqa_fx.checkpoint_plan import Planned
from sqa_fx.checkpoint_shard import (
    TEMPORARY,
    FileFacts,
    Stopped,
    file_facts,
    finish_shard,
    shard_bytes,
    temporary_name,
    write_error,
    write_shard,
)
from sqa_fx.errors import InputError, PlanError
from sqa_fx.plan import Plan
from sqa_fx.whole_file import replace_directory

Finish = Callable[[Plan], contextlib.AbstractContextManager[Callable[[Path], None]]]
"""Entered with the plan before shards are written, and left when they are, or when that failed; what it gives is called
with the folder, once all other files are in it."""
OnBytes = Callable[[int, int], None]


def check_places(source: Path, target: Path, overwrite: bool) -> None:
    """Raise InputError when ``target`` cannot become the result: it lies in ``source`` or around it, exists, or has no
    parent."""
    inside, around = target.resolve(), source.resolve()
    if inside == around or around in inside.parents or inside in around.parents:
        raise InputError(f"{target} and {source} lie in one another: give an output directory of its own")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: the folder {target.parent} does not exist")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{target} exists; choose another path, or ask for overwriting it")
    if not (target / MANIFEST).is_file():
        raise InputError(f"{target} exists and was not made by convert-checkpoint: it is not overwritten")


def complete(target: Path, files: CheckpointFiles, request: Mapping[str, Any]) -> Record | None:
    """The manifest of ``target`` when it is the complete result of just this conversion."""
    if not (target / MANIFEST).is_file() or (target / JOURNAL).exists():
        return None
    record = read_record(target / MANIFEST)
    inputs = Record(request, input_facts(files), "", {}).finished().inputs
    sizes = all(
        (target / name).is_file() and (target / name).stat().st_size == facts.bytes
        for name, facts in record.files.items()
    )
    return record if sizes and record.request == request and record.inputs == inputs else None


@contextlib.contextmanager
def workplace(target: Path, restart: bool) -> Iterator[Path]:
    """``target`` under the name that says that it is not complete, locked; what an earlier run left there stays unless
    ``restart``. Raises InputError when it cannot be made, is foreign, or is in use."""
    folder = target.with_name(target.name + ".partial")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(error, folder) from error
    with locked(folder):
        known = (folder / JOURNAL).exists() or (folder / MANIFEST).exists()
        foreign = [
            p.name for p in folder.iterdir() if p.name not in (PLAN, PLAN_TENSORS) and not p.name.startswith(".")
        ]
        foreign = [name for name in foreign if not name.endswith(TEMPORARY)]
        if not known and foreign:
            raise InputError(
                f"{folder} exists and holds {foreign[0]}, which no conversion left there: move it away, or choose "
                "another output directory"
            )
        if restart or not known:
            _empty(folder)
        try:
            yield folder
        finally:
            # A failure before anything was written leaves nothing behind.
            if folder.exists() and not any(folder.iterdir()):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _empty(folder: Path) -> None:
    try:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise write_error(error, folder) from error


def begin(
    folder: Path, files: CheckpointFiles, request: Mapping[str, Any], make: Callable[[], Planned]
) -> tuple[Record, Plan]:
    """The record and the plan of the conversion in ``folder``: those of the run that left it, or new ones.

    Raises InputError when the earlier run had another input, PlanError when it had another request, and what ``make``
    raises.
    """
    for name in (JOURNAL, MANIFEST):
        if (folder / name).exists():
            record = read_record(folder / name)
            inputs = Record(request, input_facts(files), "", {})
            if record.inputs != (inputs if name == JOURNAL else inputs.finished()).inputs:
                raise InputError(
                    f"{folder} was begun from other shards than {files.directory} holds now: delete it, or start over "
                    "with restart (--restart)"
                )
            if record.request != request:
                raise PlanError(
                    f"{folder} was begun with {json.dumps(record.request)}, not {json.dumps(request)}: give the same "
                    "options to finish it, or start over with restart (--restart)"
                )
            if plan_digest(folder) != record.plan_sha256:
                raise PlanError(f"{folder / PLAN} was altered: start over with restart (--restart)")
            return record, Plan.load(folder / PLAN)
    made = make()
    keys = _keys(made, files)
    digest = save_plan(made.plan, folder)
    skipped = [f"{name!r} is no part of a checkpoint: the model makes it when it is built" for name in made.unstored]
    record = Record(request, input_facts(files), digest, keys, (*made.notes, *skipped))
    write_durably(folder / JOURNAL, record.to_bytes())
    return record, made.plan


def _keys(made: Planned, files: CheckpointFiles) -> dict[str, list[str]]:
    names = [name for name in changed_names(made.plan) if name not in made.unstored]
    if not names:
        return {}
    keys = match_names(names, files.entries, made.tied)
    parameters = {p.name: p for p in made.plan.parameters}
    for name, own in keys.items():
        for key in own:
            if name in parameters:
                check_entry(parameters[name], files.entries[key])
    check_scales({key for own in keys.values() for key in own}, files.entries)
    return keys


def write_shards(
    folder: Path,
    files: CheckpointFiles,
    record: Record,
    cuts: Mapping[str, TensorCut],
    jobs: int,
    verify: bool,
    on_bytes: OnBytes | None,
) -> tuple[Record, int]:
    """Write every shard that ``record`` does not name as done, ``jobs`` at a time; returns the record with all of them,
    and how many were there already. Raises InputError as write_shard does, and when the disk is too small."""
    sizes = {name: shard_bytes(header, cuts) for name, header in files.shards.items()}
    done = {name: facts for name, facts in record.files.items() if name in sizes and _is_there(folder / name, facts)}
    todo = [name for name in files.shards if name not in done]
    needed, free = sum(sizes[name] for name in todo), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"cannot write {folder}: the disk is full: {len(todo)} shards need {needed / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free; free some space and run the same command again"
        )
    lock, stop = threading.Lock(), threading.Event()
    written, total = sum(sizes[name] for name in done), sum(sizes.values())

    def count(size: int) -> None:
        nonlocal written
        with lock:
            written += size
            if on_bytes is not None:
                on_bytes(written, total)

    def write(name: str) -> FileFacts:
        header = files.shards[name]
        own = {e.name: cuts[e.name] for e in header.entries if e.name in cuts}
        facts = write_shard(files.directory / name, header, own, folder / name, stop=stop, written=count)
        status = (files.directory / name).stat()
        known = record.inputs[name]
        if status.st_size != known["bytes"] or status.st_mtime_ns != known.get("mtime_ns", status.st_mtime_ns):
            temporary_name(folder / name).unlink()
            raise InputError(f"{files.directory / name} changed while it was read: run again when it is at rest")
        return facts

    def finish(name: str, facts: FileFacts) -> FileFacts:
        finish_shard(folder / name, facts, verify)
        return facts

    count(0)
    # The disk takes one shard in while the next one is read and cut.
    with ThreadPoolExecutor(jobs, "sqa-fx-write") as writers, ThreadPoolExecutor(jobs, "sqa-fx-finish") as finishers:
        writing = {writers.submit(write, name): name for name in todo}
        finishing: dict[Future[FileFacts], str] = {}
        try:
            while writing or finishing:
                for future in wait([*writing, *finishing], return_when=FIRST_COMPLETED).done:
                    if future in writing:
                        name = writing.pop(future)
                        finishing[finishers.submit(finish, name, future.result())] = name
                    else:
                        done[finishing.pop(future)] = future.result()
                        record = replace(record, files=done)
                        write_durably(folder / JOURNAL, record.to_bytes())
        except BaseException as error:
            stop.set()
            writers.shutdown(cancel_futures=True)
            finishers.shutdown()
            whole = {name: f.result() for f, name in finishing.items() if f.exception() is None}
            if whole:
                with contextlib.suppress(InputError):  # what stopped us is said, not that it stops this too
                    write_durably(folder / JOURNAL, replace(record, files={**done, **whole}).to_bytes())
            for name in todo:
                temporary_name(folder / name).unlink(missing_ok=True)
            cause = _cause(error, [*writing, *finishing])
            if cause is error:
                raise
            raise cause from None
    return replace(record, files=done), len(files.shards) - len(todo)


def _cause(error: BaseException, others: Sequence[Future[FileFacts]]) -> BaseException:
    """What stopped the others, when ``error`` is only that one was stopped."""
    if not isinstance(error, Stopped):
        return error
    failures = [future.exception() for future in others if future.done() and not future.cancelled()]
    return next((e for e in failures if e is not None and not isinstance(e, Stopped)), error)


def _is_there(path: Path, facts: FileFacts) -> bool:
    """True when a shard that the journal names is on the disk as it was written."""
    try:
        return path.stat().st_size == facts.bytes and file_facts(path) == facts
    except OSError:
        return False


def write_index(folder: Path, files: CheckpointFiles, cuts: Mapping[str, TensorCut]) -> None:
    """The index of the result: the same shards, and the new total size."""
    if files.index is None:
        return
    index = dict(files.index)
    metadata = dict(index.get("metadata") or {})
    entries = files.entries.values()
    metadata["total_size"] = sum(cuts[e.name].bytes(e) if e.name in cuts else e.bytes for e in entries)
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] -= sum(
            e.elements - cuts[e.name].bytes(e) * e.elements // e.bytes for e in entries if e.name in cuts and e.bytes
        )
    index["metadata"] = metadata
    write_durably(folder / files.index_name, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def copy_others(folder: Path, files: CheckpointFiles) -> None:
    """Copy the files beside the weights; what an earlier run left in their place goes."""
    own = {*files.shards, files.index_name, JOURNAL, PLAN, PLAN_TENSORS}
    try:
        for path in folder.iterdir():
            if path.name not in own:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in files.others:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files.directory / name, target)
    except OSError as error:
        raise write_error(error, folder) from error


def publish(folder: Path, target: Path, record: Record, overwrite: bool) -> Record:
    """Write the manifest, and give the directory its name. Raises InputError."""
    try:
        files = dict(record.files)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            if name not in files and name not in (JOURNAL, MANIFEST):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                files[name] = file_facts(path)
        record = replace(record, files=files).finished()
        write_durably(folder / MANIFEST, record.to_bytes())
        (folder / JOURNAL).unlink(missing_ok=True)
        sync_directory(folder)
        _rename(folder, target, overwrite)
        sync_directory(target.parent)
    except OSError as error:
        raise write_error(error, target) from error
    return record


def _rename(folder: Path, target: Path, overwrite: bool) -> None:
    if not overwrite or not target.exists():
        os.rename(folder, target)  # fails where something (other than an empty directory) came to be there meanwhile
        return
    old = target.with_name(target.name + ".replaced")
    replace_directory(folder, target, old)
    shutil.rmtree(old, ignore_errors=True)
