"""How much of the possible speed-up a converted model reached.

Dropping heads shortens attention only: with baseline time t0, of which site s spends a_s on attention, and r_s times
fewer query heads there, the best that can come of it is (Amdahl's law)

    ideal time = t0 - sum(a_s) + sum(a_s / r_s),    ideal speed-up = t0 / ideal time

and the share reached is the measured speed-up over the ideal one. The projections get smaller too: those of queries and
outputs r_s times, those of keys and values by the ratio of KV heads. The ideal counts that only with
``projections=True``, and only where their time is given. A share above 1 is no error: it comes of projections that were
not counted, or of a mask that the conversion proved causal, so that a faster kernel runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sqa_fx.attention_flops import AttentionCall, Model, attention_calls
from sqa_fx.attention_time import measure_attention, time_attention
from sqa_fx.errors import InputError
from sqa_fx.report import Report

if TYPE_CHECKING:
    from sqa_fx.bench import BenchReport

__all__ = [
    "IdealEntry",
    "SiteTime",
    "head_ratios",
    "ideal_ms",
    "ideal_speedup",
    "measure_attention",
    "site_times",
    "with_ideal",
]


@dataclass(frozen=True)
class SiteTime:
    """What one site costs in the baseline, in milliseconds per call, and what shrinks how much.

    ``ratio`` is query heads before over after, ``kv_ratio`` the same for KV heads. ``query_projections_ms`` is the time
    of the projections of queries and outputs, ``kv_projections_ms`` that of keys and values; None when not measured.
    """

    name: str
    attention_ms: float
    ratio: float
    kv_ratio: float = 1.0
    query_projections_ms: float | None = None
    kv_projections_ms: float | None = None


@dataclass(frozen=True)
class IdealEntry:
    """One runner on one input set: the best speed-up that its head counts allow, and the share of it that was
    measured."""

    runner: str
    label: str
    attention_ms: float
    ideal_ms: float
    ideal_speedup: float
    share: float
    projections: bool = False


def ideal_ms(baseline_ms: float, sites: Sequence[SiteTime], *, projections: bool = False) -> float:
    """The ideal milliseconds per call, given those of the baseline and of its sites; see the module.

    Raises InputError when ratios are not positive, the parts take longer than the whole, or ``projections`` is asked
    for and their time is not known.
    """
    before = after = 0.0
    for site in sites:
        if not (site.ratio > 0 and site.kv_ratio > 0 and site.attention_ms >= 0):
            raise InputError(f"{site.name}: ratios must be above 0 and times at least 0, but the site is {site}")
        parts = [(site.attention_ms, site.ratio)]
        if projections:
            if site.query_projections_ms is None or site.kv_projections_ms is None:
                raise InputError(
                    f"{site.name}: projections=True needs the time of its projections; give query_projections_ms and "
                    "kv_projections_ms"
                )
            parts += [(site.query_projections_ms, site.ratio), (site.kv_projections_ms, site.kv_ratio)]
        before += sum(time for time, _ in parts)
        after += sum(time / ratio for time, ratio in parts)
    if before >= baseline_ms:
        raise InputError(
            f"the sites take {before:.4g} ms, and the whole baseline {baseline_ms:.4g} ms: measure both on the same "
            "inputs, device and dtype, and with the same kernels"
        )
    return baseline_ms - before + after


def ideal_speedup(baseline_ms: float, sites: Sequence[SiteTime], *, projections: bool = False) -> float:
    """How many times faster than the baseline the ideal is. Raises as `ideal_ms` does."""
    return baseline_ms / ideal_ms(baseline_ms, sites, projections=projections)


def head_ratios(report: Report) -> dict[str, float]:
    """By site of a conversion: query heads before over after. With fewer query heads than KV heads (rSQA) queries
    repeat, and the KV heads count."""
    return {site.name: site.heads / max(site.hq, site.hkv) for site in report.sites}


def site_times(
    baseline: Model,
    converted: Model,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    iterations: int = 20,
) -> list[SiteTime]:
    """Time every attention of ``baseline`` alone, and pair it with the same one of ``converted`` for the head ratio.

    ``inputs`` are (args, kwargs) of both. Nothing is known of projections: ``kv_ratio`` stays 1, since keys may be
    repeated before they meet queries. Raises InputError when the two graphs do not have the same attention except
    for heads, and what `time_attention` raises.
    """
    before, after = attention_calls(baseline, inputs), attention_calls(converted, inputs)
    if len(before) != len(after):
        raise InputError(
            f"the baseline has {len(before)} attentions and the converted graph {len(after)}: they are not one model"
        )
    times = time_attention(before, iterations)
    return [SiteTime(old.module, time, _ratio(old, new)) for old, new, time in zip(before, after, times, strict=True)]


def _ratio(old: AttentionCall, new: AttentionCall) -> float:
    was, now = ([list(form.shape) for form in (call.query, call.key)] for call in (old, new))
    if old.query_heads is None or new.query_heads is None:
        raise InputError(
            f"{old.module}: heads cannot be told from q, k {was} and {now}; pass SiteTime with ratios of `head_ratios`"
        )
    if any([*a[:-3], *a[-2:]] != [*b[:-3], *b[-2:]] for a, b in zip(was, now, strict=True)):
        raise InputError(f"{old.module}: q, k are {was} before and {now} after; only heads may differ")
    return old.query_heads / new.query_heads


def with_ideal(
    report: BenchReport, sites: Mapping[tuple[str, str], Sequence[SiteTime]], *, projections: bool = False
) -> BenchReport:
    """The report with an `IdealEntry` for each (runner, label) of ``sites``, against its first runner.

    Raises InputError for a pair that is not in the report or names the first runner, and as `ideal_ms` does.
    """
    rows = {(row.runner, row.label): row for row in report.rows}
    baseline = report.rows[0].runner
    entries = []
    for (runner, label), times in sites.items():
        if (runner, label) not in rows or runner == baseline:
            raise InputError(
                f"no ideal for {runner!r} on {label!r}: name a runner other than {baseline!r}, the baseline; the "
                f"report has {list(rows)}"
            )
        total = rows[baseline, label].p50_ms
        best = ideal_ms(total, times, projections=projections)
        share = rows[runner, label].speedup / (total / best)
        attention = sum(site.attention_ms for site in times)
        entries.append(IdealEntry(runner, label, attention, best, total / best, share, projections))
    return replace(report, ideal=tuple(entries))
