"""The smaller region of one site, built on demand from the output projection back to the weights."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from sqa_fx.passes.aten_call import argument, moved_from, op_name
from sqa_fx.passes.core_emitter import CoreEmitter
from sqa_fx.passes.cut_nodes import CutNodes
from sqa_fx.passes.find import GraphFacts
from sqa_fx.passes.following import CORE
from sqa_fx.passes.hints import depends_on_data, is_tensor, shape_of, value_of
from sqa_fx.passes.labels import run_length, varying
from sqa_fx.passes.layout import DROP, Layout, NewShape
from sqa_fx.passes.op_kinds import Aligned, Move
from sqa_fx.passes.ops import step
from sqa_fx.passes.rewritten import Rewritten
from sqa_fx.passes.site import LeafUse, Refused, Site


class SmallerRegion(CoreEmitter):
    """Builds the smaller region of one site beside the old one, and puts it in its place."""

    def __init__(self, facts: GraphFacts, site: Site, layout: Layout, parameters: CutNodes) -> None:
        super().__init__(facts, site, layout, parameters)
        self.built: dict[tuple[str, fx.Node], fx.Node] = {}
        self.fused: dict[fx.Node, fx.Node] = {}
        self.repeated: dict[tuple[str, fx.Node], fx.Node] = {}
        self.projections: dict[fx.Node, fx.Node] = {}
        self.uses: dict[tuple[str, fx.Node], LeafUse] = {(u.role, u.node): u for u in site.leaves}
        self.segments = {
            (u.role, u.node): parameters.cuts[u.node].segment_of[site.name, u.role] for u in site.leaves if not u.whole
        }
        self.core_of = {n: c for c in site.cores for n in (c.score, c.value)}

    def prepare(self) -> None:
        """Build the new region; nothing of the old one changes yet. Raises Refused when it cannot be built."""
        for node in self._output_projections():
            self.projections[node] = self._copy(node, self._operand)
        if self.layout.plan.hq < self.layout.wide:
            own = {u.node for u in self.site.leaves if u.role == "q"}
            both = next((u.node for u in self.site.leaves if u.role.startswith("side:") and u.node in own), None)
            if both is not None:
                raise Refused(
                    f"fewer query heads than KV heads average {both.target}, which score terms of their own read too",
                    both,
                    kind="shared weights",
                )
        for role, node in self.site.carried_outputs:
            if len(varying(self.site.labels[role, node])) > 1:
                raise Refused("an output of the model has heads along several dimensions", node, kind="layout")
            self.build(role, node)
        for role, node in self.site.written:
            self.build(role, node)

    def _output_projections(self) -> list[fx.Node]:
        labels = self.site.labels
        return [
            n
            for n in self.site.projections
            if (CORE, n) not in labels
            and any(("o", i) in labels for i in n.all_input_nodes)
            and any((CORE, i) in labels for i in n.all_input_nodes)
        ]

    def commit(self, result: Rewritten) -> tuple[tuple[str, str], tuple[str, ...]]:
        """Put the new output projections, and outputs that carry heads, in the place of the old ones."""
        names = ("", "")
        for node, operand in self.site.narrowed:
            labels = self.site.labels[CORE, operand]
            entries = self.layout.kept_entries(labels.reshape(-1), CORE)
            result.narrowed[node.name] = (operand.name, varying(labels)[0], entries)
        if self.site.inexact:
            result.inexact[self.site.name] = "; ".join(f"{why} (node {node.name})" for node, why in self.site.inexact)
        for node, new in self.projections.items():
            node.replace_all_uses_with(new)
            names = (node.name, new.name)
        for role, node in self.site.carried_outputs:
            output = next(iter(reversed(self.graph.nodes)))
            labels = self.site.labels[role, node]
            dims = varying(labels)
            entries = self.layout.kept_entries(labels.reshape(-1), role) if dims else []
            flat = output.args[0] if isinstance(output.args[0], list | tuple) else output.args
            places = [position for position, entry in enumerate(flat) if entry is node]
            for position in places:
                if dims:
                    result.carried[position] = (dims[0], entries)
                elif self.site.inexact:
                    result.inexact_outputs.add(position)
            output.replace_input_with(node, self.built[role, node])
            if not dims:
                numbers = " and ".join(map(str, places))
                result.notes.append(f"output {numbers} of the model ({node.name}) is taken over the kept heads only")
                continue
            heads, before = self.layout.heads_of(role), self.site.heads if role == CORE else self.site.kv_heads
            if heads != before:
                what = "heads" if role == CORE else "KV heads"
                changes = result.smaller_outputs.setdefault(f"{what} of an output, {heads} instead of {before}", [])
                changes.append(node.name)
        built = (self.built.get((CORE, c.value)) for c in self.site.cores)
        return names, tuple(n.name for n in built if n is not None)

    def release_sizes(self) -> None:
        """Size queries of old tensors ask the new ones, so that the old region can go."""
        for (_, node), new in self.built.items():
            for user in list(node.users):
                if op_name(user) in ("sym_size", "sym_numel") and user is not new:
                    user.replace_input_with(node, new)

    def _role(self, node: fx.Node, preferred: str) -> str | None:
        """Under which role ``node`` is labelled for a user of role ``preferred``."""
        for role in (preferred, CORE, f"side:{node.name}"):
            if (role, node) in self.site.labels:
                return role
        return None

    def build(self, role: str, node: fx.Node) -> fx.Node:
        """The part of ``node`` that the kept heads need under ``role``."""
        key = (role, node)
        if key not in self.built:
            self.built[key] = self._build(role, node)
        return self.built[key]

    def _build(self, role: str, node: fx.Node) -> fx.Node:
        site = self.site
        if (role, node) in site.joined:
            return self.build(*site.joined[role, node])
        if (role, node) in self.uses:
            if self.uses[role, node].whole:
                return node
            return self.parameters.part(node, self.segments[role, node])
        if (role, node) in site.frontiers:
            return self._select(role, node)
        if role == CORE and node in self.core_of:
            core = self.core_of[node]
            return self._fused_core(core) if core.fused else self._contraction_core(core, node)
        description = step(node)
        if isinstance(description, Move):
            return self._move(role, node, description)
        if isinstance(description, Aligned):
            fused = self._fused_projection(role, node)
            if fused is not None:
                return fused
            maker = moved_from(node)
            new = self._copy(maker, lambda a: self._reach(role, a), self._shape(role, node))
            return new if maker is node else self._emit(node, operator.getitem, new, node.args[1])
        raise Refused(f"cannot rebuild {node.name}", node)

    def _reach(self, role: str, node: fx.Node) -> fx.Node:
        found = self._role(node, role)
        if found is None:
            return node
        new = self.build(found, node)
        if role == CORE and found != CORE and self.layout.heads_of(found) != self.layout.wide:
            if (found, node) not in self.repeated:
                self.repeated[found, node] = self._repeat(node.next, found, node, new)
            return self.repeated[found, node]
        return new

    def _operand(self, node: fx.Node) -> fx.Node:
        """An operand of an output projection: the activations under the core role, the weight under its own."""
        for role in (CORE, "o"):
            if (role, node) in self.site.labels:
                return self.build(role, node)
        return node

    def _move(self, role: str, node: fx.Node, description: Move) -> fx.Node:
        source = description.sources[0]
        found = self._role(source, role)
        before = self._shape(found, source) if found is not None else None

        def swap(value: Any) -> Any:
            if op_name(node) in ("cat", "concat", "concatenate", "stack") and isinstance(value, list | tuple):
                # Parts that no kept head needs (a fused bias, the output of a dropped head) are left out.
                value = [t for t, needed in zip(value, self._needed_parts(role, node), strict=True) if needed]
            return fx.node.map_arg(value, lambda a: self._reach(role, a) if is_tensor(a) else a)

        target, args, kwargs = self._resizer(node).move(node, swap, self._shape(role, node), before)
        if op_name(node) in ("view", "_unsafe_view") and is_tensor(node):
            # Another attention kernel may serve the smaller shapes, and lay its output out in memory differently.
            target = torch.ops.aten.reshape.default
        value = self._scaled(value_of(node), self._shape(role, node)) if self._known(node) else None
        return self._emit(node, target, *args, value=value, **kwargs)

    @staticmethod
    def _known(node: fx.Node) -> bool:
        """True for a move whose fake result is better derived than run: it would make new symbols, or (padding, in
        torch 2.11 and 2.13) fix sizes that are free."""
        return depends_on_data(node) or op_name(node) in ("pad", "constant_pad_nd")

    def _needed_parts(self, role: str, node: fx.Node) -> list[bool]:
        """Which of the tensors that ``node`` joins hold entries of kept heads."""
        labels, out = self.site.labels[role, node], shape_of(node)
        dim = int(argument(node, "dim", 0)) % len(out)
        joined = [t for t in node.args[0] if isinstance(t, fx.Node)]  # type: ignore[union-attr]
        # cat takes tensors of one dimension without elements beside any others.
        sizes = [1 if op_name(node) == "stack" else shape_of(t)[dim] if math.prod(shape_of(t)) else 0 for t in joined]
        along = labels.expand(*(out[d] if d == dim else n for d, n in enumerate(labels.shape)))
        return [
            bool((self.layout.new_heads(part, role) != DROP).any()) if part.numel() else False
            for part in along.split(sizes, dim)
        ]

    def _select(self, role: str, node: fx.Node) -> fx.Node:
        """Take the kept heads of a tensor that labels cannot cross."""
        if role in self.site.untied and self.layout.merges(role):
            raise Refused(
                f"heads can be selected here but not merged, because of {self.site.untied[role]}",
                node,
                kind="opaque op",
            )
        labels = self.site.labels[role, node]
        dim = varying(labels)[0]
        line = labels.reshape(-1)
        if node.op == "placeholder" and role in ("k", "v"):
            if self.layout.plan.hkv != self.site.kv_heads:
                raise Refused(f"{role} comes from an input that must keep its shape", node, kind="cache input")
            if self.layout.kept_entries(line, role) == list(range(line.numel())):
                return node
        following = node.next
        if isinstance(value_of(node).shape[dim], int):
            index = self.parameters.constant(torch.tensor(self.layout.kept_entries(line, role)), node)
            return self._emit(following, torch.ops.aten.index_select.default, node, dim, index)
        # Heads folded with a dimension of free size: take them out, select, and fold again.
        run = run_length(line)
        period = line[::run][: self.site.heads]
        if run > 1 and line.numel() != run * len(period):
            raise Refused("heads are interleaved with dimensions of free size", node, kind="layout")
        if not bool((line.reshape(-1, len(period), run) == period[:, None]).all()):
            raise Refused("heads are not regular along a dimension of free size", node, kind="layout")
        sizes = [-1, len(period)] if run == 1 else [len(period), -1]
        inner = dim + (run == 1)
        index = self.parameters.constant(torch.tensor(self.layout.kept_entries(period, role)), node)
        wide = self._emit(following, torch.ops.aten.unflatten.int, node, dim, sizes)
        taken = self._emit(following, torch.ops.aten.index_select.default, wide, inner, index)
        return self._emit(following, torch.ops.aten.flatten.using_ints, taken, dim, dim + 1)

    def _fused_projection(self, role: str, node: fx.Node) -> fx.Node | None:
        """One contraction for all roles of a fused projection (qkv), of which each role takes its part."""
        if op_name(node) not in ("linear", "addmm", "conv1d", "conv2d"):
            return None
        inputs = [i for i in node.all_input_nodes if i in self.parameters.cuts and (role, i) in self.uses]
        constants = [i for i in node.all_input_nodes if i in self.facts.constants]
        if not inputs or set(inputs) != set(constants):
            return None
        segments = {self.segments[role, i] for i in inputs}
        spans = {tuple(self.parameters.cuts[i].segments) for i in inputs}
        data = [i for i in node.all_input_nodes if i not in self.facts.constants]
        if len(segments) != 1 or len(spans) != 1 or any((role, d) in self.site.labels for d in data):
            return None
        span = next(iter(spans))
        if len(span) == 1:
            return None
        dim = 1 if op_name(node).startswith("conv") else len(shape_of(node)) - 1
        if node not in self.fused:
            width = self.parameters.cuts[inputs[0]].new_size
            old = shape_of(node)
            sizes = tuple(width if i == dim else n for i, n in enumerate(old))
            whole = NewShape(old, sizes, None)
            self.fused[node] = self._copy(node, lambda a: self.parameters.whole(a) if a in inputs else a, whole)
        start, length = span[next(iter(segments))]
        return self._emit(node, torch.ops.aten.slice.Tensor, self.fused[node], dim, start, start + length)
