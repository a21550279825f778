"""The rules of the graph between passes, checked after each one."""

from __future__ import annotations

import torch
from torch import fx

from sqa_fx.errors import RewriteError
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.hints import value_of


def check_graph(module: fx.GraphModule, after: str) -> None:
    """Raise RewriteError when the graph breaks a rule: ATen ops or plain arithmetic only, nothing in place inside the
    graph, every tensor node with its fake value, every attribute there with the shape the graph believes it to have."""
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise RewriteError(f"after pass {after!r} the graph is malformed: {error}") from error
    for node in module.graph.nodes:
        if node.op == "call_function":
            target = node.target
            if isinstance(target, torch._ops.OpOverload):
                if target._schema.is_mutable and "copy_" not in target._schema.name and "sqa_cut" in node.meta:
                    raise RewriteError(f"after pass {after!r} node {node.name} writes in place")
                if value_of(node) is None and target._schema.returns:
                    raise RewriteError(f"after pass {after!r} node {node.name} has no value")
        elif node.op == "get_attr":
            held = attribute(module, node.target)
            value = value_of(node)
            if isinstance(held, torch.Tensor) and isinstance(value, torch.Tensor) and held.shape != value.shape:
                raise RewriteError(
                    f"after pass {after!r} parameter {node.target} has shape {tuple(held.shape)}, the graph expects "
                    f"{tuple(value.shape)}"
                )
