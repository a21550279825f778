"""Runners under CUDA graphs: the kernels of one call, recorded once and launched together.

A recorded graph reads its inputs and writes its outputs at fixed addresses, for one set of shapes, and replays without
Python, dispatch and launch of each kernel (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sqa_fx.errors import InputError, MissingError, first_line
from sqa_fx.runners import Runner

_WARMUP = 3  # as many as torch's documentation makes before it records


class CudaGraphRunner:
    """One call of ``runner`` as a CUDA graph, for inputs of the shapes, types and device of ``args`` and ``kwargs``.

    Inputs are copied to where the graph reads them, which counts as part of a call. ``run`` returns copies of the
    outputs; with ``clone_outputs=False`` it returns the graph's own, which the next call overwrites. What the model
    writes to its inputs stays in the graph's copies, and the calls before recording write to its buffers.

    Raises MissingError without CUDA, and InputError for a runner that works on streams of its own, inputs that are not
    all on one CUDA device, and a call that cannot be recorded (it waits for the GPU, or its sizes depend on data).
    """

    on_torch_stream = True

    def __init__(
        self,
        runner: Runner,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        name: str | None = None,
        clone_outputs: bool = True,
    ) -> None:
        _check(runner)
        self.name, self.kind, self.dtype = name or graph_name(runner), runner.kind, runner.dtype
        self.clone_outputs = clone_outputs
        leaves, self._spec = pytree.tree_flatten((args, dict(kwargs)))
        self._device = _one_device(leaves, runner.name)
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            self._static = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
            static_args, static_kwargs = pytree.tree_unflatten(self._static, self._spec)
            # Not on the current stream: what libraries set up on their first calls must not be recorded, and the legacy
            # default stream cannot be.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARMUP):
                    runner.run(static_args, static_kwargs)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self._graph):
                    self._outputs = runner.run(static_args, static_kwargs)
            except RuntimeError as error:
                _end_recording(self._device)
                cause = error.__context__ or error  # ending an invalid recording raises another error on top
                raise InputError(
                    f"{runner.name} cannot be recorded as a CUDA graph on inputs {_shapes(leaves)} "
                    f"({first_line(cause)}): the call must neither wait for the GPU (.item(), .cpu(), printing) nor "
                    "make sizes from data"
                ) from error
            torch.cuda.synchronize()
            self._memory = torch.cuda.max_memory_allocated() - before

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """See ``Runner.run``. Raises InputError for inputs of another form than the graph was recorded with."""
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        if spec != self._spec or [form(x) for x in leaves] != [form(x) for x in self._static]:
            raise InputError(
                f"{self.name} was recorded for inputs {_shapes(self._static)}, but got {_shapes(leaves)}; record "
                "another CudaGraphRunner for these, or use CudaGraphs, which keeps one for each form"
            )
        with torch.cuda.device(self._device):
            for static, given in zip(self._static, leaves, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(given)
            self._graph.replay()
            return [x.clone() for x in self._outputs] if self.clone_outputs else list(self._outputs)

    def device_memory(self) -> int:
        """Bytes of the static inputs and of what the graph allocates, which it keeps between calls."""
        return self._memory


class CudaGraphs:
    """``runner`` under CUDA graphs, with one `CudaGraphRunner` for each form of inputs, recorded when it first comes.

    Raises MissingError without CUDA, InputError for a runner that works on streams of its own; ``run`` raises as
    CudaGraphRunner does.
    """

    on_torch_stream = True

    def __init__(self, runner: Runner, *, name: str | None = None, clone_outputs: bool = True) -> None:
        _check(runner)
        self.name, self.kind, self.dtype = name or graph_name(runner), runner.kind, runner.dtype
        self.runner, self.clone_outputs = runner, clone_outputs
        self._graphs: dict[Any, CudaGraphRunner] = {}
        self._last: CudaGraphRunner | None = None

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """See ``Runner.run``."""
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        key = (spec, tuple(form(x) for x in leaves))
        if key not in self._graphs:
            self._graphs[key] = CudaGraphRunner(
                self.runner, args, kwargs, name=self.name, clone_outputs=self.clone_outputs
            )
        self._last = self._graphs[key]
        return self._last.run(args, kwargs)

    def device_memory(self) -> int | None:
        """That of the graph that ran last, in bytes; None before the first call."""
        return None if self._last is None else self._last.device_memory()


def graph_name(runner: Runner) -> str:
    """What reports call ``runner`` under CUDA graphs."""
    return f"{runner.name} + CUDA graph"


def form(leaf: Any) -> Any:
    """What must agree for a recorded graph to serve an input: shape, type and device, or the value of a constant."""
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), repr(leaf))


def _end_recording(device: torch.device) -> None:
    """After a recording that failed: torch leaves its random numbers bound to it, and the next ones would raise."""
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())


def _check(runner: Runner) -> None:
    if not torch.cuda.is_available():
        raise MissingError("CUDA graphs need a CUDA device, and torch sees none: check torch.cuda.is_available()")
    if not getattr(runner, "on_torch_stream", runner.kind in ("eager", "compiled")):
        raise InputError(
            f"{runner.name} ({runner.kind}) works on streams of its own, which torch cannot record; use the CUDA "
            "graphs of that runtime"
        )


def _one_device(leaves: list[Any], name: str) -> torch.device:
    devices = {x.device for x in leaves if isinstance(x, Tensor)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise InputError(
            f"CUDA graphs need all inputs on one CUDA device, but those for {name} are {_shapes(leaves)}, on "
            f"{sorted(map(str, devices)) or 'no device'}; move model and inputs with .to('cuda')"
        )
    return next(iter(devices))


def _shapes(leaves: list[Any]) -> list[list[int]]:
    return [list(x.shape) for x in leaves if isinstance(x, Tensor)]
