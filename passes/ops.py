"""What each ATen op does to its dimensions: it moves elements, aligns operand dimensions with output dimensions, or is
opaque (see :mod:`sqa_fx.passes.op_kinds`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from sqa_fx.passes.aten_call import moved_from, op_name
from sqa_fx.passes.broadcast import pointwise
from sqa_fx.passes.contractions import CONTRACTIONS
from sqa_fx.passes.hints import is_tensor, shape_of, value_of
from sqa_fx.passes.indexing_ops import INDEXING, selection
from sqa_fx.passes.mixing_ops import NORMS, SPATIAL, batch_norm, pool, reduction, softmax
from sqa_fx.passes.op_kinds import Aligned, Move, Opaque, Operand, Step


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

_SELECTIONS = _names("topk sort kthvalue mode median cummax cummin")
_BATCH_NORMS = _names("_native_batch_norm_legit_no_training native_batch_norm _native_batch_norm_legit")
IDENTITY_MOVES = _names("clone contiguous detach alias lift_fresh_copy lift_fresh")


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
        return reduction(maker)
    if maker is not node and name in _SELECTIONS:
        return selection(maker, node)
    if maker is not node and name in SPATIAL and node.args[1] == 0:
        return pool(node)
    if maker is not node and name in _BATCH_NORMS and node.args[1] == 0:
        return batch_norm(maker)
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
    if name in SPATIAL:
        return pool(node)
    special = _ALIGNED.get(name)
    if special is not None:
        return special(node)
    if name in _CREATE:
        return Aligned(())
    if name in _SOFTMAX:
        return softmax(node)
    if name in _REDUCE:
        return reduction(node)
    target = node.target
    tagged = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    if tagged or name in _POINTWISE:
        return pointwise(node)
    return Opaque(f"op {target}")


def _view_as_complex(node: fx.Node) -> Step:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return Aligned((Operand(source, (*range(len(shape_of(node))), -1)),), joins=True)


def _view_as_real(node: fx.Node) -> Step:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return Aligned((Operand(source, tuple(range(len(shape_of(source))))),))


_ALIGNED: dict[str, Callable[[fx.Node], Step]] = {
    **CONTRACTIONS,
    **NORMS,
    **INDEXING,
    "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
}
