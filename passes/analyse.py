"""Analyse the sites of a graph: which cores and which heads work together, and everything the planner and the rewriter
need to know of each site."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from sqa_fx.passes.demand import Follower
from sqa_fx.passes.find import GraphFacts
from sqa_fx.passes.following import CORE, Meets
from sqa_fx.passes.heads import HeadCount, count_heads, different_heads, unite_heads
from sqa_fx.passes.hints import shape_of
from sqa_fx.passes.labels import Labels, aligned, heads, low, mixed_dims, single, varying
from sqa_fx.passes.locate import place
from sqa_fx.passes.op_kinds import Aligned, Operand
from sqa_fx.passes.site import Core, Refused, Site, as_refused


def analyse(facts: GraphFacts, name: str, core: Core) -> Site:
    """The site around ``core``, and around every core whose output meets its own before the output projection.

    Raises Refused with the reason.
    """
    try:
        return _analyse(facts, name, core)
    except ValueError as error:
        raise as_refused(error, core.anchor) from error


def _analyse(facts: GraphFacts, name: str, core: Core) -> Site:
    cores: tuple[Core, ...] = (core,)
    count = count_heads(facts, cores)
    forced: set[tuple[str, fx.Node]] = set()
    obstacle: Refused | None = None
    while True:
        site = _new_site(name, cores, count)
        follower = Follower(facts, site, count, forced)
        try:
            try:
                if site.heads == 1:
                    raise Refused("one head only: nothing to drop", core.anchor, kind="one head")
                follower.run()
            except Refused as refused:
                # Heads that are combined, and cores that meet, may work as one head, or as one site.
                obstacle = obstacle or refused
                united = unite_heads(count, Combinations(facts, site, count, forced).pairs())
                if len(united.kv_of) in (1, site.heads):
                    obstacle.cores = cores
                    raise obstacle from refused
                count, forced = united, set()
                continue
        except Meets as met:
            known = {c.value for c in cores}
            found = (*cores, *(c for c in met.cores if c.value not in known))
            if len(found) == len(cores):
                raise Refused("cores meet that cannot be told apart", core.anchor) from met
            cores = tuple(sorted(found, key=lambda c: facts.order[c.value]))
            count, forced = count_heads(facts, cores), set()
            pairs = Combinations(facts, _new_site(name, cores, count), count, forced).pairs(raising=False)
            count = unite_heads(count, pairs)
            continue
        more = follower.parts_of_whole() - forced
        if not more:
            _number_by_projection(site)
            return site
        forced |= more


def _number_by_projection(site: Site) -> None:
    """The model's own numbers of the heads: their order along the input of the output projection."""
    use = next(use for use in site.leaves if use.role == "o")
    order = list(dict.fromkeys(low(use.labels)[single(use.labels)].tolist()))
    if len(order) == site.heads:
        site.model_heads = tuple(order.index(c) for c in range(site.heads))
        kv_order = list(dict.fromkeys(site.kv_of[c] for c in order))
        site.model_kv_heads = tuple(kv_order.index(g) for g in range(site.kv_heads))


def _new_site(name: str, cores: Sequence[Core], count: HeadCount) -> Site:
    core = cores[0]
    return Site(
        name=name,
        cores=tuple(cores),
        heads=len(count.kv_of),
        kv_heads=max(count.kv_of) + 1,
        kv_of=count.kv_of,
        model_heads=count.model_heads,
        model_kv_heads=count.model_kv_heads,
        head_dim=_head_dim(core),
        q_len=shape_of(core.q)[-2],
        kv_len=shape_of(core.k)[-2] if core.fused else shape_of(core.anchor)[-1],
        place=place(core.anchor),
    )


def _head_dim(core: Core) -> int:
    if core.fused:
        return shape_of(core.q)[-1]
    score = aligned(core.score)
    assert score is not None
    operand = next(o for o in score.operands if o.node is core.q)
    size = 1
    for i, d in enumerate(operand.dims):
        if d is not None and d < 0:
            size *= shape_of(core.q)[i]
    return size


class Combinations(Follower):
    """Only follows the outputs forward, and notes which heads meet on the way to the output projection."""

    def pairs(self, raising: bool = True) -> torch.Tensor:
        """Pairs of heads that are combined, as columns [2, n]; none when the outputs meet another obstacle.

        Raises Meets for a core that is not of the site; with ``raising`` off such cores are left out.
        """
        self.found: list[torch.Tensor] = [torch.empty(2, 0, dtype=torch.long)]
        self.raising = raising
        self.labels.clear()
        cores = self.site.cores
        try:
            self._forward(
                {c.score: heads(n) for c, n in zip(cores, self.count.score, strict=True)},
                {c.value: heads(n) for c, n in zip(cores, self.count.value, strict=True)},
            )
        except Refused:
            return self.found[0]
        return torch.cat(self.found, 1)

    def _unite(self, first: Labels, second: Labels) -> None:
        both = torch.stack(torch.broadcast_tensors(first, second)).reshape(2, -1)
        self.found.append(low(torch.unique(both[:, different_heads(both)], dim=1)))

    def _unite_along(self, labels: Labels, dims: Sequence[int]) -> Labels:
        """Unite the heads along ``dims``; returns the labels of the first entry there."""
        first = labels
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        self._unite(labels, first)
        return first

    def _aligned_forward(self, node: fx.Node, description: Aligned) -> Labels | None:
        rank = len(shape_of(node))
        result: Labels | None = None
        for operand in description.operands:
            labels = self.labels.get((CORE, operand.node))
            if labels is None:
                self._meet(operand.node)
                continue
            mixed = [i for i in varying(labels) if (d := operand.dims[i]) is None or d < 0]
            if mixed and description.contraction:
                others = [i for i in varying(labels) if i not in mixed]
                if any(o.node in self.facts.constants for o in description.operands[:2]):
                    self._unite_along(labels, others)
                    return None
                raise Refused("heads are summed or reduced together", node)
            if mixed:
                labels = self._unite_along(labels, mixed)
            moved, _ = self.facts.carrier.align_forward(operand, labels, rank)
            if result is not None:
                self._unite(result, moved)
            result = moved
        if result is None:
            raise Refused(f"heads reach {node.target}", node)
        blocks = dict(description.blocks)
        for dim in mixed_dims(description, result):
            if dim in blocks:
                parts = result.unflatten(dim, (-1, blocks[dim]))
                self._unite(parts, parts.narrow(dim + 1, 0, 1))
            else:
                self._unite_along(result, [dim])
        return result

    def _meet(self, node: fx.Node) -> None:
        if self.raising:
            super()._meet(node)

    def _core_sides(self, node: fx.Node, labels: Labels) -> None:
        pass

    def _side(self, operand: Operand, labels: Labels) -> None:
        pass

    def _follow_side(self, node: fx.Node, labels: Labels) -> None:
        pass
