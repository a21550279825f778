"""What calibration data said of the sites of a graph, and the rotations that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from sqa_fx.passes.allowed_rotations import KEYS, VALUES, allowed_rotations, rotations_of
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.pairing import Likeness
from sqa_fx.passes.rotation import Structure
from sqa_fx.passes.site import Site
from sqa_fx.passes.site_projections import kv_projection, output_projection
from sqa_fx.passes.statistics import Flat, Moments, SiteStatistics
from sqa_fx.plan import Rotation, SitePlan


@dataclass
class Evidence:
    """Statistics by site, and the rotations that each site allows its keys and values."""

    statistics: dict[str, SiteStatistics]
    keys: Mapping[str, Structure] = field(default_factory=dict)
    values: Mapping[str, Structure] = field(default_factory=dict)

    def of(self, group: Sequence[Site]) -> SiteStatistics | None:
        """The statistics of sites that share weights, together; None when there are none of them all, or when they
        have output projections of their own."""
        found = [self.statistics[s.name] for s in group if s.name in self.statistics]
        if len(found) != len(group) or len({f.projection.made.weight for f in found}) != 1:
            return None
        total = found[0]
        for other in found[1:]:
            total = total + other
        return total

    def likeness(self, site: Site) -> tuple[Likeness, Likeness] | None:
        """How alike the keys and the values of the site's KV heads are; None when they cannot be turned or compared."""
        own = self.statistics.get(site.name)
        if own is None or own.keys is None or own.values is None:
            return None
        if own.keys.second is None or own.values.second is None:
            return None
        if site.name not in self.keys or site.name not in self.values:
            return None
        return (
            Likeness(own.keys.second, own.keys.width // site.kv_heads, self.keys[site.name]),
            Likeness(own.values.second, own.values.width // site.kv_heads, self.values[site.name]),
        )

    def distances(self, site: Site) -> Tensor | None:
        """[kv_heads, kv_heads]: what merging two KV heads loses of their keys and of their values, added."""
        both = self.likeness(site)
        if both is None:
            return None
        found = torch.zeros(site.kv_heads, site.kv_heads, dtype=torch.float64)
        for a in range(site.kv_heads):
            for b in range(a):
                found[a, b] = found[b, a] = sum(part.distance(a, b) for part in both)
        return found

    def rotations(self, site: Site, plan: SitePlan) -> tuple[list[Rotation], dict[str, Tensor]]:
        """The rotations that lay the KV heads which ``plan`` merges on each other."""
        both = self.likeness(site)
        rotations: list[Rotation] = []
        matrices: dict[str, Tensor] = {}
        if both is None or plan.kv_merge != "aligned":
            return rotations, matrices
        number = {model: g for g, model in enumerate(site.model_kv_heads)}
        for part, roles in zip(both, (KEYS, VALUES), strict=True):
            turns: dict[int, Tensor] = {}
            for group in plan.kv_groups:
                if len(group) > 1:
                    made = part.turns([number[g] for g in group])
                    turns |= {g: turn.cpu() for g, turn in made.items() if g != number[group[0]]}
            own, named = rotations_of(site, roles, turns)
            rotations += own
            matrices |= named
        return rotations, matrices

    def all_rotations(
        self, sites: Sequence[Site], plans: Mapping[str, SitePlan]
    ) -> tuple[tuple[Rotation, ...], dict[str, Tensor]]:
        """The rotations of all planned sites."""
        rotations: list[Rotation] = []
        matrices: dict[str, Tensor] = {}
        for site in sites:
            if site.name in plans:
                own, named = self.rotations(site, plans[site.name])
                rotations += own
                matrices |= named
        return tuple(rotations), matrices


def begin(module: fx.GraphModule, sites: Sequence[Site]) -> dict[str, SiteStatistics]:
    """Empty statistics of every site whose output projection is one matrix."""
    found = {}
    for site in sites:
        output = output_projection(module, site)
        if output is None:
            continue
        weight = attribute(module, output.made.weight).detach()
        keys, values = kv_projection(module, site, "k"), kv_projection(module, site, "v")
        empty = torch.zeros(site.heads, dtype=torch.float64)
        found[site.name] = SiteStatistics(
            projection=output,
            weight=output.made.matrix(weight),
            has_bias=output.made.bias is not None,
            key_projection=keys,
            value_projection=values,
            output=Moments(output.made.index.size(1)),
            keys=Moments(sum(h.numel() for h in keys.heads)) if keys is not None else None,
            values=Moments(sum(h.numel() for h in values.heads)) if values is not None else None,
            norms=empty.clone(),
            taylor=empty.clone(),
            fisher=empty.clone(),
        )
    return found


def allow_rotations(module: fx.GraphModule, sites: Sequence[Site], evidence: Evidence, inputs: Flat) -> None:
    """Find out which rotations the sites with statistics allow."""
    known = [s for s in sites if s.name in evidence.statistics]
    evidence.keys = allowed_rotations(module, known, KEYS, inputs)
    evidence.values = allowed_rotations(module, known, VALUES, inputs)
