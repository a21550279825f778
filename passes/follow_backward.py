"""Follow heads backward, from the operands of a core and from what enters the region beside it, to the parameters."""

from __future__ import annotations

import heapq

import torch
from torch import fx

from sqa_fx.passes.following import CORE, Following, OwnedByKV
from sqa_fx.passes.hints import is_tensor, shape_of
from sqa_fx.passes.labels import (
    EMPTY,
    Labels,
    compress,
    fill_gaps,
    join,
    mixed_dims,
    pack,
    single,
    varying,
)
from sqa_fx.passes.op_kinds import Aligned, Move
from sqa_fx.passes.ops import step
from sqa_fx.passes.site import Kind, LeafUse, Refused


class Backward(Following):
    """Moves labels from results to what they are computed from."""

    def _backward(self, starts: dict[fx.Node, Labels], role: str, kind: Kind) -> None:
        """Follow the labels of ``starts`` to the parameters that make them."""
        if not any(self._demanded(labels, kind) for labels in starts.values()):
            return
        site = self.site
        site.kinds[role] = kind
        before = len(site.leaves), len(site.frontiers), len(site.projections), len(site.ties)
        self._follow(starts, role, kind)
        while self.forced.isdisjoint(joins := self._statistic_joins(role)) and joins:
            self.forced |= joins
            for key in [k for k in self.labels if k[0] == role]:
                del self.labels[key]
            for found, count in zip((site.leaves, site.frontiers, site.projections, site.ties), before, strict=True):
                del found[count:]  # type: ignore[attr-defined]
            self._follow(starts, role, kind)
        if site.kv_heads == 1 and kind == "kv":
            self._prune(role)
        self._settle(role)

    def _follow(self, starts: dict[fx.Node, Labels], role: str, kind: Kind, tie: bool = False) -> None:
        """Move labels backward from ``starts``. With ``tie`` the nodes stay whole: only the parameters are wanted
        whose entries make each head."""
        order = self.facts.order
        pending: dict[fx.Node, Labels] = {}
        queue: list[int] = []
        by_order: dict[int, fx.Node] = {}

        def push(node: fx.Node, found: Labels) -> None:
            if node in pending:
                pending[node] = join(pending[node], found)
                return
            pending[node] = found
            by_order[order[node]] = node
            heapq.heappush(queue, -order[node])

        for start, labels in starts.items():
            push(start, labels)
        while queue:
            node = by_order[-heapq.heappop(queue)]
            found = pending[node]
            if not self._demanded(found, kind):
                continue
            if not tie:
                self.labels[role, node] = found
            if node.op == "get_attr" or (kind == "kv" and self._is_cache(node, role, tie)):
                self._leaf(node, found, role, tie)
                continue
            description = step(node)
            locked = isinstance(description, Aligned) and bool(mixed_dims(description, found))
            if not tie and (locked or (role, node) in self.forced):
                self._frontier(node, found, role, "a norm across heads")
            elif isinstance(description, Move):
                for source, back in self.facts.carrier.move_backward(node, found).items():
                    push(source, back)
            elif isinstance(description, Aligned):
                self._aligned_backward(node, description, found, role, push)
            elif tie:
                self.site.untied[role] = description.reason
            elif varying(found) or kind == "core" or self.site.kv_heads > 1:
                self._frontier(node, found, role, description.reason)

    def _statistic_joins(self, role: str) -> set[tuple[str, fx.Node]]:
        """Labelled nodes that also read a statistic over all heads of the same tensor (the norm of a query that is not
        yet split into heads): the tensor is needed whole there, so that its heads are selected after this node."""
        order = self.facts.order
        inside = {n for r, n in self.labels if r == role and n.op != "get_attr"}
        if self.site.kv_heads == 1 and self.site.kinds[role] == "kv":
            return set()
        first = min((order[n] for n in inside), default=0)
        depends: dict[fx.Node, bool] = {}

        def reads(node: fx.Node) -> bool:
            """True when the unlabelled ``node`` is computed from a labelled one."""
            stack = [node]
            while stack:
                current = stack[-1]
                if current in depends or current in inside or order[current] < first:
                    stack.pop()
                    continue
                sources = [n for n in current.all_input_nodes if is_tensor(n) and (CORE, n) not in self.labels]
                unknown = [n for n in sources if n not in inside and n not in depends and order[n] >= first]
                if unknown:
                    stack.extend(unknown)
                    continue
                depends[current] = any(n in inside or depends.get(n, False) for n in sources)
                stack.pop()
            return depends.get(node, False)

        joins = set()
        for node in inside:
            if isinstance(step(node), Aligned) and (role, node) not in self.site.frontiers:
                others = [
                    n for n in node.all_input_nodes if is_tensor(n) and n not in inside and (CORE, n) not in self.labels
                ]
                if any(reads(n) for n in others if n not in self.facts.constants):
                    joins.add((role, node))
        return joins

    def _settle(self, role: str) -> None:
        """Give every element that exists under ``role`` a label, whether or not a head asked for it.

        What exists is found forward, from the labelled entries of the parameters: a fused projection holds only this
        role's channels, but all positions.
        """
        present = pack(torch.tensor(0), torch.tensor(0))
        nodes = sorted((n for r, n in self.labels if r == role), key=self.facts.order.__getitem__)
        known: dict[fx.Node, Labels] = {}
        carrier = self.facts.carrier
        for node in nodes:
            labels = self.labels[role, node]
            description = step(node)
            rank = len(shape_of(node))
            own = torch.where(labels != EMPTY, present, torch.full_like(labels, EMPTY))
            if isinstance(description, Move) and any(s in known for s in description.sources):
                sources = dict(known)
                if any(s not in known for s in description.sources):
                    back = carrier.move_backward(node, labels)
                    for source in description.sources:
                        if source not in known:
                            value = present if bool((back[source] != EMPTY).any()) else torch.tensor(EMPTY)
                            sources[source] = value.reshape([1] * len(shape_of(source)))
                known[node] = carrier.move_forward(
                    node, {s: sources[s] for s in description.sources}, missing=int(present)
                )
            elif isinstance(description, Aligned) and any(o.node in known for o in description.operands):
                result = present.reshape([1] * rank)
                for operand in description.operands:
                    if operand.node in known:
                        moved, _ = carrier.align_forward(operand, known[operand.node], rank)
                        result = torch.where(moved == EMPTY, moved, result)
                known[node] = compress(result)
            else:
                known[node] = own
            there = known[node] != EMPTY
            filled = fill_gaps(labels, there)
            if isinstance(description, Move) and bool(((filled == EMPTY) & there).any()):
                # A part of which only some heads are asked for (one head taken out by number) holds the others too.
                sources = {s: self.labels[role, s] for s in description.sources if (role, s) in self.labels}
                if sources:
                    moved = carrier.move_forward(node, sources)
                    filled = compress(torch.where(filled == EMPTY, moved, filled))
            self.labels[role, node] = filled

    def _prune(self, role: str) -> None:
        """With one KV head every element is labelled alike: keep only what comes from a parameter cut elsewhere, and
        what repeats the KV head."""
        reached = {use.node for use in self.site.leaves if use.role == role}
        reached |= {n for (r, n), labels in self.labels.items() if r == role and bool(single(labels).any())}
        stack = list(reached)
        while stack:
            for user in stack.pop().users:
                passes = (role, user) in self.labels or isinstance(user.meta.get("val"), tuple | list)
                if passes and user not in reached:
                    reached.add(user)
                    stack.append(user)
        for key in [k for k in self.labels if k[0] == role and k[1] not in reached]:
            del self.labels[key]

    def _aligned_backward(self, node: fx.Node, description: Aligned, found: Labels, role: str, push: object) -> None:
        assert callable(push)
        constants = self.facts.constants
        weighted = description.contraction and any(o.node in constants for o in description.operands[:2])
        if weighted:
            self.site.projections.append(node)
        for operand in description.operands:
            back = self.facts.carrier.align_backward(operand, found)
            if weighted and operand.node not in constants and not varying(back):
                continue
            if not self._demanded(back, self.site.kinds[role]):
                continue
            if (CORE, operand.node) in self.labels:
                raise Refused("an operand depends on the attention output itself", node, kind="head mixing")
            push(operand.node, back)

    def _is_cache(self, node: fx.Node, role: str, tie: bool) -> bool:
        """True for an input that holds keys or values and gets fewer heads."""
        if node.op != "placeholder" or role not in ("k", "v") or self.facts.fixed_caches:
            return False
        if tie:
            raise Refused("a norm across heads reads keys or values from a cache", node, kind="cache input")
        return True

    def _leaf(self, node: fx.Node, found: Labels, role: str, tie: bool) -> None:
        if role.startswith("side:") or node.op == "placeholder":
            # A table that is cut or looked up in part belongs to its heads as a whole, and so does a cache.
            found = fill_gaps(found, torch.ones((), dtype=torch.bool))
            if not tie:
                self.labels[role, node] = found
        axes = varying(found)
        if len(axes) > 1:
            raise Refused(f"the heads of parameter {node.target} lie along several axes at once", node, kind="layout")
        fused = any(use.node is node for use in self.site.leaves)
        if self.site.kv_heads == 1 and self.site.kinds[role] == "kv" and not (axes and fused):
            return  # the one KV head is never dropped: its weights matter only where others that are cut are beside it
        if self.site.kinds[role] == "core" and not bool((single(found) | (found == EMPTY) | self._free(found)).all()):
            raise OwnedByKV(f"parameter {node.target} belongs to KV heads, but query heads use it", node)
        axis = axes[0] if axes else -1
        (self.site.ties if tie else self.site.leaves).append(LeafUse(node, role, axis, found.reshape(-1)))

    def _frontier(self, node: fx.Node, found: Labels, role: str, reason: str) -> None:
        if role == "o" or (role == "q" and node.op == "placeholder"):
            raise Refused(f"no projection makes {role}: it comes from {reason}", node, kind="cache input")
        if len(varying(found)) != 1:
            raise Refused(f"{reason} has heads along several dimensions", node, kind="opaque op")
        kind = self.site.kinds[role]
        if kind == "core" and not bool((single(found) | (found == EMPTY)).all()):
            raise OwnedByKV(f"{reason} belongs to KV heads, not query heads", node)
        self.site.frontiers.append((role, node))
        if kind == "kv" or role == "q":
            self._follow({node: found}, role, kind, tie=True)
