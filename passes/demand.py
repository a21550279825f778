"""Follow the heads of a site through its region: forward to the output projection, backward to every weight.

Forward from the core, labels reach the contraction that sums over heads (o_proj). Backward from every operand of the
core, and from every operand that enters the region with a head axis of its own (relative bias, ALiBi slopes, gates),
labels reach the parameters. What a label cannot cross is either a frontier (the tensor is taken with index_select
there) or a refusal.
"""

from __future__ import annotations

import heapq
import operator

import torch
from torch import fx

from sqa_fx.passes.find import GraphFacts
from sqa_fx.passes.heads import HeadCount
from sqa_fx.passes.hints import is_tensor, shape_of
from sqa_fx.passes.labels import (
    EMPTY,
    Labels,
    aligned,
    compress,
    fill_gaps,
    heads,
    high,
    join,
    join_over,
    low,
    mixed_dims,
    pack,
    single,
    varying,
)
from sqa_fx.passes.ops import Aligned, Move, Operand, argument, op_name, step
from sqa_fx.passes.site import Core, Kind, LeafUse, Refused, Site

CORE = "core"


class Meets(Exception):
    """The output of another core meets that of the site before the output projection: both are one site."""

    def __init__(self, cores: list[Core]) -> None:
        super().__init__()
        self.cores = cores


class _OwnedByKV(Refused):
    """What query heads use turns out to belong to KV heads."""


class Follower:
    """Follows the heads of one site through its region, into the site's labels, leaves and frontiers."""

    def __init__(self, facts: GraphFacts, site: Site, count: HeadCount, forced: set[tuple[str, fx.Node]]) -> None:
        self.facts, self.site, self.count = facts, site, count
        self.labels = site.labels
        self.all_heads = pack(torch.tensor(0), torch.tensor(site.heads - 1))
        self.kv = torch.tensor(site.kv_of)
        self.forced = set(forced)
        self.statistics: set[fx.Node] = set()

    def run(self) -> None:
        """Follow the operands of every core backward, and the outputs forward. Raises Refused, or Meets when another
        core has a part in this site."""
        site = self.site
        site.kinds[CORE] = "core"
        starts = {c.score: heads(n) for c, n in zip(site.cores, self.count.score, strict=True)}
        values = {c.value: heads(n) for c, n in zip(site.cores, self.count.value, strict=True)}
        operands: dict[str, dict[fx.Node, Labels]] = {"q": {}, "k": {}, "v": {}}
        for core in site.cores:
            for node, role, labels in self._operands(core, starts[core.score], values[core.value]):
                found = operands[role]
                found[node] = join(found[node], labels) if node in found else labels
        for role, found in operands.items():
            self._backward(found, role, "core" if role == "q" else "kv")
        if not self.facts.fixed_caches:
            self._pass_on()
        self._forward(starts, values)
        self._check_caches()
        core = site.core
        made = {use.role for use in site.leaves}
        if "o" not in made:
            raise Refused("no output projection sums over the heads", core.value, kind="no output projection")
        for role in ("q", "k", "v"):
            selected = any(r == role for r, _ in site.frontiers)
            if role in site.kinds and role not in made and not selected and (site.kv_heads > 1 or role == "q"):
                raise Refused(f"no projection makes {role}", core.anchor)

    def parts_of_whole(self) -> set[tuple[str, fx.Node]]:
        """Projections whose weight is cut under one role but computed whole for another (a fused projection before
        a norm across heads): their heads are better selected from the result."""
        whole: set[fx.Node] = set()
        for _, frontier in self.site.frontiers:
            stack, seen = [frontier], {frontier}
            while stack:
                node = stack.pop()
                weights = {n for n in node.all_input_nodes if n in self.facts.constants}
                description = step(node)
                if isinstance(description, Aligned) and description.contraction and weights:
                    whole |= weights
                    continue
                if node is frontier:
                    whole |= weights
                for source in node.all_input_nodes:
                    if source not in seen and source not in weights and source.op == "call_function":
                        seen.add(source)
                        stack.append(source)
        return {
            (use.role, user)
            for use in self.site.leaves
            if use.node in whole and use.role != "o"
            for user in use.node.users
            if (use.role, user) in self.labels and (use.role, user) not in self.site.frontiers
        }

    # -- the core's operands -------------------------------------------------------------------------------------

    def _operands(self, core: Core, score: Labels, value: Labels) -> list[tuple[fx.Node, str, Labels]]:
        """q, k and v of one core with their labels."""
        if core.fused:
            return self._fused_operands(core, value)
        result = []
        for node, labels, chosen in (
            (core.score, score, [(core.q, "q"), (core.k, "k")]),
            (core.value, value, [(core.v, "v")]),
        ):
            description = aligned(node)
            assert description is not None
            for operand in description.operands:
                match = next((c for c in chosen if c[0] is operand.node), None)
                if match is not None:
                    chosen.remove(match)
                    result.append((*match, self.facts.carrier.align_backward(operand, labels)))
        return result

    def _fused_operands(self, core: Core, value: Labels) -> list[tuple[fx.Node, str, Labels]]:
        out = shape_of(core.value)
        rank = len(out)
        gqa = bool(argument(core.value, "enable_gqa", False))
        result = []
        for node, role in ((core.q, "q"), (core.k, "k"), (core.v, "v")):
            shape = shape_of(node)
            labels = value.reshape(value.shape[rank - len(shape) :])
            if gqa and shape[-3] != out[-3]:
                wide = labels.expand(*labels.shape[:-3], out[-3], *labels.shape[-2:]).unflatten(-3, (shape[-3], -1))
                labels = join_over(wide, [wide.dim() - 3]).squeeze(-3)
            labels = join_over(labels, [i for i, s in enumerate(shape) if s == 1])
            result.append((node, role, compress(labels)))
        return result

    def _core_sides(self, node: fx.Node, labels: Labels) -> None:
        """Operands of a core that are not q, k, v or what the core itself made: a mask, the bias of a baddbmm."""
        core = next(c for c in self.site.cores if node in (c.score, c.value))
        if core.fused:
            mask = argument(core.value, "attn_mask")
            if isinstance(mask, fx.Node):
                self._side(Operand(mask, _right_aligned(shape_of(mask), shape_of(core.value))), labels)
            return
        description = aligned(node)
        assert description is not None
        for operand in description.operands:
            if operand.node not in (core.q, core.k, core.v) and (CORE, operand.node) not in self.labels:
                self._side(operand, labels)

    def _side(self, operand: Operand, labels: Labels) -> None:
        """An operand that enters the region from outside: follow it if it has a head axis."""
        back = self.facts.carrier.align_backward(operand, labels)
        if self._demanded(back, "core"):
            if (CORE, operand.node) in self.labels:
                return
            self._meet(operand.node)
            if varying(back):
                self._follow_side(operand.node, back)

    def _meet(self, node: fx.Node) -> None:
        """Raise Meets when ``node`` comes from the output of a core that is not of this site."""
        others = [c for c in self.facts.cores_behind(node) if c not in self.site.cores]
        if others:
            raise Meets(others)

    def _follow_side(self, node: fx.Node, labels: Labels) -> None:
        """Follow a tensor from outside; one that KV heads own (a gate made from the values) is carried once per KV
        head and repeated where it enters."""
        role, site = f"side:{node.name}", self.site
        before = len(site.leaves), len(site.frontiers), len(site.projections)
        try:
            self._backward({node: labels}, role, "core")
        except _OwnedByKV:
            for key in [k for k in self.labels if k[0] == role]:
                del self.labels[key]
            for found, count in zip((site.leaves, site.frontiers, site.projections), before, strict=True):
                del found[count:]  # type: ignore[attr-defined]
            self._backward({node: labels}, role, "kv")

    def _demanded(self, labels: Labels, kind: Kind) -> bool:
        first, last = low(labels), high(labels)
        wanted = first == last
        if self.site.kv_heads > 1 or kind == "kv":
            wanted |= (last >= first) & (self.kv[first.clamp(max=self.site.heads - 1)] == self.kv[last.clamp(min=0)])
        return bool(wanted.any())

    # -- backward ------------------------------------------------------------------------------------------------

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
            raise _OwnedByKV(f"parameter {node.target} belongs to KV heads, but query heads use it", node)
        axis = axes[0] if axes else -1
        (self.site.ties if tie else self.site.leaves).append(LeafUse(node, role, axis, found.reshape(-1)))

    def _free(self, labels: Labels) -> torch.Tensor:
        """True where several KV heads (or, with one KV head, several query heads) share an element."""
        first, last = low(labels), high(labels)
        if self.site.kv_heads == 1:
            return first < last
        limit = self.site.heads - 1
        return (last >= first) & (self.kv[first.clamp(max=limit)] != self.kv[last.clamp(min=0)])

    def _frontier(self, node: fx.Node, found: Labels, role: str, reason: str) -> None:
        if role == "o" or (role == "q" and node.op == "placeholder"):
            raise Refused(f"no projection makes {role}: it comes from {reason}", node, kind="cache input")
        if len(varying(found)) != 1:
            raise Refused(f"{reason} has heads along several dimensions", node, kind="opaque op")
        kind = self.site.kinds[role]
        if kind == "core" and not bool((single(found) | (found == EMPTY)).all()):
            raise _OwnedByKV(f"{reason} belongs to KV heads, not query heads", node)
        self.site.frontiers.append((role, node))
        if kind == "kv" or role == "q":
            self._follow({node: found}, role, kind, tie=True)

    # -- caches ---------------------------------------------------------------------------------------------------

    def _pass_on(self) -> None:
        """Follow keys and values to where they leave the graph: outputs, and caches that they are written into."""
        site, order = self.site, self.facts.order
        for role in ("k", "v"):
            queue = sorted((n for r, n in self.labels if r == role), key=order.__getitem__)
            for node in queue:
                for user in node.users:
                    if user.op == "output":
                        if (role, node) not in site.carried_outputs and varying(self.labels[role, node]):
                            site.carried_outputs.append((role, node))
                    elif (role, user) in self.labels or self._keeps_whole(role, node):
                        continue
                    elif self._written(role, user) if op_name(user) == "copy_" else self._passed(role, user):
                        queue.append(user)

    def _keeps_whole(self, role: str, node: fx.Node) -> bool:
        """True for what is not cut itself: parameters, and tensors that one KV head makes alone."""
        return node.op == "get_attr" or not varying(self.labels[role, node])

    @staticmethod
    def _leaves(node: fx.Node) -> bool:
        """True when only outputs of the graph, or caches, are made from ``node``, and it only moves elements."""
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current.op == "output" or op_name(current) == "copy_":
                continue
            if not isinstance(step(current), Move) and not (
                isinstance(step(current), Aligned) and len([n for n in current.all_input_nodes if is_tensor(n)]) == 1
            ):
                return False
            if not current.users:
                return False
            stack.extend(u for u in current.users if u not in seen)
            seen.update(current.users)
        return True

    def _passed(self, role: str, node: fx.Node) -> bool:
        """Label a node behind keys or values that is on its way out; it may join keys with values. False for what is
        made of other things too, or for other purposes: that keeps reading them whole."""
        description = step(node)
        if not self._leaves(node):
            return False
        known = {}
        for source in node.all_input_nodes:
            own = next((r for r in (role, "k", "v") if (r, source) in self.labels), None)
            if own is not None:
                known[source] = self.labels[own, source]
        if isinstance(description, Move):
            if any(s not in known for s in description.sources):
                return False
            labels = compress(self.facts.carrier.move_forward(node, known))
        else:
            assert isinstance(description, Aligned)
            (operand,) = (o for o in description.operands if o.node in known)
            labels, crossing = self.facts.carrier.align_forward(operand, known[operand.node], len(shape_of(node)))
            if crossing:
                return False
        for source, own_labels in known.items():
            if (role, source) not in self.labels:
                self.labels[role, source] = own_labels
                self.site.joined[role, source] = ("v" if role == "k" else "k", source)
        self.labels[role, node] = labels
        return True

    def _written(self, role: str, node: fx.Node) -> bool:
        """Note a ``copy_`` of keys or values into a cache that is cut; False where it goes elsewhere."""
        target, value = node.args[:2]
        assert isinstance(target, fx.Node) and isinstance(value, fx.Node)
        if (role, target) not in self.labels or (role, value) not in self.labels:
            return False
        self.labels[role, node] = self.labels[role, value]
        self.site.written.append((role, node))
        return True

    def _check_caches(self) -> None:
        """Raise Refused when a cache that gets fewer heads is also read whole."""
        for use in self.site.leaves:
            if use.node.op == "placeholder" and use.axis >= 0:
                for user in use.node.users:
                    inside = any((r, user) in self.labels for r in ("k", "v", CORE)) or not is_tensor(user)
                    if not inside and user.op != "output":
                        raise Refused(f"input {use.node.name} is also read as a whole", user, kind="cache input")

    # -- forward -------------------------------------------------------------------------------------------------

    def _forward(self, starts: dict[fx.Node, Labels], values: dict[fx.Node, Labels]) -> None:
        """Follow the cores' outputs to the contractions that sum over heads."""
        order = self.facts.order
        queue: list[int] = []
        waiting: dict[int, fx.Node] = {}

        def push_users(node: fx.Node) -> None:
            for user in node.users:
                if order[user] not in waiting:
                    waiting[order[user]] = user
                    heapq.heappush(queue, order[user])

        for node, labels in starts.items():
            self.labels[CORE, node] = labels
            self._core_sides(node, labels)
            push_users(node)
        while queue:
            node = waiting[heapq.heappop(queue)]
            if (CORE, node) in self.labels:
                continue
            if node in values:
                self.labels[CORE, node] = values[node]
                self._core_sides(node, values[node])
                push_users(node)
                continue
            if node.op == "output":
                self.site.carried_outputs.extend(
                    (CORE, n)
                    for n in node.all_input_nodes
                    if (CORE, n) in self.labels and (CORE, n) not in self.site.carried_outputs
                )
                continue
            if not is_tensor(node):
                if isinstance(node.meta.get("val"), tuple | list) and all(
                    u.target is operator.getitem for u in node.users
                ):
                    push_users(node)
                    continue
                if not isinstance(node.meta.get("val"), tuple | list):
                    continue
                raise Refused(f"heads reach {node.target}", node, kind="opaque op")
            found = self._step_forward(node)
            if found is not None:
                self.labels[CORE, node] = found
                push_users(node)

    def _step_forward(self, node: fx.Node) -> Labels | None:
        description = step(node)
        if isinstance(description, Move):
            known = {s: self.labels[CORE, s] for s in description.sources if (CORE, s) in self.labels}
            for source in description.sources:
                if source not in known:
                    self._missing_source(node, source, known)
            moved = self.facts.carrier.move_forward(node, known)
            # Padding, and what is joined from elsewhere, goes with its neighbours: heads lie along other dimensions.
            filled = fill_gaps(moved, torch.ones((), dtype=torch.bool))
            return compress(torch.where(filled == EMPTY, self.all_heads, filled))
        if not isinstance(description, Aligned):
            raise Refused(f"heads reach {description.reason}", node, kind="opaque op")
        return self._aligned_forward(node, description)

    def _missing_source(self, node: fx.Node, source: fx.Node, known: dict[fx.Node, Labels]) -> None:
        """A tensor joined (cat) to one that carries heads: it carries the same heads unless it is joined beside
        them."""
        if op_name(node) not in ("cat", "concat", "concatenate", "stack"):
            return
        if op_name(node) == "stack":
            self._meet(source)
            return
        dim = int(argument(node, "dim", 0)) % len(shape_of(node))
        other = next(iter(known.values()))
        self._meet(source)
        if other.size(dim) > 1:
            return
        known[source] = other
        if self._demanded(other, "core") and (CORE, source) not in self.labels:
            self._follow_side(source, other)

    def _aligned_forward(self, node: fx.Node, description: Aligned) -> Labels | None:
        rank = len(shape_of(node))
        result: Labels | None = None
        inside = [o for o in description.operands if (CORE, o.node) in self.labels]
        # A statistic over all heads, where that is allowed, belongs to none of them.
        owned = [o for o in inside if o.node not in self.statistics] or inside
        for operand in owned:
            labels = self.labels[CORE, operand.node]
            moved, crossing = self.facts.carrier.align_forward(operand, labels, rank)
            if crossing and not description.contraction:
                reported = len(varying(labels)) == 1 and self._only_reported(node)
                if reported or self._allowed(node):
                    if reported:
                        self.site.narrowed.append((node, operand.node))
                    else:
                        self.site.inexact.append((node, "a reduction runs over the kept heads only"))
                    self.statistics.add(node)
                    return self.all_heads.reshape([1] * rank)
            if crossing:
                self._sums_heads(node, description, operand, labels)
                return None
            if result is not None and not bool((result == moved).all()):
                self._combine(node, result, moved)
            result = moved
        if result is None:
            raise Refused(f"heads reach {node.target}", node, kind="opaque op")
        if all(o.node in self.statistics for o in inside):
            self.statistics.add(node)
        if mixed_dims(description, result):
            if not self._allowed(node):
                raise Refused("a norm or softmax runs across heads", node, kind="norm across heads")
            self.site.inexact.append((node, "a norm runs over the kept heads only"))
        for operand in description.operands:
            if (CORE, operand.node) not in self.labels:
                self._side(operand, result)
        return result

    @staticmethod
    def _only_reported(node: fx.Node) -> bool:
        """True when only outputs of the model are made from ``node`` (attention weights, averaged over heads)."""
        stack, seen = [node], {node}
        while stack:
            for user in stack.pop().users:
                if user.op == "output" or user in seen:
                    continue
                if not isinstance(step(user), Move) and not (
                    isinstance(step(user), Aligned) and len([n for n in user.all_input_nodes if is_tensor(n)]) == 1
                ):
                    return False
                seen.add(user)
                stack.append(user)
        return True

    def _allowed(self, node: fx.Node) -> bool:
        """True when a norm or reduction over the outputs (or the weights) of all heads may run over the kept ones."""
        return self.facts.allow_inexact and not any(c.value in node.users for c in self.site.cores)

    def _combine(self, node: fx.Node, first: Labels, second: Labels) -> None:
        raise Refused("heads are combined with each other", node, kind="heads combined")

    def _sums_heads(self, node: fx.Node, description: Aligned, operand: Operand, labels: Labels) -> None:
        """``node`` contracts over the head axis: with a weight it is the output projection, otherwise a refusal."""
        after_values = all((CORE, c.value) in self.labels for c in self.site.cores)
        weights = [o for o in description.operands[:2] if o.node in self.facts.constants]
        if not description.contraction or not weights:
            raise Refused("heads are summed or reduced together", node, kind="norm across heads")
        if not after_values or self._before_values(node):
            raise Refused("heads are mixed before the values (talking heads)", node, kind="talking heads")
        weight = weights[0]
        head_letters = {operand.dims[i] for i in varying(labels)}
        if any(d is None or d >= 0 for d in head_letters):
            raise Refused("the output projection keeps heads apart and sums them at once", node, kind="layout")
        shape = [1] * len(weight.dims)
        sources = []
        for i, d in enumerate(weight.dims):
            if d in head_letters:
                source = operand.dims.index(d)
                shape[i] = labels.size(source)
                sources.append(source)
        rest = [i for i in range(labels.dim()) if i not in sources]
        if any(labels.size(i) > 1 for i in rest):
            raise Refused("the heads lie differently at different positions here", node, kind="layout")
        back = labels.permute(*sources, *rest).reshape(shape)
        self.site.projections.append(node)
        if ("o", weight.node) in self.labels:
            raise Refused("one weight projects the heads out twice", node, kind="shared weights")
        self._backward({weight.node: back.contiguous()}, "o", "core")

    def _before_values(self, node: fx.Node) -> bool:
        """True for a node whose heads come from the scores or probabilities, not from the attention output."""
        values = {c.value for c in self.site.cores}
        if node in values or all(c.fused for c in self.site.cores):
            return False

        def inside(current: fx.Node) -> list[fx.Node]:
            # The tuple of a split has no labels of its own.
            return [
                n
                for n in current.all_input_nodes
                if (CORE, n) in self.labels or isinstance(n.meta.get("val"), tuple | list)
            ]

        stack, seen = inside(node), set[fx.Node]()
        while stack:
            current = stack.pop()
            if current in values:
                return False
            if current not in seen:
                seen.add(current)
                stack.extend(inside(current))
        return True


def _right_aligned(shape: tuple[int, ...], out: tuple[int, ...]) -> tuple[int | None, ...]:
    """Dimensions of an attention mask against the core's output [..., heads, q, head_dim]: keys are no output
    dimension."""
    offset = len(out) - len(shape)
    return tuple(
        None if i + offset == len(out) - 1 or (size == 1 and out[i + offset] != 1) else i + offset
        for i, size in enumerate(shape)
    )
