"""Find attention cores: an SDPA node, or a normaliser between two contractions of activations."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import fx

from sqa_fx.passes.aten_call import argument, op_name
from sqa_fx.passes.graph import constant_nodes, module_path
from sqa_fx.passes.hints import is_tensor, shape_of
from sqa_fx.passes.labels import Carrier, aligned, heads, single, varying
from sqa_fx.passes.op_kinds import Aligned, Move, Opaque
from sqa_fx.passes.ops import step
from sqa_fx.passes.site import Core, Refusal, Refused, as_refused

SDPA = "scaled_dot_product_attention"
SOFTMAX = {"softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"}
# What turns scores into weights elsewhere: sigmoid attention, squared relu, a softmax written out, angles.
_WEIGHINGS = {"exp", "exp2", "sigmoid", "relu", "acos", "softplus", "hardsigmoid", "relu6"}


@dataclass
class Found:
    """The cores of a graph in order, refusals met on the way, and shared facts."""

    cores: list[tuple[str, Core]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


class GraphFacts:
    """Facts about one graph that every site asks for: order, constants, label arithmetic."""

    def __init__(self, module: fx.GraphModule, allow_inexact: bool = False, fixed_caches: bool = False) -> None:
        self.module, self.allow_inexact = module, allow_inexact
        self.fixed_caches = fixed_caches
        """Keys and values that are inputs or outputs of the graph keep their shapes: the caller expects them."""
        self.order = {n: i for i, n in enumerate(module.graph.nodes)}
        self.constants = constant_nodes(module.graph)
        self.carrier = Carrier(module, self.constants)
        self.core_of: dict[fx.Node, Core] = {}
        """Every core of the graph by the node that makes its output."""
        self._behind: dict[fx.Node, tuple[Core, ...]] = {}

    def cores_behind(self, node: fx.Node) -> tuple[Core, ...]:
        """The cores whose outputs reach ``node`` without a contraction between."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._behind:
                stack.pop()
                continue
            if current in self.core_of:
                self._behind[current] = (self.core_of[current],)
                continue
            description = step(current)
            sources: list[fx.Node] = []
            if isinstance(description, Move):
                sources = list(description.sources)
            elif isinstance(description, Aligned) and not description.contraction and current not in self.constants:
                sources = [o.node for o in description.operands]
            unknown = [s for s in sources if s not in self._behind]
            if unknown:
                stack.extend(unknown)
                continue
            self._behind[current] = tuple(dict.fromkeys(c for s in sources for c in self._behind[s]))
        return self._behind[node]


def find_cores(facts: GraphFacts) -> Found:
    """Every attention core of the graph, in order, and the attention-like nodes that were refused."""

    found = Found()
    cores: dict[fx.Node, Core] = {}
    nodes = list(facts.module.graph.nodes)
    weighings = [n for n in nodes if op_name(n) in _WEIGHINGS]
    # What a softmax explains is not looked at again; queries made from parameters alone are the last resort.
    anchors = [(n, True) for n in nodes if op_name(n) == SDPA or op_name(n) in SOFTMAX]
    for node, learned in [*anchors, *((n, False) for n in weighings), *((n, True) for n in weighings)]:
        try:
            core = _sdpa_core(node) if op_name(node) == SDPA else _weighed_core(facts, node, learned)
        except (Refused, ValueError) as error:
            if op_name(node) not in _WEIGHINGS:
                found.refusals.append(as_refused(error, node).refusal(module_path(node) or node.name, node))
            continue
        if core is not None:
            cores.setdefault(core.value, core)
    names: dict[str, int] = {}
    for core in sorted(cores.values(), key=lambda c: facts.order[c.anchor]):
        path = module_path(core.anchor) or core.anchor.name
        count = names[path] = names.get(path, 0) + 1
        found.cores.append((path if count == 1 else f"{path}#{count}", core))
        facts.core_of[core.value] = core
    return found


def _sdpa_core(node: fx.Node) -> Core:
    q, k, v = (argument(node, n) for n in ("query", "key", "value"))
    return Core(node, node, node, q, k, v)


def _weighed_core(facts: GraphFacts, node: fx.Node, learned: bool) -> Core | None:
    """The core around an op that turns scores into weights; None when it is no attention (a classifier, a router,
    linear attention, an activation function). ``learned`` lets the query be made from parameters alone."""
    mixers: list[fx.Node] = []
    reached = _value_contraction(facts, node, mixers)
    if reached is None:
        return None
    score = _score_contraction(facts, node, mixers, learned)
    if score is None:
        return None
    if mixers:
        raise Refused(
            "a weight mixes the scores or probabilities of different heads (talking heads)",
            mixers[0],
            kind="talking heads",
        )
    path = [*reached[1:], *score]
    value, probabilities = reached[0], path[0]
    description = aligned(value)
    assert description is not None
    others = [o.node for o in description.operands[:2] if o.node is not probabilities]
    if len(others) != 1:
        raise Refused("the probabilities meet themselves, not values", value, kind="head mixing")
    pair = _query_and_key(facts, value, path)
    if pair is not None and pair[1] in facts.constants:
        return None  # the weights choose among parameters: a router, a table lookup
    return Core(node, path[-1], value, *pair, others[0], probabilities) if pair is not None else None


def _mixes_heads(facts: GraphFacts, node: fx.Node, found: Aligned) -> bool:
    """True for a contraction with a weight that keeps two other dimensions apart, as one over the head axis of
    scores does."""
    weighted = any(o.node in facts.constants for o in found.operands[:2])
    return found.contraction and weighted and len(shape_of(node)) >= 4


def _value_contraction(facts: GraphFacts, start: fx.Node, mixers: list[fx.Node]) -> list[fx.Node] | None:
    """The first contraction of the weights with an activation, and the way back from it to ``start``.

    Contractions over heads that stand in the way are appended to ``mixers``.
    """
    queue: deque[fx.Node] = deque([start])
    before: dict[fx.Node, fx.Node | None] = {start: None}
    while queue:
        node = queue.popleft()
        for user in node.users:
            if user in before:
                continue
            if not is_tensor(user):
                if op_name(user) in ("split", "split_with_sizes", "unbind", "chunk"):
                    before[user] = node
                    queue.append(user)
                continue
            description = step(user)
            if isinstance(description, Aligned) and description.contraction:
                operand = next(o for o in description.operands if o.node is node)
                if not any(d is not None and d < 0 for d in operand.dims):
                    continue
                if not any(o.node in facts.constants for o in description.operands[:2]):
                    before[user] = node
                    way: list[fx.Node] = []
                    current: fx.Node | None = user
                    while current is not None:
                        if is_tensor(current):
                            way.append(current)
                        current = before[current]
                    return way
                if not _mixes_heads(facts, user, description):
                    continue
                mixers.append(user)
            elif isinstance(description, Opaque):
                continue
            before[user] = node
            queue.append(user)
    return None


def _score_contraction(facts: GraphFacts, start: fx.Node, mixers: list[fx.Node], learned: bool) -> list[fx.Node] | None:
    """The way from ``start`` (excluded) back to the nearest contraction of two activations, which makes the scores.

    Contractions over heads that stand in the way are appended to ``mixers``.
    """
    queue: deque[tuple[fx.Node, list[fx.Node]]] = deque([(start, [])])
    seen = {start}
    from_parameters: list[fx.Node] | None = None
    while queue:
        node, path = queue.popleft()
        description = step(node)
        sources: list[fx.Node] = []
        if isinstance(description, Move):
            sources = list(description.sources)
        elif isinstance(description, Aligned):
            if description.contraction and node is not start:
                if not any(o.node in facts.constants for o in description.operands[:2]):
                    return path
                if learned and from_parameters is None and not mixers:
                    from_parameters = path
                if not _mixes_heads(facts, node, description):
                    continue
                mixers.append(node)
            sources = [o.node for o in description.operands]
        for source in sources:
            if source not in seen and source not in facts.constants:
                seen.add(source)
                queue.append((source, [*path, source]))
    if from_parameters is not None:
        # Nothing lies between the heads after all.
        mixers.clear()
    return from_parameters


def _query_and_key(facts: GraphFacts, value: fx.Node, path: list[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """Which operand of the score contraction is the query: the values are summed over the other one's positions.

    ``path`` leads from the probabilities back to the score contraction. None when the values are summed over neither
    operand's own positions.
    """
    known = aligned(value)
    assert known is not None
    weights = next(o for o in known.operands[:2] if o.node is path[0])
    summed = [i for i, d in enumerate(weights.dims) if d is not None and d < 0]
    shape = [n if i in summed else 1 for i, n in enumerate(shape_of(path[0]))]
    length = 1
    for n in shape:
        length *= n
    labels = heads(torch.arange(length)).view(shape)
    for node, source in itertools.pairwise(path):
        description = step(node)
        if isinstance(description, Move):
            labels = facts.carrier.move_backward(node, labels)[source]
        else:
            assert isinstance(description, Aligned)
            operand = next(o for o in description.operands if o.node is source)
            labels = facts.carrier.align_backward(operand, labels)
    contraction = aligned(path[-1])
    assert contraction is not None
    first, second = contraction.operands[:2]
    key_dims = set(varying(labels))
    if length == 1:
        return first.node, second.node
    if not bool(single(labels).any()):
        return None  # what is summed over are no positions of the scores, but the state of a recurrence beside them
    own_first, own_second = (
        {d for d in a.dims if d is not None} - {d for d in b.dims if d is not None}
        for a, b in ((first, second), (second, first))
    )
    in_first, in_second = bool(key_dims & own_first), bool(key_dims & own_second)
    if in_second and not in_first:
        return first.node, second.node
    if in_first and not in_second:
        return second.node, first.node
    return None
