"""Latency of several runners on the same inputs, measured in turns so that drift hits all of them alike."""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sqa_fx.environment import device_name, environment
from sqa_fx.errors import InputError
from sqa_fx.ideal import IdealEntry
from sqa_fx.runners import Runner
from sqa_fx.text_table import text_table
from sqa_fx.timing import burst_calls, cuda_device, current_device, is_stable, peak_memory, rotated, time_burst


@dataclass(frozen=True)
class BenchRow:
    """One runner on one input set: milliseconds per call, and its median over that of the first runner.

    The percentiles are over ``iterations`` turns of ``burst`` calls each. ``warmup_calls`` were made before, and
    ``stable`` says whether their times had settled. ``peak_memory_bytes`` is what one call needs on the GPU beyond
    weights and inputs, None where that is not known. ``attention_flops`` and ``attention_ms`` are per call, None unless
    `BenchReport.with_attention` was told.
    """

    runner: str
    kind: str
    dtype: str
    label: str
    iterations: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    tokens_per_s: float | None
    ratio: float
    burst: int = 1
    warmup_calls: int = 0
    stable: bool = False
    peak_memory_bytes: int | None = None
    attention_flops: int | None = None
    attention_ms: float | None = None

    @property
    def speedup(self) -> float:
        """How many times faster than the first runner."""
        return 1.0 / self.ratio

    @property
    def attention_tflops(self) -> float | None:
        """Attention TFLOP/s: 1e12 floating point operations of attention per second of attention time."""
        if self.attention_flops is None or not self.attention_ms:
            return None
        return self.attention_flops / self.attention_ms / 1e9


@dataclass(frozen=True)
class BenchReport:
    """All rows, by input set and then by runner, and where they were measured.

    ``ideal`` says how much of the possible speed-up runners reached, where that was asked (`sqa_fx.ideal.with_ideal`).
    """

    rows: tuple[BenchRow, ...]
    device: str
    threads: int
    warmup: int
    ideal: tuple[IdealEntry, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def with_attention(self, measured: Mapping[tuple[str, str], tuple[int, float]]) -> BenchReport:
        """The report with attention FLOPs and attention milliseconds per call, by (runner, label).

        Raises InputError for a runner and label that the report does not have.
        """
        unknown = measured.keys() - {(r.runner, r.label) for r in self.rows}
        if unknown:
            raise InputError(f"no row for {sorted(unknown)}; rows are {[(r.runner, r.label) for r in self.rows]}")
        rows = []
        for row in self.rows:
            flops, spent = measured.get((row.runner, row.label), (row.attention_flops, row.attention_ms))
            rows.append(replace(row, attention_flops=flops, attention_ms=spent))
        return replace(self, rows=tuple(rows))

    def to_json(self) -> str:
        """The report as JSON."""
        content = {
            "version": 2,
            "device": self.device,
            "threads": self.threads,
            "warmup": self.warmup,
            "environment": dict(self.environment),
            "rows": [{**asdict(row), "attention_tflops": row.attention_tflops} for row in self.rows],
            "ideal": [asdict(entry) for entry in self.ideal],
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the report as text; columns of which nothing is known are left out."""
        head = ["input", "runner", "kind", "dtype", "p50 ms", "p90 ms", "p99 ms", "tokens/s", "speedup"]
        head += ["calls", "warm-up", "peak MiB", "attn TFLOP/s", "ideal", "share"]
        ideal = {(entry.runner, entry.label): entry for entry in self.ideal}
        rows = []
        for r in self.rows:
            best = ideal.get((r.runner, r.label))
            rows.append(
                [
                    *(r.label, r.runner, r.kind, r.dtype),
                    *(f"{x:.3f}" for x in (r.p50_ms, r.p90_ms, r.p99_ms)),
                    _number(r.tokens_per_s, ".0f"),
                    f"{r.speedup:.2f}x",
                    f"{r.iterations}x{r.burst}",
                    str(r.warmup_calls),
                    _number(None if r.peak_memory_bytes is None else r.peak_memory_bytes / 2**20, ".1f"),
                    _number(r.attention_tflops, ".3g"),
                    _number(None if best is None else best.ideal_speedup, ".2f", "x"),
                    _number(None if best is None else 100 * best.share, ".0f", "%"),
                ]
            )
        kept = [i for i, name in enumerate(head) if name == "tokens/s" or any(row[i] != "-" for row in rows)]
        return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]

    def notes(self) -> list[str]:
        """What the reader of the table must know."""
        first = self.rows[0].runner
        found = [
            f"{self.device}, {self.threads} threads, speedup of the median over {first}; calls: turns x calls per turn"
        ]
        found += [
            f"{r.runner} on {r.label}: times had not settled after {r.warmup_calls} warm-up calls"
            for r in self.rows
            if not r.stable
        ]
        return found

    def table(self) -> str:
        """The report as aligned text."""
        return "\n".join([text_table(*self.cells()), *self.notes()])


def bench(
    runners: Sequence[Runner],
    input_sets: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]],
    *,
    warmup: int = 3,
    max_warmup: int = 50,
    iterations: int = 20,
    burst: int | None = None,
    tokens: Sequence[int] | None = None,
    labels: Sequence[str | int] | None = None,
    progress: bool = True,
) -> BenchReport:
    """Time every runner on every ``(args, kwargs)``, in turns of rotating order: A, B, then B, A, ...

    At least ``warmup`` calls of each runner on each input set are not counted, and more until their times settle (the
    median of 5 within 3% of that of the 5 before), at most ``max_warmup``; the first of them compiles. Each of the
    ``iterations`` turns makes ``burst`` calls without waiting between them, by default as many as take about 10 ms (1
    when there is no warm-up to tell), and counts as one time per call. ``tokens`` counts the tokens of each input set
    (batch * seq), for tokens per second; ``labels`` names the input sets, by default ``tokens``. With inputs on CUDA,
    runners on torch's current stream (``on_torch_stream``; eager and compiled ones) are timed by events, all else by
    the clock. Peak memory of eager and compiled runners is what torch's allocator saw; another runtime tells by
    ``device_memory()``, in bytes, if it has that. ``progress`` shows a bar on stderr.

    Raises InputError when there is nothing to run, names of runners repeat, or counts do not match.
    """
    names = [r.name for r in runners]
    if not runners or not input_sets:
        raise InputError(f"nothing to measure: {len(runners)} runners and {len(input_sets)} input sets")
    if len(set(names)) != len(names):
        raise InputError(f"runners must have different names, but are called {', '.join(names)}")
    if iterations < 1 or warmup < 0 or (burst is not None and burst < 1):
        raise InputError(
            f"iterations and burst must be at least 1 and warmup at least 0, but are {iterations}, {burst} and {warmup}"
        )
    if max_warmup < warmup:
        raise InputError(f"max_warmup is {max_warmup}, fewer than warmup, {warmup}; raise it or lower the other")
    for what, given in (("tokens", tokens), ("labels", labels)):
        if given is not None and len(given) != len(input_sets):
            raise InputError(f"{what} has {len(given)} entries for {len(input_sets)} input sets; give one for each")
    if labels is None:
        labels = list(range(len(input_sets))) if tokens is None else list(tokens)

    rows: list[BenchRow] = []
    total = len(input_sets) * iterations * len(runners)
    with tqdm(total=total, desc="bench", unit="turn", disable=not progress, file=sys.stderr) as bar:
        for index, (args, kwargs) in enumerate(input_sets):
            with current_device(cuda_device(args, kwargs)):
                timed = [_Timed(runner, args, kwargs) for runner in runners]
                _warm_up(timed, warmup, max_warmup)
                _take_turns(timed, iterations, burst, bar)
            first = float(np.median(timed[0].times))
            count = None if tokens is None else tokens[index]
            rows += [entry.row(str(labels[index]), first, count) for entry in timed]
    device = next((d for d in (cuda_device(args, kwargs) for args, kwargs in input_sets) if d is not None), None)
    return BenchReport(
        tuple(rows), device_name(device), torch.get_num_threads(), warmup, environment=environment(device)
    )


class _Timed:
    """One runner on one input set, and what was seen of it so far (milliseconds per call)."""

    def __init__(self, runner: Runner, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.runner = runner
        self.call = functools.partial(runner.run, args, kwargs)
        # Another runtime has streams of its own, which events of torch do not see.
        on_stream = bool(getattr(runner, "on_torch_stream", runner.kind in ("eager", "compiled")))
        self.events = on_stream and cuda_device(args, kwargs) is not None
        self.warmup: list[float] = []
        self.times: list[float] = []
        self.burst = 1
        self.memory: int | None = None

    def row(self, label: str, first: float, tokens: int | None) -> BenchRow:
        """The row for this runner, where the first runner's median is ``first``."""
        p50, p90, p99 = (float(p) for p in np.percentile(self.times, [50, 90, 99]))
        return BenchRow(
            runner=self.runner.name,
            kind=self.runner.kind,
            dtype=str(self.runner.dtype).removeprefix("torch."),
            label=label,
            iterations=len(self.times),
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            tokens_per_s=None if tokens is None else tokens / p50 * 1000,
            ratio=p50 / first,
            burst=self.burst,
            warmup_calls=len(self.warmup),
            stable=is_stable(self.warmup),
            peak_memory_bytes=self.memory,
        )


def _warm_up(timed: Sequence[_Timed], least: int, most: int) -> None:
    """Call every runner in turns until it is stable."""
    waiting = list(timed)
    while True:
        waiting = [t for t in waiting if len(t.warmup) < least or (len(t.warmup) < most and not is_stable(t.warmup))]
        if not waiting:
            return
        for entry in waiting:
            entry.warmup.append(time_burst(entry.call, 1, entry.events))


def _take_turns(timed: Sequence[_Timed], iterations: int, burst: int | None, bar: Any) -> None:
    """Measure every runner ``iterations`` times."""
    for entry in timed:
        entry.burst = burst_calls(entry.warmup, burst)
        told = getattr(entry.runner, "device_memory", None)
        if told is not None:
            entry.memory = told()
        elif entry.events and entry.runner.kind in ("eager", "compiled"):  # others allocate where torch does not see
            entry.memory = peak_memory(entry.call)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in the middle would be charged to whoever runs then
    try:
        for turn in range(iterations):
            for index in rotated(len(timed), turn):
                entry = timed[index]
                entry.times.append(time_burst(entry.call, entry.burst, entry.events))
                bar.update()
    finally:
        if collecting:
            gc.enable()


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
