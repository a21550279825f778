"""Parameter cuts: which blocks each parameter keeps for all its roles and sites together, and the new tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from sqa_fx.errors import PlanError
from sqa_fx.passes.layout import Layout
from sqa_fx.passes.site import LeafUse
from sqa_fx.plan import HeadBlock, ParameterPlan, Ranges, from_ranges, to_ranges


@dataclass
class Cut:
    """The cut of one parameter: one segment of the new axis per distinct use."""

    node: fx.Node
    axis: int
    size: int
    segments: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[HeadBlock] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    dropped: set[int] = field(default_factory=set)
    segment_of: dict[tuple[str, str], int] = field(default_factory=dict)
    """The segment that (site, role) uses."""
    _known: list[tuple[tuple[HeadBlock, ...], int]] = field(default_factory=list)
    _by_role: dict[str, set[str]] = field(default_factory=dict)

    @property
    def new_size(self) -> int:
        """Entries of the axis after the cut."""
        return sum(length for _, length in self.segments)

    def add(self, layout: Layout, use: LeafUse) -> None:
        """Add the entries that ``use`` keeps. Equal uses share one segment."""
        self.segment_of[layout.site.name, use.role] = self._add(layout, use)

    def _add(self, layout: Layout, use: LeafUse) -> int:
        if use.axis != self.axis:
            raise PlanError(f"parameter {self.node.target} carries heads along axes {self.axis} and {use.axis}")
        blocks = tuple(layout.blocks(use))
        if layout.site.name not in self.sites:
            self.sites.append(layout.site.name)
        self.dropped.update(layout.dropped(use))
        for known, segment in self._known:
            if _same(known, blocks):
                return segment
        start = self.new_size
        length = sum(len(from_ranges(b.to)) for b in blocks)
        self.segments.append((start, length))
        segment = len(self.segments) - 1
        self._known.append((blocks, segment))
        self._by_role.setdefault(use.role, set()).add(layout.site.name)
        if len(self._by_role[use.role]) > 1 and not use.role.startswith("side"):
            raise PlanError(
                f"sites {sorted(self._by_role[use.role])} share parameter {self.node.target}, so they must "
                "be given the same heads"
            )
        for block in blocks:
            self.blocks.append(replace(block, to=to_ranges([i + start for i in from_ranges(block.to)])))
        return segment

    def plan(self) -> ParameterPlan:
        """The cut as plan data."""
        used = {i for b in self.blocks for s in b.replaces for i in from_ranges(s)}
        dropped = to_ranges(sorted(self.dropped - used))
        return ParameterPlan(
            str(self.node.target),
            self.axis,
            (self.size, self.new_size),
            tuple(self.sites),
            _named(self.blocks),
            dropped,
        )


@dataclass
class Tie:
    """A parameter that stays whole: the entries of KV heads that become one are replaced by what the one gets."""

    node: fx.Node
    axis: int
    size: int
    sites: list[str] = field(default_factory=list)
    blocks: dict[Ranges, HeadBlock] = field(default_factory=dict)

    def add(self, layout: Layout, use: LeafUse) -> None:
        """Add the merged heads of ``use``. Raises PlanError when sites that share the parameter disagree."""
        if use.axis != self.axis:
            raise PlanError(f"parameter {self.node.target} carries heads along axes {self.axis} and {use.axis}")
        found = {}
        for block in layout.blocks(use):
            if len(block.replaces) > 1:
                for own in block.replaces:
                    found[own] = replace(block, to=own)
        known = {own: block for own, block in self.blocks.items() if block.role == use.role}
        if known and layout.site.name not in self.sites and found != known:
            raise PlanError(
                f"sites {[*self.sites, layout.site.name]} share parameter {self.node.target}, so they must be given "
                "the same heads"
            )
        if layout.site.name not in self.sites:
            self.sites.append(layout.site.name)
        self.blocks.update(found)

    def plan(self) -> ParameterPlan:
        """The tie as plan data: everything else stays where it is."""
        taken = {i for b in self.blocks.values() for i in from_ranges(b.to)}
        rest = to_ranges([i for i in range(self.size) if i not in taken])
        blocks = [*self.blocks.values(), *([HeadBlock("rest", -1, rest, (rest,), (rest,))] if rest else [])]
        return ParameterPlan(
            str(self.node.target), self.axis, (self.size, self.size), tuple(self.sites), _named(blocks)
        )


def _named(blocks: Sequence[HeadBlock]) -> tuple[HeadBlock, ...]:
    """``blocks`` with side roles numbered, since node names differ from one capture of a model to the next."""
    sides = list(dict.fromkeys(b.role for b in blocks if b.role.startswith("side:")))
    return tuple(replace(b, role=f"side:{sides.index(b.role)}") if b.role in sides else b for b in blocks)


def in_place(plan: ParameterPlan) -> ParameterPlan:
    """The same cut for a parameter that stays whole: merged heads are averaged where they are, nothing is removed."""
    blocks = [
        HeadBlock(b.role, b.head, own, b.sources, b.replaces) for b in plan.blocks if b.head >= 0 for own in b.replaces
    ]
    taken = {i for b in blocks for i in from_ranges(b.to)}
    rest = to_ranges([i for i in range(plan.size[0]) if i not in taken])
    if rest:
        blocks.append(HeadBlock("rest", -1, rest, (rest,), (rest,)))
    return replace(plan, size=(plan.size[0], plan.size[0]), blocks=tuple(blocks))


def _same(first: Sequence[HeadBlock], second: Sequence[HeadBlock]) -> bool:
    return len(first) == len(second) and all(
        (a.head, a.to, a.sources) == (b.head, b.to, b.sources) for a, b in zip(first, second, strict=True)
    )


def cut_tensor(tensor: Tensor, plan: ParameterPlan) -> Tensor:
    """``tensor`` cut along the plan's axis: selected entries stay bit for bit, merged ones are averaged in float64.

    Raises PlanError when the tensor is not of the size the plan was made for.
    """
    if tensor.shape[plan.axis] != plan.size[0]:
        raise PlanError(
            f"parameter {plan.name} has {tensor.shape[plan.axis]} entries along axis {plan.axis}, the plan "
            f"expects {plan.size[0]}"
        )
    shape = list(tensor.shape)
    shape[plan.axis] = plan.size[1]
    result = tensor.new_empty(shape)
    for block in plan.blocks:
        to = torch.tensor(from_ranges(block.to), device=tensor.device)
        parts = [
            tensor.index_select(plan.axis, torch.tensor(from_ranges(s), device=tensor.device)) for s in block.sources
        ]
        result.index_copy_(plan.axis, to, mean(parts))
    return result


def mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean of equal tensors; a single one is returned as it is, bit for bit."""
    if len(parts) == 1:
        return parts[0]
    wide = torch.stack([p.to(torch.promote_types(p.dtype, torch.float64)) for p in parts]).mean(0)
    return wide.to(parts[0].dtype)
