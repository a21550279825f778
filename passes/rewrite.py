"""Rewrite: build the smaller region of every site beside the old one, then let the old one go.

The new region is made on demand, from the output projection back to the weights: each node is asked for the part of its
value that the kept heads need. Whatever carries no heads is used as it is, so everything outside the region stays
untouched. KV tensors hold every new KV head once up to the core, where attention itself (enable_gqa), broadcasting,
or an explicit repeat serves it to its query heads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sqa_fx.errors import PlanError
from sqa_fx.passes.cut_nodes import CutNodes
from sqa_fx.passes.evaluate import constant_tensor
from sqa_fx.passes.find import GraphFacts
from sqa_fx.passes.following import CORE
from sqa_fx.passes.graph import drop_dead_code
from sqa_fx.passes.hints import depends_on_data, hint, is_tensor, shape_of, value_of
from sqa_fx.passes.labels import low, single, varying
from sqa_fx.passes.layout import DROP, Layout, NewShape
from sqa_fx.passes.ops import Aligned, Move, argument, moved_from, op_name, set_argument, step
from sqa_fx.passes.parameters import Cut, Tie
from sqa_fx.passes.resize import Resizer
from sqa_fx.passes.rewritten import Rewritten
from sqa_fx.passes.site import Core, LeafUse, Refusal, Refused, Site
from sqa_fx.plan import ParameterPlan, SitePlan

# Where a node comes from, and whether the backward pass computes it again (activation checkpointing).
_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id")


def plan_parameters(sites: list[Site], plans: Mapping[str, SitePlan]) -> tuple[dict[fx.Node, Cut], list[Refusal]]:
    """The cuts that ``plans`` make, by get_attr node, and sites that share a parameter although they use it in
    different ways. Raises PlanError when sites that share a parameter were given different heads."""
    cuts: dict[fx.Node, Cut] = {}
    refused: dict[str, Refusal] = {}
    by_name = {site.name: site for site in sites}
    for site in sites:
        plan = plans.get(site.name)
        if plan is None or plan.identity:
            continue
        layout = Layout(site, plan)
        for use in site.leaves:
            if use.whole:
                layout.check_whole(use)
                continue
            cut = cuts.setdefault(use.node, Cut(use.node, use.axis, shape_of(use.node)[use.axis]))
            try:
                cut.add(layout, use)
            except PlanError as error:
                others = [name for name in cut.sites if name != site.name]
                if any(replace(plans[name], name="") != replace(plan, name="") for name in others):
                    raise
                for name in (*others, site.name):
                    reason = Refused(str(error), use.node, kind="shared weights")
                    refused[name] = reason.refusal(name, by_name[name].core.anchor, by_name[name].place)
    return cuts, list(refused.values())


def plan_ties(sites: list[Site], plans: Mapping[str, SitePlan]) -> dict[fx.Node, ParameterPlan]:
    """The parameters that keep their size, with the entries of merged KV heads averaged in place."""
    ties: dict[fx.Node, Tie] = {}
    for site in sites:
        plan = plans.get(site.name)
        if plan is None or plan.identity:
            continue
        layout = Layout(site, plan)
        for use in site.ties:
            if use.whole:
                layout.check_whole(use)
                continue
            tie = ties.setdefault(use.node, Tie(use.node, use.axis, shape_of(use.node)[use.axis]))
            tie.add(layout, use)
    return {node: tie.plan() for node, tie in ties.items() if tie.blocks}


def rewrite(facts: GraphFacts, sites: list[Site], plans: Mapping[str, SitePlan]) -> Rewritten:
    """Rewrite every site that has a plan other than identity, in place on ``facts.module``.

    Every new region is built before any old one is replaced. A site whose region cannot be built is refused, and the
    others are built again without it, since sites may share parameters.
    """
    module = facts.module
    result = Rewritten()
    wanted = {name: plan for name, plan in plans.items() if not plan.identity}
    while True:
        cuts, refused = plan_parameters(sites, wanted)
        if refused:
            result.refused.extend(refused)
            for refusal in refused:
                del wanted[refusal.name]
            continue
        parameters = CutNodes(module, cuts, plan_ties(sites, wanted))
        builders = []
        for site in sites:
            if site.name in wanted:
                builder = _Builder(facts, site, Layout(site, wanted[site.name]), parameters)
                try:
                    builder.prepare()
                except Refused as reason:
                    refused.append(reason.refusal(site.name, site.core.anchor, site.place, site.heads))
                builders.append(builder)
        refused.extend(_outputs_shared_outside(builders, {r.name for r in refused}))
        if not refused:
            break
        result.refused.extend(refused)
        for refusal in refused:
            del wanted[refusal.name]
        drop_dead_code(module.graph)
    for builder in builders:
        result.outputs[builder.site.name], result.cores[builder.site.name] = builder.commit(result)
    result.notes.extend(f"{what}: {', '.join(names)}" for what, names in result.smaller_outputs.items())
    for builder in builders:
        builder.release_sizes()
    drop_dead_code(module.graph)
    for node in (n for b in builders for _, n in b.site.written):
        module.graph.erase_node(node)
    drop_dead_code(module.graph)
    parameters.finish(result)
    parameters.drop_whole([u for b in builders for u in b.site.leaves if u.whole], result)
    for node in module.graph.nodes:
        node.meta.pop("sqa_step", None)
        node.meta.pop("sqa_key", None)
    module.graph.lint()
    module.recompile()
    return result


def _outputs_shared_outside(builders: Sequence[_Builder], gone: Collection[str]) -> list[Refusal]:
    """Refusals of sites whose output projection also projects something that is not converted: silencing the dropped
    heads there would change it."""
    alive = [b for b in builders if b.site.name not in gone]
    inside = {n for b in alive for n in (*(n for r, n in b.site.labels if r == "o"), *b.projections)}
    found = []
    for builder in alive:
        for use in builder.site.leaves:
            outside = next((u for u in use.node.users if u not in inside), None) if use.role == "o" else None
            if outside is not None:
                reason = Refused(
                    f"parameter {use.node.target} also serves what is not converted, so they stay together",
                    outside,
                    kind="shared weights",
                )
                found.append(reason.refusal(builder.site.name, builder.site.core.anchor, builder.site.place))
                break
    return found


class _Builder:
    """Builds the smaller region of one site."""

    def __init__(self, facts: GraphFacts, site: Site, layout: Layout, parameters: CutNodes) -> None:
        self.facts, self.site, self.layout, self.parameters = facts, site, layout, parameters
        self.graph = facts.module.graph
        self.built: dict[tuple[str, fx.Node], fx.Node] = {}
        self.shapes: dict[tuple[str, fx.Node], NewShape] = {}
        self.fused: dict[fx.Node, fx.Node] = {}
        self.repeated: dict[tuple[str, fx.Node], fx.Node] = {}
        self.projections: dict[fx.Node, fx.Node] = {}
        self.uses: dict[tuple[str, fx.Node], LeafUse] = {(u.role, u.node): u for u in site.leaves}
        self.segments = {
            (u.role, u.node): parameters.cuts[u.node].segment_of[site.name, u.role] for u in site.leaves if not u.whole
        }
        self.core_of = {n: c for c in site.cores for n in (c.score, c.value)}

    # -- the public steps ----------------------------------------------------------------------------------------

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

    # -- construction --------------------------------------------------------------------------------------------

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

    def _shape(self, role: str, node: fx.Node) -> NewShape:
        if (role, node) not in self.shapes:
            self.shapes[role, node] = self.layout.new_shape(node, role)
        return self.shapes[role, node]

    def _emit(self, before: fx.Node, target: Any, *args: Any, value: Any = None, **kwargs: Any) -> fx.Node:
        """A new node before ``before``, with its fake value (found by running the op on fake inputs unless given)."""
        if self._does_nothing(target, args):
            return args[0]  # type: ignore[no-any-return]
        with self.graph.inserting_before(before):
            new = self.graph.call_function(target, args, kwargs)
        new.meta = {k: v for k, v in before.meta.items() if k in _KEPT_META}
        if value is not None:
            new.meta["val"] = value
            return new
        values = fx.node.map_arg((args, kwargs), value_of)
        try:
            new.meta["val"] = self.parameters.fakes.run(target, *values)
        except Exception as error:
            self.graph.erase_node(new)
            raise Refused(
                f"{target} does not take the smaller shapes: {str(error).splitlines()[0]}", before, kind="opaque op"
            ) from error
        return new

    @staticmethod
    def _does_nothing(target: Any, args: tuple[Any, ...]) -> bool:
        """True for a slice of everything, and for a repeat that has become a repeat of one."""
        aten = torch.ops.aten
        if target is aten.slice.Tensor and len(args) == 4:
            return bool(args[2] == 0 and args[3] == value_of(args[0]).shape[args[1]])
        if target is aten.expand.default:
            sizes = value_of(args[0]).shape
            wanted = [value_of(s) if isinstance(s, fx.Node) else s for s in args[1]]
            return len(sizes) == len(wanted) and all(
                (type(w) is int and w == -1) or (type(w) is type(s) and w == s)
                for s, w in zip(sizes, wanted, strict=True)
            )
        return target is aten.repeat_interleave.self_int and args[1] == 1

    def _copy(self, node: fx.Node, swap: Any, shape: NewShape | None = None) -> fx.Node:
        """``node`` again on new inputs, with sizes and groups that follow ``shape`` (None: its shape stays)."""
        swapped = {a: swap(a) for a in node.all_input_nodes if is_tensor(a)}
        new_args, new_kwargs = fx.node.map_arg((list(node.args), dict(node.kwargs)), lambda a: swapped.get(a, a))
        new_args, new_kwargs = list(new_args), dict(new_kwargs)
        if shape is not None and isinstance(node.target, torch._ops.OpOverload):
            resizer = self._resizer(node)
            for i, spec in enumerate(node.target._schema.arguments):
                given = new_kwargs.get(spec.name, new_args[i] if i < len(new_args) else None)
                if spec.name == "size" and isinstance(given, list | tuple):
                    changed: Any = resizer.sizes(given, shape)
                elif spec.name == "normalized_shape" and isinstance(given, list | tuple):
                    changed = resizer.sizes(given, shape, len(shape.old) - len(given))
                elif spec.name == "groups" and given not in (None, 1):
                    changed = shape.new[1]
                elif spec.name == "num_groups":
                    changed = resizer.scaled(given, shape.old[1], shape.new[1])
                else:
                    continue
                if spec.name in new_kwargs or i >= len(new_args):
                    new_kwargs[spec.name] = changed
                else:
                    new_args[i] = changed
        value = None
        if is_tensor(node):
            value = value_of(node) if shape is None else self._scaled(value_of(node), shape)
            self._check_operands(node, swapped, value)
        return self._emit(node, node.target, *new_args, value=value, **new_kwargs)

    def _scaled(self, old: torch.Tensor, shape: NewShape) -> Any:
        """The fake value of a tensor like ``old`` with fewer heads."""
        sizes = [s if a == b else s * b // a for s, a, b in zip(old.shape, shape.old, shape.new, strict=True)]
        order = sorted(range(old.dim()), key=lambda d: -hint(old.stride(d)))
        return self.parameters.fakes.run(
            torch.empty_permuted, (sizes, order), {"dtype": old.dtype, "device": old.device}
        )

    @staticmethod
    def _check_operands(node: fx.Node, swapped: Mapping[fx.Node, fx.Node], value: Any) -> None:
        """Raise Refused when the new operands of an aligned op do not fit each other or the new result."""
        description = step(node)
        if not isinstance(description, Aligned):
            return
        out = [int(hint(s)) for s in value.shape]
        inner: dict[int, int] = {}
        for operand in description.operands:
            new = value_of(swapped.get(operand.node, operand.node))
            for size, dim in zip((int(hint(s)) for s in new.shape), operand.dims, strict=True):
                if dim is not None and (
                    (dim >= 0 and size not in (1, out[dim]))
                    or (dim < 0 and description.contraction and inner.setdefault(dim, size) != size)
                ):
                    raise Refused(f"{node.target} does not take the smaller shapes", node, kind="opaque op")

    def _resizer(self, node: fx.Node) -> Resizer:
        return Resizer(
            emit=lambda target, *args, **kwargs: self._emit(node, target, *args, **kwargs),
            constant=lambda tensor: self.parameters.constant(tensor, node),
            index_value=lambda index: constant_tensor(index, self.facts.module),
        )

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
        run = _run_length(line)
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

    # -- the core ------------------------------------------------------------------------------------------------

    def _core_operand(self, role: str, node: fx.Node) -> fx.Node:
        """``node`` itself, or where heads have cores of their own and this one was merged into another, the operand
        of the head that it was merged into."""
        labels = self.site.labels.get((role, node))
        if labels is None or varying(labels) or bool((self.layout.new_heads(labels, role) != DROP).any()):
            return node
        wanted = self.layout.representative(int(low(labels).reshape(-1)[0]), role)
        for core in self.site.cores:
            other = {"q": core.q, "k": core.k, "v": core.v}[role]
            found = self.site.labels.get((role, other))
            if found is not None and not varying(found) and int(low(found).reshape(-1)[0]) == wanted:
                return other
        raise Refused("merged heads have no core of their own", node, kind="layout")

    def _fused_core(self, core: Core) -> fx.Node:
        node = core.value
        rank = len(shape_of(node))
        own = {r: self._core_operand(r, n) for r, n in (("q", core.q), ("k", core.k), ("v", core.v))}
        q, k, v = (self._reach(r, n) for r, n in own.items())
        sizes = [value_of(t).shape[-3] if value_of(t).dim() >= 4 else None for t in (q, k, v)]
        per_head = self._labelled_dim("q", core.q) == rank - 3 and rank == 4
        gqa = False
        if self.layout.plan.hq < self.layout.plan.hkv:
            q = self._repeat(node, "q", core.q, q)
        elif per_head and sizes[1] == sizes[2]:
            gqa = sizes[0] != sizes[1]
        else:
            k = self._expand_grid(node, "k", core.k, k, q) or self._repeat(node, "k", core.k, k)
            v = self._expand_grid(node, "v", core.v, v, q) or self._repeat(node, "v", core.v, v)
        new = self._copy_core(node, (q, k, v))
        if gqa or argument(node, "enable_gqa", False):
            set_argument(new, "enable_gqa", gqa)
        return new

    def _copy_core(self, node: fx.Node, operands: tuple[fx.Node, fx.Node, fx.Node]) -> fx.Node:
        """The SDPA node on new (q, k, v); its fake value is that of the old one with the new head count.

        Operands go by position: one tensor may serve as key and value, and each takes its own part.
        """
        args = [*operands, *node.args[3:]]
        mask = argument(node, "attn_mask")
        with self.graph.inserting_before(node):
            assert isinstance(node.target, torch._ops.OpOverload)
            new = self.graph.call_function(node.target, tuple(args), dict(node.kwargs))
        if isinstance(mask, fx.Node):
            set_argument(new, "attn_mask", self._reach(CORE, mask))
        new.meta = {k: v for k, v in node.meta.items() if not k.startswith("sqa_")}
        new.meta["val"] = self._scaled(value_of(node), self._shape(CORE, node))
        return new

    def _contraction_core(self, core: Core, node: fx.Node) -> fx.Node:
        plan = self.layout.plan
        if node is core.score:
            pairs = [("q", core.q), ("k", core.k)]
        else:
            assert core.probabilities is not None
            pairs = [(CORE, core.probabilities), ("v", core.v)]
        new = []
        for role, operand in pairs:
            part = self._reach(role, operand if role == CORE else self._core_operand(role, operand))
            wide = self.layout.heads_of(role) if role in self.site.kinds else self.layout.wide
            if role != CORE and wide != self.layout.wide and plan.hq != plan.hkv:
                part = self._repeat(node, role, operand, part)
            new.append(part)
        mapping = {operand: part for (_, operand), part in zip(pairs, new, strict=True)}
        if pairs[0][1] is pairs[1][1]:
            raise Refused("one tensor is both query and key", node)
        return self._copy(node, lambda a: mapping[a] if a in mapping else self._reach(CORE, a), self._shape(CORE, node))

    def _labelled_dim(self, role: str, node: fx.Node) -> int | None:
        labels = self.site.labels.get((role, node))
        dims = varying(labels) if labels is not None else []
        return dims[0] if len(dims) == 1 else None

    def _repeat(self, before: fx.Node, role: str, old: fx.Node, new: fx.Node) -> fx.Node:
        """Repeat the heads of a core operand for the heads that read them, unless broadcasting does it."""
        labels = self.site.labels.get((role, old))
        if labels is None or not bool(single(labels).any()):
            return new
        dims = varying(labels)
        if not dims:
            return new
        if role == "q" and len(dims) == 2 and dims[1] == dims[0] + 1 and self.layout.plan.hq < self.layout.wide:
            return self._repeat_grid(before, dims[0], new)
        if len(dims) != 1:
            if self.site.core.fused:
                raise Refused("heads lie along two dimensions of the attention", old, kind="layout")
            return new
        dim, times = dims[0], self.layout.wide // self.layout.heads_of(role)
        run = _run_length(labels.reshape(-1))
        rank, source = len(value_of(new).shape), new
        emit = self._emit
        if run > 1:
            heads = self.layout.heads_of(role)
            if labels.numel() != run * self.site.heads:
                raise Refused("heads are interleaved with other dimensions on both sides", old, kind="layout")
            sizes = [heads, -1]
            new = emit(before, torch.ops.aten.unflatten.int, new, dim, sizes)
        new = emit(before, torch.ops.aten.unsqueeze.default, new, dim + 1)
        wide = [-1] * (rank + 1 + int(run > 1))
        wide[dim + 1] = times
        new = emit(before, torch.ops.aten.expand.default, new, wide)
        repeated = emit(before, torch.ops.aten.flatten.using_ints, new, dim, dim + 1 + int(run > 1))
        if run == 1:
            repeated.meta["sqa_repeat"] = (source, dim)
        return repeated

    def _expand_grid(self, before: fx.Node, role: str, old: fx.Node, new: fx.Node, queries: fx.Node) -> fx.Node | None:
        """KV heads that were expanded to the grid of the query heads, expanded to the smaller one; None elsewhere."""
        labels = self.site.labels.get((role, old))
        dims = varying(labels) if labels is not None else []
        if len(dims) != 2:
            return None
        wanted = [int(value_of(queries).shape[d]) for d in dims]
        sizes = [-1] * len(value_of(new).shape)
        for dim, size in zip(dims, wanted, strict=True):
            if value_of(new).shape[dim] not in (1, size):
                return None
            sizes[dim] = size
        return self._emit(before, torch.ops.aten.expand.default, new, sizes)

    def _repeat_grid(self, before: fx.Node, dim: int, new: fx.Node) -> fx.Node:
        """Queries in a grid [KV heads, query heads of each] at ``dim``, repeated until every KV head has one."""
        new = self._emit(before, torch.ops.aten.flatten.using_ints, new, dim, dim + 1)
        sizes = [-1] * (len(value_of(new).shape) + 1)
        sizes[dim + 1] = self.layout.wide // self.layout.plan.hq
        new = self._emit(before, torch.ops.aten.unsqueeze.default, new, dim + 1)
        new = self._emit(before, torch.ops.aten.expand.default, new, sizes)
        new = self._emit(before, torch.ops.aten.flatten.using_ints, new, dim, dim + 1)
        return self._emit(before, torch.ops.aten.unsqueeze.default, new, dim + 1)


def _run_length(labels: torch.Tensor) -> int:
    """How many equal labels stand in a row at the start."""
    different = torch.nonzero(labels != labels[0]).reshape(-1)
    return int(different[0]) if different.numel() else labels.numel()
