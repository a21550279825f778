"""How long the attention of a captured graph takes by itself, on random tensors of the same form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sqa_fx.attention_flops import AttentionCall, Model, TensorForm, attention_calls
from sqa_fx.errors import InputError
from sqa_fx.timing import burst_calls, current_device, is_stable, time_burst


def measure_attention(
    model: Model, inputs: tuple[tuple[Any, ...], Mapping[str, Any]], iterations: int = 20, *, max_warmup: int = 50
) -> float:
    """Milliseconds of all attention in one call of ``model`` with ``inputs``, (args, kwargs): see `time_attention`."""
    return sum(time_attention(attention_calls(model, inputs), iterations, max_warmup=max_warmup))


def time_attention(calls: Sequence[AttentionCall], iterations: int = 20, *, max_warmup: int = 50) -> list[float]:
    """Milliseconds of each of ``calls``: the median of ``iterations`` bursts of scaled_dot_product_attention alone.

    The tensors are random, with the shapes, strides, dtype and device of the graph's own, and the same mask form,
    causality, scale, dropout and grouping. Calls of the same form are timed once. Alone, attention finds its inputs in
    the cache more often than inside a model, so that this is a lower bound of its share.

    Raises InputError for attention that is a softmax between two contractions: there is no single op to time.
    """
    if iterations < 1:
        raise InputError(f"iterations must be at least 1, but is {iterations}")
    unfused = [call.name for call in calls if not call.fused]
    if unfused:
        raise InputError(
            f"attention at {', '.join(unfused[:5])} is a softmax between two contractions, not one op to time: load "
            "the model with scaled_dot_product_attention, or take the time of its kernels from torch.profiler"
        )
    known: dict[AttentionCall, float] = {}
    times = []
    for call in calls:
        form = replace(call, name="", module="")
        if form not in known:
            known[form] = _time(form, iterations, max_warmup)
        times.append(known[form])
    return times


def _time(call: AttentionCall, iterations: int, max_warmup: int) -> float:
    device = call.query.device
    events = device.type == "cuda"
    with current_device(device if events else None), torch.no_grad():
        run = sdpa_alone(call)
        warm: list[float] = []
        while len(warm) < max_warmup and not is_stable(warm):
            warm.append(time_burst(run, 1, events))
        burst = burst_calls(warm, None)
        return statistics.median(time_burst(run, burst, events) for _ in range(iterations))


def sdpa_alone(call: AttentionCall) -> Callable[[], Tensor]:
    """The scaled_dot_product_attention of ``call`` on random tensors of its own; a mask hides nothing."""
    generator = torch.Generator(device=call.query.device).manual_seed(0)
    query, key, value = (_random(form, generator) for form in (call.query, call.key, call.value))
    mask = None if call.mask is None else _open(call.mask)

    def run() -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, mask, call.dropout, call.causal, scale=call.scale, enable_gqa=call.gqa
        )

    return run


def _open(form: TensorForm) -> Tensor:
    return _laid_out(form, torch.ones if form.dtype == torch.bool else torch.zeros)


def _random(form: TensorForm, generator: torch.Generator) -> Tensor:
    return _laid_out(form, lambda size, **kw: torch.randn(size, generator=generator, **kw))


def _laid_out(form: TensorForm, make: Callable[..., Tensor]) -> Tensor:
    """A tensor of that form in memory from ``make``; kernels differ in speed by the strides of their inputs."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(form.shape, form.strides, strict=True))
    if math.prod(form.shape) == 0:
        extent = 0
    return make(extent, dtype=form.dtype, device=form.device).as_strided(form.shape, form.strides)
