"""The value of a node that depends on constants and sizes only, at the example sizes or at others."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sqa_fx.passes.hints import hint, value_of

# Far more nodes than any mask takes; a larger cone means that the node depends on the whole model.
_LIMIT = 400


def constant_tensor(node: fx.Node, owner: torch.nn.Module, sizes: Mapping[Any, int] | None = None) -> Tensor | None:
    """The value of ``node``; None when it depends on input data. ``sizes`` maps size symbols to other values."""
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        value = value_of(n)
        if n.op == "placeholder" and isinstance(value, Tensor):
            return None
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
            continue
        if len(seen) > _LIMIT:
            return None
        order.append(n)
        stack.extend(n.all_input_nodes)
    position = {n: i for i, n in enumerate(node.graph.nodes)}
    results: dict[fx.Node, Any] = {}

    def scalar(argument: Any) -> Any:
        if isinstance(argument, fx.Node) and argument not in results:
            return size_at(value_of(argument), sizes)
        return results.get(argument, argument) if isinstance(argument, fx.Node) else argument

    try:
        with torch.no_grad():
            for n in sorted(order, key=position.__getitem__):
                if n.op == "get_attr":
                    results[n] = operator.attrgetter(str(n.target))(owner)
                elif n.op == "call_function":
                    args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), scalar)
                    results[n] = n.target(*args, **kwargs)  # type: ignore[operator]
                else:
                    return None
    except (RuntimeError, KeyError, TypeError, ValueError, IndexError):
        return None
    value = results[node]
    return value if isinstance(value, Tensor) else None


def size_at(value: Any, sizes: Mapping[Any, int] | None) -> Any:
    """A symbolic number at the given sizes of its symbols (the example sizes without)."""
    if sizes is None or not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return hint(value)
    found = value.node.expr.subs(dict(sizes))
    if isinstance(value, torch.SymBool):
        return bool(found)
    return int(found) if isinstance(value, torch.SymInt) else float(found)


def size_hints(graph: fx.Graph) -> dict[Any, int]:
    """The free sizes of a graph's inputs that are plain symbols, with their values at the example inputs."""
    found: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(value_of(node), Tensor):
            for size in value_of(node).shape:
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    found[size.node.expr] = int(hint(size))
    return found


def size_symbols(graph: fx.Graph) -> list[Any]:
    """The free size symbols of a graph's inputs."""
    symbols: dict[Any, None] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(value_of(node), Tensor):
            for size in value_of(node).shape:
                if isinstance(size, torch.SymInt):
                    symbols.update(dict.fromkeys(sorted(size.node.expr.free_symbols, key=str)))
    return list(symbols)
