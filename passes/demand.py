"""Follow the heads of a site through its region: forward to the output projection, backward to every weight.

Forward from the core, labels reach the contraction that sums over heads (o_proj). Backward from every operand of the
core, and from every operand that enters the region with a head axis of its own (relative bias, ALiBi slopes, gates),
labels reach the parameters. What a label cannot cross is either a frontier (the tensor is taken with index_select
there) or a refusal.
"""

from __future__ import annotations

from torch import fx

from sqa_fx.passes.aten_call import argument
from sqa_fx.passes.follow_caches import Caches
from sqa_fx.passes.follow_forward import Forward
from sqa_fx.passes.following import CORE
from sqa_fx.passes.hints import shape_of
from sqa_fx.passes.labels import Labels, aligned, compress, heads, join, join_over
from sqa_fx.passes.op_kinds import Aligned
from sqa_fx.passes.ops import step
from sqa_fx.passes.site import Core, Refused


class Follower(Forward, Caches):
    """Follows the heads of one site through its region, into the site's labels, leaves and frontiers."""

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
