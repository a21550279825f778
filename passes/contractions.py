"""Ops that contract data with weights, or two activations: linear, matmul, einsum, convolutions and the like."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from sqa_fx.passes.aten_call import argument, op_name
from sqa_fx.passes.broadcast import broadcast_dims
from sqa_fx.passes.hints import concrete, shape_of
from sqa_fx.passes.op_kinds import Aligned, Opaque, Operand, Step


def _embedding(node: fx.Node) -> Step:
    weight, index = node.args[:2]
    assert isinstance(weight, fx.Node) and isinstance(index, fx.Node)
    rank = len(shape_of(node))
    return Aligned((Operand(weight, (-1, rank - 1)), Operand(index, tuple(range(rank - 1)))))


def _linear(node: fx.Node) -> Step:
    data, weight = node.args[0], node.args[1]
    bias = argument(node, "bias")
    assert isinstance(data, fx.Node) and isinstance(weight, fx.Node)
    lead = len(shape_of(data)) - 1
    if len(shape_of(weight)) != 2:
        return Opaque("linear with a vector weight")
    operands = [Operand(data, (*range(lead), -1)), Operand(weight, (lead, -1))]
    if isinstance(bias, fx.Node):
        operands.append(Operand(bias, (lead,)))
    return Aligned(tuple(operands), contraction=True)


def _matmul(node: fx.Node) -> Step:
    left, right = node.args[0], node.args[1]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    a, b, out = shape_of(left), shape_of(right), shape_of(node)
    if len(a) < 2 or len(b) < 2:
        return Opaque("matmul with a vector")
    lead = len(out) - 2

    def batch(shape: tuple[int, ...]) -> tuple[int | None, ...]:
        offset = lead - (len(shape) - 2)
        return tuple(None if size == 1 and out[offset + i] != 1 else offset + i for i, size in enumerate(shape[:-2]))

    return Aligned((Operand(left, (*batch(a), lead, -1)), Operand(right, (*batch(b), -1, lead + 1))), contraction=True)


def _cdist(node: fx.Node) -> Step:
    left, right = node.args[0], node.args[1]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    out = shape_of(node)
    lead = len(out) - 2

    def batch(source: fx.Node) -> tuple[int | None, ...]:
        shape = shape_of(source)
        return broadcast_dims(source, [*out[:lead], *shape[-2:]])[:-2]

    return Aligned(
        (Operand(left, (*batch(left), lead, -1)), Operand(right, (*batch(right), lead + 1, -1))), contraction=True
    )


def _addmm(node: fx.Node) -> Step:
    add, left, right = node.args[:3]
    assert isinstance(add, fx.Node) and isinstance(left, fx.Node) and isinstance(right, fx.Node)
    out = shape_of(node)
    lead = len(out) - 2
    lead_dims = tuple(range(lead))
    return Aligned(
        (
            Operand(left, (*lead_dims, lead, -1)),
            Operand(right, (*lead_dims, -1, lead + 1)),
            Operand(add, broadcast_dims(add, out)),
        ),
        contraction=True,
    )


def _einsum(node: fx.Node) -> Step:
    equation = str(node.args[0]).replace(" ", "")
    tensors = node.args[1]
    assert isinstance(tensors, list | tuple)
    nodes = [t for t in tensors if isinstance(t, fx.Node)]
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "->" not in equation or len(terms) != len(nodes):
        return Opaque(f"einsum {equation}")
    if "." in equation:
        spare = list(map(chr, range(0x100, 0x180)))
        ranks = [len(shape_of(n)) - len(t.replace("...", "")) for n, t in zip(nodes, terms, strict=True)]
        widest = max((r for r, t in zip(ranks, terms, strict=True) if "..." in t), default=0)
        terms = [
            t.replace("...", "".join(spare[widest - r : widest]) if "..." in t else "")
            for r, t in zip(ranks, terms, strict=True)
        ]
        right = right.replace("...", "".join(spare[:widest]))
    if any(len(set(t)) != len(t) for t in terms):
        return Opaque(f"einsum {equation} with a repeated index")
    inner = {c: -1 - i for i, c in enumerate(sorted({c for t in terms for c in t} - set(right)))}
    out = shape_of(node)
    operands = []
    for n, term in zip(nodes, terms, strict=True):
        dims: list[int | None] = []
        for size, letter in zip(shape_of(n), term, strict=True):
            at = right.find(letter)
            dims.append(inner[letter] if at < 0 else None if size == 1 and out[at] != 1 else at)
        operands.append(Operand(n, tuple(dims)))
    return Aligned(tuple(operands), contraction=len(nodes) > 1)


def _convolution(node: fx.Node) -> Step:
    data, weight = node.args[0], node.args[1]
    bias = argument(node, "bias")
    assert isinstance(data, fx.Node) and isinstance(weight, fx.Node)
    rank = len(shape_of(data))
    if rank != len(shape_of(weight)):
        return Opaque(f"op {node.target}")
    transposed = "transpose" in op_name(node) or bool(argument(node, "transposed", False))
    groups = int(concrete(argument(node, "groups", 1)))
    channels = shape_of(data)[1]
    # Spatial dimensions are mixed by the kernel, and no head may live there: a reduced number of their own on both
    # sides.
    spatial = tuple(-10 - i for i in range(rank - 2))
    kernel = tuple(-20 - i for i in range(rank - 2))
    if groups == 1:
        ends = (-1, 1) if transposed else (1, -1)
        operands = [Operand(data, (0, -1, *spatial)), Operand(weight, (*ends, *kernel))]
    elif groups == channels == shape_of(node)[1]:
        operands = [Operand(data, (0, 1, *spatial)), Operand(weight, (1, None, *kernel))]
    else:
        return Opaque("a convolution with channel groups", channels=1)
    if isinstance(bias, fx.Node):
        operands.append(Operand(bias, (1,)))
    return Aligned(tuple(operands), contraction=True)


CONTRACTIONS: dict[str, Callable[[fx.Node], Step]] = {
    "linear": _linear,
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "cdist": _cdist,
    "_cdist_forward": _cdist,
    "einsum": _einsum,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose1d": _convolution,
    "conv_transpose2d": _convolution,
    "conv_transpose3d": _convolution,
    "convolution": _convolution,
    "embedding": _embedding,
}
