"""How scaled_dot_product_attention is written in ONNX: the Attention op where there is one, plain ops where not.

The stock translation of torch.onnx refuses equal heads with ``enable_gqa``, one KV head without it, inputs that are not
4-D, and at opset 23 and up it emits masks of ``[batch, 1, 1, keys]`` that ONNX Runtime then refuses. These do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sqa_fx.errors import InputError

ATTENTION_OPSET = 23
"""The first opset that has the Attention op."""

OLDEST_OPSET = 18
"""The oldest opset that torch.onnx writes natively."""

AttentionForm = Literal["auto", "causal", "root", "masked", "plain"]
"""How attention is written. "causal": the Attention op, its ``is_causal`` set where attention is causal. "root": the
same, but causal attention with the square root of its scale, for fused kernels that apply the scale twice (TensorRT-RTX
1.4 on Hopper); read as ONNX, that is wrong. "masked": the Attention op with the causal mask as a tensor. "plain":
MatMul and Softmax. "auto": "causal" from opset 23 on, else "plain"."""

# Values and opsets belong to onnxscript, which carries no usable types.
Value = Any
Opset = Any
Dim = int | str | None
"""A size, the symbol of a dynamic size, or unknown."""


@dataclass(frozen=True)
class _Operand:
    """A value together with what is known of its sizes; values made during translation carry no shape themselves."""

    value: Value
    dims: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        return len(self.dims)


@dataclass(frozen=True)
class _Problem:
    """One attention in canonical form.

    query ``[batch, q_heads, q_len, d]``, key ``[batch, kv_heads, kv_len, d]``, value ``[batch, kv_heads, kv_len, d_v]``
    with static heads and ``q_heads % kv_heads == 0``; mask, where there is one, has 4 axes and broadcasts to
    ``[batch, q_heads, q_len, kv_len]``.
    """

    query: _Operand
    key: _Operand
    value: _Operand
    mask: _Operand | None
    mask_is_bool: bool


def translation_table(opset: int, form: AttentionForm = "auto") -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` entries for ``torch.onnx.export(..., opset_version=opset)``.

    Raises InputError for an opset below 18 or one without the Attention op where ``form`` wants it, and MissingError is
    left to the caller: onnxscript is imported when an attention is translated.
    """
    if opset < OLDEST_OPSET:
        raise InputError(f"opset {opset} is below {OLDEST_OPSET}, the oldest that torch.onnx writes; use 24 or 18")
    if form in ("causal", "root", "masked") and opset < ATTENTION_OPSET:
        raise InputError(f"attention form {form!r} needs the Attention op of opset {ATTENTION_OPSET}, not {opset}")

    def sdpa(
        query: Value,
        key: Value,
        value: Value,
        attn_mask: Value = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Any = None,
        enable_gqa: bool = False,
    ) -> Value:
        return translate_sdpa(
            opset,
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            form=form,
        )

    return {torch.ops.aten.scaled_dot_product_attention.default: sdpa}


def translate_sdpa(
    opset: int,
    query: Value,
    key: Value,
    value: Value,
    *,
    attn_mask: Value,
    dropout_p: float,
    is_causal: bool,
    scale: Any,
    enable_gqa: bool,
    form: AttentionForm = "auto",
) -> Value:
    """Write one attention with the operators of ``opset``; it means what torch means.

    query ``[..., q_heads, q_len, d]``, key ``[..., kv_heads, kv_len, d]``, value ``[..., kv_heads, kv_len, d_v]``, mask
    broadcastable to ``[..., q_heads, q_len, kv_len]``; returns ``[..., q_heads, q_len, d_v]``. Two leading axes fewer
    and more are fine. Causal is aligned at the top left when the lengths differ.

    Raises InputError for dropout, causal together with a mask, and heads that do not divide.
    """
    if dropout_p:
        raise InputError(
            f"attention has dropout_p={dropout_p}; an exported model does not drop: call model.eval() before exporting"
        )
    if is_causal and attn_mask is not None:
        raise InputError("is_causal and attn_mask are both set, which torch refuses; make the mask causal instead")
    op = _opset(opset)
    q, k, v = (_operand(x) for x in (query, key, value))
    mask = None if attn_mask is None else _operand(attn_mask)
    mask_is_bool = attn_mask is not None and attn_mask.dtype.name == "BOOL"
    if mask is not None and not mask_is_bool and attn_mask.dtype != query.dtype:
        mask = _Operand(op.Cast(mask.value, to=query.dtype), mask.dims)

    q_len, kv_len = q.dims[-2], k.dims[-2]
    fused_causal = is_causal and q_len is not None and q_len == kv_len
    if is_causal and not fused_causal:
        # Editions of the Attention op, and fused kernels, disagree on the alignment of a rectangle: spell it out.
        mask, mask_is_bool = _Operand(_causal_mask(op, query, key), (q_len, kv_len)), True

    rank = max(x.rank for x in (q, k, v))
    rank = max(rank, 2 if mask is None else mask.rank)
    problem, restore = _canonical(op, rank, q, k, v, mask, mask_is_bool, enable_gqa)
    plain = form == "plain" or opset < ATTENTION_OPSET
    if fused_causal and (plain or form == "masked"):
        causal = _Operand(_lift(op, _causal_mask(op, query, key), 2, 4), (1, 1, q_len, kv_len))
        problem = _Problem(problem.query, problem.key, problem.value, causal, True)
        fused_causal = False
    if not plain:
        out = _attention_op(op, problem, query.dtype, scale, fused_causal, root=form == "root")
    else:
        out = _plain_ops(op, problem, query.dtype, scale, rows_may_be_empty=not is_causal)
    return restore(out)


# --- any shape that torch takes -> the canonical one -----------------------------------------------------------------


def _canonical(
    op: Opset,
    rank: int,
    q: _Operand,
    k: _Operand,
    v: _Operand,
    mask: _Operand | None,
    mask_is_bool: bool,
    enable_gqa: bool,
) -> tuple[_Problem, Callable[[Value], Value]]:
    """Bring the operands into the form of ``_Problem``; also returns what puts the output back."""
    operands = [_lifted(op, x, rank) for x in (q, k, v)] + ([] if mask is None else [_lifted(op, mask, rank)])
    unsqueezed: list[int] = []
    if rank == 2:
        unsqueezed = [0, 1]
    elif rank == 3:
        # Without enable_gqa the first axis means nothing to torch but a batch, and it may well be dynamic.
        unsqueezed = [0] if enable_gqa else [1]
    if unsqueezed:
        operands = [_unsqueezed(op, x, unsqueezed) for x in operands]

    operands, leading = _same_leading(op, operands)
    folded = len(leading) > 1
    if folded:
        operands = [_fold_leading(op, x) for x in operands]
    operands, heads_folded = _static_heads(op, operands, enable_gqa)
    q4, k4, v4 = operands[:3]
    problem = _Problem(q4, k4, v4, operands[3] if mask is not None else None, mask_is_bool)

    def restore(out: Value) -> Value:
        if heads_folded is not None:  # [batch*heads, 1, q_len, d_v] -> [batch, heads, q_len, d_v]
            tail = op.Shape(out, start=2)
            out = op.Reshape(out, op.Concat(_ints(op, [-1]), heads_folded, tail, axis=0))
        if folded:
            out = op.Reshape(out, op.Concat(*leading, op.Shape(out, start=1), axis=0))
        return op.Squeeze(out, _ints(op, unsqueezed)) if unsqueezed else out

    return problem, restore


def _lifted(op: Opset, x: _Operand, rank: int) -> _Operand:
    return _Operand(_lift(op, x.value, x.rank, rank), (1,) * (rank - x.rank) + x.dims)


def _lift(op: Opset, value: Value, rank: int, to: int) -> Value:
    return value if rank == to else op.Unsqueeze(value, _ints(op, list(range(to - rank))))


def _unsqueezed(op: Opset, x: _Operand, axes: list[int]) -> _Operand:
    dims = list(x.dims)
    for axis in axes:
        dims.insert(axis, 1)
    return _Operand(op.Unsqueeze(x.value, _ints(op, axes)), tuple(dims))


def _same_leading(op: Opset, operands: list[_Operand]) -> tuple[list[_Operand], list[Value]]:
    """Broadcast the axes before the heads; a mask that is 1 on all of them stays small. Also returns their sizes."""
    count = operands[0].rank - 3
    sources = [next((x for x in operands if x.dims[i] != 1), operands[0]) for i in range(count)]
    wanted: tuple[Dim, ...] = tuple(source.dims[i] for i, source in enumerate(sources))
    sizes: list[Value] = []
    if count > 1 or any(1 in x.dims[:count] and x.dims[:count] != wanted for x in operands):
        sizes = [op.Shape(source.value, start=i, end=i + 1) for i, source in enumerate(sources)]
    result = []
    for index, x in enumerate(operands):
        small = x.dims[:count] == (1,) * count
        short = any(have == 1 and want != 1 for have, want in zip(x.dims[:count], wanted, strict=True))
        if short and not (index == 3 and small):
            shape = op.Concat(*sizes, _ints(op, [1, 1, 1]), axis=0)
            x = _Operand(op.Expand(x.value, shape), wanted + x.dims[count:])
        result.append(x)
    return result, sizes if count > 1 else []


def _fold_leading(op: Opset, x: _Operand) -> _Operand:
    """``[a, b, ..., heads, len, d] -> [a*b*..., heads, len, d]``."""
    shape = op.Concat(_ints(op, [-1]), op.Shape(x.value, start=x.rank - 3), axis=0)
    batch: Dim = 1 if all(d == 1 for d in x.dims[:-3]) else None
    return _Operand(op.Reshape(x.value, shape), (batch, *x.dims[-3:]))


def _static_heads(op: Opset, operands: list[_Operand], enable_gqa: bool) -> tuple[list[_Operand], Value]:
    """Make the heads of query, key and value static and divisible; also returns the dynamic size folded, or None."""
    q, k, v = operands[:3]
    mask = operands[3] if len(operands) > 3 else None
    hq, hk, hv = q.dims[1], k.dims[1], v.dims[1]
    if not (isinstance(hq, int) and isinstance(hk, int) and isinstance(hv, int)):
        return _fold_dynamic_heads(op, q, k, v, mask)

    if enable_gqa:
        if hq % hk or hq % hv:
            raise InputError(f"attention with enable_gqa has {hq} query heads, {hk} key, {hv} value heads: no multiple")
        wanted_q = hq
    else:
        mask_heads = mask.dims[1] if mask is not None and isinstance(mask.dims[1], int) else 1
        wanted_q = max(hq, hk, hv, mask_heads)
        if any(h not in (1, wanted_q) for h in (hq, hk, hv)):
            raise InputError(
                f"attention without enable_gqa has {hq} query heads, {hk} key and {hv} value heads; make them equal, "
                "or 1, or set enable_gqa"
            )
    wanted_kv = hk if hk == hv else wanted_q
    q = _repeat_heads(op, q, hq, wanted_q)
    k = _repeat_heads(op, k, hk, wanted_kv)
    v = _repeat_heads(op, v, hv, wanted_kv)
    return [q, k, v, *operands[3:]], None


def _repeat_heads(op: Opset, x: _Operand, heads: int, wanted: int) -> _Operand:
    """``[batch, heads, len, d] -> [batch, wanted, len, d]``, head h becoming heads h*n .. h*n + n - 1."""
    if heads == wanted:
        return x
    dims = (x.dims[0], wanted, *x.dims[2:])
    if heads == 1:
        return _Operand(op.Expand(x.value, _ints(op, [1, wanted, 1, 1])), dims)
    repeated = op.Expand(op.Unsqueeze(x.value, _ints(op, [2])), _ints(op, [1, 1, wanted // heads, 1, 1]))
    shape = op.Concat(_ints(op, [-1, wanted]), op.Shape(x.value, start=2), axis=0)
    return _Operand(op.Reshape(repeated, shape), dims)


def _fold_dynamic_heads(
    op: Opset, q: _Operand, k: _Operand, v: _Operand, mask: _Operand | None
) -> tuple[list[_Operand], Value]:
    """Heads of a dynamic number become part of the batch, which is exact as long as there are equally many."""
    if not q.dims[1] == k.dims[1] == v.dims[1] or q.dims[1] is None:
        raise InputError(
            f"attention has a dynamic number of heads, query {q.dims}, key {k.dims}, value {v.dims}, and they are not "
            "known to be equal; export with a static number of heads"
        )
    heads = op.Shape(q.value, start=1, end=2)
    lead = op.Shape(q.value, start=0, end=2)
    if mask is not None and mask.dims[:2] != (1, 1):
        expanded = op.Expand(mask.value, op.Concat(lead, _ints(op, [1, 1]), axis=0))
        mask = _Operand(expanded, (*q.dims[:2], *mask.dims[2:]))

    def fold(x: _Operand) -> _Operand:
        if x.dims[:2] == (1, 1):
            return x
        shape = op.Concat(_ints(op, [-1, 1]), op.Shape(x.value, start=2), axis=0)
        return _Operand(op.Reshape(x.value, shape), (None, 1, *x.dims[2:]))

    return [fold(x) for x in (q, k, v, *([] if mask is None else [mask]))], heads


# --- the two ways to write it ----------------------------------------------------------------------------------------


def _attention_op(op: Opset, p: _Problem, dtype: Any, scale: Any, causal: bool, root: bool) -> Value:
    """The Attention op on ``[batch, len, heads*d]``: its transposes cancel those that split the heads.

    ``root``: whoever runs it squares the scale where it is causal.
    """
    q = p.query.value
    if root and causal:
        scale = _head_dim(p) ** -0.5 if scale is None else scale
        scale = scale**0.5 if isinstance(scale, (int, float)) and scale > 0 else scale
    # Kernels multiply both sides by sqrt(scale) and read 0 as "default", so only a positive number can be an attribute.
    if dtype.name == "DOUBLE" and scale is None and isinstance(p.query.dims[3], int):
        scale = p.query.dims[3] ** -0.5
    # An attribute is a float32, so a double scale is multiplied in as well.
    if scale is not None and not (isinstance(scale, (int, float)) and scale > 0 and dtype.name != "DOUBLE"):
        q, scale = _scaled(op, q, dtype, scale), 1.0
    q3, k3, v3 = (
        _heads_last(op, value, x.dims) for value, x in ((q, p.query), (p.key.value, p.key), (p.value.value, p.value))
    )
    mask = None if p.mask is None else p.mask.value
    if p.mask is not None and _needs_expand(p.mask, p):
        # ONNX Runtime takes 1 for batch and heads of a mask, but wants both lengths in full. The lengths are read off
        # the 3-D form: one more reader of the 4-D one would keep its transposes alive.
        lengths = op.Shape(q3, start=1, end=2), op.Shape(k3, start=1, end=2)
        mask = op.Expand(mask, op.Concat(_ints(op, [1, 1]), *lengths, axis=0))
    out, *_ = op.Attention(
        q3,
        k3,
        v3,
        mask,
        is_causal=int(causal),
        q_num_heads=p.query.dims[1],
        kv_num_heads=p.key.dims[1],
        scale=None if scale is None else float(scale),
    )
    head_dim = p.value.dims[3] if isinstance(p.value.dims[3], int) else -1
    split = op.Reshape(out, _ints(op, [0, 0, _static(p.query.dims[1]), head_dim]))
    return op.Transpose(split, perm=[0, 2, 1, 3])


def _heads_last(op: Opset, value: Value, dims: tuple[Dim, ...]) -> Value:
    """``[batch, heads, len, d] -> [batch, len, heads*d]``."""
    width = _static(dims[1]) * dims[3] if isinstance(dims[3], int) else -1
    return op.Reshape(op.Transpose(value, perm=[0, 2, 1, 3]), _ints(op, [0, 0, width]))


def _needs_expand(mask: _Operand, p: _Problem) -> bool:
    wanted = (p.query.dims[2], p.key.dims[2])
    return any(have == 1 and want != 1 for have, want in zip(mask.dims[2:], wanted, strict=True))


def _plain_ops(op: Opset, p: _Problem, dtype: Any, scale: Any, rows_may_be_empty: bool) -> Value:
    """softmax(q k^T * scale + mask) v.

    Grouped heads cost nothing: the query heads of a group are rows of one matrix product, so that keys and values are
    never repeated.
    """
    hq, hkv = _static(p.query.dims[1]), _static(p.key.dims[1])
    if scale is None:
        scale = _head_dim(p) ** -0.5
    q = _scaled(op, p.query.value, dtype, scale)

    def grouped(x: Value) -> Value:  # [batch, q_heads, q_len, n] -> [batch, kv_heads, group*q_len, n]
        return x if hq == hkv else op.Reshape(x, _ints(op, [0, hkv, -1, 0]))

    def ungrouped(x: Value) -> Value:
        return x if hq == hkv else op.Reshape(x, _ints(op, [0, hq, -1, 0]))

    scores = ungrouped(op.MatMul(grouped(q), op.Transpose(p.key.value, perm=[0, 1, 3, 2])))
    if p.mask is not None:
        if p.mask_is_bool:
            # Where, not Add: a fused Add and Softmax of ONNX Runtime's CUDA provider returns garbage.
            scores = op.Where(p.mask.value, scores, _scalar(op, float("-inf"), dtype))
        else:
            scores = op.Add(scores, p.mask.value)
    half = dtype.name in ("FLOAT16", "BFLOAT16")
    if half:
        scores = op.Cast(scores, to=_float32())
    weights = op.Softmax(scores, axis=-1)
    if half:
        weights = op.Cast(weights, to=dtype)
    out = ungrouped(op.MatMul(grouped(weights), p.value.value))
    if p.mask is None or not rows_may_be_empty:
        return out
    # A query that may see no key gets 0 from torch, and NaN from the softmax above.
    return op.Where(_row_sees_a_key(op, p.mask, p.mask_is_bool, dtype), out, _scalar(op, 0.0, dtype))


def _head_dim(p: _Problem) -> int:
    head_dim = p.query.dims[3]
    if not isinstance(head_dim, int):
        raise InputError(f"attention has a head size that is not static, {p.query.dims}; give it an explicit scale")
    return head_dim


def _row_sees_a_key(op: Opset, mask: _Operand, is_bool: bool, dtype: Any) -> Value:
    """``[batch or 1, heads or 1, q_len or 1, 1]``, computed on the mask, which is smaller than the scores."""
    last = _ints(op, [-1])
    if is_bool:
        seen = op.ReduceMax(op.Cast(mask.value, to=_float32()), last, keepdims=1)
        return op.Greater(seen, _scalar(op, 0.0, _float32()))
    return op.Greater(op.ReduceMax(mask.value, last, keepdims=1), _scalar(op, float("-inf"), dtype))


def _causal_mask(op: Opset, query: Value, key: Value) -> Value:
    """Bool ``[q_len, kv_len]``, true where key j <= query i: torch's alignment, the top left corner."""

    def positions(x: Value) -> Value:
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        return op.Range(zero, op.Squeeze(op.Shape(x, start=-2, end=-1), _ints(op, [0])), one)

    return op.LessOrEqual(op.Unsqueeze(positions(key), _ints(op, [0])), op.Unsqueeze(positions(query), _ints(op, [1])))


# --- small things ----------------------------------------------------------------------------------------------------


def _operand(value: Value) -> _Operand:
    return _Operand(value, tuple(_dim(d) for d in value.shape))


def _dim(size: Any) -> Dim:
    if isinstance(size, int):
        return size
    return None if size.value is None else str(size.value)


def _static(dim: Dim) -> int:
    assert isinstance(dim, int), dim  # _static_heads has seen to it
    return dim


def _ints(op: Opset, values: list[int]) -> Value:
    return op.Constant(value_ints=values)


def _scalar(op: Opset, number: float, dtype: Any) -> Value:
    import onnx_ir

    return op.Constant(value=onnx_ir.tensor(float(number), dtype=dtype))


def _scaled(op: Opset, query: Value, dtype: Any, scale: Any) -> Value:
    factor = _scalar(op, scale, dtype) if isinstance(scale, (int, float)) else op.Cast(scale, to=dtype)
    return op.Mul(query, factor)


def _float32() -> Any:
    import onnx_ir

    return onnx_ir.DataType.FLOAT


def _opset(version: int) -> Opset:
    from onnxscript import onnx_opset

    try:
        return getattr(onnx_opset, f"opset{version}")
    except AttributeError:
        raise InputError(f"the installed onnxscript does not know opset {version}; use 24, or upgrade it") from None
