"""Number the output channels of the projections behind a tensor, and carry the numbers forward to it.

Every output channel of a projection gets a number. The numbers travel forward by running the ops; where an op mixes
elements (rotary embeddings, per-head norms) the numbers that it mixes become one class.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sqa_fx.passes.classes import Classes
from sqa_fx.passes.find import GraphFacts
from sqa_fx.passes.hints import is_tensor, shape_of, value_of
from sqa_fx.passes.labels import compress, varying
from sqa_fx.passes.op_kinds import Aligned, Move, Opaque
from sqa_fx.passes.ops import step

# How far back from a contraction the projection is looked for whose channels it may leave as they are.
_NEAR = 12


def channel_numbers(facts: GraphFacts, target: fx.Node, from_inputs: bool = False) -> list[Tensor]:
    """For every source of ``target`` that has channels: the channel number of each element (-1: none), compressed.

    ``from_inputs`` takes the graph's inputs for sources.
    """
    region, sources = _region_with(facts, target, False, True) if from_inputs else _region(facts, target)
    results = []
    for source in sources:
        start = _source_numbers(facts, source)
        classes = Classes(int(start.max()) + 1)
        values = {source: start}
        for node in region:
            if node in values:
                continue
            description = step(node)
            if isinstance(description, Move):
                if any(s in values for s in description.sources):
                    known = {s: values[s] for s in description.sources if s in values}
                    values[node] = facts.carrier.move_forward(node, known, missing=-1)
            elif isinstance(description, Aligned):
                moved = _mix(description, values, len(shape_of(node)), classes)
                if moved is not None:
                    values[node] = moved
        if target in values:
            results.append(compress(classes.roots(values[target])))
    return results


def comes_from_projection(facts: GraphFacts, target: fx.Node) -> bool:
    """Whether a projection of activations makes ``target`` (and not a cache, or parameters alone)."""
    return bool(_region_with(facts, target, constants=False)[1])


def _mix(description: Aligned, values: dict[fx.Node, Tensor], rank: int, classes: Classes) -> Tensor | None:
    """The channels of an aligned op's output. Channels that a norm or a reduction runs over are not united: a statistic
    over all heads makes no head of them, and whether it may stay is asked where labels move backward."""
    result: Tensor | None = None
    for operand in description.operands:
        numbers = values.get(operand.node)
        if numbers is None:
            continue
        lost = [i for i, d in enumerate(operand.dims) if (d is None or d < 0) and numbers.size(i) > 1]
        if lost and not (description.contraction or description.joins):
            continue
        for dim in lost:
            classes.unite(numbers, numbers.amax(dim, keepdim=True))
        if lost:
            numbers = numbers.amax(lost, keepdim=True)
        order = sorted((d, i) for i, d in enumerate(operand.dims) if d is not None and d >= 0)
        shape = [1] * rank
        for dim, position in order:
            shape[dim] = numbers.size(position)
        gone = [i for i, d in enumerate(operand.dims) if d is None or d < 0]
        numbers = numbers.permute(*[i for _, i in order], *gone).reshape(shape)
        if result is None:
            result = numbers
        else:
            classes.unite(result, numbers)
            result = torch.maximum(*torch.broadcast_tensors(result, numbers))
    return compress(result) if result is not None else None


def _region(facts: GraphFacts, target: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes between the sources of ``target`` and ``target`` in graph order, and the sources: projections, and
    for a target that depends on parameters only (learned queries), those parameters and their projections."""
    region, sources = _region_with(facts, target, target in facts.constants)
    return (region, sources) if sources else _region_with(facts, target, True)


def _region_with(
    facts: GraphFacts, target: fx.Node, constants: bool, inputs: bool = False
) -> tuple[list[fx.Node], list[fx.Node]]:
    region: list[fx.Node] = []
    sources: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [target]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        description = step(node)
        if node in facts.constants and not constants:
            continue
        if isinstance(description, Move):
            region.append(node)
            stack.extend(description.sources)
            continue
        if isinstance(description, Aligned):
            weights = [o.node for o in description.operands[:2] if o.node in facts.constants]
            if not weights and not description.operands:
                continue
            if description.contraction and weights and not _keeps_channels(node, description, facts):
                sources.append(node)
                continue
            region.append(node)
            stack.extend(o.node for o in description.operands)
            continue
        cache = inputs and node.op == "placeholder" and is_cache(node)
        if node.op == "get_attr" or cache or (isinstance(description, Opaque) and description.channels is not None):
            sources.append(node)
    region.sort(key=facts.order.__getitem__)
    return region, sources


def _keeps_channels(node: fx.Node, description: Aligned, facts: GraphFacts) -> bool:
    """True for a contraction with a weight that leaves channels as they are: one that maps each channel by itself
    (depthwise convolution), and one over positions, between the projection that made the channels and the core."""
    data, weight = description.operands[:2]
    if weight.node not in facts.constants:
        data, weight = weight, data
    own = {d for d in weight.dims if d is not None and d >= 0} - {d for d in data.dims if d is not None and d >= 0}
    if not own and weight.node in facts.constants:
        return True
    if weight.node not in facts.constants or data.node in facts.constants:
        return False
    labels = _made_channels(data.node, facts)
    if labels is None:
        return False
    over = [i for i, d in enumerate(data.dims) if d is None or d < 0]
    return bool(varying(labels)) and not any(labels.size(i) > 1 for i in over)


def _made_channels(node: fx.Node, facts: GraphFacts) -> Tensor | None:
    """The channel numbers of a tensor that a projection made, with nothing between but moves and one-operand ops."""
    way = [node]
    for _ in range(_NEAR):
        description = step(way[-1])
        if isinstance(description, Move) and len(description.sources) == 1:
            way.append(description.sources[0])
        elif isinstance(description, Aligned) and description.contraction:
            if not any(o.node in facts.constants for o in description.operands[:2]):
                return None
            break
        elif isinstance(description, Aligned) and len(description.operands) == 1:
            way.append(description.operands[0].node)
        else:
            return None
    else:
        return None
    numbers = _source_numbers(facts, way[-1])
    for user in reversed(way[:-1]):
        description = step(user)
        if isinstance(description, Move):
            numbers = facts.carrier.move_forward(user, {description.sources[0]: numbers}, missing=-1)
        else:
            assert isinstance(description, Aligned)
            operand = description.operands[0]
            lost = [i for i, d in enumerate(operand.dims) if (d is None or d < 0) and numbers.size(i) > 1]
            if lost:
                return None
            numbers, _ = facts.carrier.align_forward(operand, numbers, len(shape_of(user)))
    return numbers


def is_cache(node: fx.Node) -> bool:
    """True for an input that may hold keys or values: it has at least a batch, positions and channels."""
    return is_tensor(node) and value_of(node).is_floating_point() and len(shape_of(node)) >= 3


def _source_numbers(facts: GraphFacts, node: fx.Node) -> Tensor:
    """A number for every output channel of a source, in the compressed shape of its output."""
    rank = len(shape_of(node))
    description = step(node)
    if isinstance(description, Opaque) and description.channels is not None:
        shape = [1] * rank
        shape[description.channels] = shape_of(node)[description.channels]
        return torch.arange(torch.Size(shape).numel()).view(shape)
    if not isinstance(description, Aligned):
        shape = list(shape_of(node))
        return torch.arange(torch.Size(shape).numel()).view(shape)
    first, second = description.operands[:2]
    weight = second if second.node in facts.constants else first
    # Dimensions that data and weight share (a matrix for each head) tell channels apart too.
    shape = [1] * rank
    for dim in sorted({d for d in weight.dims if d is not None and d >= 0}):
        shape[dim] = shape_of(node)[dim]
    return torch.arange(torch.Size(shape).numel()).view(shape)
