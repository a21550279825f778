"""The public verbs: convert and inspect."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import fx, nn

from sqa_fx.assemble import assemble, merged_report, refused_report, require_parts, require_sites
from sqa_fx.calibration import Loss, Spool, calibrate, check_data
from sqa_fx.convert_graph import (
    FromData,
    NothingRewritten,
    convert_graph,
    cut_inputs,
    graph_report,
    parameter_count,
)
from sqa_fx.deferred import DeferredModule
from sqa_fx.errors import CaptureError, InputError, PlanError
from sqa_fx.inputs import example_inputs
from sqa_fx.model_calls import LABELS, inputs_for
from sqa_fx.module import ConvertedModule
from sqa_fx.native import remember_stock
from sqa_fx.partly import PartlyConvertedModule
from sqa_fx.passes.budget import allot, budget_share
from sqa_fx.passes.capture import Captured, capture
from sqa_fx.passes.capture_ways import TRY, DynamicShapes
from sqa_fx.passes.head_scores import GRADIENT_SCORES
from sqa_fx.passes.pipeline import Analysis, Timings, find_sites, fit_plan, make_plan
from sqa_fx.passes.record import Call
from sqa_fx.passes.verify import Precision
from sqa_fx.plan import Plan, SitePlan
from sqa_fx.region_drawing import check_target, draw_regions
from sqa_fx.region_graph import RegionGraph, region_graphs
from sqa_fx.report import Report
from sqa_fx.request import MERGED_BY_DATA, WITHOUT_DATA, HeadChoice, HeadScore, KvMerge, Repairs, Request
from sqa_fx.site_limit import VARIABLE, limited
from sqa_fx.submodules import Part, Parts, depends_on_data, find_parts, plan_parts

Model = nn.Module | torch.export.ExportedProgram


def convert(
    model: Model,
    *,
    hq: Request = None,
    hkv: Request = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    heads: HeadChoice | None = None,
    kv_merge: KvMerge | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    repair: Repairs | None = None,
    dynamic_shapes: DynamicShapes = "auto",
    verify: bool | Precision = True,
    allow_inexact: bool = False,
) -> ConvertedModule | PartlyConvertedModule | DeferredModule:
    """Rewrite the attention of ``model`` into SQA form with its trained weights, prove it, and return the new module.

    ``hq`` and ``hkv`` are the query and KV heads to keep per site: a number, a fraction of the site's own heads
    (0.5), a variant name (``hq="sSQA"``), or a mapping from site patterns to any of these (sites that no pattern
    names stay). With calibration data, ``hq="auto:0.5"`` spends half of the attention FLOPs where heads matter most:
    every site is given as many heads as its measured sensitivity calls for. ``plan`` applies a plan made before
    instead. ``args`` and ``kwargs`` are example inputs as for torch.export.export; without them the model's own
    (``dummy_inputs``, ``default_cfg``) are used, and a model that has none is converted on its first call.

    ``calibration`` is an iterable of batches of model inputs (a tensor, a tuple of arguments, or a mapping of keyword
    arguments each; ``attention_mask`` [batch, tokens] marks the valid tokens). It is read once. ``heads`` says which
    heads stay: "weights" (largest norm of value and output blocks; the default without data), "first", lists by site
    pattern, or with data "reconstruct" (the default: the set from which the site's output can best be fitted again),
    "importance", "activation", "wifv", "taylor" and "fisher" (see passes/head_scores). The last two need gradients, of
    ``loss(outputs, batch)`` where given, else of the model's own distribution. ``kv_merge`` says how KV heads that
    share a group become one: "mean" (the default without data), "select" (the best one stays) or, with data, "joint"
    (the default: the heads that are most alike are paired, and mapped to the one that tells most about both; what
    reads them maps back) or "aligned" (paired, turned onto each other, and averaged). ``repair`` (on with data) fits
    every output projection again in closed form, and the values with it, as far as that helps on held-out samples;
    ``repair="outputs"`` leaves the values alone.

    ``verify`` is True (proof in float64), "native" (in the model's own dtype) or False. ``allow_inexact`` also converts
    sites whose result cannot be exact, because a norm or a mean runs over the outputs or the weights of all heads: it
    runs over the kept ones then; the report marks these sites with how far they are off, and everything behind them
    is still proved. The model passed in is never modified. Where torch.export cannot take the whole model, its largest
    submodules that it can take are converted instead, in a copy of the model that otherwise runs as it did
    (PartlyConvertedModule); the report's notes say so.

    Raises CaptureError, NoAttentionError, PlanError (an impossible request), VerifyError (the proof failed) and
    InputError.
    """
    if plan is None and hq is None and hkv is None:
        raise InputError("say how many heads to keep: hq=, hkv=, or a plan=")
    if plan is not None and not (hq is None and hkv is None):
        raise InputError("a plan holds its own hq and hkv: pass either plan= or hq=/hkv=")
    heads = heads if heads is not None else "weights" if calibration is None else "reconstruct"
    kv_merge = kv_merge if kv_merge is not None else "mean" if calibration is None else "joint"
    _check_choices(heads, kv_merge, calibration, plan, repair)
    _check_budget(hq, hkv, calibration)
    if calibration is not None:
        check_data(calibration)
    inputs = _inputs(model, args, kwargs)
    if inputs is None and calibration is not None:
        batches = iter(calibration)
        first = next(batches, None)
        if first is None:
            raise InputError("calibration= gave no batches (an iterator that was used up already?)")
        assert isinstance(model, nn.Module)
        given, named = inputs_for(model, first)
        inputs = given, {name: value for name, value in named.items() if name not in LABELS}
        calibration = itertools.chain([first], batches)
    options: dict[str, Any] = {
        "hq": hq,
        "hkv": hkv,
        "plan": plan,
        "heads": heads,
        "kv_merge": kv_merge,
        "calibration": calibration,
        "loss": loss,
        "repair": True if repair is None else repair,
        "dynamic_shapes": dynamic_shapes,
        "verify": verify,
        "allow_inexact": allow_inexact,
    }
    if inputs is None:
        assert isinstance(model, nn.Module)
        return DeferredModule(model, lambda a, k: remember_stock(_convert(model, a, k, **options), model))
    return remember_stock(_convert(model, *inputs, **options), model)


def _convert(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    hq: Request,
    hkv: Request,
    plan: Plan | None,
    heads: HeadChoice,
    kv_merge: str,
    calibration: Iterable[Any] | None,
    loss: Loss | None,
    repair: Repairs,
    dynamic_shapes: DynamicShapes,
    verify: bool | Precision,
    allow_inexact: bool,
) -> ConvertedModule | PartlyConvertedModule:
    timings = Timings()
    whole = _capture_whole(model, args, kwargs, dynamic_shapes, timings, allow_inexact)
    if isinstance(whole, Parts):
        if calibration is not None or (plan is not None and (plan.rotations or plan.refitted)):
            raise InputError(
                "calibration data is used where torch.export takes the whole model; this one is converted submodule by "
                f"submodule ({whole.story([])}): convert it without calibration="
            )
        return _convert_parts(whole, hq, hkv, plan, heads, kv_merge, verify, timings)
    captured, analysis = whole
    analysis.require_sites()
    if plan is not None:
        plans = timings.timed("plan", lambda: fit_plan(analysis, plan))
        return _convert_captured(captured, analysis, _named(plans, analysis), plan, verify, timings)
    if calibration is None:
        plans = timings.timed("plan", lambda: make_plan(analysis, hq, hkv, heads, kv_merge))
        return _convert_captured(captured, analysis, _named(plans, analysis), None, verify, timings)
    with Spool(captured) as spool:
        gradients = isinstance(heads, str) and heads in GRADIENT_SCORES
        evidence = timings.timed(
            "calibrate",
            lambda: calibrate(captured, analysis, calibration, spool, gradients, kv_merge in MERGED_BY_DATA, loss),
        )
        share = budget_share(hq)
        if share is not None:
            inputs = next(iter(spool)).inputs
            sites, module = analysis.sites, captured.graph_module
            hq = timings.timed("budget", lambda: allot(module, sites, evidence.statistics, share, inputs))
        plans = timings.timed("plan", lambda: make_plan(analysis, hq, hkv, heads, kv_merge, evidence=evidence))
        plans = _named(plans, analysis)
        rotations, matrices = evidence.all_rotations(analysis.sites, plans)
        from_data = FromData(
            rotations, matrices, spool if repair else None, evidence.statistics if repair is True else {}
        )
        return _convert_captured(captured, analysis, plans, None, verify, timings, from_data=from_data)


def _named(plans: dict[str, SitePlan], analysis: Analysis) -> dict[str, SitePlan]:
    """``plans`` within the limit that the environment sets. Raises PlanError when the request names no site."""
    if not plans:
        raise PlanError(f"no site is named by the request; sites are: {', '.join(s.name for s in analysis.sites)}")
    return _limited(plans, analysis)


def _capture_whole(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: DynamicShapes,
    timings: Timings,
    allow_inexact: bool,
) -> tuple[Captured, Analysis] | Parts:
    """The whole model as one graph, or its submodules where that cannot be. Raises CaptureError where neither can."""
    splits = isinstance(model, nn.Module) and (dynamic_shapes is None or isinstance(dynamic_shapes, str))
    whole: tuple[Captured, Analysis] | None = None
    try:
        captured = timings.timed("capture", lambda: capture(model, args, kwargs, dynamic_shapes))
        whole = captured, timings.timed("find", lambda: find_sites(captured.graph_module, allow_inexact))
        if not splits or not depends_on_data(whole[0].graph_module, whole[1]):
            return whole
        failure = CaptureError("the whole graph has sizes that depend on data")
    except CaptureError as error:
        if not splits:
            raise
        failure = error
    assert isinstance(model, nn.Module)
    why = str(failure).removesuffix(f"; {TRY}")
    found = timings.timed("capture", lambda: find_parts(model, args, kwargs, dynamic_shapes, why, allow_inexact))
    if whole is not None and not found.site_names:
        return whole
    require_parts(found)
    return found


def _convert_captured(
    captured: Captured,
    analysis: Analysis,
    plans: dict[str, SitePlan],
    given: Plan | None,
    verify: bool | Precision,
    timings: Timings,
    calls: Sequence[Call] = (),
    from_data: FromData | None = None,
) -> ConvertedModule:
    """Rewrite and prove one graph, on its example inputs and on ``calls``."""
    plan, report = convert_graph(captured, analysis, plans, given, verify, timings, calls, from_data)
    _own_tensors(captured.graph_module)
    args, kwargs = cut_inputs(captured.graph_module.graph, plan, captured.args, captured.kwargs)
    return ConvertedModule(
        captured.graph_module,
        plan=plan,
        report=report,
        args=args,
        kwargs=kwargs,
        dynamic_shapes=captured.dynamic_shapes,
        training=captured.training,
        signature=captured.signature,
    )


def _limited(plans: dict[str, SitePlan], analysis: Analysis, before: int = 0) -> dict[str, SitePlan]:
    """``plans`` within the limit that the environment sets; the report says which sites it leaves alone."""
    kept, left = limited(plans, before)
    if left:
        analysis.notes.append(f"left as they are because of {VARIABLE} in the environment: {', '.join(left)}")
    return kept


def _convert_parts(
    found: Parts,
    hq: Request,
    hkv: Request,
    plan: Plan | None,
    heads: HeadChoice,
    kv_merge: str,
    verify: bool | Precision,
    timings: Timings,
) -> PartlyConvertedModule:
    """Convert the submodules one by one, and put them into the copy of the model."""
    require_sites(found)
    plans = timings.timed("plan", lambda: plan_parts(found, plan, hq, hkv, heads, kv_merge))
    if not any(plans):
        raise PlanError(f"no site is named by the request; sites are: {', '.join(found.site_names)}")
    before = 0
    for i, (part, own) in enumerate(zip(found.parts, plans, strict=True)):
        plans[i] = _limited(own, part.analysis, before) if own else own
        before += sum(not p.identity for p in plans[i].values())
    done: list[tuple[Part, ConvertedModule]] = []
    reports: list[tuple[Part, Report]] = []
    missed: NothingRewritten | None = None
    for part, own in zip(found.parts, plans, strict=True):
        plain = graph_report(part.captured, part.analysis, {}, None, None, 0, timings)
        try:
            if own:
                converted = _convert_captured(part.captured, part.analysis, own, None, verify, timings, part.calls)
                done.append((part, converted))
                plain = converted.report
        except NothingRewritten as miss:
            missed, plain = miss, refused_report(plain, miss.refused)
        reports.append((part, plain))
    if missed is not None and not done:
        raise missed
    # Inexact sites differ from the masked original, and so does everything after them.
    exact = not any(site.inexact for _, report in reports for site in report.sites)
    return timings.timed("assemble", lambda: assemble(found, done, reports, plan, bool(verify) and exact))


def inspect(
    model: Model,
    *,
    hq: Request = None,
    hkv: Request = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "auto",
    allow_inexact: bool = False,
    graph: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Report:
    """The attention sites of ``model``, convertible and refused, and what ``hq``/``hkv`` would save; nothing is
    converted.

    ``allow_inexact`` counts sites in that :func:`convert` would convert inexactly.
    ``graph`` is an .svg or .png file to draw the region of every site into (needs matplotlib); an existing one is
    replaced only with ``overwrite``.

    Raises CaptureError, PlanError and InputError as :func:`convert` does, MissingError for a drawing without
    matplotlib. No attention is an empty report, not an error.
    """
    target = check_target(graph, overwrite) if graph is not None else None
    inputs = _inputs(model, args, kwargs)
    if inputs is None:
        raise InputError(
            f"{type(model).__name__} says nothing of its inputs: pass args= or kwargs= as you would call it"
        )
    timings = Timings()
    whole = _capture_whole(model, *inputs, dynamic_shapes, timings, allow_inexact)
    if isinstance(whole, Parts):
        report, graphs = _inspect_parts(whole, hq, hkv, timings)
        if target is not None:
            left_alone = [f"{m.name}: {m.what}" for m in report.other_mixers]
            timings.timed("draw", lambda: draw_regions(graphs, target, left_alone=left_alone, overwrite=overwrite))
        return report
    captured, analysis = whole
    plans: dict[str, SitePlan] = {}
    if hq is not None or hkv is not None:
        plans = timings.timed("plan", lambda: make_plan(analysis, hq, hkv, "first", "mean"))
    if target is not None:
        graphs, mixers = region_graphs(analysis, plans), [str(m) for m in analysis.other_mixers]
        timings.timed("draw", lambda: draw_regions(graphs, target, left_alone=mixers, overwrite=overwrite))
    count = parameter_count(captured.graph_module)
    return graph_report(captured, analysis, plans, None, None, count, timings)


def _inspect_parts(found: Parts, hq: Request, hkv: Request, timings: Timings) -> tuple[Report, list[RegionGraph]]:
    plans: list[dict[str, SitePlan]] = [{} for _ in found.parts]
    if hq is not None or hkv is not None:
        plans = timings.timed("plan", lambda: plan_parts(found, None, hq, hkv, "first", "mean"))
    reports = [
        (part, graph_report(part.captured, part.analysis, own, None, None, 0, timings))
        for part, own in zip(found.parts, plans, strict=True)
    ]
    count = parameter_count(found.twin)
    report = merged_report(found, reports, count, count)
    report.notes.insert(0, found.story([part.path for part in found.parts if part.analysis.sites]))
    graphs = [g for part, own in zip(found.parts, plans, strict=True) for g in region_graphs(part.analysis, own)]
    return report, graphs


def _check_choices(
    heads: HeadChoice, kv_merge: str, calibration: Iterable[Any] | None, plan: Plan | None, repair: Repairs | None
) -> None:
    if isinstance(heads, str) and heads not in get_args(HeadScore):
        known = ", ".join(repr(name) for name in get_args(HeadScore))
        raise InputError(f"heads={heads!r}: known are {known}, or a mapping from site patterns to lists of heads")
    if kv_merge not in get_args(KvMerge):
        raise InputError(f"kv_merge={kv_merge!r}: known are {', '.join(repr(name) for name in get_args(KvMerge))}")
    if repair not in (None, True, False, "outputs"):
        raise InputError(f"repair={repair!r}: known are True, False and 'outputs'")
    if calibration is None:
        if (isinstance(heads, str) and heads not in WITHOUT_DATA) or kv_merge in MERGED_BY_DATA or repair:
            what = (
                f"repair={repair!r}"
                if repair
                else f"kv_merge={kv_merge!r}"
                if kv_merge in MERGED_BY_DATA
                else f"heads={heads!r}"
            )
            raise InputError(f"{what} needs calibration=, an iterable of batches of model inputs")
    elif plan is not None:
        raise InputError("a plan holds what its own calibration gave: pass either plan= or calibration=")


def _check_budget(hq: Request, hkv: Request, calibration: Iterable[Any] | None) -> None:
    if budget_share(hq) is None:
        return
    if calibration is None:
        raise InputError(f"hq={hq!r} spends a budget where heads matter most, which needs calibration= to tell")
    if hkv is not None:
        raise InputError(
            f"hq={hq!r} decides on KV heads too (one for each query head where there were): leave hkv= out"
        )


def _inputs(
    model: Model, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not isinstance(model, nn.Module | torch.export.ExportedProgram):
        raise InputError(f"convert takes an nn.Module, an ExportedProgram or a GraphModule, not {type(model).__name__}")
    if args or kwargs or isinstance(model, torch.export.ExportedProgram):
        return tuple(args), dict(kwargs or {})
    return example_inputs(model)


def _own_tensors(module: fx.GraphModule) -> None:
    """Give the converted module tensors of its own, ties kept, so that training it leaves the user's model alone."""
    memo: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, held in list(table.items()):
                if held is not None:
                    table[name] = memo.setdefault(id(held), copy.deepcopy(held.detach()))  # type: ignore[assignment]
                    if isinstance(held, nn.Parameter) and not isinstance(table[name], nn.Parameter):
                        memo[id(held)] = table[name] = nn.Parameter(table[name], requires_grad=held.requires_grad)  # type: ignore[arg-type]
