"""Rows of a long measurement: kept after each one, taken up again after an interruption, within a budget of seconds."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sqa_fx.errors import InputError, first_line
from sqa_fx.whole_file import write_whole

Row = dict[str, Any]
MUST_AGREE = ("device", "torch", "settings")
"""What must be the same in a file that is gone on with: times of two devices do not belong in one table."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `MeasuredRows`."""
    parser.add_argument("--out", type=Path, required=True, help="STEM of the files: STEM.json, STEM.md")
    parser.add_argument("--resume", action="store_true", help="go on with STEM.json: rows that are there stay")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="stop before a row that takes too long")


class MeasuredRows:
    """Rows in STEM.json, each known by the values of ``key``; ``report`` turns the file's content into STEM.md.

    Raises InputError for a file that is there without ``resume``, or that was measured elsewhere or otherwise.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        about: Mapping[str, Any],
        key: Sequence[str],
        report: Callable[[Mapping[str, Any]], str],
    ) -> None:
        self.path: Path = options.out.with_suffix(".json")
        self.key, self.report, self.limit = tuple(key), report, float(options.max_seconds)
        self.about = json.loads(json.dumps(about))
        self.rows: list[Row] = []
        self.start = time.perf_counter()
        self.latest = 0.0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        if not options.resume:
            raise InputError(f"{self.path} exists already: go on with it by --resume, or give another --out")
        known = json.loads(self.path.read_text(encoding="utf-8"))
        for name in MUST_AGREE:
            if known.get(name) != self.about.get(name):
                raise InputError(
                    f"{self.path} was measured with {name} {known.get(name)!r}, this is {self.about.get(name)!r}: give "
                    "another --out"
                )
        self.rows = known["rows"]

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return {**self.about, "rows": self.rows}

    def has(self, **key: Any) -> bool:
        """Whether the row is there."""
        return any(all(row[name] == key[name] for name in self.key) for row in self.rows)

    def may_start(self) -> bool:
        """False where one more row as long as the last one would end after the budget."""
        if self.elapsed + self.latest <= self.limit:
            return True
        self.say(f"stopped: {self.limit:.0f} s would not do for another row of {self.latest:.0f} s")
        return False

    def measure(self, measure: Callable[[], Mapping[str, Any]], **key: Any) -> bool:
        """Add the row ``key`` with what ``measure`` returns or how it failed; False where the budget is spent.

        A row that is there already is not measured again.
        """
        if self.has(**key):
            return True
        if not self.may_start():
            return False
        before = self.elapsed
        row: Row = dict(key)
        try:
            row |= measure()
        except Exception as error:  # one row that fails must not take the others with it
            row["failed"] = failure(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.latest = self.elapsed - before
        row["row_seconds"] = round(self.latest, 1)
        self.rows.append(row)
        self.write()
        self.say(json.dumps(row))
        return True

    def write(self) -> None:
        """Both files, each complete or not at all."""
        content = self.content()
        write_whole(self.path, (json.dumps(content, indent=1) + "\n").encode(), overwrite=True)
        write_whole(self.path.with_suffix(".md"), self.report(content).encode(), overwrite=True)

    def say(self, text: str) -> None:
        """Print ``text`` with the elapsed time."""
        print(f"[{self.elapsed:.0f} s] {text}", flush=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory: cuBLAS and cuDNN say so in errors of their own, and so does the CPU."""
    words = ("out of memory", "alloc_failed", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)


def failure(error: BaseException) -> str:
    """How something failed, in a line."""
    return "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {first_line(error)[:300]}"


def merged(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several files as one, such as those of several processes; their rows keep their order.

    Raises InputError where they were not measured alike.
    """
    first = contents[0]
    for other in contents[1:]:
        for name in MUST_AGREE:
            if other.get(name) != first.get(name):
                raise InputError(f"{name} differs: {first.get(name)!r} and {other.get(name)!r}; these are two tables")
    return {**first, "rows": [row for content in contents for row in content["rows"]]}


def fact_lines(facts: Mapping[str, Any]) -> str:
    """A Markdown list of the facts that are known."""
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None)


def report_facts(content: Mapping[str, Any]) -> str:
    """The head of a results file's report: on what, and with which settings, its rows were measured."""
    return fact_lines({k: v for k, v in content.items() if k not in ("rows", "settings")} | content["settings"])


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))
