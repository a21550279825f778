"""Simplify: decomposed attention becomes one SDPA node, and a mask proved causal becomes is_causal.

Both let fused kernels run: they refuse masks, and cannot see a softmax between two matmuls.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from sqa_fx.passes.aten_call import argument, op_name, set_argument
from sqa_fx.passes.evaluate import constant_tensor, size_at, size_symbols
from sqa_fx.passes.graph import attribute, drop_dead_code, fake_mode_of
from sqa_fx.passes.hints import is_tensor, value_of
from sqa_fx.passes.propagate import FakeResults

SDPA = torch.ops.aten.scaled_dot_product_attention.default
_MATMUL = {"matmul", "bmm"}
# A mask of this many rows and columns still takes little memory and time.
_LARGEST_TRIAL = 4500
_CASTS = {"_to_copy", "to", "type_as", "clone", "contiguous", "detach", "alias"}


def simplify(module: fx.GraphModule, cores: Collection[str]) -> dict[str, str]:
    """Simplify the attention cores named ``cores`` in place. What does not fit exactly is left as it is.

    Returns the new name of every core that got another node.
    """
    renamed: dict[str, str] = {}
    fakes = FakeResults(fake_mode_of(module.graph))
    for node in list(module.graph.nodes):
        if node.name not in cores:
            continue
        attention = node if op_name(node) == "scaled_dot_product_attention" else _fuse(node, fakes)
        if attention is not None:
            _causal(module, attention)
            renamed[node.name] = attention.name
    drop_dead_code(module.graph)
    module.graph.lint()
    module.recompile()
    return renamed


@dataclass
class _Chain:
    """What lies between the scores and the values of a decomposed attention."""

    score: fx.Node
    scale: float = 1.0
    mask: fx.Node | None = None
    hidden: fx.Node | None = None
    """A boolean mask that is True where a score is hidden (the other way round than SDPA's)."""
    dropout: float = 0.0


def _fuse(value: fx.Node, fakes: FakeResults) -> fx.Node | None:
    """Replace ``softmax(q k^T * scale + mask) v`` by SDPA where that is exact; None where the form is another one."""
    if op_name(value) not in _MATMUL or len(value_of(value).shape) != 4:
        return None
    probabilities, v = value.args[:2]
    if not isinstance(probabilities, fx.Node) or not isinstance(v, fx.Node):
        return None
    chain = _read_chain(probabilities)
    if chain is None:
        return None
    q, k = chain.score.args[:2]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
    q, k, v, gqa = _without_repeats(q, k, v)
    types = {value_of(n).dtype for n in (q, k, v)}
    shapes = [value_of(n).shape for n in (q, k, v)]
    if len(types) != 1 or any(len(s) != 4 for s in shapes) or not _fits(shapes, gqa):
        return None
    dtype = types.pop()
    if value_of(value).dtype != dtype:
        return None
    masks = [m for m in (chain.mask, chain.hidden) if m is not None]
    if any(value_of(m).dtype not in (dtype, torch.bool) or value_of(m).dim() < 2 for m in masks):
        return None
    graph = value.graph
    with graph.inserting_before(value):
        if chain.hidden is not None:
            chain.mask = graph.call_function(torch.ops.aten.logical_not.default, (chain.hidden,))
            chain.mask.meta["val"] = fakes.run(torch.logical_not, (value_of(chain.hidden),), {})
        key = graph.call_function(torch.ops.aten.transpose.int, (k, -2, -1))
        key.meta["val"] = fakes.run(torch.transpose, (value_of(k), -2, -1), {})
        new = graph.call_function(SDPA, (q, key, v, chain.mask, chain.dropout, False))
    set_argument(new, "scale", chain.scale)
    if gqa:
        set_argument(new, "enable_gqa", True)
    new.meta = {key_: held for key_, held in value.meta.items() if not key_.startswith("sqa_")}
    value.replace_all_uses_with(new)
    graph.erase_node(value)
    return new


def _fits(shapes: list[Any], gqa: bool) -> bool:
    (qb, qh), (kb, kh), (vb, vh) = (s[:2] for s in shapes)
    if not (qb == kb and kb == vb and kh == vh):
        return False
    return bool(qh % kh == 0) if gqa else bool(qh == kh)


def _without_repeats(q: fx.Node, k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, bool]:
    """K and V before their heads were repeated, when both were."""
    sources = [n.meta.get("sqa_repeat") for n in (k, v)]
    if all(s is not None and s[1] == 1 for s in sources):
        return q, sources[0][0], sources[1][0], True  # type: ignore[index]
    return q, k, v, False


def _read_chain(probabilities: fx.Node) -> _Chain | None:
    """Read the ops from the probabilities back to the scores; None as soon as one does not fit SDPA."""
    dropout = 0.0
    node = probabilities
    for node in _back(probabilities):
        name = op_name(node)
        if name == "dropout":
            if bool(argument(node, "train")):
                dropout = float(argument(node, "p"))
        elif name in ("softmax", "_softmax", "_safe_softmax"):
            break
        elif name not in _CASTS or not value_of(node).is_floating_point():
            return None
    else:
        return None
    rank = len(value_of(node).shape)
    if int(argument(node, "dim")) % rank != rank - 1:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or len(node.users) != 1:
        return None
    chain = _Chain(source, dropout=dropout)
    for node in _back(source):
        name = op_name(node)
        if name in _MATMUL:
            chain.score = node
            return chain if len(value_of(node).shape) == 4 else None
        if name in ("mul", "div") and isinstance(node.args[1], int | float):
            factor = float(node.args[1])
            if not math.isfinite(factor) or factor == 0:
                return None
            chain.scale *= factor if name == "mul" else 1 / factor
        elif name == "masked_fill" and chain.mask is None and chain.hidden is None and chain.scale == 1.0:
            hidden = node.args[1]
            if node.args[2] != -math.inf or not isinstance(hidden, fx.Node):
                return None
            chain.hidden = hidden
        elif name == "add" and chain.mask is None and chain.hidden is None and chain.scale == 1.0:
            mask = node.args[1]
            if not isinstance(mask, fx.Node) or not is_tensor(mask) or argument(node, "alpha", 1) != 1:
                return None
            if not value_of(mask).is_floating_point():
                return None
            chain.mask = mask
        elif name not in _CASTS:
            return None
    return None


def _back(start: fx.Node) -> Iterator[fx.Node]:
    """``start`` and the first operands behind it, as long as nothing else reads them."""
    node: Any = start
    while isinstance(node, fx.Node) and is_tensor(node) and len(node.users) == 1:
        yield node
        node = node.args[0] if node.args else None


def _causal(module: fx.GraphModule, node: fx.Node) -> None:
    """Turn a mask that is causal at several shapes into is_causal."""
    mask = argument(node, "attn_mask")
    if not isinstance(mask, fx.Node):
        return
    rows, columns = value_of(argument(node, "query")).shape[-2], value_of(argument(node, "key")).shape[-2]
    trials = _trial_sizes(module, mask, rows)
    for sizes in trials:
        n, m = size_at(rows, sizes), size_at(columns, sizes)
        held = constant_tensor(mask, module, sizes)
        if n == m and held is not None and held.dim() >= 2 and 1 < max(held.shape[-2:]) < n:
            continue  # a stored mask that is too small here: the original cannot run at this size either
        if n != m or held is None or not _is_causal(held, n):
            return
    if trials:
        set_argument(node, "attn_mask", None)
        set_argument(node, "is_causal", True)


def _trial_sizes(module: fx.GraphModule, mask: fx.Node, rows: Any) -> list[dict[Any, int] | None]:
    """Sizes at which a mask has to be causal to be causal at all: the example's, two small ones, and one beyond every
    number and every stored tensor that the mask is made from, where a window or a table would show. None when the sizes
    would be too large to try."""
    if isinstance(rows, int):
        return [None]
    largest = 8
    stack, seen = [mask], {mask}
    while stack:
        current = stack.pop()
        leaves = pytree.tree_leaves((current.args, dict(current.kwargs)))
        # Slices to the end carry the largest int64, which bounds nothing.
        numbers = [leaf for leaf in leaves if type(leaf) is int and 0 < leaf < 2**31]
        if current.op == "get_attr":
            numbers.extend(value_of(current).shape)
            held = attribute(module, current.target)
            if held.numel() == 1 and not held.is_floating_point():
                numbers.append(abs(int(held)))
        largest = max([largest, *numbers])
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    if largest > _LARGEST_TRIAL:
        return []
    symbols = size_symbols(module.graph)
    own = rows.node.expr.free_symbols
    trials: list[dict[Any, int] | None] = [None]
    for base in (3, 8, largest, largest + 3):
        trials.append({symbol: base if symbol in own else 2 + i % 3 for i, symbol in enumerate(symbols)})
    return trials


def _is_causal(mask: Tensor, length: int) -> bool:
    if mask.dim() < 2 or mask.shape[-2:] != (length, length) or length < 2:
        return False
    keep = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == keep).all())
    if not mask.is_floating_point():
        return False
    # Adding this much to a score makes its weight exactly zero, since the diagonal of every row stays.
    floor = max(torch.finfo(mask.dtype).min, -1e30)
    return bool((mask[..., keep] == 0).all()) and bool((mask[..., ~keep] <= floor).all())
