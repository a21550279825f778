"""In which order the kept heads lie in a fused parameter: as the code of the module expects it.

A plan puts the entries of one role after those of the other, [q | k | v], which a rewritten graph splits as it likes.
The module's own code expects its own layout, such as [head, (q, k, v), head_dim]: that of the original parameter with
entries missing. Sorting the kept entries by where they came from gives it, for any layout. A KV head that was merged
out of several came from several places: the first or the last of them, depending on whether the layout has keys and
values before or behind the queries that read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sqa_fx.plan import ParameterPlan, Plan, from_ranges, to_ranges

Order = Literal["first", "last", "plan"]


def orders(plan: Plan) -> list[Order]:
    """The orders that differ, the most likely one first."""
    known: list[tuple[tuple[int, ...], ...]] = []
    found: list[Order] = []
    wanted: tuple[Order, ...] = ("first", "last", "plan")
    for order in wanted:
        made = tuple(tuple(arrangement(p, order)) for p in plan.parameters)
        if made not in known:
            known.append(made)
            found.append(order)
    return found


def arrangement(parameter: ParameterPlan, order: Order) -> list[int]:
    """For every entry of the cut parameter in ``order``, the entry in the plan's own order."""
    entries = list(range(parameter.size[1]))
    if order == "plan":
        return entries
    place = [0] * parameter.size[1]
    for block in parameter.blocks:
        for to, *came_from in zip(
            from_ranges(block.to), *(from_ranges(ranges) for ranges in block.replaces), strict=True
        ):
            place[to] = min(came_from) if order == "first" else max(came_from)
    return sorted(entries, key=lambda entry: place[entry])


def arranged_plan(plan: Plan, order: Order) -> Plan:
    """``plan`` with every cut in ``order``: cutting a checkpoint by it gives what the module's own code expects."""
    cuts, tensors = [], dict(plan.tensors)
    for parameter in plan.parameters:
        entries = arrangement(parameter, order)
        where = {old: new for new, old in enumerate(entries)}
        blocks = [replace(b, to=to_ranges([where[i] for i in from_ranges(b.to)])) for b in parameter.blocks]
        cuts.append(replace(parameter, blocks=tuple(blocks)))
        key = f"refitted/{parameter.name}"
        if key in tensors:
            tensors[key] = tensors[key].index_select(parameter.axis, torch.tensor(entries))
    return replace(plan, parameters=tuple(cuts), tensors=tensors)


def arranged_tensors(cut: Mapping[str, Tensor], plan: Plan, order: Order) -> dict[str, Tensor]:
    """The cut tensors, which lie as ``plan`` says, in ``order``."""
    found = dict(cut)
    for parameter in plan.parameters:
        entries = arrangement(parameter, order)
        if parameter.name in found and entries != sorted(entries):
            held = found[parameter.name]
            found[parameter.name] = held.index_select(parameter.axis, torch.tensor(entries, device=held.device))
    return found
