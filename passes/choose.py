"""Choose which heads stay, by scores or as a set, balanced over the KV groups that the result will have."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from sqa_fx.errors import PlanError
from sqa_fx.passes.eliminate import eliminate
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.labels import high, low
from sqa_fx.passes.pairing import grouped
from sqa_fx.passes.site import Site
from sqa_fx.passes.statistics import SiteStatistics
from sqa_fx.plan import SitePlan
from sqa_fx.request import HeadChoice, check


def weight_scores(module: fx.GraphModule, site: Site) -> Tensor:
    """The Frobenius norm of each head's value block times that of its output block: [heads], canonical order.

    A head's contribution to the output is W_o[:, h] W_v[h] x, whose size the product of the two norms bounds.
    """
    norms = {}
    for role in ("v", "o"):
        total = torch.zeros(site.heads, dtype=torch.float64)
        for use in (u for u in site.leaves if u.node.op == "get_attr"):
            weight = attribute(module, use.node.target)
            if use.role != role or weight.dim() < 2 or not weight.is_floating_point() or weight.is_meta:
                continue
            if use.whole:
                total[int(low(use.labels)[0])] += float(weight.detach().double().square().sum())
                continue
            energy = weight.detach().double().square().movedim(use.axis, 0).reshape(weight.shape[use.axis], -1).sum(1)
            first, last = low(use.labels), high(use.labels)
            for head in range(site.heads):
                total[head] += energy[((first <= head) & (head <= last)).to(energy.device)].sum().cpu()
        norms[role] = total.sqrt()
    return norms["v"] * norms["o"]


def choose(
    site: Site,
    hq: int,
    hkv: int,
    scores: Tensor | None,
    heads_by: HeadChoice,
    kv_merge: str,
    statistics: SiteStatistics | None = None,
    distances: Tensor | None = None,
) -> SitePlan:
    """The plan of one site. ``scores`` ranks canonical heads (None: first heads win); explicit lists are in model
    numbers. With "reconstruct", ``statistics`` choose a set of heads together instead, see eliminate.

    Kept heads are split evenly over the new KV heads, each of which merges the original KV heads its queries read: such
    that lie beside each other, or, with ``distances`` [kv_heads, kv_heads], that are most alike.
    """
    wide = max(hq, hkv)
    explicit = _explicit(site, heads_by, wide)
    if explicit is not None:
        return _assemble(site, explicit, hq, hkv, "explicit", kv_merge, scores)
    groups = _query_groups(site, wide, hkv, distances)
    if heads_by == "reconstruct":
        assert statistics is not None
        tie_break = statistics.fisher if statistics.samples else None
        found = eliminate(
            statistics.weight.double(), statistics.moments, statistics.projection.heads, wide, groups, tie_break
        )
        kept = found.kept
    else:
        ranking = scores if scores is not None else -torch.arange(site.heads, dtype=torch.float64)
        kept = [c for group in groups for c in _best(group, wide // len(groups), ranking)]
    if site.kv_heads == site.heads and distances is not None and hkv < wide:
        ordered = [c for group in grouped(sorted(kept), hkv, distances) for c in group]
    else:
        ordered = [c for group in groups for c in sorted(set(group) & set(kept))]
    return _assemble(site, ordered, hq, hkv, str(heads_by), kv_merge, scores)


def _explicit(site: Site, heads_by: HeadChoice, wide: int) -> list[int] | None:
    if not isinstance(heads_by, Mapping):
        return None
    for pattern, numbers in heads_by.items():
        if pattern == site.name or fnmatch.fnmatchcase(site.name, pattern):
            chosen = sorted(set(numbers))
            if len(chosen) != len(numbers) or len(chosen) != wide or chosen[0] < 0 or chosen[-1] >= site.heads:
                raise PlanError(
                    f"site {site.name!r}: {list(numbers)} must name {wide} different heads between 0 and "
                    f"{site.heads - 1}"
                )
            canonical = {model: c for c, model in enumerate(site.model_heads)}
            return sorted(canonical[n] for n in chosen)
    raise PlanError(f"heads={dict(heads_by)!r} has no entry for site {site.name!r}")


def _query_groups(site: Site, wide: int, hkv: int, distances: Tensor | None) -> list[list[int]]:
    """Disjoint sets of query heads of which equally many must be kept: one set for each new KV head. With a KV head
    for every query head, any kept heads can be put together: one set of all."""
    if site.kv_heads == site.heads:
        return [list(range(site.heads))]
    share = wide // hkv
    if distances is not None and hkv < site.kv_heads:
        merged = grouped(range(site.kv_heads), hkv, distances)
    else:
        merged = [group.tolist() for group in np.array_split(np.arange(site.kv_heads), hkv)]
    groups = []
    for group in merged:
        members = [c for c, kv in enumerate(site.kv_of) if kv in group]
        if len(members) < share:
            raise PlanError(
                f"site {site.name!r} has {site.heads} query heads on {site.kv_heads} KV heads: a group of "
                f"{len(group)} KV heads cannot give {share} query heads"
            )
        groups.append(members)
    return groups


def _best(members: Sequence[int], count: int, ranking: Tensor) -> list[int]:
    return sorted(members, key=lambda c: (-float(ranking[c]), c))[:count]


def _assemble(
    site: Site, kept: list[int], hq: int, hkv: int, by: str, kv_merge: str, scores: Tensor | None
) -> SitePlan:
    share = len(kept) // hkv
    kv_groups: list[tuple[int, ...]] = []
    for j in range(hkv):
        read = list(dict.fromkeys(site.kv_of[c] for c in kept[j * share : (j + 1) * share]))
        if kv_merge == "select" and len(read) > 1:
            # The KV head whose queries matter most comes first: it is the one that is kept.
            weight = {
                g: sum(float(scores[c]) for c in kept if site.kv_of[c] == g) if scores is not None else 0.0
                for g in read
            }
            read.sort(key=lambda g: -weight[g])
        kv_groups.append(tuple(site.model_kv_heads[g] for g in read))
    flat = [g for group in kv_groups for g in group]
    if len(set(flat)) != len(flat):
        raise PlanError(
            f"site {site.name!r}: the kept heads {[site.model_heads[c] for c in kept]} cannot be split "
            f"evenly over {hkv} KV "
            f"heads, because KV head {next(g for g in flat if flat.count(g) > 1)} would be needed twice"
        )
    wide = len(kept) // hq
    numbers = [site.model_heads[c] for c in kept]
    return SitePlan(
        name=site.name,
        heads=site.heads,
        kv_heads=site.kv_heads,
        hq=hq,
        hkv=hkv,
        head_dim=site.head_dim,
        query_heads=tuple(numbers),
        query_groups=tuple(tuple(numbers[i * wide : (i + 1) * wide]) for i in range(hq)),
        kv_groups=tuple(kv_groups),
        heads_by=by,
        kv_merge=kv_merge,
    )


def check_fit(site: Site, plan: SitePlan) -> None:
    """Raise PlanError unless ``plan`` can be applied to ``site``."""
    if (plan.heads, plan.kv_heads, plan.head_dim) != (site.heads, site.kv_heads, site.head_dim):
        raise PlanError(
            f"the plan of site {site.name!r} is for {plan.heads} query heads, {plan.kv_heads} KV heads, "
            f"head dim {plan.head_dim}; "
            f"the model has {site.heads}, {site.kv_heads}, {site.head_dim}"
        )
    check(site.name, site.heads, site.kv_heads, plan.hq, plan.hkv)
    wide = max(plan.hq, plan.hkv)
    if len(plan.query_heads) != wide or len(set(plan.query_heads)) != wide:
        raise PlanError(
            f"the plan of site {site.name!r} must list {wide} different query heads: {list(plan.query_heads)}"
        )
    canonical = {model: c for c, model in enumerate(site.model_heads)}
    if not set(plan.query_heads) <= set(canonical):
        raise PlanError(f"the plan of site {site.name!r} names query heads that do not exist: {list(plan.query_heads)}")
    if [h for group in plan.query_groups for h in group] != list(plan.query_heads):
        raise PlanError(f"the query groups of site {site.name!r} do not list its query heads in order")
    merged = [g for group in plan.kv_groups for g in group]
    if len(set(merged)) != len(merged):
        raise PlanError(f"site {site.name!r}: a KV head is merged into two groups")
    share = wide // plan.hkv
    for i, head in enumerate(plan.query_heads):
        if site.model_kv_heads[site.kv_of[canonical[head]]] not in plan.kv_groups[i // share]:
            raise PlanError(
                f"site {site.name!r}: query head {head} would read KV group "
                f"{list(plan.kv_groups[i // share])}, into which its own "
                "KV head is not merged"
            )
