"""ATen calls in a graph: the name of the op and its arguments, however they were passed."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx


def op_name(node: fx.Node) -> str:
    """The bare name of the node's op (``view`` for ``aten.view.default``), or '' when it is not an op call."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", "")


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument ``name`` of an ATen call, wherever it was passed, or its schema default."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    for index, spec in enumerate(target._schema.arguments):
        if spec.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            if index < len(node.args):
                return node.args[index]
            return spec.default_value if spec.has_default_value() else default
    return default


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set the argument ``name`` of an ATen call."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    for index, spec in enumerate(target._schema.arguments):
        if spec.name == name and index < len(node.args) and not spec.kwarg_only:
            node.update_arg(index, value)
            return
    node.update_kwarg(name, value)


def moved_from(node: fx.Node) -> fx.Node:
    """The op that really moves: for an element of a tuple (split, unbind) the op that made the tuple."""
    if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return node
