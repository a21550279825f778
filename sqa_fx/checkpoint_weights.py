"""The norms of heads, taken from weights that stay where they are: each tensor is read once, in pieces."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from sqa_fx.checkpoint_cut import CHUNK, Source
from sqa_fx.checkpoint_format import DTYPES, Entry
from sqa_fx.checkpoint_layout import CheckpointFiles
from sqa_fx.passes.pipeline import Analysis
from sqa_fx.passes.site import Site

Energy = Callable[[str, int], Tensor]
"""The sum of squares of every entry along an axis of the parameter of that name, in float64: [entries]."""


def weighed(analysis: Analysis, energy: Energy) -> Analysis:
    """``analysis`` of a model without weights, for choosing heads by weights: those of the value and output projections
    are stood in for by the root of their energy along the axis of the heads, which has the same norms by head."""
    axes = {str(use.node.target): use.axis for site in analysis.sites for use in scored(site)}
    facts = copy.copy(analysis.facts)
    facts.module = cast(fx.GraphModule, _Weights(analysis.facts.module, axes, energy, {}))
    return Analysis(facts, analysis.sites, analysis.refusals, analysis.other_mixers, analysis.notes)


def scored(site: Site) -> list[Any]:
    """The uses of parameters from which the heads of ``site`` are ranked."""
    return [use for use in site.leaves if use.node.op == "get_attr" and use.role in ("v", "o")]


class _Weights:
    """What is asked for a parameter by attributes, one dotted part at a time, as of a module."""

    def __init__(
        self, held: Any, axes: Mapping[str, int], energy: Energy, read: dict[str, Tensor], path: str = ""
    ) -> None:
        self._held, self._axes, self._energy, self._read, self._path = held, axes, energy, read, path

    def __getattr__(self, part: str) -> Any:
        path = f"{self._path}.{part}" if self._path else part
        held = getattr(self._held, part)
        if not isinstance(held, Tensor):
            return _Weights(held, self._axes, self._energy, self._read, path)
        if path not in self._axes or held.dim() < 2 or not held.is_floating_point():
            return held
        if path not in self._read:
            sizes = [1] * held.dim()
            sizes[self._axes[path]] = -1
            self._read[path] = self._energy(path, self._axes[path]).sqrt().view(sizes)
        return self._read[path]


def energy_of_module(model: nn.Module) -> Energy:
    """Energies of parameters that are in memory."""
    state = model.state_dict(keep_vars=True)

    def energy(name: str, axis: int) -> Tensor:
        held = state[name].detach()
        return _by_entry(held, axis).cpu()

    return energy


def energy_of_files(files: CheckpointFiles, keys: Mapping[str, Sequence[str]]) -> Energy:
    """Energies of parameters that lie in shards; ``keys`` are the names of their tensors there."""
    where = {entry.name: (shard, entry) for shard, header in files.shards.items() for entry in header.entries}

    def energy(name: str, axis: int) -> Tensor:
        shard, entry = where[keys[name][0]]
        source = Source(files.directory / shard, files.shards[shard].data_start)
        try:
            return _streamed(source, entry, axis)
        finally:
            source.close()

    return energy


def _streamed(source: Source, entry: Entry, axis: int) -> Tensor:
    """The energy of every entry along ``axis`` of a tensor in a file, read in pieces of whole outermost rows."""
    dtype = DTYPES[entry.dtype]
    total = torch.zeros(entry.shape[axis], dtype=torch.float64)
    if not entry.bytes:
        return total
    row = entry.bytes // entry.shape[0]
    step = max(1, CHUNK // row)
    for at in range(0, entry.shape[0], step):
        count = min(step, entry.shape[0] - at)
        piece = source.tensor(entry.start + at * row, count * row, dtype).view(count, *entry.shape[1:])
        own = _by_entry(piece, axis)
        if axis == 0:
            total[at : at + count] = own
        else:
            total += own
    return total


def _by_entry(tensor: Tensor, axis: int) -> Tensor:
    rest = math.prod(tensor.shape) // max(1, tensor.shape[axis])
    return tensor.to(torch.float64).square().movedim(axis, 0).reshape(tensor.shape[axis], rest).sum(1)
