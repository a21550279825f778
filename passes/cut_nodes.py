"""The cut parameters and caches as nodes of the graph, and the tensors behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from sqa_fx.passes.graph import attribute, fake_mode_of
from sqa_fx.passes.hints import shape_of, value_of
from sqa_fx.passes.parameters import Cut, cut_tensor, in_place
from sqa_fx.passes.propagate import FakeResults
from sqa_fx.passes.rewritten import Rewritten
from sqa_fx.passes.site import LeafUse, Refused
from sqa_fx.plan import ParameterPlan, from_ranges


class CutNodes:
    """New get_attr nodes for cut parameters, made once and shared by all sites."""

    def __init__(self, module: fx.GraphModule, cuts: dict[fx.Node, Cut], ties: dict[fx.Node, ParameterPlan]) -> None:
        self.module, self.cuts, self.ties = module, cuts, ties
        self._whole: dict[fx.Node, fx.Node] = {}
        self._parts: dict[tuple[fx.Node, int], fx.Node] = {}
        self._constants = 0
        self.fakes = FakeResults(fake_mode_of(module.graph))

    def whole(self, node: fx.Node) -> fx.Node:
        """The get_attr node of the whole cut parameter."""
        if node not in self._whole:
            cut = self.cuts[node]
            with self.module.graph.inserting_after(node):
                if node.op == "placeholder":
                    new = self.module.graph.placeholder(node.name)
                else:
                    new = self.module.graph.get_attr(str(node.target))
            shape = list(value_of(node).shape)
            shape[cut.axis] = cut.new_size
            held = value_of(node)
            fake = self.fakes.run(torch.empty, (shape,), {"dtype": held.dtype, "device": held.device})
            new.meta = {"val": fake}
            self._whole[node] = new
        return self._whole[node]

    def part(self, node: fx.Node, segment: int) -> fx.Node:
        """The segment of a cut parameter that one role uses."""
        cut = self.cuts[node]
        whole = self.whole(node)
        if len(cut.segments) == 1:
            return whole
        if (node, segment) not in self._parts:
            start, length = cut.segments[segment]
            with self.module.graph.inserting_after(whole):
                new = self.module.graph.call_function(
                    torch.ops.aten.slice.Tensor, (whole, cut.axis, start, start + length)
                )
            new.meta = {"val": self.fakes.run(torch.narrow, (value_of(whole), cut.axis, start, length), {})}
            self._parts[node, segment] = new
        return self._parts[node, segment]

    def constant(self, tensor: torch.Tensor, beside: fx.Node) -> fx.Node:
        """A new constant of the module, on the device of ``beside``."""
        tensor = tensor.to(value_of(beside).device)
        while hasattr(self.module, f"_sqa_constant_{self._constants}"):
            self._constants += 1
        name = f"_sqa_constant_{self._constants}"
        self.module.register_buffer(name, tensor)
        first = next(iter(self.module.graph.nodes))
        with self.module.graph.inserting_before(first):
            node = self.module.graph.get_attr(name)
        node.meta = {"val": fake_mode_of(self.module.graph).from_tensor(tensor)}
        return node

    def finish(self, result: Rewritten) -> None:
        """Cut the parameters; one that something else still reads whole stays whole and is cut in the graph."""
        plans = {node: cut.plan() for node, cut in self.cuts.items()}
        alive = set(self.module.graph.nodes)
        holders = Holders(self.module)
        for node, plan in self.ties.items():
            if node in plans:
                raise Refused(
                    f"parameter {node.target} would be cut for one role and kept whole for another",
                    node,
                    kind="shared weights",
                )
            holders.replace(attribute(self.module, node.target), plan)
            result.notes.append(f"parameter {node.target} keeps its size; its merged KV heads are averaged in place")
        for node, new in self._whole.items():
            plan = plans[node]
            if node.op == "placeholder":
                self._replace_input(node, new)
                continue
            if node not in alive:
                holders.replace(attribute(self.module, node.target), plan)
                continue
            order = [0] * plan.size[1]
            for block in plan.blocks:
                for to, source in zip(from_ranges(block.to), from_ranges(block.sources[0]), strict=True):
                    order[to] = source
            index = self.constant(torch.tensor(order), node)
            with self.module.graph.inserting_before(new):
                taken = self.module.graph.call_function(torch.ops.aten.index_select.default, (node, plan.axis, index))
            taken.meta = dict(new.meta)
            new.replace_all_uses_with(taken)
            self.module.graph.erase_node(new)
            plans[node] = in_place(plan)
            if any(len(b.replaces) > 1 for b in plan.blocks):
                holders.replace(attribute(self.module, node.target), plans[node])
            result.notes.append(f"parameter {node.target} is also read whole; its heads are selected in the graph")
        result.parameters = (*(p for n, p in plans.items() if n.op != "placeholder"), *self.ties.values())
        result.inputs = tuple(p for n, p in plans.items() if n.op == "placeholder")
        smaller: dict[tuple[int, int], list[str]] = {}
        for p in result.inputs:
            smaller.setdefault(p.size, []).append(p.name)
        for (before, after), names in smaller.items():
            if before != after:
                text = f"KV caches among the inputs hold {after} heads instead of {before}: {', '.join(names)}"
                result.notes.append(text)

    def _replace_input(self, node: fx.Node, new: fx.Node) -> None:
        """Let the smaller input ``new`` take the place and the name of ``node``."""
        readers = [user.name for user in node.users]
        if readers:
            by = ", ".join(readers)
            raise Refused(f"input {node.name} is also read as a whole by {by}", node, kind="cache input")
        self.module.graph.erase_node(node)
        new.name, new.target = node.name, node.target
        new.meta = {**node.meta, **new.meta}

    def drop_whole(self, uses: Sequence[LeafUse], result: Rewritten) -> None:
        """Remove parameters of heads that are gone and had them for themselves."""
        alive = {str(n.target) for n in self.module.graph.nodes if n.op == "get_attr"}
        gone: list[ParameterPlan] = []
        for use in (u for u in uses if u.node.op == "get_attr"):
            name, count = str(use.node.target), shape_of(use.node)[0] if shape_of(use.node) else 0
            if name not in alive and not any(p.name == name for p in gone):
                gone.append(ParameterPlan(name, 0, (count, 0), (), (), (f"0:{count}",)))
                owner, _, attribute_name = name.rpartition(".")
                delattr(self.module.get_submodule(owner), attribute_name)
        result.parameters = (*result.parameters, *gone)


class Holders:
    """Every table entry of a module tree by the tensor it holds, so that a cut parameter is replaced under all its
    names."""

    def __init__(self, module: nn.Module) -> None:
        self._places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for owner in module.modules():
            for table in (owner._parameters, owner._buffers, vars(owner)):
                for name, held in table.items():
                    if isinstance(held, torch.Tensor):
                        self._places.setdefault(id(held), []).append((table, name))

    def replace(self, old: torch.Tensor, plan: ParameterPlan) -> None:
        """Put the cut tensor wherever ``old`` was; ties stay tied."""
        self.put(old, cut_tensor(old.detach(), plan))

    def put(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Put ``new`` wherever ``old`` was, as a parameter if that was one."""
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for table, name in self._places[id(old)]:
            table[name] = new


def cut_unread(module: nn.Module, plans: Sequence[ParameterPlan]) -> tuple[ParameterPlan, ...]:
    """Cut parameters of ``module`` that its graph does not read (a decoding step reads no projection of the encoder's
    keys), so that every graph of a model holds the same ones; those that were there."""
    holders, done = Holders(module), []
    for plan in plans:
        try:
            held = attribute(module, plan.name)
        except AttributeError:
            continue
        if isinstance(held, torch.Tensor) and plan.blocks and held.shape[plan.axis] == plan.size[0]:
            holders.replace(held, plan)
            done.append(plan)
    return tuple(done)
