"""The neighbourhood of an attention core, whether or not its heads could be followed."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable

from torch import fx

from sqa_fx.passes.find import GraphFacts
from sqa_fx.passes.hints import is_tensor, value_of
from sqa_fx.passes.labels import aligned
from sqa_fx.passes.op_kinds import Aligned, Move, Operand
from sqa_fx.passes.ops import step


def region(
    facts: GraphFacts, anchors: Iterable[fx.Node], limit: int | None = None, through: Container[fx.Node] = ()
) -> set[fx.Node]:
    """The nodes around attention cores as far as the projections on every side, these included; the nearest ``limit``
    of them. Projections ``through`` which it goes on are no ends."""
    anchors = list(anchors)
    found = set(anchors)
    for backward in (True, False):
        queue, seen = deque(anchors), set(anchors)
        while queue and (limit is None or len(found) < limit):
            node = queue.popleft()
            for other in node.all_input_nodes if backward else node.users:
                if other in seen or other.op != "call_function" or other in facts.constants:
                    continue
                seen.add(other)
                found.add(other)
                known = aligned(other) if is_tensor(other) else None
                weighted = known is not None and known.contraction and weights(facts, known)
                passes = isinstance(value_of(other), tuple | list) or (
                    is_tensor(other) and isinstance(step(other), Move | Aligned)
                )
                if passes and (not weighted or other in through):
                    queue.append(other)
    return found


def weights(facts: GraphFacts, description: Aligned) -> list[Operand]:
    """The constant operands among the two that a contraction multiplies."""
    return [o for o in description.operands[:2] if o.node in facts.constants]
