"""What is known while the heads of a site are followed: the labels so far, and who owns what."""

from __future__ import annotations

import torch
from torch import fx

from sqa_fx.passes.aten_call import op_name
from sqa_fx.passes.find import GraphFacts
from sqa_fx.passes.heads import HeadCount
from sqa_fx.passes.hints import is_tensor
from sqa_fx.passes.labels import Labels, high, low, pack
from sqa_fx.passes.op_kinds import Aligned, Move
from sqa_fx.passes.ops import step
from sqa_fx.passes.site import Core, Kind, Refused, Site

CORE = "core"


class Meets(Exception):
    """The output of another core meets that of the site before the output projection: both are one site."""

    def __init__(self, cores: list[Core]) -> None:
        super().__init__()
        self.cores = cores


class OwnedByKV(Refused):
    """What query heads use turns out to belong to KV heads."""


class Following:
    """The heads of one site and where they were met: in the site's labels, leaves and frontiers."""

    def __init__(self, facts: GraphFacts, site: Site, count: HeadCount, forced: set[tuple[str, fx.Node]]) -> None:
        self.facts, self.site, self.count = facts, site, count
        self.labels = site.labels
        self.all_heads = pack(torch.tensor(0), torch.tensor(site.heads - 1))
        self.kv = torch.tensor(site.kv_of)
        self.forced = set(forced)
        self.statistics: set[fx.Node] = set()

    def _demanded(self, labels: Labels, kind: Kind) -> bool:
        first, last = low(labels), high(labels)
        wanted = first == last
        if self.site.kv_heads > 1 or kind == "kv":
            wanted |= (last >= first) & (self.kv[first.clamp(max=self.site.heads - 1)] == self.kv[last.clamp(min=0)])
        return bool(wanted.any())

    def _free(self, labels: Labels) -> torch.Tensor:
        """True where several KV heads (or, with one KV head, several query heads) share an element."""
        first, last = low(labels), high(labels)
        if self.site.kv_heads == 1:
            return first < last
        limit = self.site.heads - 1
        return (last >= first) & (self.kv[first.clamp(max=limit)] != self.kv[last.clamp(min=0)])


def only_leaves(node: fx.Node, caches: bool = False) -> bool:
    """True when only outputs of the graph (with ``caches`` also writes into caches) are made from ``node``, and all on
    the way only moves elements."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user.op == "output" or (caches and op_name(user) == "copy_") or user in seen:
                continue
            if not only_moves(user) or not user.users:
                return False
            seen.add(user)
            stack.append(user)
    return True


def only_moves(node: fx.Node) -> bool:
    """True for a node that moves elements of one tensor, or computes each from one of them."""
    description = step(node)
    if isinstance(description, Aligned):
        return len([n for n in node.all_input_nodes if is_tensor(n)]) == 1
    return isinstance(description, Move)
