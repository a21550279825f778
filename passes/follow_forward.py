"""Follow heads forward, from the output of a core to the contraction that sums over them: the output projection."""

from __future__ import annotations

import heapq
import operator

import torch
from torch import fx

from sqa_fx.passes.aten_call import argument, op_name
from sqa_fx.passes.follow_backward import Backward
from sqa_fx.passes.following import CORE, Meets, OwnedByKV, only_leaves
from sqa_fx.passes.hints import is_tensor, shape_of
from sqa_fx.passes.labels import EMPTY, Labels, aligned, compress, fill_gaps, mixed_dims, varying
from sqa_fx.passes.op_kinds import Aligned, Move, Operand
from sqa_fx.passes.ops import step
from sqa_fx.passes.site import Refused


class Forward(Backward):
    """Moves labels from tensors to what is computed from them, and follows back what meets them on the way."""

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
                reported = len(varying(labels)) == 1 and only_leaves(node)
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
        except OwnedByKV:
            for key in [k for k in self.labels if k[0] == role]:
                del self.labels[key]
            for found, count in zip((site.leaves, site.frontiers, site.projections), before, strict=True):
                del found[count:]  # type: ignore[attr-defined]
            self._backward({node: labels}, role, "kv")


def _right_aligned(shape: tuple[int, ...], out: tuple[int, ...]) -> tuple[int | None, ...]:
    """Dimensions of an attention mask against the core's output [..., heads, q, head_dim]: keys are no output
    dimension."""
    offset = len(out) - len(shape)
    return tuple(
        None if i + offset == len(out) - 1 or (size == 1 and out[i + offset] != 1) else i + offset
        for i, size in enumerate(shape)
    )
