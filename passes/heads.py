"""Count the heads of a core: projection channels that meet in one batch entry of the core are one head.

Every output channel of a projection gets a number, which travels forward to the core (:mod:`channel_numbers`); those
that the contraction over head dim mixes become one class. At the core, batch entries that hold the same class are the
same head, whatever the layout on the way was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqa_fx.passes.aten_call import argument
from sqa_fx.passes.channel_numbers import channel_numbers, comes_from_projection
from sqa_fx.passes.classes import Classes
from sqa_fx.passes.find import GraphFacts
from sqa_fx.passes.hints import shape_of
from sqa_fx.passes.labels import aligned, compress, low, mixed_dims, single, varying
from sqa_fx.passes.labels import heads as head_labels
from sqa_fx.passes.op_kinds import Move, Operand
from sqa_fx.passes.ops import step
from sqa_fx.passes.site import Core, Refused


@dataclass(frozen=True)
class HeadCount:
    """Heads of a core, canonically numbered (sorted by KV head).

    ``score`` and ``value`` give, for each core, the canonical head of each entry of its score and output (compressed
    shapes).
    """

    kv_of: tuple[int, ...]
    model_heads: tuple[int, ...]
    model_kv_heads: tuple[int, ...]
    score: tuple[Tensor, ...]
    value: tuple[Tensor, ...]


def count_heads(facts: GraphFacts, cores: Sequence[Core]) -> HeadCount:
    """Number the query and KV heads of the cores of one site: those of each core follow those of the one before, and
    cores that read the same keys and values share KV heads. Raises Refused when the structure has no heads."""
    counts = [_count(facts, core) for core in cores]
    if len(counts) == 1:
        return counts[0]
    kv: dict[tuple[Any, Any, int], int] = {}
    heads: list[tuple[int, int, int]] = []
    for i, (core, count) in enumerate(zip(cores, counts, strict=True)):
        for c, g in enumerate(count.kv_of):
            heads.append((kv.setdefault((_source(core.k), _source(core.v), g), len(kv)), i, c))
    order = sorted(range(len(heads)), key=lambda h: (heads[h][0], h))
    number = {heads[h][1:]: n for n, h in enumerate(order)}

    def renumbered(i: int, local: Tensor) -> Tensor:
        return torch.tensor([number[i, c] for c in range(len(counts[i].kv_of))])[local]

    return HeadCount(
        tuple(heads[h][0] for h in order),
        tuple(order),
        tuple(range(len(kv))),
        tuple(renumbered(i, count.score[0]) for i, count in enumerate(counts)),
        tuple(renumbered(i, count.value[0]) for i, count in enumerate(counts)),
    )


def _source(node: fx.Node) -> Any:
    """Equal for nodes that move the same tensor in the same way (one key, transposed anew for every head)."""
    if not isinstance(step(node), Move):
        return node

    def key(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return _source(argument)
        return tuple(key(a) for a in argument) if isinstance(argument, list | tuple) else argument

    return (node.target, key(node.args), tuple((k, key(v)) for k, v in node.kwargs.items()))


def _count(facts: GraphFacts, core: Core) -> HeadCount:
    if core.fused:
        return _count_fused(facts, core)
    score, value = aligned(core.score), aligned(core.value)
    assert score is not None and value is not None
    q_operand, k_operand = (next(o for o in score.operands[:2] if o.node is n) for n in (core.q, core.k))
    shared = {d for d in q_operand.dims if d is not None and d >= 0} & {
        d for d in k_operand.dims if d is not None and d >= 0
    }
    rank = len(shape_of(core.score))
    own = {d for d in q_operand.dims if d is not None and d >= 0}
    try:
        q = _operand_classes(facts, core.q, q_operand, shared, rank)
        wider = own != shared and (q.numel() == 1 or _depends_on_more(facts, core, q))
    except Refused:
        if own == shared:
            raise
        wider = True
    if wider:
        # Heads may lie along a dimension that only the query has (one KV head for all, grouped queries).
        q = _operand_classes(facts, core.q, q_operand, own, rank)
    k = _operand_classes(facts, core.k, k_operand, shared, rank, queries=q)
    q, k = _same_shape(q, k)
    while True:
        width = int(k.max()) + 1
        carried, met = _carry(facts, core, compress(q * width + k))
        if not met.numel():
            break
        q, k = _united(q, met // width), _united(k, met % width)
    assert core.probabilities is not None
    p_operand = next(o for o in value.operands[:2] if o.node is core.probabilities)
    v_operand = next(o for o in value.operands[:2] if o.node is core.v)
    out_rank = len(shape_of(core.value))
    shared = {d for d in p_operand.dims if d is not None and d >= 0} & {
        d for d in v_operand.dims if d is not None and d >= 0
    }
    pairs, crossing = facts.carrier.align_forward(p_operand, _as_labels(carried), out_rank)
    if crossing:
        raise Refused("heads are mixed between the scores and the values", core.value, kind="head mixing")
    pairs = _as_numbers(pairs)
    v = _operand_classes(facts, core.v, v_operand, shared, out_rank, values=True, queries=pairs // width)
    pairs, v = _same_shape(pairs, v)
    heads, tables = _number(pairs // width, pairs % width, v)
    q_table = torch.zeros(int(q.max()) + 1, dtype=torch.long)
    q_table[(pairs // width).reshape(-1)] = heads.reshape(-1)
    return HeadCount(*tables, (compress(q_table[q]),), (compress(heads),))


def _count_fused(facts: GraphFacts, core: Core) -> HeadCount:
    rank = len(shape_of(core.value))
    lead = tuple(range(rank - 2))
    batch = set(lead)
    gqa = bool(argument(core.value, "enable_gqa", False)) and shape_of(core.q)[-3] != shape_of(core.k)[-3]
    out = shape_of(core.value)

    def operand(node: fx.Node, last: tuple[int, int]) -> Operand:
        shape = shape_of(node)
        offset = rank - len(shape)
        dims: tuple[int | None, ...] = tuple(
            None if size == 1 and out[i + offset] != 1 else i + offset for i, size in enumerate(shape[:-2])
        )
        return Operand(node, (*dims, *last))

    q = _operand_classes(facts, core.q, operand(core.q, (rank - 2, -1)), batch, rank)
    found = []
    for node, last, values in ((core.k, (rank - 2, -1), False), (core.v, (-1, rank - 1), True)):
        queries = q
        if gqa and q.size(-3) > 1:
            queries = q[..., :: shape_of(core.q)[-3] // shape_of(node)[-3], :, :]
        classes = _operand_classes(facts, node, operand(node, last), batch, rank, values, queries)
        if gqa:
            repeats = shape_of(core.q)[-3] // shape_of(node)[-3]
            classes = classes.expand(*classes.shape[:-3], shape_of(node)[-3], *classes.shape[-2:])
            classes = classes.repeat_interleave(repeats, -3)
        found.append(classes)
    q, k, v = torch.broadcast_tensors(q, *found)
    heads, tables = _number(q, k, v)
    heads = compress(heads)
    return HeadCount(*tables, (heads,), (heads,))


def _depends_on_more(facts: GraphFacts, core: Core, q: Tensor) -> bool:
    """True when the query's channels vary along more dimensions than the ones it shares with the keys."""
    dims = {d for numbers in channel_numbers(facts, core.q) for d in varying(numbers)}
    return len(dims) > len(varying(q)) + 1 and core.q not in facts.constants


def _same_shape(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    a, b = torch.broadcast_tensors(first, second)
    return a, b


def _as_labels(numbers: Tensor) -> Tensor:

    return head_labels(numbers)


def _as_numbers(labels: Tensor) -> Tensor:

    if not bool(single(labels).all()):
        raise Refused("heads are mixed between the scores and the values", kind="head mixing")
    return low(labels)


def _united(numbers: Tensor, pairs: Tensor) -> Tensor:
    """``numbers`` with the classes of each column of ``pairs`` [2, n] made one, densely numbered again."""
    classes = Classes(int(numbers.max()) + 1)
    classes.unite(pairs[0], pairs[1])
    _, dense = torch.unique(classes.roots(numbers), return_inverse=True)
    united: Tensor = dense
    return united


def _carry(facts: GraphFacts, core: Core, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Move score-head numbers from the score contraction to the probabilities. Numbers that meet on the way (paired
    heads, of which one is subtracted from the other) are returned as columns [2, n]."""
    assert core.probabilities is not None
    region = _between(core.score, core.probabilities)
    values = {core.score: _as_labels(numbers)}
    for node in sorted(region, key=facts.order.__getitem__):
        description = step(node)
        if isinstance(description, Move):
            if any(s in values for s in description.sources):
                known = {s: values[s] for s in description.sources if s in values}
                some = next(iter(known.values()))
                filled = (
                    {s: known.get(s, some) for s in description.sources}
                    if len(known) < len(description.sources)
                    else known
                )
                values[node] = facts.carrier.move_forward(node, filled)
            continue
        found = aligned(node)
        if found is None:
            continue
        moved = None
        for operand in found.operands:
            if operand.node in values:
                other, crossing = facts.carrier.align_forward(operand, values[operand.node], len(shape_of(node)))
                if crossing:
                    raise Refused("heads are mixed between the scores and the values", node, kind="head mixing")
                if mixed_dims(found, other):
                    raise Refused("the normaliser runs across heads", node, kind="norm across heads")
                if moved is not None:
                    pairs = torch.stack(torch.broadcast_tensors(moved, other)).reshape(2, -1)
                    pairs = pairs[:, different_heads(pairs)]
                    if pairs.numel():
                        return numbers, low(torch.unique(pairs, dim=1))
                else:
                    moved = other
        if moved is not None:
            values[node] = moved
    if core.probabilities not in values:
        raise Refused("no way from the scores to the probabilities", core.anchor)
    return _as_numbers(values[core.probabilities]), torch.empty(2, 0, dtype=torch.long)


def different_heads(pairs: Tensor) -> Tensor:
    """Where both labels of a column are single heads, and not the same."""
    return torch.logical_and(torch.logical_and(single(pairs[0]), single(pairs[1])), pairs[0] != pairs[1])


def unite_heads(count: HeadCount, pairs: Tensor) -> HeadCount:
    """The count with the heads of each column of ``pairs`` [2, n] made one: heads that work together stay or go
    together. The KV heads that such a head reads become one in turn."""
    heads = Classes(len(count.kv_of))
    heads.unite(pairs[0], pairs[1])
    kv = Classes(max(count.kv_of) + 1)
    own = torch.tensor(count.kv_of)
    roots = heads.roots(torch.arange(len(count.kv_of)))
    kv.unite(own, own[roots])
    kv_root = kv.roots(own).tolist()
    kv_order = list(dict.fromkeys(kv_root))
    order = sorted(set(roots.tolist()), key=lambda r: (kv_order.index(kv_root[r]), r))
    number = torch.tensor([order.index(r) for r in roots.tolist()])
    first = [min(count.model_heads[c] for c, r in enumerate(roots.tolist()) if r == root) for root in order]
    model_kv = [
        min(count.model_kv_heads[g] for g, r in zip(own.tolist(), kv_root, strict=True) if r == k) for k in kv_order
    ]
    return HeadCount(
        tuple(kv_order.index(kv_root[r]) for r in order),
        tuple(sorted(first).index(f) for f in first),
        tuple(sorted(model_kv).index(f) for f in model_kv),
        tuple(compress(number[n]) for n in count.score),
        tuple(compress(number[n]) for n in count.value),
    )


def _between(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """The nodes on paths from ``start`` (excluded) to ``end`` (included)."""
    backward: set[fx.Node] = set()
    stack = [end]
    reaches: dict[fx.Node, None] = {}
    while stack:
        node = stack.pop()
        if node in backward or node is start:
            continue
        backward.add(node)
        stack.extend(node.all_input_nodes)
        if len(backward) > 2000:
            break
    stack = [start]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in backward and user not in reaches:
                reaches[user] = None
                stack.append(user)
    return set(reaches)


def _operand_classes(
    facts: GraphFacts,
    node: fx.Node,
    operand: Operand,
    shared: set[int],
    rank: int,
    values: bool = False,
    queries: Tensor | None = None,
) -> Tensor:
    """A class number for each batch entry of one core operand, in the compressed shape of the core's output.

    Keys or values that no projection makes come from a cache; then ``queries`` (the classes of the query) tell its
    heads from its batch.
    """
    result = torch.zeros((1,) * rank, dtype=torch.long)
    batch = [i for i, d in enumerate(operand.dims) if d is not None and d in shared]
    # The channels of a head lie along the contracted dimension of q and k, and along the output's own dimension of v.
    inner = [i for i, d in enumerate(operand.dims) if i not in batch and d is not None and (d >= 0) == values]
    found: list[Tensor] = []
    if queries is not None and node not in facts.constants and not comes_from_projection(facts, node):
        found = _cache_numbers(facts, node, operand, batch, inner, queries)
    for numbers in found or channel_numbers(facts, node):
        positions = [i for i in varying(numbers) if i not in batch and i not in inner]
        if positions:
            # Positions without channels (learned rows joined to the keys) say nothing about heads.
            common = numbers.amax(positions, keepdim=True)
            if bool(((numbers == common) | (numbers < 0)).all()):
                numbers, positions = common, []
        flat = numbers.permute(*batch, *inner, *[i for i in range(numbers.dim()) if i not in batch + inner])
        batch_shape = [numbers.size(i) for i in batch]
        entries = 1
        for size in batch_shape:
            entries *= size
        flat = flat.reshape(entries, -1)
        # A position of head dim on which fewer entries differ is shared by heads (a rope part common to all): leave
        # it out.
        counts = torch.tensor([torch.unique(flat[:, j]).numel() for j in range(flat.size(1))])
        finest = int(counts.max())
        if finest == 1:
            continue
        if positions and _depends(numbers, positions, batch, inner):
            raise Refused(
                "the channels of a head lie along positions (channel attention)", node, kind="channel attention"
            )
        kept = flat[:, counts == finest]
        classes = Classes(int(numbers.max()) + 1)
        classes.unite(kept, kept[:, :1])
        merged = classes.roots(kept[:, 0])
        _, dense = torch.unique(merged, return_inverse=True)
        shape = [1] * rank
        for i, size in zip(batch, batch_shape, strict=True):
            shape[operand.dims[i] or 0] = size
        dense = dense.view(shape)
        combined = result * (int(dense.max()) + 1) + dense
        _, result = torch.unique(combined, return_inverse=True)
    return result


def _cache_numbers(
    facts: GraphFacts, node: fx.Node, operand: Operand, batch: list[int], inner: list[int], queries: Tensor
) -> list[Tensor]:
    """Numbers of the entries of keys or values that come from an input of the graph (a cache): every entry has a number
    of its own, but those that the same query head reads have one, and so have all positions."""
    results = []
    for numbers in channel_numbers(facts, node, from_inputs=True):
        for dim in varying(numbers):
            if dim not in batch and dim not in inner:
                numbers = numbers.narrow(dim, 0, 1)
        shape = [1] * numbers.dim()
        for i in batch:
            shape[i] = queries.size(operand.dims[i] or 0)
        own = queries.reshape(shape) if queries.numel() == torch.Size(shape).numel() else None
        if own is None or any(a != b for a, b in zip(shape, numbers.shape, strict=True) if a != 1 and b != 1):
            continue
        readers, numbers = torch.broadcast_tensors(own, numbers)
        classes = Classes(int(numbers.max()) + 1)
        for reader in torch.unique(own).tolist():
            read = numbers[readers == reader].reshape(-1, *(numbers.size(i) for i in inner))
            classes.unite(read, read[:1])
        results.append(compress(classes.roots(numbers)))
    return results


def _depends(numbers: Tensor, positions: list[int], batch: list[int], inner: list[int]) -> bool:
    """True when the set of channels of an entry changes along ``positions`` (and not merely their order)."""
    order = [*batch, *positions, *inner]
    entries = 1
    for i in batch:
        entries *= numbers.size(i)
    steps = 1
    for i in positions:
        steps *= numbers.size(i)
    grid = numbers.permute(*order, *[i for i in range(numbers.dim()) if i not in order]).reshape(entries, steps, -1)
    grid = grid.sort(-1).values
    return not bool((grid == grid[:, :1]).all())


def _number(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Canonical head numbers per entry, and (kv_of, model_heads, model_kv_heads)."""
    q, k, v = torch.broadcast_tensors(q, k, v)
    rows = list(zip(q.reshape(-1).tolist(), k.reshape(-1).tolist(), v.reshape(-1).tolist(), strict=True))
    appearance: dict[tuple[int, int, int], int] = {}
    kv_appearance: dict[tuple[int, int], int] = {}
    for row in rows:
        appearance.setdefault(row, len(appearance))
        kv_appearance.setdefault(row[1:], len(kv_appearance))
    if len({row[0] for row in appearance}) != len(appearance):
        raise Refused("several heads share a query")
    ordered = sorted(appearance, key=lambda row: (kv_appearance[row[1:]], appearance[row]))
    canonical = {row: i for i, row in enumerate(ordered)}
    numbers = torch.tensor([canonical[row] for row in rows]).view(q.shape)
    kv_of = tuple(kv_appearance[row[1:]] for row in ordered)
    return numbers, (kv_of, tuple(appearance[row] for row in ordered), tuple(range(len(kv_appearance))))
