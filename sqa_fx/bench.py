"""Latency of several runners on the same inputs, measured in turns so that drift hits all of them alike."""

from __future__ import annotations

import gc
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from tqdm import tqdm

from sqa_fx.errors import InputError
from sqa_fx.runners import Runner
from sqa_fx.text_table import text_table


@dataclass(frozen=True)
class BenchRow:
    """One runner on one input set: milliseconds per call, and its median over that of the first runner."""

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

    @property
    def speedup(self) -> float:
        """How many times faster than the first runner."""
        return 1.0 / self.ratio


@dataclass(frozen=True)
class BenchReport:
    """All rows, by input set and then by runner, and where they were measured."""

    rows: tuple[BenchRow, ...]
    device: str
    threads: int
    warmup: int

    def to_json(self) -> str:
        """The report as JSON."""
        content = {
            "version": 1,
            "device": self.device,
            "threads": self.threads,
            "warmup": self.warmup,
            "rows": [asdict(row) for row in self.rows],
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def table(self) -> str:
        """The report as aligned text."""
        head = ["input", "runner", "kind", "dtype", "p50 ms", "p90 ms", "p99 ms", "tokens/s", "speedup"]
        rows = [
            [
                r.label,
                r.runner,
                r.kind,
                r.dtype,
                *(f"{x:.3f}" for x in (r.p50_ms, r.p90_ms, r.p99_ms)),
                "-" if r.tokens_per_s is None else f"{r.tokens_per_s:.0f}",
                f"{r.speedup:.2f}x",
            ]
            for r in self.rows
        ]
        note = f"{self.device}, {self.threads} threads, speedup of the median over {self.rows[0].runner}"
        return text_table(head, rows) + "\n" + note


def bench(
    runners: Sequence[Runner],
    input_sets: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]],
    *,
    warmup: int = 3,
    iterations: int = 20,
    tokens: Sequence[int] | None = None,
    labels: Sequence[str | int] | None = None,
    progress: bool = True,
) -> BenchReport:
    """Time every runner on every ``(args, kwargs)``, in turns: A, B, A, B, ...

    ``warmup`` calls of each runner on each input set are not counted; the first of them compiles. ``tokens`` counts the
    tokens of each input set (batch * seq), for tokens per second; ``labels`` names the input sets, by default
    ``tokens``. PyTorch runners on CUDA are timed by events on their stream, all else by the clock. ``progress`` shows a
    bar on stderr.

    Raises InputError when there is nothing to run, names of runners repeat, or counts do not match.
    """
    names = [r.name for r in runners]
    if not runners or not input_sets:
        raise InputError(f"nothing to measure: {len(runners)} runners and {len(input_sets)} input sets")
    if len(set(names)) != len(names):
        raise InputError(f"runners must have different names, but are called {', '.join(names)}")
    if iterations < 1 or warmup < 0:
        raise InputError(f"iterations must be at least 1 and warmup at least 0, but are {iterations} and {warmup}")
    for what, given in (("tokens", tokens), ("labels", labels)):
        if given is not None and len(given) != len(input_sets):
            raise InputError(f"{what} has {len(given)} entries for {len(input_sets)} input sets; give one for each")
    if labels is None:
        labels = list(range(len(input_sets))) if tokens is None else list(tokens)

    rows: list[BenchRow] = []
    total = len(input_sets) * (warmup + iterations) * len(runners)
    with tqdm(total=total, desc="bench", unit="call", disable=not progress, file=sys.stderr) as bar:
        for index, (args, kwargs) in enumerate(input_sets):
            times = _times(runners, args, kwargs, warmup, iterations, bar)
            first = float(np.median(times[0]))
            for runner, samples in zip(runners, times, strict=True):
                p50, p90, p99 = (float(p) for p in np.percentile(samples, [50, 90, 99]))
                rows.append(
                    BenchRow(
                        runner=runner.name,
                        kind=runner.kind,
                        dtype=str(runner.dtype).removeprefix("torch."),
                        label=str(labels[index]),
                        iterations=iterations,
                        p50_ms=p50,
                        p90_ms=p90,
                        p99_ms=p99,
                        tokens_per_s=None if tokens is None else tokens[index] / p50 * 1000,
                        ratio=p50 / first,
                    )
                )
    device = _device_name(any(_on_cuda(args, kwargs) for args, kwargs in input_sets))
    return BenchReport(tuple(rows), device, torch.get_num_threads(), warmup)


def _times(
    runners: Sequence[Runner], args: tuple[Any, ...], kwargs: Mapping[str, Any], warmup: int, iterations: int, bar: Any
) -> list[list[float]]:
    """Milliseconds of each call, by runner."""
    cuda = _on_cuda(args, kwargs)
    times: list[list[float]] = [[] for _ in runners]
    collecting = gc.isenabled()
    try:
        for step in range(warmup + iterations):
            if step == warmup:
                gc.collect()
                gc.disable()  # a collection in the middle would be charged to whoever runs then
            for runner, samples in zip(runners, times, strict=True):
                # Events see the stream of PyTorch only; another runtime has streams of its own.
                timed = _time_events if cuda and runner.kind in ("eager", "compiled") else _time_clock
                elapsed = timed(runner, args, kwargs, cuda)
                if step >= warmup:
                    samples.append(elapsed)
                bar.update()
    finally:
        if collecting:
            gc.enable()
    return times


def _time_clock(runner: Runner, args: tuple[Any, ...], kwargs: Mapping[str, Any], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter_ns()
    runner.run(args, kwargs)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) / 1e6


def _time_events(runner: Runner, args: tuple[Any, ...], kwargs: Mapping[str, Any], cuda: bool) -> float:
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    runner.run(args, kwargs)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _on_cuda(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.is_cuda for x in pytree.tree_leaves((args, dict(kwargs))))


def _device_name(cuda: bool) -> str:
    return torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})"
