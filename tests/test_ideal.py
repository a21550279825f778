"""The ideal speed-up: arithmetic, pairing of two graphs, and what the bench report says of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from attention_models import FusedAttention, Stack
from attention_models import converted as convert_now

from sqa_fx import ideal
from sqa_fx.attention_flops import AttentionCall
from sqa_fx.bench import BenchReport, BenchRow
from sqa_fx.errors import InputError
from sqa_fx.ideal import SiteTime, head_ratios, ideal_ms, ideal_speedup, site_times, with_ideal
from sqa_fx.report import Report, SiteReport


def test_amdahl() -> None:
    sites = [SiteTime("a", 3.0, 2.0), SiteTime("b", 4.0, 4.0)]
    assert ideal_ms(10.0, sites) == pytest.approx(3 + 1.5 + 1)
    assert ideal_speedup(10.0, sites) == pytest.approx(10 / 5.5)
    assert ideal_speedup(10.0, []) == 1


def test_projections_count_when_their_time_is_given() -> None:
    site = SiteTime("a", 3.0, 2.0, kv_ratio=4.0, query_projections_ms=2.0, kv_projections_ms=1.0)
    assert ideal_ms(10.0, [site]) == pytest.approx(7 + 1.5)
    assert ideal_ms(10.0, [site], projections=True) == pytest.approx(4 + 1.5 + 1 + 0.25)
    with pytest.raises(InputError, match="kv_projections_ms"):
        ideal_ms(10.0, [replace(site, kv_projections_ms=None)], projections=True)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (SiteTime("a", 10.0, 2.0), "whole baseline"),
        (SiteTime("a", 1.0, 0.0), "ratios must be above 0"),
        (SiteTime("a", -1.0, 2.0), "times at least 0"),
        (SiteTime("a", float("nan"), 2.0), "times at least 0"),
    ],
)
def test_impossible_times(site: SiteTime, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ideal_speedup(10.0, [site])


def test_ratios_follow_the_wider_side() -> None:
    def site(name: str, hq: int, hkv: int) -> SiteReport:
        return SiteReport(name, 12, 12, hq, hkv, 3, 7, 7, 100, 50, 1, 1, "sdpa")

    report = Report(sites=[site("half", 6, 3), site("reverse", 2, 4)])
    assert head_ratios(report) == {"half": 2, "reverse": 3}


def stack(*heads: int) -> Stack:
    """Attention layers of so many heads; inputs are token numbers [batch, length]."""
    return Stack([FusedAttention(30, count) for count in heads], 30).eval()


def test_pairs_of_two_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = stack(6, 10), torch.randint(0, 30, (2, 7))
    converted = convert_now(model, hq={"*.0": 2, "*.1": 5}, hkv={"*.0": 2, "*.1": 5}, args=(ids,), dynamic_shapes=None)

    def times(calls: Sequence[AttentionCall], iterations: int) -> list[float]:
        assert [call.query_heads for call in calls] == [6, 10] and iterations == 4
        return [0.5, 0.25]

    monkeypatch.setattr(ideal, "time_attention", times)
    pairs = site_times(torch.export.export(model, (ids,)), converted, ((ids,), {}), 4)
    assert pairs == [SiteTime("layers.0", 0.5, 3.0), SiteTime("layers.1", 0.25, 2.0)]
    assert head_ratios(converted.report) == {"layers.0": 3, "layers.1": 2}


def test_graphs_that_are_not_one_model() -> None:
    ids = torch.randint(0, 30, (2, 7))
    model = stack(6)
    converted = convert_now(model, hq=3, hkv=3, args=(ids,), dynamic_shapes=None)
    with pytest.raises(InputError, match="2 attentions and the converted graph 1"):
        site_times(torch.export.export(stack(6, 6), (ids,)), converted, ((ids,), {}), 1)
    with pytest.raises(InputError, match="only heads may differ"):  # heads of another size
        site_times(torch.export.export(stack(10), (ids,)), converted, ((ids,), {}), 1)


def report_of(*speedups: float) -> BenchReport:
    rows = [
        BenchRow(name, "eager", "float32", "512", 5, 10 / s, 10 / s, 10 / s, None, 1 / s, stable=True)
        for name, s in zip(("original", "half", "quarter"), speedups, strict=False)
    ]
    return BenchReport(tuple(rows), "CPU", 1, 3)


def test_share_in_the_report() -> None:
    plain = report_of(1.0, 1.2, 1.5)
    assert "ideal" not in plain.table() and "share" not in plain.table()
    half, quarter = [SiteTime("a", 6.0, 2.0)], [SiteTime("a", 6.0, 4.0)]
    report = with_ideal(plain, {("half", "512"): half, ("quarter", "512"): quarter})
    first, second = report.ideal
    assert first.ideal_speedup == pytest.approx(10 / 7) and first.share == pytest.approx(1.2 / (10 / 7))
    assert second.ideal_speedup == pytest.approx(10 / 5.5) and second.share == pytest.approx(1.5 / (10 / 5.5))
    head, rows = report.cells()
    assert [row[head.index("ideal")] for row in rows] == ["-", "1.43x", "1.82x"]
    assert [row[head.index("share")] for row in rows] == ["-", "84%", "82%"]
    written = json.loads(report.to_json())["ideal"]
    assert [entry["runner"] for entry in written] == ["half", "quarter"]
    assert written[0]["ideal_ms"] == pytest.approx(7) and written[0]["attention_ms"] == 6


@pytest.mark.parametrize("pair", [("original", "512"), ("half", "1024"), ("other", "512")])
def test_no_ideal_for_the_baseline_or_what_was_not_measured(pair: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="no ideal for"):
        with_ideal(report_of(1.0, 1.2), {pair: [SiteTime("a", 6.0, 2.0)]})
