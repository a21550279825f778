"""The rules of the graph between passes, checked after each one."""

from __future__ import annotations

import torch
from torch import fx

from sqa_fx.errors import RewriteError
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.hints import value_of


def check_graph(module: fx.GraphModule, after: str) -> None:
    """Raise RewriteError when the graph breaks a rule: it is well formed, every op has its fake value, and every
    attribute has the shape that the graph believes it to have."""
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise RewriteError(f"after pass {after!r} the graph is malformed: {error}") from error
    for node in module.graph.nodes:
        if node.op == "call_function":
            target = node.target
            returns = isinstance(target, torch._ops.OpOverload) and bool(target._schema.returns)
            if returns and value_of(node) is None:
                raise RewriteError(f"after pass {after!r} node {node.name} has no value")
        elif node.op == "get_attr":
            held = attribute(module, node.target)
            value = value_of(node)
            if isinstance(held, torch.Tensor) and isinstance(value, torch.Tensor) and held.shape != value.shape:
                raise RewriteError(
                    f"after pass {after!r} parameter {node.target} has shape {tuple(held.shape)}, the graph expects "
                    f"{tuple(value.shape)}"
                )
