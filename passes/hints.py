"""Concrete sizes for symbolic ones: every analysis runs at the sizes of the example inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def hint(value: Any) -> Any:
    """A plain int, float or bool for a symbolic one (its value at the example inputs); anything else unchanged."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        found = value.node.hint
        if found is None:
            env = value.node.shape_env
            # Renamed between torch 2.11 and 2.13.
            backed = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
            found = value.node.expr.subs({**backed, **data_sizes(value)})
            if found.free_symbols:
                raise ValueError(f"{value} depends on data, so it has no size at the example inputs")
            kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
            return kind(found)
        return found
    return value


def data_sizes(value: torch.SymInt | torch.SymFloat | torch.SymBool) -> dict[Any, int]:
    """Known values of the sizes that depend on data in the graph of ``value``, by symbol; may be added to."""
    env = value.node.shape_env
    if not hasattr(env, "sqa_data_sizes"):
        env.sqa_data_sizes = {}
    known: dict[Any, int] = env.sqa_data_sizes
    return known


def is_free(size: Any) -> bool:
    """True for a size that may differ from call to call (a symbol that export has not fixed to a number)."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def depends_on_data(node: fx.Node) -> bool:
    """True for a tensor with a size that depends on data: running its op on fake inputs would make new symbols."""
    value = value_of(node)
    sizes: list[Any] = list(value.shape) if isinstance(value, torch.Tensor) else []
    return any(isinstance(s, torch.SymInt) and s.node.hint is None for s in sizes)


def value_of(node: fx.Node) -> Any:
    """The fake value of ``node`` (a FakeTensor, a number, or a tuple of them), or None."""
    return node.meta.get("val")


def is_tensor(node: Any) -> bool:
    """True for a node whose value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(value_of(node), torch.Tensor)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a tensor node at the example inputs."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"node {node.name} is not a tensor")
    return tuple(int(hint(size)) for size in value.shape)


def concrete(argument: Any) -> Any:
    """``argument`` with every scalar node replaced by its value at the example inputs; tensor nodes stay."""

    def swap(node: fx.Node) -> Any:
        value = value_of(node)
        return node if isinstance(value, torch.Tensor | tuple | list) or value is None else hint(value)

    return fx.node.map_arg(argument, swap)
