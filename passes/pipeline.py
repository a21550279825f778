"""The passes in order, each timed and followed by the check of the graph."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, fx

from sqa_fx.errors import NoAttentionError, PlanError
from sqa_fx.passes.analyse import analyse
from sqa_fx.passes.check import check_graph
from sqa_fx.passes.choose import check_fit, choose, weight_scores
from sqa_fx.passes.evidence import Evidence
from sqa_fx.passes.find import GraphFacts, find_cores
from sqa_fx.passes.head_scores import data_scores
from sqa_fx.passes.locate import location, named, nodes_at
from sqa_fx.passes.mixers import OtherMixer, other_mixers
from sqa_fx.passes.rewrite import rewrite
from sqa_fx.passes.rewritten import Rewritten
from sqa_fx.passes.simplify import simplify
from sqa_fx.passes.site import Refusal, Refused, Site
from sqa_fx.passes.statistics import SiteStatistics
from sqa_fx.plan import Plan, SitePlan
from sqa_fx.request import MERGED_BY_DATA, WITHOUT_DATA, HeadChoice, Request, check_patterns, resolve, rounding

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Timings:
    """Milliseconds of each pass; ``on_pass(name, milliseconds)`` is told as each one ends."""

    milliseconds: dict[str, float] = field(default_factory=dict)
    on_pass: Callable[[str, float], None] | None = None

    def timed(self, name: str, call: Callable[[], T]) -> T:
        """Run ``call`` as pass ``name``."""
        start = time.perf_counter()
        result = call()
        spent = (time.perf_counter() - start) * 1e3
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + spent
        log.debug("%s: %.1f ms", name, spent)
        if self.on_pass is not None:
            self.on_pass(name, spent)
        return result


@dataclass
class Analysis:
    """The sites of a graph, convertible and refused."""

    facts: GraphFacts
    sites: list[Site]
    refusals: list[Refusal]
    other_mixers: list[OtherMixer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require_sites(self) -> None:
        """Raise NoAttentionError, naming the nearest miss, when nothing can be converted."""
        if self.sites:
            return
        others = "".join(f"; seen instead: {m}" for m in self.other_mixers[:1])
        if len(self.other_mixers) > 1:
            others += f", and {len(self.other_mixers) - 1} more"
        if not self.refusals:
            raise NoAttentionError(
                "no attention found: the graph holds no scaled_dot_product_attention, and no softmax "
                f"between two products of activations{others}"
            )
        miss = self.refusals[0]
        more = f" ({len(self.refusals) - 1} more sites were refused)" if len(self.refusals) > 1 else ""
        error = NoAttentionError(
            f"no convertible attention found; nearest miss: {named(miss.name, miss.place)}, refused because "
            + miss.reason
            + (f", at node {nodes_at(miss.nodes, miss.node_locations, miss.place.where)}" if miss.nodes else "")
            + f"; to convert: {miss.advice}"
            + more
            + others
        )
        error.kinds = tuple(r.kind for r in self.refusals)
        raise error


def find_sites(module: fx.GraphModule, allow_inexact: bool = False, fixed_caches: bool = False) -> Analysis:
    """Find and analyse every attention site of the graph. ``allow_inexact`` lets norms over all heads run over the kept
    ones; ``fixed_caches`` keeps the shapes of keys and values that are inputs or outputs of the graph."""
    facts = GraphFacts(module, allow_inexact, fixed_caches)
    found = find_cores(facts)
    sites, refusals = [], list(found.refusals)
    joined: set[fx.Node] = set()
    for name, core in found.cores:
        if core.value in joined:
            continue
        try:
            sites.append(analyse(facts, name, core))
        except Refused as refused:
            together = {c.value for c in refused.cores} or {core.value}
            refusals.extend(refused.refusal(n, c.anchor) for n, c in found.cores if c.value in together)
            joined |= together
            continue
        joined.update(c.value for c in sites[-1].cores)
    return Analysis(facts, sites, refusals, other_mixers(facts, sites, refusals))


def make_plan(
    analysis: Analysis,
    hq: Request,
    hkv: Request,
    heads_by: HeadChoice,
    kv_merge: str,
    all_patterns: bool = True,
    evidence: Evidence | None = None,
) -> dict[str, SitePlan]:
    """The plan of every site that the request names. Sites that share weights are ranked together.

    ``all_patterns`` demands that every pattern of the request names a site of this graph. ``evidence`` is what
    calibration data said of the sites; choices that need data fall back to others where it says nothing of a site, and
    the notes say so.
    """
    names = [s.name for s in analysis.sites]
    if all_patterns:
        check_patterns(hq, names, "hq")
        check_patterns(hkv, names, "hkv")
    wanted = {}
    for s in analysis.sites:
        with _located(s):
            wanted[s.name] = resolve(s.name, s.heads, s.kv_heads, hq, hkv)
    rounded = [rounding(s.name, s.heads, s.kv_heads, hq, hkv) for s in analysis.sites]
    analysis.notes.extend(note for note in rounded if note)
    plans: dict[str, SitePlan] = {}
    for group in _tied(analysis.sites):
        known = evidence.of(group) if evidence is not None else None
        scores, by = _ranking(analysis, group, heads_by, known)
        for site in group:
            numbers = wanted[site.name]
            if numbers is None:
                continue
            own = scores if scores is None or len(scores) == site.heads else weight_scores(analysis.facts.module, site)
            merge, distances = kv_merge, None
            merged = site.kv_heads if site.kv_heads < site.heads else max(numbers)
            if merge in MERGED_BY_DATA and numbers[1] < merged:
                distances = evidence.distances(site, merge) if evidence is not None else None
                if distances is None:
                    merge = "select"
                    analysis.notes.append(
                        f"site {site.name!r}: its KV heads cannot be turned onto each other, so the best ones are kept"
                    )
            with _located(site):
                plans[site.name] = choose(site, *numbers, own, by, merge, known, distances)
    return plans


def _ranking(
    analysis: Analysis, group: Sequence[Site], heads_by: HeadChoice, known: SiteStatistics | None
) -> tuple[Tensor | None, HeadChoice]:
    """Scores of the heads of sites that share weights, and by what their heads are really chosen."""
    if not isinstance(heads_by, str) or heads_by == "first":
        return None, heads_by
    if heads_by not in WITHOUT_DATA:
        if known is not None:
            return data_scores(known, "importance" if heads_by == "reconstruct" else heads_by), heads_by
        names = ", ".join(repr(s.name) for s in group)
        analysis.notes.append(
            f"site {names}: the output projection is not one matrix over all heads, so that calibration data says "
            "nothing of it; its heads are chosen by weights"
        )
    each = [weight_scores(analysis.facts.module, s) for s in group]
    if len({len(e) for e in each}) > 1:
        return None, "weights"
    scores = each[0] / each[0].mean().clamp(min=1e-30)
    for e in each[1:]:
        scores = scores + e / e.mean().clamp(min=1e-30)
    return scores, "weights"


@contextlib.contextmanager
def _located(site: Site) -> Iterator[None]:
    """Add the line of ``site`` to a PlanError about it."""
    try:
        yield
    except PlanError as error:
        if site.place.where:
            raise PlanError(f"{error} (the site is at {site.place.where})") from error
        raise


def _tied(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites grouped by the parameters they share."""
    owner: dict[fx.Node, int] = {}
    groups: list[list[Site]] = []
    for site in sites:
        found = {owner[use.node] for use in site.leaves if use.node in owner}
        if found:
            target = min(found)
            groups[target].append(site)
            for other in found - {target}:
                groups[target].extend(groups[other])
                groups[other].clear()
                for node, place in list(owner.items()):
                    if place == other:
                        owner[node] = target
        else:
            target = len(groups)
            groups.append([site])
        for use in site.leaves:
            owner[use.node] = target
    return [g for g in groups if g]


def fit_plan(analysis: Analysis, plan: Plan) -> dict[str, SitePlan]:
    """A given plan by site. Raises PlanError when it does not fit the graph."""
    sites = {s.name: s for s in analysis.sites}
    for entry in plan.sites:
        if entry.name not in sites:
            raise PlanError(
                f"the plan names site {entry.name!r}, which this model does not have; it has: {', '.join(sites)}"
            )
        with _located(sites[entry.name]):
            check_fit(sites[entry.name], entry)
    return {entry.name: entry for entry in plan.sites}


def run_passes(analysis: Analysis, plans: dict[str, SitePlan], timings: Timings) -> Rewritten:
    """Rewrite and simplify ``analysis.facts.module`` in place."""
    module = analysis.facts.module
    try:
        result = timings.timed("rewrite", lambda: rewrite(analysis.facts, analysis.sites, plans))
    except Refused as refused:
        raise PlanError(
            f"the request cannot be carried out: {refused.reason} "
            f"(node {nodes_at(refused.nodes, [location(n) for n in refused.at])})"
        ) from refused
    check_graph(module, "rewrite")
    renamed = timings.timed("simplify", lambda: simplify(module, {n for names in result.cores.values() for n in names}))
    result.cores = {site: tuple(renamed.get(n, n) for n in names) for site, names in result.cores.items()}
    check_graph(module, "simplify")
    return result
