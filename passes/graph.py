"""Small questions about an fx graph that several passes ask."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sqa_fx.passes.hints import value_of


def attribute(owner: torch.nn.Module, target: Any) -> Any:
    """The parameter, buffer or constant that a get_attr node names."""
    return operator.attrgetter(str(target))(owner)


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on parameters, buffers and constants only."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function"
            and node.all_input_nodes
            and isinstance(value_of(node), torch.Tensor | tuple | list)
            and all(n in found for n in node.all_input_nodes)
            and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
        ):
            found.add(node)
    return found


def module_path(node: fx.Node) -> str:
    """The path of the module whose code made ``node``, '' when unknown or the root."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return "" if path.startswith("_empty_nn_module") else path.removeprefix("L['self'].")


def fake_mode_of(graph: fx.Graph) -> Any:
    """The fake mode under which the graph was traced."""
    for node in graph.nodes:
        value = value_of(node)
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    raise ValueError("the graph holds no traced tensors")


def drop_dead_code(graph: fx.Graph) -> None:
    """Remove what nothing uses. Random ops (dropout, attention) may go too: an unused draw is no effect of the
    model."""

    def kept(node: fx.Node) -> bool:
        if node.op in ("placeholder", "output"):
            return True
        schema = getattr(node.target, "_schema", None)
        return node.op == "call_function" and (
            bool(schema and schema.is_mutable) or (node.is_impure() and not _random(node))
        )

    graph.eliminate_dead_code(is_impure_node=kept)


def _random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
