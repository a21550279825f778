"""Which GPU kernels a runner launches, whatever runs it: CUPTI, through torch.profiler, sees those of every library of
the process, ONNX Runtime's and TensorRT's too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sqa_fx.errors import MissingError
from sqa_fx.runners import Runner

_ATTENTION = re.compile(r"flash|fmha|mha_|_mha|attention|sdpa|softmax|soft_max", re.IGNORECASE)
# Inductor names a kernel after all operators that it took in, also after an attention beside which it only moves heads.
_INDUCTOR = re.compile(r"^triton_(?!tem_)")
_SOFTMAX = re.compile(r"(?<!log)_softmax")


@dataclass(frozen=True)
class KernelTime:
    """A kernel by name: launches and microseconds per call of the runner."""

    name: str
    launches: float
    microseconds: float

    @property
    def attention(self) -> bool:
        """Whether the name is that of a fused attention or a softmax."""
        pattern = _SOFTMAX if _INDUCTOR.match(self.name) else _ATTENTION
        return pattern.search(self.name) is not None


def gpu_kernels(runner: Runner, args: tuple[Any, ...], kwargs: Mapping[str, Any], calls: int = 3) -> list[KernelTime]:
    """The kernels of one call, longest first, as means over ``calls``. Raises MissingError without a GPU."""
    if not torch.cuda.is_available():
        raise MissingError("GPU kernels can be seen on a GPU only, and there is none here")
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        runner.run(args, kwargs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            runner.run(args, kwargs)
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch._C._autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset")):
            found.setdefault(event.name, []).append(float(event.device_time))
    kernels = [KernelTime(name, len(times) / calls, sum(times) / calls) for name, times in found.items()]
    return sorted(kernels, key=lambda k: -k.microseconds)


def attention_kernels(kernels: Sequence[KernelTime], shortest: int = 70) -> str:
    """The attention among ``kernels`` in words: short names, launches, and milliseconds per call."""
    found = [k for k in kernels if k.attention]
    return (
        "; ".join(f"{k.launches:g} x {k.name[:shortest]} {k.microseconds / 1e3:.3f} ms" for k in found) or "none seen"
    )
