"""The projections of a site as matrices, and which of their rows or columns belong to which head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqa_fx.passes.following import CORE
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.layout import head_entries
from sqa_fx.passes.projection import Projection, readers
from sqa_fx.passes.site import LeafUse, Site
from sqa_fx.plan import Ranges, to_ranges


@dataclass(frozen=True, eq=False)
class HeadProjection:
    """A projection and, for each head in canonical order, its columns (output projection) or rows (keys, values)."""

    made: Projection
    heads: tuple[Tensor, ...]


def output_projection(module: fx.GraphModule, site: Site) -> HeadProjection | None:
    """The output projection of a site, with the columns of every query head; None when it is not one matrix of which
    every head has as many columns (several projections, heads that share columns)."""
    uses = [u for u in site.leaves if u.role == "o" and not u.whole]
    if len(uses) != 1 or len(site.cores) != 1:
        return None
    # Sites that share the parameter have projections of their own.
    found = [p for p in readers(module, uses[0].node) if (CORE, p.activation) in site.labels]
    if len(found) != 1:
        return None
    members = [(c, c) for c in range(site.heads)]
    heads = _heads(module, site, uses[0], found[0], members, columns=True)
    return None if heads is None else HeadProjection(found[0], heads)


def input_projection(module: fx.GraphModule, site: Site, role: str) -> HeadProjection | None:
    """The projection that makes the queries ("q"), keys ("k") or values ("v") of a site, with the rows of every query
    head or KV head; None when it is not one matrix of which every head has as many rows."""
    uses = [u for u in site.leaves if u.role == role and not u.whole and len(attribute_shape(module, u)) > 1]
    if len(uses) != 1 or len(site.cores) != 1:
        return None
    found = [p for p in readers(module, uses[0].node) if (role, p.node) in site.labels]
    if len(found) != 1:
        return None
    by_query = [(c, c) for c in range(site.heads)]
    members = by_query if role == "q" else [site.group(g) for g in range(site.kv_heads)]
    heads = _heads(module, site, uses[0], found[0], members, columns=False)
    return None if heads is None else HeadProjection(found[0], heads)


def attribute_shape(module: fx.GraphModule, use: LeafUse) -> tuple[int, ...]:
    """The shape of the parameter that ``use`` is about."""
    return tuple(attribute(module, use.node.target).shape) if use.node.op == "get_attr" else ()


def _heads(
    module: fx.GraphModule,
    site: Site,
    use: LeafUse,
    made: Projection,
    members: list[tuple[int, int]],
    columns: bool,
) -> tuple[Tensor, ...] | None:
    line = made.line(attribute_shape(module, use), use.axis, columns)
    if line is None:
        return None
    heads = []
    for member in members:
        positions = [torch.nonzero(line == e).reshape(-1) for e in head_entries(site, use, member)]
        heads.append(torch.cat(positions) if positions else line.new_empty(0))
    sizes = {h.numel() for h in heads}
    if len(sizes) != 1 or 0 in sizes or torch.cat(heads).unique().numel() != sum(h.numel() for h in heads):
        return None
    return tuple(heads)


def head_ranges(site: Site, use: LeafUse, kv_head: int) -> list[Ranges]:
    """The entries of a parameter that belong to a KV head, or to each query head that reads it: the blocks that turn
    with it."""
    first, last = site.group(kv_head)
    members = [(first, last)] if site.kinds[use.role] == "kv" else [(c, c) for c in range(first, last + 1)]
    return [to_ranges(head_entries(site, use, m)) for m in members]
