"""The paper's table: conversions against models written by hand, its arithmetic, and what an interruption leaves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import example_path  # noqa: F401 (finds the examples)
import paper_figures
import paper_table
import pytest
import torch
from measured_rows import MeasuredRows, failure, merged
from paper_measure import PaperBench, variant_models
from paper_model import VARIANTS, DenseModel, Sizes
from paper_report import figures, report, verdicts

from sqa_fx.attention_flops import attention_calls
from sqa_fx.errors import InputError

TINY = Sizes(width=64, layers=1, heads=16, hidden=96, vocabulary=53)
SMALLEST = "--device cpu --dtype float32 --layers 1 --width 64 --vocabulary 53 --turns 3 --row-seconds 0.2 --eager"


def test_the_papers_sizes() -> None:
    counts = {}
    for variant in ("MHA", "GQA", "MQA", "SQA", "sSQA", "xSQA", "xSMQA"):
        with torch.device("meta"):
            counts[variant] = sum(p.numel() for p in DenseModel(Sizes(), *VARIANTS[variant]).parameters()) / 1e6
    # The paper's own counts, in millions.
    said = {"MHA": 12.0, "GQA": 11.2, "MQA": 11.0, "SQA": 10.7, "sSQA": 10.9, "xSQA": 10.4, "xSMQA": 10.2}
    assert counts == {name: pytest.approx(count, abs=0.1) for name, count in said.items()}


@pytest.mark.parametrize(
    "variant",
    [
        "SQA",
        "rSQA",
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("MQA", "GQA", "sSQA", "xSQA", "xSMQA", "lSQA")),
    ],
)
def test_written_by_hand_equals_converted(variant: str) -> None:
    torch.manual_seed(0)
    base = DenseModel(TINY, *VARIANTS["MHA"])
    models = variant_models(base, TINY, variant, torch.randint(53, (2, 17)))
    converted, hand = models["converted"], models["by hand"]
    for shape in ((3, 29), (1, 61)):
        ids, targets = torch.randint(53, shape), torch.randint(53, shape)
        losses = [torch.nn.functional.cross_entropy(m(ids).flatten(0, 1), targets.flatten()) for m in (converted, hand)]
        torch.testing.assert_close(converted(ids), hand(ids), rtol=1e-5, atol=1e-6)
        for loss in losses:
            loss.backward()
    gradients = {name: p.grad for name, p in converted.named_parameters()}
    assert gradients.keys() == dict(hand.named_parameters()).keys()
    for name, parameter in hand.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert (
            base(ids) - hand(ids)
        ).abs().max() > 1e-3  # heads are gone: this is no comparison of a model with itself
    calls = attention_calls(converted, ((torch.zeros(1, 131072, dtype=torch.int64),), {}))
    assert [(c.causal, c.mask, c.query_heads) for c in calls] == [(True, None, max(VARIANTS[variant]))]


def test_figures_and_verdicts() -> None:
    row: dict[str, Any] = {
        "variant": "SQA", "mode": "forward", "length": 131072, "batch": 1, "heads": [8, 4],
        "milliseconds": {"MHA": 100.0, "converted": 48.0, "backend": 47.0, "by hand": 46.9},
        "attention_ms": {"MHA": 12.0, "SQA": 6.6}, "attention_in_model_ms": 90.0,
        "converted_attention": {"sites": 8, "causal": True, "masks": 0},
    }  # fmt: skip
    f = figures(row, 8)
    assert f["paper"] == pytest.approx(1.2648 / 0.6308)
    assert f["converted speedup"] == pytest.approx(100 / 48)
    assert f["ideal speedup"] == pytest.approx(100 / 55)  # 10 ms that stay, and half of 90
    assert f["converted / ideal"] == pytest.approx(55 / 48)
    assert f["converted / by hand"] == pytest.approx(46.9 / 48)
    assert f["attention / proportional"] == pytest.approx(1.1)
    assert verdicts(row, 8) == {
        "as the paper": True, "as by hand": False, "backend as by hand": True, "proportional": False, "ideal": True,
        "causal, no mask": True,
    }  # fmt: skip
    # Without kernels, attention alone counts; with more KV heads than query heads, these do.
    alone = {k: v for k, v in row.items() if k != "attention_in_model_ms"}
    assert figures(alone, 8)["ideal speedup"] == pytest.approx(100 / (4 + 48))
    assert figures({**alone, "heads": [4, 8]}, 8)["ideal speedup"] == pytest.approx(100 / (4 + 48))
    assert "ideal speedup" not in figures({**alone, "attention_ms": {"MHA": 13.0, "SQA": 6.5}}, 8)
    assert paper_figures.speedup("rSQA", 1024) is None and paper_figures.speedup("SQA", 7) is None


def test_rows_failures_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "table"
    command = [*SMALLEST.split(), "--out", str(out), "--tokens", "37x2", "--variants", "SQA", "rSQA"]
    own = PaperBench.row

    def row(self: PaperBench, mode: str, variant: str, length: int, batch: int) -> dict[str, Any]:
        if mode == "training" and variant == "SQA":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
        if variant == "rSQA":
            return {"heads": [4, 8], "milliseconds": {}, "failed": {}}
        return own(self, mode, variant, length, batch)

    monkeypatch.setattr(PaperBench, "row", row)
    assert paper_table.main([*command, "--modes", "forward", "training", "--variants", "SQA"]) == 0
    before = json.loads(out.with_suffix(".json").read_text())
    assert before["rows"][1]["failed"] == "out of memory"
    assert paper_table.main(command) == 2  # the file is there
    assert paper_table.main([*command, "--resume", "--turns", "4"]) == 2  # measured otherwise
    assert paper_table.main([*command, "--resume", "--max-seconds", "0"]) == 0
    assert json.loads(out.with_suffix(".json").read_text()) == before
    assert paper_table.main([*command, "--resume"]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert rows[:2] == before["rows"]
    assert [(r["variant"], r["mode"]) for r in rows[2:]] == [("rSQA", "forward"), ("rSQA", "training")]
    assert rows[0]["failed"] == {} and rows[0]["attention_ms"].keys() == {"MHA", "SQA"}
    assert rows[0]["milliseconds"].keys() == {"MHA", "converted", "backend", "by hand"}
    assert rows[0]["converted_attention"] == {"sites": 1, "causal": True, "masks": 0}
    assert max(rows[0]["errors"].values()) < 1e-5 and rows[0]["errors"].keys() == {"converted", "backend", "by hand"}
    written = out.with_suffix(".md").read_text()
    assert "| 37 x 2 | rSQA (4, 8) |" in written and "- training, 37 x 2, SQA, the row: out of memory" in written


def test_one_way_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def call(self: PaperBench, mode: str, variant: str, way: str) -> Any:
        if way == "backend":
            return lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
        return lambda ids, *_: ids * 2

    monkeypatch.setattr(PaperBench, "call", call)
    monkeypatch.setattr(PaperBench, "attention", lambda *_: {})
    out = tmp_path / "table"
    command = [*SMALLEST.split(), "--out", str(out), "--tokens", "37x2", "--variants", "SQA", "--modes", "training"]
    assert paper_table.main(command) == 0
    (row,) = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert row["failed"] == {"backend": "out of memory"}
    assert row["milliseconds"].keys() == {"MHA", "converted", "by hand"}


def test_merging(tmp_path: Path) -> None:
    content = {"device": "a", "torch": "2", "settings": {"layers": 8}, "rows": [{"variant": "SQA"}]}
    assert merged([content, {**content, "rows": [{"variant": "GQA"}]}])["rows"] == [
        {"variant": "SQA"},
        {"variant": "GQA"},
    ]
    with pytest.raises(InputError, match="device differs"):
        merged([content, {**content, "device": "b"}])
    row = {"variant": "SQA", "mode": "forward", "length": 7, "batch": 1, "heads": [8, 4], "milliseconds": {"MHA": 2.5}}
    assert "| 7 x 1 | SQA (8, 4) | 2.50 |" in report({**content, "rows": [row]})
    assert failure(ValueError("one\ntwo")) == "ValueError: one"


def test_budget(tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path / "rows", resume=False, max_seconds=100.0)
    rows = MeasuredRows(options, {"device": "x"}, ("n",), lambda content: f"{len(content['rows'])} rows\n")
    assert rows.measure(lambda: {"value": 1}, n=1) and rows.measure(lambda: {"value": 2}, n=1)
    assert [row["value"] for row in rows.rows] == [1] and rows.path.with_suffix(".md").read_text() == "1 rows\n"
    rows.latest = 101
    assert not rows.measure(lambda: {"value": 1}, n=2) and len(rows.rows) == 1
