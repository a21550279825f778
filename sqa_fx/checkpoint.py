"""Convert a safetensors checkpoint that does not fit into memory, shard by shard."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from sqa_fx.checkpoint_cut import cuts_by_key
from sqa_fx.checkpoint_journal import JOURNAL, MANIFEST, PLAN, Record
from sqa_fx.checkpoint_layout import CheckpointFiles, read_checkpoint
from sqa_fx.checkpoint_native import loading_finish, loading_notes
from sqa_fx.checkpoint_plan import Planned, planned
from sqa_fx.checkpoint_run import (
    Finish,
    OnBytes,
    begin,
    check_places,
    complete,
    copy_others,
    publish,
    workplace,
    write_index,
    write_shards,
)
from sqa_fx.errors import InputError
from sqa_fx.passes.capture_ways import DynamicShapes
from sqa_fx.plan import Plan
from sqa_fx.request import HeadChoice, KvMerge, Request


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`convert_checkpoint` did."""

    directory: str
    plan: Plan
    shards: int
    shards_kept: int
    """Shards that an earlier run had finished."""
    tensors: int
    tensors_cut: int
    bytes_before: int
    """Size of all tensors of the input, in bytes."""
    bytes_after: int
    seconds: float
    left_out: tuple[str, ...]
    """Files of the input that hold the original weights in another form, and were not copied."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data; the plan is in the directory."""
        own = {name: value for name, value in vars(self).items() if name != "plan"}
        return {**own, "left_out": list(self.left_out), "notes": list(self.notes), "sites": len(self.plan.sites)}

    def table(self) -> str:
        """The report in lines."""
        heads = sorted({f"{s.heads}/{s.kv_heads} -> {s.hq}/{s.hkv}" for s in self.plan.sites})
        lines = [
            f"{len(self.plan.sites)} sites, query/KV heads {', '.join(heads)}",
            f"{self.tensors_cut} of {self.tensors} tensors cut, {self.bytes_before / 1e9:.3f} GB -> "
            f"{self.bytes_after / 1e9:.3f} GB in {self.shards} shards"
            + (f" ({self.shards_kept} were there already)" if self.shards_kept else "")
            + f", {self.seconds:.1f} s",
            *([f"not copied: {', '.join(self.left_out)}"] if self.left_out else []),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def convert_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    hq: Request = None,
    hkv: Request = None,
    plan: Plan | None = None,
    heads: HeadChoice | None = None,
    kv_merge: KvMerge | None = None,
    allow_inexact: bool = False,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "auto",
    jobs: int | None = None,
    verify: bool = True,
    overwrite: bool = False,
    restart: bool = False,
    native: bool = True,
    finish: Finish | None = None,
    on_bytes: OnBytes | None = None,
) -> CheckpointReport:
    """Cut the weights of a safetensors checkpoint as a plan says, one shard after the other, into a new directory.

    ``checkpoint`` is a directory with ``model.safetensors``, or with shards and ``model.safetensors.index.json``; it is
    only read. The plan is ``plan``, or is made from its config.json by :func:`sqa_fx.plan` with ``hq``, ``hkv``,
    ``heads``, ``kv_merge``, ``allow_inexact``, ``args``, ``kwargs`` and ``dynamic_shapes``. Tensors that it names are
    cut in pieces, all others and all other files are copied (hidden files, and weights in other formats, are left out).
    What is written has the bits that :func:`sqa_fx.convert` gives with the same plan; the plan is not proved, since the
    model is not run.

    ``native`` searches fields of the config that say what the plan does: then config.json has them, and the stock class
    of transformers loads the result. Names and shapes are compared for the whole model, outputs for a small sibling of
    it with random weights. Where there are no such fields, ``sqa_fx.json`` says why, and holds what
    :func:`sqa_fx.from_pretrained` needs; the report's notes say which it is.

    Everything is written to ``OUTPUT.partial``, which gets its name when it is complete, with the plan and a manifest
    (sizes in bytes and SHA-256 of all files, see :func:`sqa_fx.verify_checkpoint`) in it. A run that was killed is
    taken up by the same call: finished shards are checked and kept. The same call again on a complete directory changes
    nothing.

    ``jobs`` shards are written at a time (default: 4, or as many as there are processors); each holds at most about
    100 MB, whatever the size of tensors, unless the plan has calibrated rotations or refitted projections: such tensors
    are held whole, a few times over in float64. ``verify`` reads every shard again from the file system and compares.
    ``overwrite`` replaces a complete result of an earlier conversion, ``restart`` forgets an unfinished one.
    ``finish`` takes the place of that search, which begins when the shards are written: ``finish(plan)`` is a context
    that is entered before they are, so that what needs the plan alone can run beside, and what it gives is called with
    the directory before that is published. It may change files other than the shards, such as config.json, which is
    otherwise a copy. ``on_bytes(written, total)`` is told of progress.

    Raises MissingError (no checkpoint), InputError (a damaged shard or index, a full disk, a directory that exists or
    cannot be written, another unfinished run), PlanError (parameters without a tensor, quantised weights, an unfinished
    run with another request), and what :func:`sqa_fx.plan` raises.
    """
    if plan is None and hq is None and hkv is None:
        raise InputError("say how many heads to keep: hq=, hkv=, or a plan=")
    if plan is not None and (hq, hkv, heads, kv_merge) != (None, None, None, None):
        raise InputError("a plan holds its own choices: pass either plan= or hq=, hkv=, heads= and kv_merge=")

    def make() -> Planned:
        if plan is not None:
            return Planned(plan, {}, (), ())
        return planned(
            checkpoint,
            hq=hq,
            hkv=hkv,
            args=args,
            kwargs=kwargs,
            heads=heads,
            kv_merge=kv_merge or "mean",
            dynamic_shapes=dynamic_shapes,
            allow_inexact=allow_inexact,
        )

    if plan is not None:
        request: dict[str, Any] = {"plan": _digest(plan)}
    else:
        request = request_of(hq, hkv, heads, kv_merge, allow_inexact, args, kwargs, dynamic_shapes)
    if finish is None and native:
        finish = loading_finish(Path(checkpoint))
    elif not native:
        request["native"] = False
    return convert_files(
        checkpoint,
        output,
        request,
        make,
        jobs=jobs,
        verify=verify,
        overwrite=overwrite,
        restart=restart,
        finish=finish,
        on_bytes=on_bytes,
    )


def request_of(
    hq: Request,
    hkv: Request,
    heads: HeadChoice | None,
    kv_merge: KvMerge | None,
    allow_inexact: bool = False,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "auto",
) -> dict[str, Any]:
    """What decides a plan, as JSON-ready data: an unfinished conversion is only taken up by the same request."""
    request: dict[str, Any] = {
        "hq": hq,
        "hkv": hkv,
        "heads": heads or "weights",
        "kv_merge": kv_merge or "mean",
        "allow_inexact": allow_inexact,
    }
    if dynamic_shapes != "auto":
        request["dynamic_shapes"] = repr(dynamic_shapes)
    if args or kwargs:
        request["inputs"] = repr(pytree.tree_map(_shape, (tuple(args), dict(kwargs or {}))))
    return request


def convert_files(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    request: Mapping[str, Any],
    make: Callable[[], Planned],
    *,
    jobs: int | None = None,
    verify: bool = True,
    overwrite: bool = False,
    restart: bool = False,
    finish: Finish | None = None,
    on_bytes: OnBytes | None = None,
) -> CheckpointReport:
    """:func:`convert_checkpoint` with a plan that ``make`` makes, if no earlier run made it; ``request`` is what says
    (as JSON) that it would be the same. Raises as it does."""
    start = time.perf_counter()
    jobs = min(4, os.cpu_count() or 1) if jobs is None else jobs
    if jobs < 1:
        raise InputError(f"jobs={jobs}: at least one shard must be written at a time")
    target = Path(os.path.abspath(output))
    request = json.loads(json.dumps(request))
    files = read_checkpoint(checkpoint)
    if not overwrite and not restart and target.is_dir():
        done = complete(target, files, request)
        if done is not None:
            return _report(target, files, done, Plan.load(target / PLAN), len(files.shards), start, finish)
    check_places(files.directory, target, overwrite)
    with workplace(target, restart) as folder:
        record, plan = begin(folder, files, request, make)
        cuts = cuts_by_key(plan, record.keys)
        if (folder / JOURNAL).exists() or not (folder / MANIFEST).exists():
            finishing = contextlib.nullcontext(lambda folder: None) if finish is None else finish(plan)
            with finishing as finished:
                record, kept = write_shards(folder, files, record, cuts, jobs, verify, on_bytes)
                write_index(folder, files, cuts)
                copy_others(folder, files)
                finished(folder)
        else:
            kept = len(files.shards)
        record = publish(folder, target, record, overwrite)
    return _report(target, files, record, plan, kept, start, finish)


def _report(
    target: Path, files: CheckpointFiles, record: Record, plan: Plan, kept: int, start: float, finish: Finish | None
) -> CheckpointReport:
    cuts = cuts_by_key(plan, record.keys)
    after = sum(cuts[e.name].bytes(e) if e.name in cuts else e.bytes for e in files.entries.values())
    notes = [
        *loading_notes(target),
        *record.notes,
        "the plan was not proved: convert(model, plan=...) does where the weights fit",
    ]
    if finish is None and "config.json" in files.others:
        notes.append("config.json is a copy: it still says the original numbers of heads")
    return CheckpointReport(
        str(target),
        plan,
        len(files.shards),
        kept,
        len(files.entries),
        len(cuts),
        files.data_bytes,
        after,
        time.perf_counter() - start,
        files.left_out,
        tuple(notes),
    )


def _digest(plan: Plan) -> str:
    digest = hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode())
    for name in sorted(plan.tensors):
        held = plan.tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {held.dtype} {list(held.shape)}".encode())
        digest.update(held.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _shape(value: Any) -> Any:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else value
