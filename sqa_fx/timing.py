"""How long a call takes: warm-up until times settle, and bursts of calls between two readings of a clock.

A call by itself, with a synchronisation on either side, measures how long it takes to launch its kernels; a burst keeps
the device busy, as a server would. On CUDA, work on torch's current stream is timed by events, everything else by the
clock between two synchronisations.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

WINDOW = 5
"""How many calls make one median of the warm-up."""
TOLERANCE = 0.03
"""How far the medians of two windows in a row may differ for a runner to be warm, as a share of the earlier one."""
BURST_MS = 10.0
"""How long a burst lasts by default, in milliseconds."""


def is_stable(times: Sequence[float]) -> bool:
    """Whether the median of the last ``WINDOW`` times is within ``TOLERANCE`` of that of as many before them."""
    if len(times) < 2 * WINDOW:
        return False
    before, last = statistics.median(times[-2 * WINDOW : -WINDOW]), statistics.median(times[-WINDOW:])
    return abs(last - before) <= TOLERANCE * before


def burst_calls(times: Sequence[float], burst: int | None) -> int:
    """How many calls a burst has: ``burst``, or as many as take ``BURST_MS`` by the median of the last ``times``
    (milliseconds, from the warm-up), at least 1. Without any times it is 1."""
    if burst is not None:
        return burst
    typical = statistics.median(times[-WINDOW:]) if times else 0.0
    return math.ceil(BURST_MS / typical) if typical > 0 else 1


def rotated(count: int, turn: int) -> list[int]:
    """The numbers 0..count-1 in turn ``turn``: each turn starts with the next one, so that all have every place."""
    return [(turn + i) % count for i in range(count)]


def time_burst(call: Callable[[], object], calls: int, events: bool) -> float:
    """Milliseconds per call of ``calls`` calls in a row; ``events`` for work on torch's current CUDA stream."""
    return (_by_events if events else _by_clock)(call, calls) / calls


def _by_clock(call: Callable[[], object], calls: int) -> float:
    _synchronize()
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    _synchronize()
    return (time.perf_counter_ns() - start) / 1e6


def _by_events(call: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _synchronize() -> None:
    # An engine may work on a GPU although its inputs are in host memory.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that torch's CUDA allocator held at most during one call on the current device, beyond those before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cuda_device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device | None:
    """The device of the first CUDA tensor among the inputs; None without one."""
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    return next((x.device for x in leaves if isinstance(x, torch.Tensor) and x.is_cuda), None)


@contextlib.contextmanager
def current_device(device: torch.device | None) -> Iterator[None]:
    """Make a CUDA ``device`` the current one: streams, events and memory statistics are those of the current device."""
    with contextlib.nullcontext() if device is None else torch.cuda.device(device):
        yield
