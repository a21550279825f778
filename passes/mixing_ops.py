"""Ops that mix entries along some of their dimensions: softmax, norms, reductions and pooling."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from sqa_fx.passes.aten_call import argument, moved_from, op_name
from sqa_fx.passes.broadcast import broadcast_dims, pointwise, tensor_inputs
from sqa_fx.passes.hints import concrete, is_tensor, shape_of
from sqa_fx.passes.op_kinds import Aligned, Opaque, Operand, Step


def softmax(node: fx.Node) -> Step:
    """An op that mixes all entries along one dimension."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(shape_of(node))
    dim = int(concrete(argument(node, "dim"))) % rank
    return Aligned((Operand(source, tuple(range(rank))),), frozenset({dim}))


def reduction(node: fx.Node) -> Step:
    """An op that reduces some dimensions, or all."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return Opaque(f"op {node.target}")
    rank = len(shape_of(source))
    dims = concrete(argument(node, "dim"))
    if len(tensor_inputs(node)) > 1:
        return pointwise(node)
    if dims is None or dims == []:
        dims = list(range(rank))
    reduced = {int(d) % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}
    keep = bool(argument(node, "keepdim", False))
    mapped: list[int | None] = []
    position = 0
    for i in range(rank):
        if i in reduced:
            mapped.append(-1 - i)
            position += int(keep)
        else:
            mapped.append(position)
            position += 1
    return Aligned((Operand(source, tuple(mapped)),))


def _norm(node: fx.Node) -> Step:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(shape_of(source))
    width = len(concrete(argument(node, "normalized_shape")))
    tail = tuple(range(rank - width, rank))
    operands = [Operand(source, tuple(range(rank)))]
    operands += [Operand(n, tail) for n in (argument(node, "weight"), argument(node, "bias")) if isinstance(n, fx.Node)]
    return Aligned(tuple(operands), frozenset(tail))


def _weight_norm(node: fx.Node) -> Step:
    direction, length = node.args[:2]
    assert isinstance(direction, fx.Node) and isinstance(length, fx.Node)
    out = shape_of(node)
    dim = int(concrete(argument(node, "dim", 0))) % len(out)
    return Aligned(
        (Operand(direction, tuple(range(len(out)))), Operand(length, broadcast_dims(length, out))),
        frozenset(d for d in range(len(out)) if d != dim),
    )


def _group_norm(node: fx.Node) -> Step:
    """Normalises [batch, channels, *positions] within groups of channels, over all positions."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = shape_of(source)
    groups = int(concrete(argument(node, "num_groups")))
    operands = [Operand(source, tuple(range(len(shape))))]
    operands += [Operand(n, (1,)) for n in (argument(node, "weight"), argument(node, "bias")) if isinstance(n, fx.Node)]
    return Aligned(tuple(operands), frozenset(range(2, len(shape))), blocks=((1, shape[1] // groups),))


def batch_norm(node: fx.Node) -> Step:
    """Normalises each channel of [batch, channels, *positions] by statistics that are given."""
    if argument(node, "training", False):
        return Opaque("batch norm in training mode")
    source, *channel = node.args[:5]
    assert isinstance(source, fx.Node)
    operands = [Operand(source, tuple(range(len(shape_of(source)))))]
    operands += [Operand(n, (1,)) for n in channel if isinstance(n, fx.Node)]
    return Aligned(tuple(operands))


def pool(node: fx.Node) -> Step:
    """Pooling and resampling mix the spatial dimensions of [batch, channels, *spatial] or [channels, *spatial]."""
    maker = moved_from(node)
    source = maker.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(node):
        return Opaque(f"op {maker.target}")
    rank, spatial = len(shape_of(source)), SPATIAL[op_name(maker)]
    if spatial == 0:
        spatial = rank - 2
    lead = rank - spatial
    return Aligned((Operand(source, tuple(i if i < lead else -10 - i for i in range(rank))),))


SPATIAL = {
    f"{kind}_pool{n}d{suffix}": n
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "_adaptive_avg", "lp")
    for n in (1, 2, 3)
    for suffix in ("", "_with_indices")
} | dict.fromkeys(
    """
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa
    """.split(),
    0,  # all but batch and channels
)

NORMS: dict[str, Callable[[fx.Node], Step]] = {
    "layer_norm": _norm,
    "rms_norm": _norm,
    "_fused_rms_norm": _norm,
    "batch_norm": batch_norm,
    "_weight_norm": _weight_norm,
    "group_norm": _group_norm,
}
