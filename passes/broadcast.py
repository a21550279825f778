"""Dimensions of operands that broadcast, and of elementwise ops."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from sqa_fx.passes.hints import is_tensor, shape_of
from sqa_fx.passes.op_kinds import Aligned, Opaque, Operand, Step


def broadcast_dims(operand: fx.Node, out_shape: Sequence[int]) -> tuple[int | None, ...]:
    """Which output dimension each dimension of ``operand`` is; None where it is broadcast."""
    shape = shape_of(operand)
    offset = len(out_shape) - len(shape)
    return tuple(None if size == 1 and out_shape[offset + i] != 1 else offset + i for i, size in enumerate(shape))


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs of ``node`` that are tensors."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def pointwise(node: fx.Node) -> Step:
    """An op that computes each element from those at the same position of its operands."""
    out_shape = shape_of(node)
    operands = []
    for source in tensor_inputs(node):
        if len(shape_of(source)) > len(out_shape):
            return Opaque(f"op {node.target} with an operand larger than its result")
        operands.append(Operand(source, broadcast_dims(source, out_shape)))
    return Aligned(tuple(operands))
