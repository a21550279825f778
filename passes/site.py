"""What the analysis knows of one attention site, and why a site was refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from sqa_fx.passes.advice import ADVICE, RefusalKind
from sqa_fx.passes.labels import Labels
from sqa_fx.passes.locate import Place, location, place

Kind = Literal["core", "kv"]


@dataclass(frozen=True)
class Refusal:
    """A site that cannot be converted: falsy, with the reason, its kind, and the nodes that stand in the way.

    ``place`` is the line of the attention itself, ``node_locations`` those of ``nodes`` ("file.py:123", '' when
    unknown).
    """

    name: str
    reason: str
    nodes: tuple[str, ...] = ()
    heads: int | None = None
    kind: RefusalKind = "other"
    place: Place = field(default_factory=Place)
    node_locations: tuple[str, ...] = ()
    anchor: fx.Node | None = field(default=None, compare=False, repr=False)

    def __bool__(self) -> bool:
        return False

    @property
    def advice(self) -> str:
        """What would make the site convertible."""
        return ADVICE[self.kind]


class Refused(Exception):
    """Raised inside the analysis of one site; becomes a Refusal in the report."""

    def __init__(self, reason: str, *nodes: fx.Node, kind: RefusalKind = "other") -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = nodes
        self.nodes = tuple(n.name for n in nodes)
        self.kind: RefusalKind = kind
        self.cores: tuple[Core, ...] = ()
        """The cores that were looked at as one site when this was raised."""

    def refusal(self, name: str, anchor: fx.Node, at: Place | None = None, heads: int | None = None) -> Refusal:
        """What the report says of site ``name`` around ``anchor``; ``at`` is its line, if known already."""
        places = tuple(location(n) for n in self.at)
        return Refusal(name, self.reason, self.nodes, heads, self.kind, at or place(anchor), places, anchor)


def as_refused(error: Refused | ValueError, node: fx.Node) -> Refused:
    """A refusal for ``error``, at ``node`` when it names none (a size that depends on data)."""
    if isinstance(error, Refused):
        return error
    text = str(error)
    kind: RefusalKind = "data-dependent size" if "depends on data" in text else "other"
    if "which elements" in text:
        kind = "data-dependent routing"
    return Refused(text, node, kind=kind)


@dataclass(frozen=True)
class Core:
    """The heart of a site: ``score`` contracts q with k, ``value`` contracts the probabilities with v (one SDPA node
    is both).
    """

    anchor: fx.Node
    score: fx.Node
    value: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    probabilities: fx.Node | None = None

    @property
    def fused(self) -> bool:
        """True for a scaled_dot_product_attention node."""
        return self.score is self.value


@dataclass(frozen=True)
class LeafUse:
    """A parameter (or constant, or a cache that is an input) whose elements along ``axis`` belong to heads, under one
    role. Without an axis the parameter belongs to one head as a whole."""

    node: fx.Node
    role: str
    axis: int
    labels: Labels

    @property
    def whole(self) -> bool:
        """True for a parameter of one head alone."""
        return self.axis < 0


@dataclass
class Site:
    """A convertible site. Heads are numbered canonically inside: sorted by KV head, so that KV groups are intervals.

    ``model_heads[c]`` and ``model_kv_heads[g]`` are the model's own numbers of canonical ones: their order in the
    output projection.
    ``labels`` holds, per role and node, which heads each element serves; ``kinds`` whether a role counts query heads
    (``core``) or KV heads (``kv``). ``place`` is the line of source that the core comes from.
    """

    name: str
    cores: tuple[Core, ...]
    heads: int
    kv_heads: int
    kv_of: tuple[int, ...]
    model_heads: tuple[int, ...]
    model_kv_heads: tuple[int, ...]
    head_dim: int
    q_len: int
    kv_len: int
    place: Place = field(default_factory=Place)
    labels: dict[tuple[str, fx.Node], Labels] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    leaves: list[LeafUse] = field(default_factory=list)
    frontiers: list[tuple[str, fx.Node]] = field(default_factory=list)
    """Nodes that are computed whole, and of which the kept heads are selected."""
    ties: list[LeafUse] = field(default_factory=list)
    """Parameters behind a frontier of KV heads: they keep their size, and merged heads are averaged in place."""
    untied: dict[str, str] = field(default_factory=dict)
    """Roles whose KV heads can be selected but not merged, and why."""
    projections: list[fx.Node] = field(default_factory=list)
    carried_outputs: list[tuple[str, fx.Node]] = field(default_factory=list)
    """Outputs of the model that carry heads, each with the role it has them under."""
    written: list[tuple[str, fx.Node]] = field(default_factory=list)
    """``copy_`` nodes that write keys or values into a cache."""
    joined: dict[tuple[str, fx.Node], tuple[str, fx.Node]] = field(default_factory=dict)
    """Values that leave the graph joined to keys (or keys to values): what they are under their own role."""
    narrowed: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    """Reductions over all heads that only become outputs of the model, with their operand."""
    inexact: list[tuple[fx.Node, str]] = field(default_factory=list)
    """Nodes that the user allowed to differ from the masked original, and how they do."""

    @property
    def core(self) -> Core:
        """The first core: a site has several when their outputs meet before one output projection."""
        return self.cores[0]

    def group(self, kv: int) -> tuple[int, int]:
        """First and last canonical query head of canonical KV head ``kv``."""
        members = [c for c, g in enumerate(self.kv_of) if g == kv]
        return members[0], members[-1]
