"""Where a site's output joins the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sqa_fx.passes.aten_call import op_name
from sqa_fx.passes.hints import is_tensor, shape_of
from sqa_fx.passes.ops import IDENTITY_MOVES

_RESHAPES = {*IDENTITY_MOVES, "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
_PASSES = {*_RESHAPES, "dropout", "_to_copy", "to"}


@dataclass(frozen=True)
class Junction:
    """``node`` adds ``other`` to the site's output, whose elements lie in the same order."""

    node: fx.Node
    other: fx.Node


def junction(output: fx.Node) -> Junction | None:
    """The addition that the value of ``output`` goes into, and into nothing else; None where it is scaled, normalised
    or moved first."""
    node = output
    while len(node.users) == 1:
        user = next(iter(node.users))
        name = op_name(user)
        if name in ("add", "add_"):
            left, right = user.args[:2]
            other = right if left is node else left
            if user.kwargs.get("alpha", 1) != 1 or not isinstance(other, fx.Node) or not is_tensor(other):
                return None
            same = shape_of(other) == shape_of(user) == shape_of(node)
            return Junction(user, other) if same else None
        if name not in _PASSES:
            return None
        node = user
    return None
