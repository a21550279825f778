"""Follow keys and values to where they leave the graph: its outputs, and the caches that they are written into."""

from __future__ import annotations

from torch import fx

from sqa_fx.passes.aten_call import op_name
from sqa_fx.passes.following import CORE, Following, only_leaves, only_moves
from sqa_fx.passes.hints import is_tensor, shape_of
from sqa_fx.passes.labels import compress, varying
from sqa_fx.passes.op_kinds import Aligned, Move
from sqa_fx.passes.ops import step
from sqa_fx.passes.site import Refused


class Caches(Following):
    """Labels keys and values on their way out."""

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

    def _passed(self, role: str, node: fx.Node) -> bool:
        """Label a node behind keys or values that is on its way out; it may join keys with values. False for what is
        made of other things too, or for other purposes: that keeps reading them whole."""
        description = step(node)
        if not (only_moves(node) and node.users and only_leaves(node, caches=True)):
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
