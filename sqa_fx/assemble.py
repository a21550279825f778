"""Put submodules that were converted one by one back into the model, check the whole, and report on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from sqa_fx.errors import CaptureError, InputError, NoAttentionError, PlanError
from sqa_fx.module import ConvertedModule
from sqa_fx.partly import PartlyConvertedModule, check_eager, modes, put_in_place, run_masked
from sqa_fx.passes.capture_ways import TRY
from sqa_fx.plan import Plan
from sqa_fx.report import RefusedReport, Report, refused_entry
from sqa_fx.submodules import Part, Parts, whole_plan


def require_parts(found: Parts) -> None:
    """Raise CaptureError, with the reasons, when no submodule with attention could be exported."""
    if found.parts:
        return
    if not found.refusals:
        raise CaptureError(f"{found.why}; and none of its submodules computes attention; {TRY}")
    first = "; ".join(f"{r.name}: {r.reason}" for r in found.refusals[:3])
    raise CaptureError(
        f"{found.why}; none of its submodules with attention can be converted alone either: {first}; {TRY}"
    )


def require_sites(found: Parts) -> None:
    """Raise NoAttentionError, naming the nearest miss, when no exported submodule has a site that can be converted."""
    if found.site_names:
        return
    miss = next(r for part in found.parts for r in part.analysis.refusals)
    error = NoAttentionError(
        f"no convertible attention found; nearest miss: {miss.name!r}, refused because {miss.reason}"
        + (f", at node {', '.join(miss.nodes)}" if miss.nodes else "")
        + f" (its module was exported alone, because {found.why})"
    )
    error.kinds = tuple(r.kind for part in found.parts for r in part.analysis.refusals)
    raise error


def assemble(
    found: Parts,
    done: Sequence[tuple[Part, ConvertedModule]],
    reports: Sequence[tuple[Part, Report]],
    given: Plan | None,
    verify: bool,
) -> PartlyConvertedModule:
    """The whole model with the converted submodules of ``done`` in place, compared with the masked original.

    Raises PlanError when ``given`` was made for another model, VerifyError when the whole does not agree.
    """
    twin, paths = found.twin, [part.path for part, _ in done]
    plan = whole_plan([(part.path, converted.plan) for part, converted in done])
    if given is not None and given.parameters and not given.same_cuts(plan):
        raise PlanError("the plan cuts other parameters than this model needs: it was made for another model")
    before = sum(p.numel() for p in twin.parameters())
    expected = run_masked(twin, plan, paths, found.args, found.kwargs) if verify else ""
    flags = modes(twin)
    for part, converted in done:
        put_in_place(twin, part.path, converted)
    report = merged_report(found, reports, before, sum(p.numel() for p in twin.parameters()))
    report.notes.insert(0, found.story(paths))
    result = PartlyConvertedModule(twin, submodules=paths, plan=plan, report=report, fixed=found.fixed)
    if isinstance(expected, str):
        if expected:
            report.notes.append(f"the whole was not compared in eager: {expected}")
        return result
    try:
        if any(flags.values()):
            result.eval()
        check = check_eager(expected, twin, paths, found.args, found.kwargs)
        assert report.proof is not None
        report.proof["eager"] = check
        report.notes.append(_sentence(check))
    except InputError as error:
        report.notes.append(f"the whole was not compared in eager, only its submodules were proved: {error}")
    finally:
        _restore_modes(twin, flags)
        result.training = twin.training
    return result


def _restore_modes(twin: nn.Module, flags: Mapping[str, bool]) -> None:
    for name, module in twin.named_modules():
        if name in flags and module.training != flags[name]:
            if isinstance(module, ConvertedModule):
                module.train(flags[name])
            else:
                module.training = flags[name]


def _sentence(check: Mapping[str, Any]) -> str:
    text = f"the whole model agrees with the masked original in eager: relative error {check['error']:.2e}"
    if check["in_step"]:
        text += (
            f" with every converted submodule given the original's inputs; run freely, rounding alone makes it "
            f"{check['free_running_error']:.2e}"
        )
    if check["reshaped"]:
        text += f"; {check['reshaped']} outputs have another shape, because they carry heads"
    return text


def merged_report(found: Parts, reports: Sequence[tuple[Part, Report]], before: int, after: int) -> Report:
    """One report of the whole from those of its submodules."""
    whole = Report(parameters_before=before, parameters_after=after, notes=[*found.notes])
    dynamic: list[str] = []
    static: list[str] = []
    for part, report in reports:
        whole.sites.extend(report.sites)
        whole.refused.extend(report.refused)
        whole.other_mixers.extend(report.other_mixers)
        whole.milliseconds = report.milliseconds
        if not report.sites:
            continue  # it stays as it is: how it was exported does not matter
        dynamic.extend(f"{part.path}: {entry}" for entry in report.dynamic)
        static.extend(f"{part.path}: {entry}" for entry in report.static)
        whole.notes.extend(f"{part.path}: {note}" for note in report.notes)
        if report.proof is not None:
            whole.proof = _merged_proof(whole.proof, report.proof)
    whole.dynamic, whole.static = tuple(dynamic), tuple(static)
    whole.refused.extend(refused_entry(r) for r in found.refusals)
    return whole


def _merged_proof(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    if first is None:
        return {**second, "sites": [*second["sites"]], "notes": [*second["notes"]]}
    precisions = dict.fromkeys([*first["precision"].split(" and "), second["precision"]])
    return {
        "precision": " and ".join(precisions),
        "tolerance": max(first["tolerance"], second["tolerance"]),
        "error": max(first["error"], second["error"]),
        "shapes": min(first["shapes"], second["shapes"]),
        "sites": [*first["sites"], *second["sites"]],
        "notes": [*first["notes"], *second["notes"]],
    }


def refused_report(report: Report, refused: Sequence[RefusedReport]) -> Report:
    """``report`` with more refusals, whose sites are no sites any more."""
    names = {r.name for r in refused}
    return replace(report, sites=[s for s in report.sites if s.name not in names], refused=[*report.refused, *refused])
