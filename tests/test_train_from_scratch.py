"""Training from scratch at its smallest: rows of every method, what goes on after an interruption, means over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import example_path  # noqa: F401 (finds the examples)
import pytest
import torch
import train_from_scratch
from torch import Tensor
from train_from_scratch import CONVERTED, HEALED, SCRATCH, summary

TINY = "--device cpu --layers 1 --width 64 --vocabulary 61 --length 16 --batch 4 --steps 3 --seeds 0 --converted sSQA"


def _source(vocabulary: int, megabytes: float, cache: Path | None = None) -> tuple[Tensor, Tensor, float]:
    tokens = torch.randint(vocabulary, (2000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return tokens, tokens[:500], 3.0


@pytest.fixture(autouse=True)
def _no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(train_from_scratch, "source_tokens", _source)
    yield


def test_methods_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows"
    command = [*TINY.split(), "--out", str(out)]
    assert train_from_scratch.main([*command, "--work", "MHA:0", "--converted"]) == 0
    before = json.loads(out.with_suffix(".json").read_text())["rows"]
    trained: list[tuple[str, int]] = []
    own = train_from_scratch.Training.scratch

    def scratch(self: train_from_scratch.Training, variant: str, seed: int) -> dict[str, object]:
        trained.append((variant, seed))
        return own(self, variant, seed)

    monkeypatch.setattr(train_from_scratch.Training, "scratch", scratch)
    assert train_from_scratch.main([*command, "--variants", "sSQA", "MHA", "--resume"]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert rows[:1] == before and trained == [("sSQA", 0)]  # MHA came from its file
    assert [(r["variant"], r["method"]) for r in rows] == [
        ("MHA", SCRATCH), ("sSQA", CONVERTED), ("sSQA", HEALED), ("sSQA", SCRATCH),
    ]  # fmt: skip
    assert all("failed" not in r and 3 < r["loss"] < 6 and 0 <= r["accuracy"] <= 1 for r in rows)
    assert rows[0]["tokens"] == rows[3]["tokens"] == 3 * 4 * 16 and rows[0]["parameters"] > rows[3]["parameters"]
    assert "| sSQA | MHA, converted and healed |" in out.with_suffix(".md").read_text()


def test_work_and_summary() -> None:
    options = train_from_scratch.parser().parse_args(
        ["--out", "x", "--variants", "GQA", "SQA", "MHA", "--seeds", "3", "4"]
    )
    assert train_from_scratch.work(options) == ["MHA:3", "MHA:4", "GQA:3", "SQA:3", "SQA:4"]
    rows = [
        {"variant": v, "method": SCRATCH, "seed": s, "tokens": 5, "loss": loss, "accuracy": 0.5}
        for v, s, loss in (("SQA", 3, 2.5), ("SQA", 4, 2.7), ("MHA", 3, 2.0), ("MHA", 4, 2.2))
    ]
    rows.append({"variant": "GQA", "method": SCRATCH, "seed": 3, "failed": "out of memory"})
    first, second = summary(rows)
    assert first["variant"] == "MHA" and first["loss"] == pytest.approx(2.1) and first["paper's loss"] == 1.1976
    assert second["loss over MHA"] == pytest.approx(0.5) and second["seeds"] == 2
    assert second["loss, spread"] == pytest.approx(0.2 / 2**0.5)
