"""Several ways to run one thing, timed in interleaved turns within a budget of seconds; one that fails is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from measured_rows import failure
from torch import Tensor

from sqa_fx.attention_flops import AttentionCall, TensorForm
from sqa_fx.bench import bench
from sqa_fx.errors import MissingError
from sqa_fx.gpu_kernels import gpu_kernels
from sqa_fx.timing import time_burst


class Way:
    """A `sqa_fx.runners.Runner` of any callable on torch's stream, such as a training step."""

    kind = "compiled"
    on_torch_stream = True

    def __init__(self, name: str, call: Callable[..., Any], dtype: torch.dtype) -> None:
        self.name, self.call, self.dtype = name, call, dtype

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """See ``Runner.run``."""
        result = self.call(*args, **kwargs)
        return [result] if isinstance(result, Tensor) else []


def timed(
    ways: Mapping[str, Callable[..., Any]],
    args: tuple[Any, ...],
    dtype: torch.dtype,
    seconds: float,
    turns: int,
) -> dict[str, Any]:
    """Median and 90th percentile in milliseconds, peak memory, seconds of the first call (it compiles), and failures.

    There are ``turns`` turns of every way, or as few as ``seconds`` allow, at least 3.
    """
    cuda = any(isinstance(a, Tensor) and a.is_cuda for a in args)
    failed: dict[str, str] = {}
    first: dict[str, float] = {}
    once: dict[str, float] = {}
    for name, call in ways.items():
        try:
            first[name] = time_burst(lambda: call(*args), 1, False) / 1e3  # noqa: B023 (called at once)
            once[name] = time_burst(lambda: call(*args), 1, cuda)  # noqa: B023 (called at once)
        except Exception as error:  # a way may fail on its own; the others go on
            failed[name] = failure(error)
            if cuda:
                torch.cuda.empty_cache()
    result: dict[str, Any] = {"first_call_seconds": {n: round(s, 2) for n, s in first.items()}, "failed": failed}
    if not once:
        return {**result, "milliseconds": {}}
    round_ms = sum(max(ms, 10.0) for ms in once.values())  # a turn is a burst of at least 10 ms
    iterations = max(3, min(turns, int(seconds * 1e3 / round_ms)))
    # Settling takes ten calls: what takes long has settled in its two.
    warmup = max(0, min(50, int(seconds * 1e3 / round_ms)) - 3)
    runners = [Way(name, ways[name], dtype) for name in once]
    report = bench(runners, [(args, {})], warmup=min(3, warmup), max_warmup=warmup, iterations=iterations,
                   progress=False)  # fmt: skip
    rows = {row.runner: row for row in report.rows}
    return {
        **result,
        "milliseconds": {n: r.p50_ms for n, r in rows.items()},
        "p90_milliseconds": {n: r.p90_ms for n, r in rows.items()},
        "peak_memory_bytes": {n: r.peak_memory_bytes for n, r in rows.items()},
        "turns": iterations,
    }


def alone(call: AttentionCall, backward: bool) -> Callable[..., Any]:
    """The attention ``call`` by itself on random tensors laid out as in the model; with its backward pass if asked.

    What it is called with is not read.
    """
    query, key, value = (_laid_out(form, backward) for form in (call.query, call.key, call.value))

    def forward(*_: Any) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=call.causal, scale=call.scale, enable_gqa=call.gqa
        )

    if not backward:
        return forward
    gradient = torch.randn_like(forward())

    def both(*_: Any) -> None:
        forward().backward(gradient)
        query.grad = key.grad = value.grad = None

    return both


def _laid_out(form: TensorForm, gradients: bool) -> Tensor:
    empty = torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device=form.device)
    return empty.normal_().requires_grad_(gradients)


def attention_in_model(call: Callable[..., Any], args: tuple[Any, ...], dtype: torch.dtype) -> tuple[float, float]:
    """Milliseconds of the attention kernels of one call, and of all kernels. Raises MissingError without a GPU."""
    if not any(isinstance(a, Tensor) and a.is_cuda for a in args):
        raise MissingError("the kernels of a call are seen on a GPU only")
    kernels = gpu_kernels(Way("call", call, dtype), args, {}, calls=1)
    own = [k.microseconds for k in kernels if k.attention]
    return math.fsum(own) / 1e3, math.fsum(k.microseconds for k in kernels) / 1e3
