"""Sizes that depend on data (unbacked symbols) at the example inputs: found by running the graph once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from sqa_fx.passes.hints import data_sizes, value_of


def learn_data_sizes(module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Record what every size that depends on data is at these inputs, for :func:`sqa_fx.passes.hints.hint`.

    Graphs without such sizes are not run. A graph that fails to run leaves the sizes unknown.
    """
    if not any(_unknown(n) for n in module.graph.nodes):
        return
    inputs = pytree.tree_leaves((tuple(args), dict(kwargs)), is_leaf=lambda x: x is None)
    inputs = [v.detach().clone() if isinstance(v, Tensor) else v for v in inputs]
    state = torch.random.get_rng_state()
    try:
        with torch.no_grad():
            _Learner(module).run(*inputs, enable_io_processing=False)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return
    finally:
        torch.random.set_rng_state(state)


def _unknown(node: fx.Node) -> list[tuple[Any, int | None]]:
    """The symbolic numbers of ``node`` without a value: (number, dimension or None for the node itself)."""
    value = value_of(node)
    sizes: list[tuple[Any, int | None]] = []
    if isinstance(value, Tensor):
        sizes = [(s, d) for d, s in enumerate(value.shape)]
    elif isinstance(value, torch.SymInt):
        sizes = [(value, None)]
    return [(s, d) for s, d in sizes if isinstance(s, torch.SymInt) and s.node.hint is None]


class _Learner(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for size, dim in _unknown(n):
            expression = size.node.expr
            if expression.is_symbol:
                found = result if dim is None else result.shape[dim]
                data_sizes(size)[expression] = int(found)
        return result
