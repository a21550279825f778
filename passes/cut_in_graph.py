"""Parameter cuts as graph nodes, so that gradients reach the original parameter and an optimizer steps on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sqa_fx.passes.graph import fake_mode_of
from sqa_fx.passes.hints import value_of
from sqa_fx.passes.propagate import FakeResults
from sqa_fx.plan import ParameterPlan, from_ranges

aten = torch.ops.aten
Emit = Callable[..., fx.Node]


def cut_in_graph(graph: fx.Graph, node: fx.Node, plan: ParameterPlan) -> fx.Node:
    """Nodes after ``node`` (a parameter) that cut it as ``plan`` says; the last of them.

    Entries are taken with slices, whose gradients are cheap and deterministic; merged heads are averaged in float64 as
    :func:`sqa_fx.passes.parameters.cut_tensor` does.
    """
    fakes = FakeResults(fake_mode_of(graph))
    last = node

    def emit(target: Any, *args: Any) -> fx.Node:
        nonlocal last
        with graph.inserting_after(last):
            new = graph.call_function(target, args)
        values = fx.node.map_arg(args, value_of)
        new.meta = {"val": fakes.run(target, values, {})}
        last = new
        return new

    entries: list[tuple[int, ...]] = [()] * plan.size[1]
    for block in plan.blocks:
        to = from_ranges(block.to)
        for position, sources in zip(to, zip(*(from_ranges(s) for s in block.sources), strict=True), strict=True):
            entries[position] = sources
    parts = [_piece(emit, node, plan.axis, run) for run in _runs(entries)]
    return parts[0] if len(parts) == 1 else emit(aten.cat.default, parts, plan.axis)


def _runs(entries: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Entries that follow each other in the same distance in every source, longest runs first come."""
    runs: list[list[tuple[int, ...]]] = []
    step: tuple[int, ...] | None = None
    for sources in entries:
        previous = runs[-1][-1] if runs else ()
        difference = (
            tuple(a - b for a, b in zip(sources, previous, strict=True)) if len(previous) == len(sources) else None
        )
        forward = difference is not None and difference and all(d > 0 for d in difference)
        if runs and forward and (step is None or difference == step):
            runs[-1].append(sources)
            step = difference
        else:
            runs.append([sources])
            step = None
    return runs


def _piece(emit: Emit, node: fx.Node, axis: int, run: list[tuple[int, ...]]) -> fx.Node:
    first, last = run[0], run[-1]
    parts = []
    for position, (start, end) in enumerate(zip(first, last, strict=True)):
        step = run[1][position] - start if len(run) > 1 else 1
        parts.append(emit(aten.slice.Tensor, node, axis, start, end + 1, step))
    if len(parts) == 1:
        return parts[0]
    dtype = value_of(node).dtype
    wide = torch.promote_types(dtype, torch.float64)
    total = emit(aten.stack.default, [emit(aten.to.dtype, part, wide) for part in parts])
    return emit(aten.to.dtype, emit(aten.mean.dim, total, [0]), dtype)
