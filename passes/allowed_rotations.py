"""Which rotations of its heads a site allows, found by trial: turned weights must not change what the site computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from sqa_fx.passes.rotation import Structure, structures, turned_weights
from sqa_fx.passes.site import LeafUse, Site
from sqa_fx.passes.site_projections import head_ranges, output_projection
from sqa_fx.passes.verify import TOLERANCE, MaskedRun, distance
from sqa_fx.plan import Rotation, from_ranges

KEYS, VALUES = ("q", "k"), ("o", "v")
"""The roles whose parameters turn together: what reads a head, and the head."""


def rotations_of(
    site: Site, roles: Sequence[str], turns: Mapping[int, Tensor]
) -> tuple[list[Rotation], dict[str, Tensor]]:
    """The rotations of all parameters of ``roles`` by ``turns`` (one matrix for each canonical KV head), and the
    matrices by name."""
    found: list[Rotation] = []
    matrices: dict[str, Tensor] = {}
    for kv_head, turn in turns.items():
        name = f"rotation/{site.name}/{roles[-1]}/{site.model_kv_heads[kv_head]}"
        matrices[name] = turn
        for use in _turning(site, roles):
            for ranges in head_ranges(site, use, kv_head):
                found.append(Rotation(str(use.node.target), use.axis, ranges, name))
    return found, matrices


def _turning(site: Site, roles: Sequence[str]) -> list[LeafUse]:
    return [u for u in site.leaves if u.role in roles]


def _width(site: Site, roles: Sequence[str]) -> int | None:
    """The channels of a head, if all parameters of ``roles`` have as many for each; None where they do not, or where
    something other than a parameter of this site alone (a cache, a merged tie) would have to turn too."""
    uses = _turning(site, roles)
    if any(u.whole or u.node.op != "get_attr" for u in uses) or {u.role for u in uses} != set(roles):
        return None
    if any(u.role in roles for u in site.ties) or any(role in roles for role, _ in site.frontiers):
        return None
    widths = {len(from_ranges(r)) for u in uses for g in range(site.kv_heads) for r in head_ranges(site, u, g)}
    return widths.pop() if len(widths) == 1 else None


def allowed_rotations(
    module: fx.GraphModule, sites: Sequence[Site], roles: Sequence[str], inputs: Sequence[object]
) -> dict[str, Structure]:
    """For every site that allows any: the freest structure under which random maps of its heads leave its output as it
    is when what reads the heads undoes them, in float64, on ``inputs``; rotations where no others are allowed. Every
    site is judged on the original's inputs to it.
    """
    shared: dict[fx.Node, int] = {}
    for site in sites:
        for node in {u.node for u in site.leaves}:
            shared[node] = shared.get(node, 0) + 1
    outputs = {}
    for site in sites:
        made = output_projection(module, site)
        if made is not None and not any(shared[u.node] > 1 for u in site.leaves):
            outputs[site.name] = made.made.node.name
    widths = {s.name: w for s in sites if s.name in outputs and (w := _width(s, roles)) is not None}
    left = [s for s in sites if s.name in widths]
    found: dict[str, Structure] = {}
    if not left:
        return found
    plain = MaskedRun(module, {}, True, set(outputs.values()))
    with torch.no_grad():
        plain.run(*inputs, enable_io_processing=False)
    generator = torch.Generator().manual_seed(0)
    # Nothing lies between values and output that pairs could commute with and others could not.
    count = 1 if roles == VALUES else max(len(structures(w)) for w in widths.values())
    for linear, attempt in [(linear, attempt) for linear in (True, False) for attempt in range(count)]:
        turned: dict[str, Tensor] = {}
        for site in left:
            structure = _candidate(widths[site.name], attempt)
            if structure is not None:
                maker = structure.stretched if linear else structure.random
                turns = {g: maker(widths[site.name], generator) for g in range(site.kv_heads)}
                undone = {g: torch.linalg.inv(turn).T for g, turn in turns.items()}
                reader, read = rotations_of(site, roles[:1], undone), rotations_of(site, roles[1:], turns)
                turned |= turned_weights(module, [*reader[0], *read[0]], {**reader[1], **read[1]}, wide=True)
        run = MaskedRun(module, turned, True, set(outputs.values()))
        run.replaced = plain.seen
        with torch.no_grad():
            run.run(*inputs, enable_io_processing=False)
        for site in list(left):
            structure = _candidate(widths[site.name], attempt)
            name = outputs[site.name]
            if structure is not None and distance(plain.seen[name], run.seen[name]) <= TOLERANCE[torch.float64]:
                found[site.name] = replace(structure, linear=linear)
                left.remove(site)
        if not left:
            break
    return found


def _candidate(size: int, attempt: int) -> Structure | None:
    known = structures(size)
    return known[attempt] if attempt < len(known) else None
