"""Nodes of a region that becomes smaller: copies of old nodes on new inputs, with sizes that follow the kept heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from sqa_fx.passes.cut_nodes import CutNodes
from sqa_fx.passes.evaluate import constant_tensor
from sqa_fx.passes.find import GraphFacts
from sqa_fx.passes.hints import hint, is_tensor, value_of
from sqa_fx.passes.layout import Layout, NewShape
from sqa_fx.passes.op_kinds import Aligned
from sqa_fx.passes.ops import step
from sqa_fx.passes.resize import Resizer
from sqa_fx.passes.site import Refused, Site

# Where a node comes from, and whether the backward pass computes it again (activation checkpointing).
_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id")


class Emitter(ABC):
    """Makes the nodes of one site's new region."""

    def __init__(self, facts: GraphFacts, site: Site, layout: Layout, parameters: CutNodes) -> None:
        self.facts, self.site, self.layout, self.parameters = facts, site, layout, parameters
        self.graph = facts.module.graph
        self.shapes: dict[tuple[str, fx.Node], NewShape] = {}

    @abstractmethod
    def _reach(self, role: str, node: fx.Node) -> fx.Node:
        """What a new node that works for ``role`` reads in the place of ``node``."""

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
