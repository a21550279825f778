"""What the rewrite did to one graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqa_fx.passes.site import Refusal
from sqa_fx.plan import ParameterPlan


@dataclass
class Rewritten:
    """What the rewrite did: parameter cuts, for each site the node that now makes its output, and notes."""

    parameters: tuple[ParameterPlan, ...] = ()
    outputs: dict[str, tuple[str, str]] = field(default_factory=dict)
    cores: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    inputs: tuple[ParameterPlan, ...] = ()
    """How inputs of the graph that hold keys or values (caches) are cut."""
    carried: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    """For each graph output that carries heads: the dimension and the original entries that stay along it."""
    smaller_outputs: dict[str, list[str]] = field(default_factory=dict)
    """What outputs carry fewer of, and their nodes."""
    inexact: dict[str, str] = field(default_factory=dict)
    """Sites that cannot agree with the masked original, and why; the user allowed it."""
    inexact_outputs: set[int] = field(default_factory=set)
    narrowed: dict[str, tuple[str, int, list[int]]] = field(default_factory=dict)
    """Reductions over heads that are reported only: the operand, its head dimension and the entries that stay."""
