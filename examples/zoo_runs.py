"""What coverage.py and surgery_coverage.py share: options, the models of a zoo folder, processes, limits, files."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import logging
import multiprocessing
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch

from sqa_fx.torchvision_ops import make_torchvision_importable


class Job(NamedTuple):
    """One entry in one implementation, and how many seconds it may take."""

    name: str
    impl: str
    seconds: int


class ZooRun(Protocol):
    """What a script tells of a job: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    seconds: float


R = TypeVar("R", bound=ZooRun)


class OutOfTime(BaseException):
    """The entry took too long. Not an Exception, so that nobody's handler swallows it."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise OutOfTime after ``seconds``, again and again in case something caught it."""

    armed = [True]

    def stop(number: int, frame: types.FrameType | None) -> None:
        if armed:
            raise OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def timed(seconds: int, convert: Callable[[], R], out_of_time: R) -> R:
    """What ``convert`` returns, or ``out_of_time`` where it takes more than ``seconds``; with the seconds it took."""
    start = time.perf_counter()
    try:
        with time_limit(seconds):
            run = convert()
    except OutOfTime:
        run = out_of_time
    run.seconds = time.perf_counter() - start
    return run


def arguments(parser: argparse.ArgumentParser, timeout: int) -> None:
    """The options that both scripts have; ``timeout`` is the default of --timeout."""
    parser.add_argument("--zoo", type=Path, required=True, help="folder with allzoo.py")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="entries to run, as name or name:impl (glob)"
    )
    parser.add_argument("--timeout", type=int, default=timeout, metavar="SECONDS", help="per entry and implementation")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--out", type=Path, metavar="STEM", help="write STEM.json and STEM.md")


def open_zoo(folder: Path) -> bool:
    """Make ``allzoo`` importable and its libraries quiet; where there is none, say so and return False."""
    if not (folder / "allzoo.py").is_file():
        print(f"{folder} holds no allzoo.py", file=sys.stderr)
        return False
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    make_torchvision_importable()
    sys.path.insert(0, str(folder.resolve()))
    return True


def wanted_jobs(options: argparse.Namespace) -> list[Job]:
    """The entries that --only asks for, in every implementation."""
    import allzoo

    return [
        Job(name, impl, options.timeout)
        for name, entry in allzoo.ZOO.items()
        for impl in entry.impls
        if not options.only or any(fnmatch.fnmatchcase(t, p) for t in (name, f"{name}:{impl}") for p in options.only)
    ]


def run_all(one_run: Callable[[Job], R], options: argparse.Namespace, after_each: Callable[[list[R]], None]) -> list[R]:
    """All runs, by --jobs processes; ``after_each`` is called with those that are there, the latest at the end."""
    runs: list[R] = []
    jobs = wanted_jobs(options)
    # One process per model and worker at a time: a model that runs out of memory or time takes no other with it.
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=20) as pool:
        for run in pool.imap(one_run, jobs):
            runs.append(run)
            after_each(runs)
    return runs


def as_json(summary: Mapping[str, Any], runs: Sequence[ZooRun]) -> str:
    """Summary and runs as one JSON document."""
    return json.dumps({"summary": summary, "runs": [asdict(run) for run in runs]}, indent=1)


def summary_table(summary: Mapping[str, Any]) -> list[str]:
    """The summary as the lines of a Markdown table."""
    return ["| | |", "|---|---:|", *(f"| {key} | {value} |" for key, value in summary.items())]


def said_error(error: float | None) -> str:
    """An error in a cell of a table: nothing where there is none."""
    return "" if error is None else f"{error:.0e}"


def write(stem: Path, summary: Mapping[str, Any], runs: Sequence[ZooRun], markdown: str) -> None:
    """STEM.json and STEM.md."""
    stem.with_suffix(".json").write_text(as_json(summary, runs) + "\n")
    stem.with_suffix(".md").write_text(markdown)


def print_summary(summary: Mapping[str, Any]) -> None:
    """A line for each figure."""
    print(*(f"{key}: {value}" for key, value in summary.items()), sep="\n")
