"""bench: the order of calls, the arithmetic, the report and its picture. No test looks at how fast anything is."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqa_fx import timing
from sqa_fx.bench import BenchReport, BenchRow, bench
from sqa_fx.errors import InputError, MissingError
from sqa_fx.latency_plot import plot_latency
from sqa_fx.runners import EagerRunner
from sqa_fx.text_table import text_table
from sqa_fx.timing import burst_calls, is_stable, rotated


class Logged:
    """A runner that writes down each call and takes its time off a list, on a clock of its own."""

    kind = "eager"
    dtype = torch.float32

    def __init__(self, name: str, log: list[tuple[str, int]], clock: Clock, durations: list[float]) -> None:
        self.name, self.log, self.clock, self.durations = name, log, clock, list(durations)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        self.log.append((self.name, args[0].shape[0]))
        self.clock.now += int(self.durations.pop(0) * 1e6)
        return []


class Clock:
    """Stands in for the clock, in nanoseconds."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(timing.time, "perf_counter_ns", fake)  # type: ignore[attr-defined]
    return fake


def sets(*sizes: int) -> list[tuple[tuple[Tensor], dict[str, Any]]]:
    return [((torch.zeros(size),), {}) for size in sizes]


def test_turns_and_arithmetic(clock: Clock) -> None:
    log: list[tuple[str, int]] = []
    a = Logged("a", log, clock, [900, 900, 4, 6, 5, 900, 900, 40, 40, 40])
    b = Logged("b", log, clock, [700, 700, 2, 2.5, 3, 700, 700, 10, 20, 30])
    options: dict[str, Any] = {"warmup": 2, "max_warmup": 2, "iterations": 3, "burst": 1, "progress": False}
    report = bench([a, b], sets(3, 7), tokens=[1000, 3000], **options)
    order = ["a", "b", "a", "b", "a", "b", "b", "a", "a", "b"]  # the third and later pairs rotate
    assert log == [(name, size) for size in (3, 7) for name in order]
    assert [(r.runner, r.label) for r in report.rows] == [("a", "1000"), ("b", "1000"), ("a", "3000"), ("b", "3000")]
    assert [r.p50_ms for r in report.rows] == [5, 2.5, 40, 20]
    assert [r.ratio for r in report.rows] == [1, 0.5, 1, 0.5]
    assert report.rows[1].speedup == 2
    assert report.rows[0].tokens_per_s == pytest.approx(1000 / 0.005)
    assert report.rows[3].p90_ms == pytest.approx(28)
    assert report.rows[3].p99_ms == pytest.approx(29.8)
    assert all(r.iterations == 3 and r.burst == 1 and r.peak_memory_bytes is None for r in report.rows)
    assert all(r.warmup_calls == 2 and not r.stable for r in report.rows)

    content = json.loads(report.to_json())
    assert content["version"] == 2 and content["rows"][1]["ratio"] == 0.5
    assert content["environment"]["torch"] == torch.__version__
    table = report.table().splitlines()
    assert table[0].split() == "input runner kind dtype p50 ms p90 ms p99 ms tokens/s speedup calls warm-up".split()
    expected = ["1000", "b", "eager", "float32", "2.500", "2.900", "2.990", "400000", "2.00x", "3x1", "2"]
    assert table[3].split() == expected
    assert table[-1] == "b on 3000: times had not settled after 2 warm-up calls"


def test_warm_up_goes_on_until_times_settle(clock: Clock) -> None:
    log: list[tuple[str, int]] = []
    falling = [100.0, 80, 60, 50, 40, 30, 20, 15, 12, 11, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
    a = Logged("a", log, clock, [*falling, 7])
    b = Logged("b", log, clock, [4.0] * 10 + [3.0] * 3)
    report = bench([a, b], sets(3), iterations=1, progress=False)
    slow, steady = report.rows
    # After 18 calls the last 5 and the 5 before (12, 11, 10 ... sorted) have the same median for the first time.
    assert slow.warmup_calls == 18
    assert not is_stable(falling[:17])
    assert (steady.warmup_calls, steady.stable, slow.stable) == (10, True, True)
    assert (slow.burst, steady.burst) == (1, 3)  # 10 ms at 10 and at 4 ms a call
    assert steady.p50_ms == 3
    assert "settled" not in report.table()


@pytest.mark.parametrize(
    ("times", "stable"),
    [
        ([1.0] * 9, False),
        ([1.0] * 10, True),
        ([1.0] * 5 + [1.029] * 5, True),
        ([1.0] * 5 + [0.971] * 5, True),
        ([1.0] * 5 + [1.031] * 5, False),
        ([1.0] * 5 + [0.969] * 5, False),
        ([9.0, 9.0, 9.0] + [1.0] * 10, True),
        ([1.0, 50.0] + [1.0] * 6 + [50.0, 1.0], True),
    ],
)
def test_stability(times: list[float], stable: bool) -> None:
    assert is_stable(times) is stable


def test_bursts_and_turns() -> None:
    assert [burst_calls(times, None) for times in ([], [0.3] * 5, [20.0] * 5, [9.0] * 9 + [1.0] * 5)] == [1, 34, 1, 10]
    assert burst_calls([0.3] * 5, 7) == 7
    assert [rotated(3, turn) for turn in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]


def test_time_of_a_burst_is_per_call(clock: Clock) -> None:
    runner = Logged("a", [], clock, [1, 2, 6])
    report = bench([runner], sets(3), warmup=0, max_warmup=0, iterations=1, burst=3, progress=False)
    assert report.rows[0].p50_ms == 3
    assert report.rows[0].warmup_calls == 0 and not report.rows[0].stable


def test_memory_that_the_runner_tells(clock: Clock) -> None:
    runner = Logged("a", [], clock, [1.0] * 2)
    runner.device_memory = lambda: 3 * 2**20  # type: ignore[attr-defined]
    report = bench([runner], sets(3), warmup=0, max_warmup=0, iterations=2, progress=False)
    assert report.rows[0].peak_memory_bytes == 3 * 2**20
    head, rows = report.cells()
    assert rows[0][head.index("peak MiB")] == "3.0"


def test_attention_columns(clock: Clock) -> None:
    runner = Logged("a", [], clock, [4.0])
    report = bench([runner], sets(3), warmup=0, max_warmup=0, iterations=1, labels=["short"], progress=False)
    assert report.rows[0].attention_tflops is None and "attn TFLOP/s" not in report.table()
    told = report.with_attention({("a", "short"): (3 * 10**12, 2000.0)})
    assert told.rows[0].attention_tflops == pytest.approx(1.5)
    head, rows = told.cells()
    assert rows[0][head.index("attn TFLOP/s")] == "1.5"
    assert json.loads(told.to_json())["rows"][0]["attention_tflops"] == pytest.approx(1.5)
    with pytest.raises(InputError, match="no row for"):
        report.with_attention({("b", "short"): (1, 1.0)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: events and torch's memory statistics")
def test_events_and_memory_on_cuda() -> None:
    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    report = bench([EagerRunner(Squares())], [((torch.ones(2**20, device="cuda"),), {})], iterations=2, progress=False)
    [row] = report.rows
    assert row.p50_ms > 0
    assert row.peak_memory_bytes == 4 * 2**20
    assert report.environment["driver"] != ""


def test_real_module_and_progress(capfd: pytest.CaptureFixture[str]) -> None:
    runner = EagerRunner(nn.Linear(5, 7))
    report = bench([runner], [((torch.randn(3, 5),), {})], warmup=0, max_warmup=1, iterations=4, labels=["short"])
    [row] = report.rows
    assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms
    assert row.label == "short" and row.tokens_per_s is None
    printed = capfd.readouterr()
    assert printed.out == "" and "bench" in printed.err
    bench([runner], [((torch.randn(3, 5),), {})], warmup=0, max_warmup=1, iterations=1, progress=False)
    assert capfd.readouterr().err == ""


def test_collector_is_back_after_a_failure(clock: Clock) -> None:
    assert gc.isenabled()
    runner = Logged("a", [], clock, [1, 1])  # the third call finds its list empty
    with pytest.raises(IndexError):
        bench([runner], sets(3), warmup=1, max_warmup=1, iterations=5, progress=False)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations"),
        ({"warmup": -1}, "warmup"),
        ({"burst": 0}, "burst"),
        ({"warmup": 9, "max_warmup": 8}, "max_warmup is 8"),
        ({"tokens": [1, 2]}, "tokens has 2 entries for 1"),
        ({"labels": []}, "labels has 0 entries for 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench([EagerRunner(nn.Linear(5, 7))], sets(5), progress=False, **options)


def test_nothing_to_measure_and_names_twice() -> None:
    runner = EagerRunner(nn.Linear(5, 7))
    with pytest.raises(InputError, match="nothing to measure"):
        bench([], sets(5))
    with pytest.raises(InputError, match="different names"):
        bench([runner, runner], sets(5))


def test_text_table_aligns() -> None:
    assert text_table(["name", "ms"], [["a", "10.5"], ["longer", "-"]]) == (
        "name      ms\n------  ----\na       10.5\nlonger     -"
    )


# --- the picture -----------------------------------------------------------------------------------------------------


def report_of(labels: list[str]) -> BenchReport:
    rows = []
    for i, label in enumerate(labels):
        for name, factor in (("original", 1.0), ("SQA", 0.5)):
            ms = 3.0 * 4**i * factor
            rows.append(BenchRow(name, "eager", "float32", label, 20, ms, ms, ms, None, factor))
    return BenchReport(tuple(rows), "CPU", 2, 3)


@pytest.mark.parametrize("labels", [["512", "1024", "2048"], ["short", "long"], ["512"]])
def test_plot(tmp_path: Path, labels: list[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = plot_latency(report_of(labels), tmp_path / "p.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert os.listdir(tmp_path) == ["p.png"]


def test_plot_marks_the_speedup_of_all_but_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.axes import Axes

    marks: list[str] = []
    real = Axes.annotate

    def annotate(self: Any, text: str, *args: Any, **kwargs: Any) -> Any:
        marks.append(text)
        return real(self, text, *args, **kwargs)

    monkeypatch.setattr(Axes, "annotate", annotate)
    plot_latency(report_of(["512", "1024", "2048"]), tmp_path / "p.png")
    assert marks == ["2.00x"] * 3


def test_plot_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report = report_of(["512"])
    path = tmp_path / "p.png"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="overwrite=True"):
        plot_latency(report, path)
    assert path.read_bytes() == b"mine"
    with pytest.raises(InputError, match=r"\.png"):
        plot_latency(report, tmp_path / "p.pdf")
    with pytest.raises(InputError, match="cannot write"):
        plot_latency(report, tmp_path / "none" / "p.png")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        plot_latency(report, path, overwrite=True)
    assert path.read_bytes() == b"mine" and os.listdir(tmp_path) == ["p.png"]


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingError, match="pip install matplotlib"):
        plot_latency(report_of(["512"]), tmp_path / "p.png")
