"""Rewrite: build the smaller region of every site beside the old one, then let the old one go.

The new region is made on demand, from the output projection back to the weights: each node is asked for the part of its
value that the kept heads need. Whatever carries no heads is used as it is, so everything outside the region stays
untouched. KV tensors hold every new KV head once up to the core, where attention itself (enable_gqa), broadcasting,
or an explicit repeat serves it to its query heads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import fx

from sqa_fx.errors import PlanError
from sqa_fx.passes.cut_nodes import CutNodes
from sqa_fx.passes.find import GraphFacts
from sqa_fx.passes.graph import drop_dead_code
from sqa_fx.passes.hints import shape_of
from sqa_fx.passes.layout import Layout
from sqa_fx.passes.parameters import Cut, Tie
from sqa_fx.passes.rewritten import Rewritten
from sqa_fx.passes.site import Refusal, Refused, Site
from sqa_fx.passes.smaller_region import SmallerRegion
from sqa_fx.plan import ParameterPlan, SitePlan


def plan_parameters(sites: list[Site], plans: Mapping[str, SitePlan]) -> tuple[dict[fx.Node, Cut], list[Refusal]]:
    """The cuts that ``plans`` make, by get_attr node, and sites that share a parameter although they use it in
    different ways. Raises PlanError when sites that share a parameter were given different heads."""
    cuts: dict[fx.Node, Cut] = {}
    refused: dict[str, Refusal] = {}
    by_name = {site.name: site for site in sites}
    for site in sites:
        plan = plans.get(site.name)
        if plan is None or plan.identity:
            continue
        layout = Layout(site, plan)
        for use in site.leaves:
            if use.whole:
                layout.check_whole(use)
                continue
            cut = cuts.setdefault(use.node, Cut(use.node, use.axis, shape_of(use.node)[use.axis]))
            try:
                cut.add(layout, use)
            except PlanError as error:
                others = [name for name in cut.sites if name != site.name]
                if any(replace(plans[name], name="") != replace(plan, name="") for name in others):
                    raise
                for name in (*others, site.name):
                    reason = Refused(str(error), use.node, kind="shared weights")
                    refused[name] = reason.refusal(name, by_name[name].core.anchor, by_name[name].place)
    return cuts, list(refused.values())


def plan_ties(sites: list[Site], plans: Mapping[str, SitePlan]) -> dict[fx.Node, ParameterPlan]:
    """The parameters that keep their size, with the entries of merged KV heads averaged in place."""
    ties: dict[fx.Node, Tie] = {}
    for site in sites:
        plan = plans.get(site.name)
        if plan is None or plan.identity:
            continue
        layout = Layout(site, plan)
        for use in site.ties:
            if use.whole:
                layout.check_whole(use)
                continue
            tie = ties.setdefault(use.node, Tie(use.node, use.axis, shape_of(use.node)[use.axis]))
            tie.add(layout, use)
    return {node: tie.plan() for node, tie in ties.items() if tie.blocks}


def rewrite(facts: GraphFacts, sites: list[Site], plans: Mapping[str, SitePlan]) -> Rewritten:
    """Rewrite every site that has a plan other than identity, in place on ``facts.module``.

    Every new region is built before any old one is replaced. A site whose region cannot be built is refused, and the
    others are built again without it, since sites may share parameters.
    """
    module = facts.module
    result = Rewritten()
    wanted = {name: plan for name, plan in plans.items() if not plan.identity}
    while True:
        cuts, refused = plan_parameters(sites, wanted)
        if refused:
            result.refused.extend(refused)
            for refusal in refused:
                del wanted[refusal.name]
            continue
        parameters = CutNodes(module, cuts, plan_ties(sites, wanted))
        builders = []
        for site in sites:
            if site.name in wanted:
                builder = SmallerRegion(facts, site, Layout(site, wanted[site.name]), parameters)
                try:
                    builder.prepare()
                except Refused as reason:
                    refused.append(reason.refusal(site.name, site.core.anchor, site.place, site.heads))
                builders.append(builder)
        refused.extend(_outputs_shared_outside(builders, {r.name for r in refused}))
        if not refused:
            break
        result.refused.extend(refused)
        for refusal in refused:
            del wanted[refusal.name]
        drop_dead_code(module.graph)
    for builder in builders:
        result.outputs[builder.site.name], result.cores[builder.site.name] = builder.commit(result)
    result.notes.extend(f"{what}: {', '.join(names)}" for what, names in result.smaller_outputs.items())
    for builder in builders:
        builder.release_sizes()
    drop_dead_code(module.graph)
    for node in (n for b in builders for _, n in b.site.written):
        module.graph.erase_node(node)
    drop_dead_code(module.graph)
    parameters.finish(result)
    parameters.drop_whole([u for b in builders for u in b.site.leaves if u.whole], result)
    for node in module.graph.nodes:
        node.meta.pop("sqa_step", None)
        node.meta.pop("sqa_key", None)
    module.graph.lint()
    module.recompile()
    return result


def _outputs_shared_outside(builders: Sequence[SmallerRegion], gone: Collection[str]) -> list[Refusal]:
    """Refusals of sites whose output projection also projects something that is not converted: silencing the dropped
    heads there would change it."""
    alive = [b for b in builders if b.site.name not in gone]
    inside = {n for b in alive for n in (*(n for r, n in b.site.labels if r == "o"), *b.projections)}
    found = []
    for builder in alive:
        for use in builder.site.leaves:
            outside = next((u for u in use.node.users if u not in inside), None) if use.role == "o" else None
            if outside is not None:
                reason = Refused(
                    f"parameter {use.node.target} also serves what is not converted, so they stay together",
                    outside,
                    kind="shared weights",
                )
                found.append(reason.refusal(builder.site.name, builder.site.core.anchor, builder.site.place))
                break
    return found
