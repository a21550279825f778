"""Mixers of positions that are no softmax attention: seen, named in the report, and left alone.

Seen are recurrent layers, scans, running sums and products, Fourier transforms, products of two activations that sum
over positions (linear attention and its kin), and loops over positions that hand a state on. Anything inside an
attention site, converted or refused, belongs to that site.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from sqa_fx.passes.aten_call import argument, op_name
from sqa_fx.passes.find import GraphFacts
from sqa_fx.passes.graph import module_path
from sqa_fx.passes.hints import hint, is_tensor, shape_of, value_of
from sqa_fx.passes.labels import Labels, aligned, heads, join, varying
from sqa_fx.passes.locate import Place, place
from sqa_fx.passes.op_kinds import Aligned, Move
from sqa_fx.passes.ops import step
from sqa_fx.passes.region import region, weights
from sqa_fx.passes.site import Refusal, Site

_LSTM, _GRU, _RNN = "LSTM", "GRU", "recurrent layer"
_SCAN, _FOURIER = "scan (state-space or recurrent)", "Fourier transform"
_RUNNING = "running sum or product (state-space or linear attention)"
_PRODUCT = "product of activations over positions without softmax (linear attention or state-space)"
_LOOP = "loop over positions that hands a state on (recurrent or state-space)"
_OPS = {
    **dict.fromkeys(("lstm", "lstm_cell", "_thnn_fused_lstm_cell", "mkldnn_rnn_layer", "quantized_lstm"), _LSTM),
    **dict.fromkeys(("gru", "gru_cell", "_thnn_fused_gru_cell", "quantized_gru"), _GRU),
    **dict.fromkeys(("rnn_tanh", "rnn_relu", "rnn_tanh_cell", "rnn_relu_cell", "_cudnn_rnn", "miopen_rnn"), _RNN),
    **dict.fromkeys(("scan", "associative_scan", "while_loop"), _SCAN),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp"), _RUNNING),
}
_PRODUCTS = frozenset({"matmul", "bmm", "mm", "einsum", "addmm", "baddbmm"})
# How far a dimension or a loop is followed; real ones are much shorter.
_REACH = 400


@dataclass(frozen=True)
class OtherMixer:
    """A module that mixes positions by other means than softmax attention."""

    name: str
    place: Place
    what: str

    def __str__(self) -> str:
        return f"{self.name!r}{f' ({self.place.where})' if self.place.where else ''}: {self.what}"


def other_mixers(facts: GraphFacts, sites: Sequence[Site], refusals: Sequence[Refusal]) -> list[OtherMixer]:
    """The mixers outside every attention site, one entry per module."""
    owned = _owned(facts, sites, refusals)
    refused_paths = {module_path(r.anchor) for r in refusals if r.anchor is not None}
    found: dict[str, OtherMixer] = {}
    loops: dict[tuple[str, fx.Node, int], list[fx.Node]] = {}

    def add(node: fx.Node, what: str) -> None:
        path = module_path(node)
        known = found.setdefault(path, OtherMixer(path or node.name, place(node), what))
        if what not in known.what:
            found[path] = replace(known, what=f"{known.what}; {what}")

    for node in facts.module.graph.nodes:
        if node.op != "call_function" or node in facts.constants:
            continue
        name = op_name(node) or str(node.target)
        if name == "select" and is_tensor(node.args[0]) and node.args[0] not in facts.constants:
            dim = int(node.args[1]) % value_of(node.args[0]).dim()
            loops.setdefault((module_path(node), _whole(node.args[0]), dim), []).append(node)
        if node in owned:
            continue
        what = _OPS.get(name)
        if what == _RUNNING:
            # Running sums of integers are position numbers and places in a queue.
            if _is_float(node) and carries_positions(facts, node, int(argument(node, "dim"))):
                add(node, what)
        elif what is not None:
            add(node, what)
        elif name.startswith(("fft_", "_fft_")) and not name.endswith(("freq", "shift")):
            add(node, _FOURIER)
        elif name in _PRODUCTS and module_path(node) not in refused_paths and _sums_positions(facts, node):
            add(node, _PRODUCT)
    for (path, _, dim), steps in loops.items():
        if path not in found and path not in refused_paths:
            first = _hands_on(facts, steps, dim)
            if first is not None and first not in owned and carries_positions(facts, _source(steps[0]), dim):
                add(first, _LOOP)
    return list(found.values())


def _is_float(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


# -- what belongs to attention sites ---------------------------------------------------------------------------------


def _owned(facts: GraphFacts, sites: Iterable[Site], refusals: Iterable[Refusal]) -> set[fx.Node]:
    owned = {node for site in sites for _, node in site.labels}
    anchors = [c.anchor for s in sites for c in s.cores] + [r.anchor for r in refusals if r.anchor is not None]
    return owned | region(facts, anchors)


# -- which dimensions are positions ----------------------------------------------------------------------------------


def _sums_positions(facts: GraphFacts, node: fx.Node) -> bool:
    """True for a contraction of two activations that sums over positions."""
    known = aligned(node)
    if known is None or not known.contraction or weights(facts, known):
        return False
    for operand in known.operands[:2]:
        summed = [i for i, d in enumerate(operand.dims) if d is not None and d < 0]
        if not any(carries_positions(facts, operand.node, dim) for dim in summed):
            return False
    return True


def carries_positions(facts: GraphFacts, node: fx.Node, dim: int) -> bool:
    """True when dimension ``dim`` of ``node`` is made of positions (rows of an input, pixels of an image), not of the
    output channels of a weight.

    The dimension is followed back, by running the ops, to the weights, lookups and inputs that make it. False for what
    has no size before it runs.
    """
    try:
        return _carries_positions(facts, node, dim)
    except ValueError:
        return False


def _carries_positions(facts: GraphFacts, node: fx.Node, dim: int) -> bool:
    shape = shape_of(node)
    dim %= len(shape)
    if shape[dim] == 1:
        return False
    labels = [1] * len(shape)
    labels[dim] = shape[dim]
    pending: dict[fx.Node, Labels] = {node: heads(torch.arange(shape[dim])).view(labels)}
    by_order = {facts.order[node]: node}
    queue = [-facts.order[node]]
    for _ in range(_REACH):
        if not queue:
            return False
        current = by_order[-heapq.heappop(queue)]
        own = pending.pop(current)
        if not varying(own):
            continue
        description = step(current)
        backward: dict[fx.Node, Labels] = {}
        if isinstance(description, Move):
            backward = facts.carrier.move_backward(current, own)
        elif isinstance(description, Aligned):
            constant = weights(facts, description)
            if constant and (description.contraction or op_name(current) == "embedding"):
                given = {d for o in description.operands[:2] if o not in constant for d in o.dims}
                channels = {d for o in constant for d in o.dims if d is not None and d >= 0} - given
                if not set(varying(own)) <= channels:
                    return True
                continue
            for operand in description.operands:
                if operand.node not in facts.constants:
                    backward[operand.node] = facts.carrier.align_backward(operand, own)
        elif current.op == "placeholder":
            # The last dimension of a float input holds its features.
            rank = len(shape_of(current))
            if not (_is_float(current) and rank > 1 and set(varying(own)) <= {rank - 1}):
                return True
        elif not set(varying(own)) <= {len(shape_of(current)) - 1}:
            return True
        for source, found in backward.items():
            if source in facts.constants or not is_tensor(source):
                continue
            if source in pending:
                pending[source] = join(pending[source], found)
            else:
                pending[source] = found
                by_order[facts.order[source]] = source
                heapq.heappush(queue, -facts.order[source])
    return False


# -- loops over positions --------------------------------------------------------------------------------------------


def _source(select: fx.Node) -> fx.Node:
    source = select.args[0]
    assert isinstance(source, fx.Node)
    return source


def _size(node: fx.Node, dim: int) -> int:
    size = value_of(node).shape[dim]
    try:
        return int(hint(size))
    except ValueError:
        return 0


def _whole(node: fx.Node) -> fx.Node:
    """What a loop takes its steps from: ``x[:, i]`` is a slice of everything, made anew in each step."""
    while op_name(node) in ("slice", "alias") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _hands_on(facts: GraphFacts, steps: Sequence[fx.Node], dim: int) -> fx.Node | None:
    """The first node of a later step that takes what an earlier step computed; None when the steps only join at the end
    (each frame of a video by itself)."""
    by_index: dict[int, list[fx.Node]] = {}
    for node in steps:
        if isinstance(node.args[2], int):
            by_index.setdefault(node.args[2], []).append(node)
    source = _source(steps[0])
    if len(by_index) < 3 or len(by_index) < _size(source, dim) - 1:
        return None
    first, second, *_ = by_index.values()
    marks: dict[fx.Node, int] = {**dict.fromkeys(first, 1), **dict.fromkeys(second, 2)}
    queue: list[int] = []
    waiting: dict[int, fx.Node] = {}

    def push(node: fx.Node) -> None:
        for user in node.users:
            if facts.order[user] not in waiting:
                waiting[facts.order[user]] = user
                heapq.heappush(queue, facts.order[user])

    for node in marks:
        push(node)
    for _ in range(_REACH):
        if not queue:
            return None
        node = waiting[heapq.heappop(queue)]
        mark = 0
        for source in node.all_input_nodes:
            mark |= marks.get(source, 0)
        if mark == 3:
            joined = not is_tensor(node) or not isinstance(step(node), Move)
            if joined and node.op == "call_function":
                return node
            continue
        if node not in marks:
            marks[node] = mark
            push(node)
    return None
