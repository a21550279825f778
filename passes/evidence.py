"""What calibration data said of the sites of a graph, and the rotations that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from sqa_fx.passes.allowed_rotations import KEYS, VALUES, allowed_rotations, rotations_of
from sqa_fx.passes.pairing import Likeness
from sqa_fx.passes.projection import weight_of
from sqa_fx.passes.rotation import Structure
from sqa_fx.passes.site import Site
from sqa_fx.passes.site_projections import HeadProjection, input_projection, output_projection
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

    def distances(self, site: Site, kv_merge: str) -> Tensor | None:
        """[kv_heads, kv_heads]: what merging two KV heads loses of their keys and of their values, as shares, added."""
        both = self.likeness(site)
        if both is None:
            return None
        found = torch.zeros(site.kv_heads, site.kv_heads, dtype=torch.float64)
        parts = list(zip(both, self.metrics(site, None), strict=True))
        for a in range(site.kv_heads):
            for b in range(a):
                found[a, b] = found[b, a] = sum(
                    part.joint((a, b), [metrics[a], metrics[b]]).lost
                    if kv_merge == "joint" and metrics is not None
                    else part.distance(a, b)
                    for part, metrics in parts
                )
        return found

    def rotations(self, site: Site, plan: SitePlan) -> tuple[list[Rotation], dict[str, Tensor]]:
        """The changes of basis after which the KV heads that ``plan`` merges can be averaged."""
        both = self.likeness(site)
        rotations: list[Rotation] = []
        matrices: dict[str, Tensor] = {}
        if both is None or plan.kv_merge not in ("aligned", "joint"):
            return rotations, matrices
        number = {model: g for g, model in enumerate(site.model_kv_heads)}
        groups = [[number[g] for g in group] for group in plan.kv_groups if len(group) > 1]
        for part, roles, metrics in zip(both, (KEYS, VALUES), self.metrics(site, plan), strict=True):
            heads: dict[int, Tensor] = {}
            readers: dict[int, Tensor] = {}
            for group in groups:
                joint = plan.kv_merge == "joint" and part.structure is not None and part.structure.linear
                if joint and metrics is not None:
                    maps = part.joint(group, [metrics[g] for g in group])
                    heads |= dict(zip(group, maps.down, strict=True))
                    readers |= dict(zip(group, maps.back, strict=True))
                else:
                    turned = part.turns(group)
                    heads, readers = {**heads, **turned}, {**readers, **turned}
            for role, turns in zip(roles, (readers, heads), strict=True):
                own, named = rotations_of(site, (role,), {g: turn.cpu() for g, turn in turns.items()})
                rotations += own
                matrices |= named
        return rotations, matrices

    def metrics(self, site: Site, plan: SitePlan | None) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """How errors of the keys and of the values of every KV head count, [size, size] each: by the second moments of
        the queries that meet the keys, and by W_o^T W_o; of the query heads that ``plan`` keeps, or of all."""
        own = self.statistics[site.name]
        canonical = {model: c for c, model in enumerate(site.model_heads)}
        kept = {canonical[h] for h in plan.query_heads} if plan is not None else set(range(site.heads))
        readers = [[c for c in range(site.heads) if site.kv_of[c] == g and c in kept] for g in range(site.kv_heads)]
        readers = [r or [site.group(g)[0]] for g, r in enumerate(readers)]
        keys = values = None
        if own.queries is not None and own.queries.second is not None:
            queries = Likeness(own.queries.second, own.queries.width // site.heads, None)
            keys = [_total([queries.block(c, c) for c in each]) for each in readers]
        weight = own.weight.double()
        columns = [c.to(weight.device) for c in own.projection.heads]
        values = [_total([weight[:, columns[c]].T @ weight[:, columns[c]] for c in each]) for each in readers]
        return keys, values

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
        queries, keys, values = (input_projection(module, site, role) for role in "qkv")
        empty = torch.zeros(site.heads, dtype=torch.float64)
        found[site.name] = SiteStatistics(
            projection=output,
            weight=weight_of(module, output.made),
            has_bias=output.made.bias is not None,
            query_projection=queries,
            key_projection=keys,
            value_projection=values,
            output=Moments(output.made.index.size(1)),
            queries=_moments(queries),
            keys=_moments(keys),
            values=_moments(values),
            norms=empty.clone(),
            taylor=empty.clone(),
            fisher=empty.clone(),
        )
    return found


def _total(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _moments(part: HeadProjection | None) -> Moments | None:
    return None if part is None else Moments(sum(h.numel() for h in part.heads))


def allow_rotations(module: fx.GraphModule, sites: Sequence[Site], evidence: Evidence, inputs: Flat) -> None:
    """Find out which rotations the sites with statistics allow."""
    known = [s for s in sites if s.name in evidence.statistics]
    evidence.keys = allowed_rotations(module, known, KEYS, inputs)
    evidence.values = allowed_rotations(module, known, VALUES, inputs)
