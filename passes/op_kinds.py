"""What an op does to its dimensions: the kinds that everything inside an attention region is of.

A *move* only re-arranges elements, so it is understood by running it on element indices. An *aligned* op computes each
output element from operand elements at matching positions: elementwise ops, norms, reductions and contractions all are
aligned, and differ only in how operand dimensions map to output dimensions. The rest is opaque.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Operand:
    """One tensor operand of an aligned op.

    ``dims[i]`` tells what operand dimension ``i`` is: an output dimension (>= 0), a contracted or reduced one
    (negative; equal numbers are contracted with each other), or None for a broadcast dimension of size 1.
    """

    node: fx.Node
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class Aligned:
    """An op whose output positions are operand positions; ``locked`` output dimensions are mixed (softmax, norms).
    ``joins``: operand elements that share an output position become one number there (complex from two reals)."""

    operands: tuple[Operand, ...]
    locked: frozenset[int] = frozenset()
    contraction: bool = False
    joins: bool = False
    blocks: tuple[tuple[int, int], ...] = ()
    """Output dimensions that are mixed within blocks of so many entries (the channel groups of a group norm)."""


@dataclass(frozen=True)
class Move:
    """An op that only moves elements of ``sources``."""

    sources: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Opaque:
    """An op that head labels cannot cross. ``channels`` is the output dimension along which its weights make channels
    (a projection that cannot be cut), if it has one."""

    reason: str
    channels: int | None = None


Step = Aligned | Move | Opaque
