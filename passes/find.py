"""Find attention cores: an SDPA node, or a normaliser between two contractions of activations."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import fx

from sqa_fx.passes.advice import RefusalKind
from sqa_fx.passes.graph import constant_nodes, module_path
from sqa_fx.passes.hints import is_tensor, shape_of
from sqa_fx.passes.labels import Carrier, aligned, heads, varying
from sqa_fx.passes.ops import Move, argument, op_name, step
from sqa_fx.passes.site import Core, Refusal, Refused

SDPA = "scaled_dot_product_attention"
_NORMALISERS = {"softmax", "_softmax", "_safe_softmax"}


@dataclass
class Found:
    """The cores of a graph in order, refusals met on the way, and shared facts."""

    cores: list[tuple[str, Core]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


class GraphFacts:
    """Facts about one graph that every site asks for: order, constants, label arithmetic."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.order = {n: i for i, n in enumerate(module.graph.nodes)}
        self.constants = constant_nodes(module.graph)
        self.carrier = Carrier(module, self.constants)


def find_cores(facts: GraphFacts) -> Found:
    """Every attention core of the graph, in order, and the attention-like nodes that were refused."""

    found = Found()
    names: dict[str, int] = {}
    for node in facts.module.graph.nodes:
        name = op_name(node)
        if name != SDPA and name not in _NORMALISERS:
            continue
        path = module_path(node) or node.name
        try:
            core = _sdpa_core(node) if name == SDPA else _softmax_core(facts, node)
        except Refused as refused:
            found.refusals.append(refused.refusal(path, node))
            continue
        except ValueError as error:
            kind: RefusalKind = "data-dependent size" if "depends on data" in str(error) else "other"
            found.refusals.append(Refused(str(error), node, kind=kind).refusal(path, node))
            continue
        if core is None:
            continue
        count = names[path] = names.get(path, 0) + 1
        found.cores.append((path if count == 1 else f"{path}#{count}", core))
    return found


def _sdpa_core(node: fx.Node) -> Core:
    q, k, v = (argument(node, n) for n in ("query", "key", "value"))
    return Core(node, node, node, q, k, v)


def _softmax_core(facts: GraphFacts, node: fx.Node) -> Core | None:
    """The core around a softmax; None when the softmax is no attention (a classifier, a router, linear attention)."""
    mixers: list[fx.Node] = []
    reached = _value_contraction(facts, node, mixers)
    scores = _score_contractions(facts, node, mixers)
    if mixers and (reached is not None) != bool(scores):
        raise Refused(
            "a weight mixes the scores or probabilities of different heads (talking heads)",
            mixers[0],
            kind="talking heads",
        )
    if reached is None or not scores:
        return None
    value, probabilities = reached
    score, path = scores[0]
    q, k = _query_and_key(facts, node, score, path)
    description = aligned(value)
    assert description is not None
    others = [o.node for o in description.operands[:2] if o.node is not probabilities]
    if len(others) != 1:
        raise Refused("the probabilities meet themselves, not values", value)
    return Core(node, score, value, q, k, others[0], probabilities)


def _value_contraction(facts: GraphFacts, softmax: fx.Node, mixers: list[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The first contraction of the probabilities with an activation, and the operand that carries the probabilities.

    Contractions with weights that stand in the way are appended to ``mixers``.
    """
    queue: deque[fx.Node] = deque([softmax])
    seen = {softmax}
    while queue:
        node = queue.popleft()
        for user in node.users:
            if user in seen or not is_tensor(user):
                if user not in seen and op_name(user) in ("split", "split_with_sizes", "unbind", "chunk"):
                    seen.add(user)
                    queue.append(user)
                continue
            description = step(user)
            if isinstance(description, Move):
                seen.add(user)
                queue.append(user)
                continue
            found = aligned(user)
            if found is None:
                continue
            if not found.contraction:
                seen.add(user)
                queue.append(user)
                continue
            operand = next(o for o in found.operands if o.node is node)
            if not any(d is not None and d < 0 for d in operand.dims):
                continue
            if any(o.node in facts.constants for o in found.operands[:2]):
                mixers.append(user)
                continue
            return user, node
    return None


def _score_contractions(
    facts: GraphFacts, softmax: fx.Node, mixers: list[fx.Node]
) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Contractions of two activations that feed the softmax without another contraction between, nearest first.

    Contractions with weights that stand in the way are appended to ``mixers``.
    """
    start = softmax.args[0]
    assert isinstance(start, fx.Node)
    queue: deque[tuple[fx.Node, list[fx.Node]]] = deque([(start, [softmax])])
    seen = {start}
    found = []
    while queue:
        node, path = queue.popleft()
        description = step(node)
        if isinstance(description, Move):
            sources = list(description.sources)
        else:
            known = aligned(node)
            if known is None:
                continue
            operands = [o.node for o in known.operands]
            if known.contraction:
                if not any(o in facts.constants for o in operands[:2]):
                    found.append((node, path))
                else:
                    mixers.append(node)
                continue
            sources = operands
        for source in sources:
            if source not in seen and source not in facts.constants:
                seen.add(source)
                queue.append((source, [*path, node]))
    return found


def _query_and_key(facts: GraphFacts, softmax: fx.Node, score: fx.Node, path: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """Which operand of the score contraction is the query: the softmax runs over the other one's positions."""
    rank = len(shape_of(softmax))
    known = aligned(softmax)
    assert known is not None
    dim = next(iter(known.locked))

    length = shape_of(softmax)[dim]
    shape = [1] * rank
    shape[dim] = length
    labels = heads(torch.arange(length)).view(shape)
    chain = [*path, score]
    for node, source in itertools.pairwise(chain[1:]):
        description = step(node)
        if isinstance(description, Move):
            labels = facts.carrier.move_backward(node, labels)[source]
        else:
            found = aligned(node)
            assert found is not None
            operand = next(o for o in found.operands if o.node is source)
            labels = facts.carrier.align_backward(operand, labels)
    contraction = aligned(score)
    assert contraction is not None
    first, second = contraction.operands[:2]
    key_dims = set(varying(labels))
    if length == 1 or not key_dims:
        return first.node, second.node
    in_first, in_second = key_dims <= set(first.dims), key_dims <= set(second.dims)
    if in_second and not in_first:
        return first.node, second.node
    if in_first and not in_second:
        return second.node, first.node
    raise Refused("the softmax does not run over the positions of one score operand", softmax, score)
