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
            raise ValueError(f"{value} depends on data, so it has no size at the example inputs")
        return found
    return value


def is_free(size: Any) -> bool:
    """True for a size that may differ from call to call (a symbol that export has not fixed to a number)."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


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
