"""What an ATen op does to its dimensions: it moves elements, aligns operand dimensions with output dimensions, or is
opaque.

Two descriptions cover everything inside an attention region. A *move* only re-arranges elements, so it is understood by
running it on element indices. An *aligned* op computes each output element from operand elements at matching positions:
elementwise ops, norms, reductions and contractions all are aligned, and differ only in how operand dimensions map to
output dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sqa_fx.passes.hints import concrete, is_tensor, shape_of, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Operand:
    """One tensor operand of an aligned op.

    ``dims[i]`` tells what operand dimension ``i`` is: an output dimension (>= 0), a contracted or reduced one
    (negative; equal numbers are contracted with each other), or None for a broadcast dimension of size 1.
    """

    node: fx.Node
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class Aligned:
    """An op whose output positions are operand positions; ``locked`` output dimensions are mixed (softmax, norms).
    ``joins``: operand elements that share an output position become one number there (complex from two reals)."""

    operands: tuple[Operand, ...]
    locked: frozenset[int] = frozenset()
    contraction: bool = False
    joins: bool = False
    blocks: tuple[tuple[int, int], ...] = ()
    """Output dimensions that are mixed within blocks of so many entries (the channel groups of a group norm)."""


@dataclass(frozen=True)
class Move:
    """An op that only moves elements of ``sources``."""

    sources: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Opaque:
    """An op that head labels cannot cross. ``channels`` is the output dimension along which its weights make channels
    (a projection that cannot be cut), if it has one."""

    reason: str
    channels: int | None = None


Step = Aligned | Move | Opaque


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVE_ONE = _names("""
    view _unsafe_view reshape permute transpose t unsqueeze squeeze expand repeat select slice narrow clone contiguous
    flatten unflatten movedim flip roll alias detach unfold constant_pad_nd pad tile diagonal lift_fresh_copy lift_fresh
    swapaxes swapdims moveaxis mT numpy_T index_select index view_as expand_as reshape_as repeat_interleave
    select_copy squeeze_copy view_copy as_strided_copy channel_shuffle pixel_shuffle pixel_unshuffle im2col rot90
    broadcast_to adjoint unsafe_split split split_with_sizes chunk unbind tensor_split
""")
_MOVE_MANY = _names("cat stack concat concatenate")
_SCATTER = _names("slice_scatter select_scatter")
# Aligned one to one, but without torch's pointwise tag.
_POINTWISE = _names("""
    _to_copy to dropout alpha_dropout feature_dropout where masked_fill lerp conj resolve_conj resolve_neg _conj
    fake_quantize_per_tensor_affine float nan_to_num _conj_physical zeros_like ones_like full_like empty_like
    bernoulli copy floor_divide remainder fmod div addcmul addcdiv hardswish hardsigmoid relu6 hardtanh silu
    gelu relu elu leaky_relu softplus mish clamp log_sigmoid threshold celu selu __and__ __or__ __xor__ logical_not
    logical_and logical_or zero fill bitwise_not bitwise_and bitwise_or
""")
_REDUCE = _names("mean sum amax amin argmax argmin var std linalg_vector_norm logsumexp prod norm any all")
_SOFTMAX = _names("softmax _softmax log_softmax _log_softmax _safe_softmax cumsum")
_CREATE = _names("zeros ones empty full new_zeros new_ones new_empty new_full")
IDENTITY_MOVES = _names("clone contiguous detach alias lift_fresh_copy lift_fresh")


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


def step(node: fx.Node) -> Step:
    """Describe ``node``; the result is cached on the node until the graph is edited."""
    known = node.meta.get("sqa_step")
    if known is None:
        known = _step(node)
        node.meta["sqa_step"] = known
    return known


def _step(node: fx.Node) -> Step:
    if node.op != "call_function":
        return Opaque(f"{node.op} {node.name}")
    maker = moved_from(node)
    name = op_name(maker)
    if maker is not node and name in ("max", "min") and node.args[1] == 0:
        return _reduction(maker)
    if maker is not node and name in _SELECTIONS:
        return _selection(maker, node)
    if maker is not node and name in _SPATIAL and node.args[1] == 0:
        return _pool(node)
    if maker is not node and name in _BATCH_NORMS and node.args[1] == 0:
        return _batch_norm(maker)
    if maker is not node and not (name in _MOVE_ONE and isinstance(value_of(maker), tuple | list)):
        return Opaque(f"one of several results of {name or maker.name}")
    if not is_tensor(node):
        return Opaque(f"{name} does not make a tensor")
    if name in _MOVE_ONE:
        if name == "repeat_interleave" and not is_tensor(maker.args[0]):
            return Opaque(name)
        if not isinstance(maker.args[0], fx.Node):
            return Opaque(name)
        return Move((maker.args[0],))
    if name in _MOVE_MANY:
        tensors = maker.args[0]
        assert isinstance(tensors, list | tuple)
        return Move(tuple(t for t in tensors if isinstance(t, fx.Node)))
    if name in _SCATTER and isinstance(maker.args[0], fx.Node) and isinstance(maker.args[1], fx.Node):
        return Move((maker.args[0], maker.args[1]))
    if name in _SPATIAL:
        return _pool(node)
    special = _ALIGNED.get(name)
    if special is not None:
        return special(node)
    if name in _CREATE:
        return Aligned(())
    if name in _SOFTMAX:
        return _softmax(node)
    if name in _REDUCE:
        return _reduction(node)
    target = node.target
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    if pointwise or name in _POINTWISE:
        return _pointwise(node)
    return Opaque(f"op {target}")


def _broadcast_dims(operand: fx.Node, out_shape: Sequence[int]) -> tuple[int | None, ...]:
    shape = shape_of(operand)
    offset = len(out_shape) - len(shape)
    return tuple(None if size == 1 and out_shape[offset + i] != 1 else offset + i for i, size in enumerate(shape))


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]


def _pointwise(node: fx.Node) -> Step:
    out_shape = shape_of(node)
    operands = []
    for source in _tensor_inputs(node):
        if len(shape_of(source)) > len(out_shape):
            return Opaque(f"op {node.target} with an operand larger than its result")
        operands.append(Operand(source, _broadcast_dims(source, out_shape)))
    return Aligned(tuple(operands))


def _softmax(node: fx.Node) -> Step:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(shape_of(node))
    dim = int(concrete(argument(node, "dim"))) % rank
    return Aligned((Operand(source, tuple(range(rank))),), frozenset({dim}))


def _reduction(node: fx.Node) -> Step:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return Opaque(f"op {node.target}")
    rank = len(shape_of(source))
    dims = concrete(argument(node, "dim"))
    if len(_tensor_inputs(node)) > 1:
        return _pointwise(node)
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


def _selection(maker: fx.Node, node: fx.Node) -> Step:
    """Values or indices that topk, sort and the like pick along one dimension: positions there mean nothing after."""
    source = maker.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(node):
        return Opaque(f"op {maker.target}")
    rank = len(shape_of(source))
    dim = int(concrete(argument(maker, "dim", -1))) % rank
    return Aligned((Operand(source, tuple(-1 - i if i == dim else i for i in range(rank))),))


def _single_selection(node: fx.Node) -> Step:
    return _selection(node, node)


def _gather(node: fx.Node) -> Step:
    source, index = node.args[0], node.args[2]
    assert isinstance(source, fx.Node) and isinstance(index, fx.Node)
    dim = int(concrete(node.args[1])) % len(shape_of(source))
    out = shape_of(node)
    if any(s != o for i, (s, o) in enumerate(zip(shape_of(source), out, strict=True)) if i != dim):
        return Opaque("gather from a part of its source")
    dims = tuple(range(len(out)))
    return Aligned((Operand(source, tuple(-1 - i if i == dim else i for i in dims)), Operand(index, dims)))


def _scatter(node: fx.Node) -> Step:
    source, index = node.args[0], node.args[2]
    assert isinstance(source, fx.Node) and isinstance(index, fx.Node)
    dim = int(concrete(node.args[1])) % len(shape_of(source))
    out = shape_of(node)
    if any(s != o for i, (s, o) in enumerate(zip(shape_of(index), out, strict=True)) if i != dim):
        return Opaque("scatter into a part of its target")
    dims = tuple(range(len(out)))
    inner = tuple(-1 - i if i == dim else i for i in dims)
    operands = [Operand(source, dims), Operand(index, inner)]
    if len(node.args) > 3 and isinstance(node.args[3], fx.Node) and is_tensor(node.args[3]):
        operands.append(Operand(node.args[3], inner if shape_of(node.args[3]) else ()))
    return Aligned(tuple(operands), frozenset({dim}))


def _index_copy(node: fx.Node) -> Step:
    """Slices of the first tensor along one dimension overwritten by those of another, at given positions."""
    source, index, new = node.args[0], node.args[2], node.args[3]
    assert isinstance(source, fx.Node) and isinstance(index, fx.Node) and isinstance(new, fx.Node)
    rank = len(shape_of(source))
    dim = int(concrete(node.args[1])) % max(1, rank)
    own = tuple(range(rank))
    inner = tuple(-1 - i if i == dim else i for i in own)
    places = (-1 - dim,) if shape_of(index) else ()
    return Aligned((Operand(source, own), Operand(new, inner), Operand(index, places)), frozenset({dim}))


def _index_put(node: fx.Node) -> Step:
    """Entries of the first tensor at given positions of some dimensions overwritten by those of another."""
    source, indices, new = node.args[0], list(node.args[1]), node.args[2]  # type: ignore[arg-type]
    assert isinstance(source, fx.Node) and isinstance(new, fx.Node)
    rank = len(shape_of(source))
    chosen = [i for i, n in enumerate(indices) if n is not None]
    holders = [n for n in indices if isinstance(n, fx.Node)]
    if not chosen or any(value_of(n).dtype == torch.bool for n in holders):
        return Opaque("index_put by a mask")
    width = max(len(shape_of(n)) for n in holders)
    joined = chosen == list(range(chosen[0], chosen[-1] + 1))
    kept = [i for i in range(rank) if i not in chosen]
    places = [-1 - rank - i for i in range(width)]
    before = [i for i in kept if joined and i < chosen[0]]
    written = [*before, *places, *(i for i in kept if i not in before)]
    shape = shape_of(new)
    sizes = {i: shape_of(source)[i] for i in kept}
    dims: list[int | None] = list(written[len(written) - len(shape) :])
    for i, size in enumerate(shape):
        own = dims[i]
        if size == 1 and own is not None and own >= 0 and sizes[own] != 1:
            dims[i] = None
    operands = [Operand(source, tuple(range(rank))), Operand(new, tuple(dims))]
    operands += [Operand(n, tuple(places[width - len(shape_of(n)) :])) for n in holders]
    return Aligned(tuple(operands), frozenset(chosen))


def _copy_into(node: fx.Node) -> Step:
    """A tensor written into another: what is written counts from here on."""
    new = node.args[1]
    assert isinstance(new, fx.Node)
    if len(shape_of(new)) > len(shape_of(node)):
        return Opaque("copy_ from a larger tensor")
    return Aligned((Operand(new, _broadcast_dims(new, shape_of(node))),))


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
        (Operand(direction, tuple(range(len(out)))), Operand(length, _broadcast_dims(length, out))),
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


def _batch_norm(node: fx.Node) -> Step:
    if argument(node, "training", False):
        return Opaque("batch norm in training mode")
    source, *channel = node.args[:5]
    assert isinstance(source, fx.Node)
    operands = [Operand(source, tuple(range(len(shape_of(source)))))]
    operands += [Operand(n, (1,)) for n in channel if isinstance(n, fx.Node)]
    return Aligned(tuple(operands))


_SELECTIONS = {"topk", "sort", "kthvalue", "mode", "median", "cummax", "cummin"}
_BATCH_NORMS = {"_native_batch_norm_legit_no_training", "native_batch_norm", "_native_batch_norm_legit"}


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
        return _broadcast_dims(source, [*out[:lead], *shape[-2:]])[:-2]

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
            Operand(add, _broadcast_dims(add, out)),
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


def _pool(node: fx.Node) -> Step:
    """Pooling and resampling mix the spatial dimensions of [batch, channels, *spatial] or [channels, *spatial]."""
    maker = moved_from(node)
    source = maker.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(node):
        return Opaque(f"op {maker.target}")
    rank, spatial = len(shape_of(source)), _SPATIAL[op_name(maker)]
    if spatial == 0:
        spatial = rank - 2
    lead = rank - spatial
    return Aligned((Operand(source, tuple(i if i < lead else -10 - i for i in range(rank))),))


_SPATIAL = {
    f"{kind}_pool{n}d{suffix}": n
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "_adaptive_avg", "lp")
    for n in (1, 2, 3)
    for suffix in ("", "_with_indices")
} | dict.fromkeys(
    _names("""
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa
    """),
    0,  # all but batch and channels
)


def _view_as_complex(node: fx.Node) -> Step:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return Aligned((Operand(source, (*range(len(shape_of(node))), -1)),), joins=True)


def _view_as_real(node: fx.Node) -> Step:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return Aligned((Operand(source, tuple(range(len(shape_of(source))))),))


_ALIGNED: dict[str, Callable[[fx.Node], Step]] = {
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
    "layer_norm": _norm,
    "rms_norm": _norm,
    "_fused_rms_norm": _norm,
    "batch_norm": _batch_norm,
    "_weight_norm": _weight_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "gather": _gather,
    "scatter": _scatter,
    "index_copy": _index_copy,
    "index_put": _index_put,
    "copy_": _copy_into,
    "argsort": _single_selection,
    "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
}
