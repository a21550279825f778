"""Long contexts at their smallest: what a row holds, both kinds of verdict, and going on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import example_path  # noqa: F401 (finds the examples)
import long_context
import pytest
import torch
from long_context_models import CASES, DiffusionTransformer, scaled

import sqa_fx


def test_rows_and_resume(tmp_path: Path) -> None:
    out = tmp_path / "rows"
    command = f"--out {out} --device cpu --dtype fp32 --layers 1 --head-dim 8 --models llama-1b --engines eager".split()
    command += ["--iterations", "2", "--validate-to", "16"]
    assert long_context.main([*command, "--tokens", "16"]) == 0
    before = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert long_context.main([*command, "--tokens", "16", "32"]) == 2  # the file is there
    assert long_context.main([*command, "--tokens", "16", "32", "--resume"]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert rows[:1] == before and [row["length"] for row in rows] == [16, 32]
    for row, reference in zip(rows, ("float64", "eager"), strict=True):
        assert row["heads"] == [32, 8]
        assert [v["variant"] for v in row["variants"]] == ["baseline", "(16, 8)", "(16, 4)"]
        assert all(v["passed"] and v["reference"] == reference and v["speedup"] > 0 for v in row["variants"])
    assert "| llama-1b | eager | 32 | (16, 4) |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").is_file()


@pytest.mark.slow
def test_what_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(_: object, about: dict[str, str], name: str, *more: object) -> dict[str, Any]:
        if name == "baseline":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {**about, "variant": name, "length": 16, "passed": True, "cosine": 1.0, "reference": "eager", "said": []}

    monkeypatch.setattr(long_context.LongBench, "verdict", verdict)
    out = tmp_path / "rows"
    command = f"--out {out} --device cpu --dtype fp32 --layers 1 --head-dim 8 --models llama-1b --engines eager".split()
    assert long_context.main([*command, "--tokens", "16", "--validate-to", "0", "--iterations", "2"]) == 0
    (row,) = json.loads(out.with_suffix(".json").read_text())["rows"]
    found = {v["variant"]: v for v in row["variants"]}
    assert found["baseline"]["skipped"] == "out of memory" and "speedup" not in found["(16, 8)"]
    assert found["(16, 8)"]["p50_ms"] > 0
    assert "skipped: out of memory" in out.with_suffix(".md").read_text()


def test_shapes() -> None:
    assert {name: case.shape.width // case.shape.heads for name, case in CASES.items()} == {
        "llama-1b": 64, "llama-8b": 128, "vit-l-1024px": 64, "diffusion": 128, "document-encoder": 64,
    }  # fmt: skip
    shape = scaled(CASES["diffusion"], 4).shape
    assert (shape.width, shape.hidden) == (96, 384)
    torch.manual_seed(0)
    model, x = DiffusionTransformer(shape, 1, 23).eval(), torch.randn(2, 23, 96)
    converted = sqa_fx.convert(model, hq=6, hkv=6, args=(x,))
    with torch.no_grad():
        assert converted(x).shape == x.shape and (converted(x) - model(x)).abs().max() > 1e-4
