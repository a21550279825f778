"""One captured graph: rewritten as planned, proved, and reported on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from sqa_fx.calibration import Spool
from sqa_fx.errors import PlanError
from sqa_fx.passes.aten_call import argument, op_name
from sqa_fx.passes.capture import Captured, clone_graph, dynamic_sizes
from sqa_fx.passes.cut_nodes import Holders, cut_unread
from sqa_fx.passes.find import SDPA
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.hints import hint, value_of
from sqa_fx.passes.locate import named, nodes_at
from sqa_fx.passes.parameters import cut_tensor
from sqa_fx.passes.pipeline import Analysis, Timings, run_passes
from sqa_fx.passes.record import Call
from sqa_fx.passes.refit import Refit
from sqa_fx.passes.rewritten import Rewritten
from sqa_fx.passes.rotation import turned_weights
from sqa_fx.passes.site import Refusal, Site
from sqa_fx.passes.statistics import SiteStatistics
from sqa_fx.passes.verify import Comparison, Inexact, Precision, Proof, refitted_tensor, worst
from sqa_fx.passes.verify import verify as prove
from sqa_fx.plan import Plan, Rotation, SitePlan
from sqa_fx.repair import repair
from sqa_fx.report import OtherMixerReport, Report, SiteReport, refused_entry
from sqa_fx.trace_log import log_graph


class NothingRewritten(PlanError):
    """Every planned site of a graph was refused when it was to be rewritten."""

    def __init__(self, refused: Sequence[Refusal]) -> None:
        miss = refused[0]
        super().__init__(
            f"no site could be rewritten; {named(miss.name, miss.place)}: {miss.reason} "
            f"(node {nodes_at(miss.nodes, miss.node_locations, miss.place.where)}); to convert: {miss.advice}"
        )
        self.refused = [refused_entry(r) for r in refused]


@dataclass(frozen=True)
class FromData:
    """What calibration data adds to a conversion: rotations before the cut, and a repair after it (of the sites in
    ``statistics`` with their values)."""

    rotations: tuple[Rotation, ...]
    matrices: Mapping[str, Tensor]
    spool: Spool | None = None
    statistics: Mapping[str, SiteStatistics] = field(default_factory=dict)


def convert_graph(
    captured: Captured,
    analysis: Analysis,
    plans: Mapping[str, SitePlan],
    given: Plan | None,
    verify: bool | Precision,
    timings: Timings,
    calls: Sequence[Call] = (),
    from_data: FromData | None = None,
) -> tuple[Plan, Report]:
    """Rewrite ``captured.graph_module`` in place as ``plans`` say, and prove it on its example inputs and on ``calls``.

    ``given`` is the whole plan that ``plans`` come from, when the user gave one. Raises NothingRewritten, PlanError and
    VerifyError.
    """
    original = clone_graph(captured.graph_module)
    if given is not None:
        from_data = FromData(given.rotations, given.tensors)
    if from_data is not None and from_data.rotations:
        _turn(captured.graph_module, from_data)
    log_graph("before", original)
    before = parameter_count(captured.graph_module)
    done = run_passes(analysis, dict(plans), timings)
    log_graph("converted", captured.graph_module)
    converted = {name: entry for name, entry in plans.items() if name not in {r.name for r in done.refused}}
    if not converted:
        raise NothingRewritten(done.refused)
    made = Plan(tuple(converted.values()), done.parameters, done.inputs)
    if given is not None and given.parameters:
        read = {str(n.target) for n in captured.graph_module.graph.find_nodes(op="get_attr")}
        if not given.covers(made, read):
            raise PlanError("the plan cuts other parameters than this model needs: it was made for another model")
        names = {p.name for p in made.parameters}
        unread = cut_unread(captured.graph_module, [p for p in given.parameters if p.name not in names])
        made = replace(made, parameters=(*made.parameters, *unread))
    fits: Mapping[str, Refit] = {}
    if from_data is not None:
        made = replace(made, rotations=from_data.rotations, tensors=dict(from_data.matrices))
    if given is not None and given.refitted:
        _refit(captured.graph_module, given)
        made = replace(made, refitted=given.refitted)
    elif from_data is not None and from_data.spool is not None:
        spool, statistics = from_data.spool, from_data.statistics
        of = {s.name: (s, statistics[s.name]) for s in analysis.sites if s.name in statistics}
        found = timings.timed("repair", lambda: repair(original, captured.graph_module, made, done.outputs, spool, of))
        fits = found.sites
        done.notes.extend(found.notes)
        refitted = tuple(name.removeprefix("refitted/") for name in found.tensors)
        made = replace(made, refitted=refitted, tensors={**made.tensors, **found.tensors})
    proof = None
    if verify:
        precision: Precision = verify if isinstance(verify, str) else "float64"
        inexact = Inexact(done.inexact, frozenset(done.inexact_outputs), done.narrowed)
        comparison = Comparison(original, captured.graph_module, made, done.outputs, done.carried, inexact)
        for call in (Call(captured.args, captured.kwargs), *calls):
            proof = timings.timed(
                "verify",
                lambda call=call, first=proof: worst(  # type: ignore[misc]
                    first, prove(comparison, call.args, call.kwargs, precision)
                ),
            )
    return made, graph_report(captured, analysis, converted, done, proof, before, timings, fits)


def _turn(module: fx.GraphModule, data: FromData) -> None:
    """Turn heads of ``module`` as planned. Raises PlanError when the plan turns what the model does not have."""
    try:
        turned = turned_weights(module, data.rotations, data.matrices)
    except AttributeError as error:
        raise PlanError(f"the plan turns heads of a parameter that this model does not have: {error}") from error
    holders = Holders(module)
    for name, tensor in turned.items():
        holders.put(attribute(module, name), tensor)


def _refit(module: fx.GraphModule, plan: Plan) -> None:
    """Give the cut parameters the values that the plan has for them. Raises PlanError when it has none that fit."""
    holders = Holders(module)
    for name in plan.refitted:
        new = refitted_tensor(plan, name)
        try:
            old = attribute(module, name)
        except AttributeError as error:
            raise PlanError(f"the plan refits {name}, which this model does not have") from error
        if new.shape != old.shape:
            raise PlanError(
                f"the plan refits {name} with a tensor of shape {list(new.shape)}; cut, it has shape {list(old.shape)}"
            )
        holders.put(old, new.to(old))


def cut_inputs(
    graph: fx.Graph, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of the original graph as the rewritten one takes them: caches hold the keys and values of the heads
    that stay."""
    plans = {p.name: p for p in plan.inputs}
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    names = [str(n.target) for n in graph.find_nodes(op="placeholder")]
    cut = [
        cut_tensor(leaf.detach(), plans[name]) if name in plans else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    if not plans:
        return args, dict(kwargs)
    made: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(cut, spec)
    return made


def parameter_count(module: nn.Module) -> int:
    """How many numbers the parameters of ``module`` hold."""
    return sum(p.numel() for p in module.parameters())


def graph_report(
    captured: Captured,
    analysis: Analysis,
    plans: Mapping[str, SitePlan],
    done: Rewritten | None,
    proof: Proof | None,
    parameters_before: int,
    timings: Timings,
    fits: Mapping[str, Refit] | None = None,
) -> Report:
    """The report on one graph, converted (``done``) or only looked at; ``fits`` is how its sites were repaired."""
    errors = {s.name: s.error for s in proof.sites} if proof is not None else {}
    forms = _attention_forms(captured.graph_module, done)
    dynamic, static = dynamic_sizes(captured.graph_module)
    fixed = (
        [f"the rewrite fixed sizes: {', '.join(captured.dynamic)} were free before"]
        if len(dynamic) != len(captured.dynamic) or sum(map(_free, dynamic)) != sum(map(_free, captured.dynamic))
        else []
    )
    report = Report(
        parameters_before=parameters_before,
        parameters_after=parameter_count(captured.graph_module),
        dynamic=dynamic,
        static=static,
        notes=[*captured.notes, *fixed, *analysis.notes, *(done.notes if done is not None else ())],
        proof=proof.to_json() if proof is not None else None,
        milliseconds=timings.milliseconds,
    )
    refused = [*analysis.refusals, *(done.refused if done is not None else ())]
    gone = {r.name for r in done.refused} if done is not None else set()
    report.sites = [
        _site_report(s, plans.get(s.name), forms.get(s.name, ""), errors.get(s.name), (fits or {}).get(s.name))
        for s in analysis.sites
        if s.name not in gone
    ]
    report.refused = [refused_entry(r) for r in refused]
    report.other_mixers = [OtherMixerReport(m.name, m.place.where, m.what) for m in analysis.other_mixers]
    if proof is not None:
        report.notes.extend(proof.notes)
    return report


def _free(entry: str) -> int:
    """How many sizes of "name[sizes]" are free."""
    return sum(not size.strip().isdigit() for size in entry.partition("[")[2].rstrip("]").split(","))


def _attention_forms(module: fx.GraphModule, done: Rewritten | None) -> dict[str, str]:
    """Per site: what kind of node computes its attention now."""
    by_name = {n.name: n for n in module.graph.nodes}
    forms = {}
    for site, names in (done.cores if done is not None else {}).items():
        node = by_name.get(names[0])
        if node is None:
            forms[site] = "sdpa"
        elif op_name(node) == SDPA:
            flags = [f for f, on in (("causal", argument(node, "is_causal")), ("gqa", argument(node, "enable_gqa")),
                                     ("mask", argument(node, "attn_mask") is not None)) if on]  # fmt: skip
            forms[site] = " ".join(["sdpa", *flags])
        else:
            forms[site] = "softmax"
    return forms


def _site_report(site: Site, plan: SitePlan | None, form: str, error: float | None, fit: Refit | None) -> SiteReport:
    hq = plan.hq if plan is not None else site.heads
    hkv = plan.hkv if plan is not None else site.kv_heads
    v_dim = int(hint(value_of(site.core.v).shape[-1]))
    elements = sum(math.prod(int(hint(n)) for n in value_of(core.value).shape) for core in site.cores)
    # Every output element of a core is a sum over kv_len; the scores cost head_dim per element of the same grid.
    before = 2 * (elements // v_dim) * site.kv_len * (site.head_dim + v_dim)
    wide = max(hq, hkv)
    width = value_of(site.core.v).element_size() * (site.head_dim + v_dim)
    return SiteReport(
        name=site.name,
        heads=site.heads,
        kv_heads=site.kv_heads,
        hq=hq,
        hkv=hkv,
        head_dim=site.head_dim,
        q_len=site.q_len,
        kv_len=site.kv_len,
        flops_before=before,
        flops_after=before * wide // site.heads,
        kv_bytes_before=site.kv_heads * width,
        kv_bytes_after=hkv * width,
        attention=form,
        query_heads=plan.query_heads if plan is not None else (),
        kv_groups=plan.kv_groups if plan is not None else (),
        proof_error=error,
        location=site.place.where,
        inexact="; ".join(f"{why} (node {node.name})" for node, why in site.inexact),
        attentions=len(site.cores),
        error_before_repair=None if fit is None or math.isnan(fit.before) else fit.before,
        error_after_repair=None if fit is None or math.isnan(fit.after) else fit.after,
    )
