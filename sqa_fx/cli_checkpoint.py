"""The subcommands for models that do not fit into memory: plan, convert-checkpoint."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

import sqa_fx
from sqa_fx.checkpoint import convert_checkpoint, convert_files, request_of
from sqa_fx.checkpoint_native import Verdict, judge, loading_finish
from sqa_fx.checkpoint_plan import Planned, planned
from sqa_fx.cli_convert import add_request
from sqa_fx.cli_values import head_choice, request, to_json
from sqa_fx.errors import InputError
from sqa_fx.inputs import parse_input_spec
from sqa_fx.plan import Plan
from sqa_fx.progress import hidden

_T = TypeVar("_T")


def add_choices(parser: argparse.ArgumentParser) -> None:
    """How many heads remain, and which."""
    add_request(parser)
    parser.add_argument("--heads", metavar="CHOICE", help="weights (default), first, or a JSON file of lists by site")
    parser.add_argument("--kv-merge", choices=("mean", "select"), help="how KV heads become one (default: mean)")
    parser.add_argument(
        "--static", action="store_true", help="capture with the sizes of the example inputs: several times faster"
    )
    parser.add_argument(
        "--input", action="append", default=[], metavar="SPEC", help="name:dtype[shape], where the config does not tell"
    )


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sqa-fx plan``."""
    parser.add_argument("model", type=Path, metavar="CONFIG", help="a config.json, or the directory that holds it")
    add_choices(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the plan to write (JSON)")


def add_convert(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sqa-fx convert-checkpoint``."""
    parser.add_argument("checkpoint", type=Path, metavar="IN_DIR", help="a directory of safetensors; it is only read")
    parser.add_argument("output", type=Path, metavar="OUT_DIR", help="the directory to make")
    add_choices(parser)
    parser.add_argument("--plan", type=Path, metavar="FILE", help="apply this saved plan instead of --hq and --hkv")
    parser.add_argument("--jobs", type=int, metavar="N", help="shards written at a time (default: 4, at most the CPUs)")
    parser.add_argument("--no-verify", action="store_true", help="do not read every shard again to compare its SHA-256")
    parser.add_argument(
        "--no-native", action="store_true", help="leave config.json as it is, without a search for one that says SQA"
    )
    parser.add_argument("--restart", action="store_true", help="forget what an earlier run left in OUT_DIR.partial")


def run_plan(options: argparse.Namespace) -> int:
    """``sqa-fx plan``: make a plan from a config, and weights that stay on the disk."""
    if options.output.exists() and not options.overwrite:
        raise InputError(f"{options.output} exists: choose another path, or pass --overwrite")
    made = planned(options.model, **_choices(options))
    made.plan.save(options.output, overwrite=options.overwrite)
    sites = made.plan.sites
    if options.json:
        print(to_json({"output": str(options.output), "sites": len(sites), "notes": list(made.notes)}))
        return 0
    for site in sites:
        print(f"{site.name}: {site.heads}/{site.kv_heads} -> {site.hq}/{site.hkv} heads")
    print(*(f"note: {note}" for note in made.notes), f"saved to {options.output}", sep="\n")
    return 0


def run_convert(options: argparse.Namespace) -> int:
    """``sqa-fx convert-checkpoint``: cut a checkpoint shard by shard."""
    with tqdm(unit="B", unit_scale=True, file=sys.stderr, disable=hidden(), leave=False) as bar:

        def progress(written: int, total: int) -> None:
            bar.total = total
            bar.update(written - bar.n)

        common: dict[str, Any] = {
            "jobs": options.jobs,
            "verify": not options.no_verify,
            "overwrite": options.overwrite,
            "restart": options.restart,
            "on_bytes": progress,
            "finish": None if options.no_native else loading_finish(options.checkpoint, _judging_beside),
        }
        left_out: dict[str, Any] = {"native": False} if options.no_native else {}
        if options.plan is not None:
            if options.hq or options.hkv or options.heads or options.kv_merge:
                raise InputError("--plan holds every choice: leave out --hq, --hkv, --heads and --kv-merge")
            loaded = sqa_fx.Plan.load(options.plan)
            report = convert_checkpoint(options.checkpoint, options.output, plan=loaded, **left_out, **common)
        else:
            choices = _choices(options)
            report = convert_files(
                options.checkpoint,
                options.output,
                {**request_of(**choices), **left_out},
                lambda: _in_a_process(options.checkpoint, choices),
                **common,
            )
    print(to_json(report.to_json()) if options.json else f"{report.table()}\nwritten to {report.directory}")
    return 0


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    if not (options.hq or options.hkv):
        raise InputError("say how many heads are to remain: --hq, --hkv" + (" or --plan" * hasattr(options, "plan")))
    inputs = dict(parse_input_spec(text) for text in options.input)
    return {
        "hq": request(options.hq, "--hq"),
        "hkv": request(options.hkv, "--hkv"),
        "heads": head_choice(options.heads) if options.heads else None,
        "kv_merge": options.kv_merge or "mean",
        "allow_inexact": options.allow_inexact,
        "kwargs": inputs,
        "dynamic_shapes": None if options.static else "auto",
    }


def _in_a_process(checkpoint: Path, choices: dict[str, Any]) -> Planned:
    """The plan, made in a process of its own, whose memory is free again when the shards are written."""
    with _beside(_planned, checkpoint, choices) as made:
        return made()


def _judging_beside(checkpoint: Path, plan: Plan) -> AbstractContextManager[Callable[[], Verdict]]:
    """How the result loads, found out while this process writes shards."""
    # No verdict depends on the tensors of a plan; to send them, torch would move them to shared memory while others
    # read them.
    return _beside(_judged, checkpoint, replace(plan, tensors={}))


@contextmanager
def _beside(work: Callable[..., _T], *arguments: Any) -> Iterator[Callable[[], _T]]:
    """Begins ``work`` in a process of its own, whose memory is not this one's; what it gives waits for the result. The
    process ends with its work, and is ended where nobody waits for that any more."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    # An interrupt is for the process that waits: the other one inherits that it is blocked.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        answer = pool.submit(work, *arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    (process,) = pool._processes.values()  # only Python 3.14 has a public way to end it
    pool.shutdown(wait=False)
    try:
        yield answer.result
    finally:
        if not answer.done():
            process.terminate()
        process.join()


def _end_with_parent() -> None:
    """End this process when the one that began it is killed: it would wait for more work for ever."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _judged(checkpoint: Path, plan: Plan) -> Verdict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return judge(checkpoint, plan)


def _planned(checkpoint: Path, choices: dict[str, Any]) -> Planned:
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # notes between torch and its own libraries
            warnings.simplefilter("ignore", category)
        return planned(checkpoint, **choices)
