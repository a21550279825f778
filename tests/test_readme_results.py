"""The README's plots and tables are those of the files in examples/results; what is stale is found."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import example_path
import pytest

pytest.importorskip("matplotlib")

import readme_plots
import readme_tables
from PIL import Image
from readme_plots import README, pictures
from readme_tables import RESULTS, replaced, tables

TEXT = README.read_text(encoding="utf-8")
ROW: dict[str, Any] = {"mode": "forward", "length": 131072, "batch": 1, "failed": {}}
PAPER = [
    {**ROW, "variant": v, "heads": h, "milliseconds": {"MHA": 100.0, "converted": ms, "by hand": ms},
     "attention_ms": {"MHA": 11.0, v: 5.5}}
    for v, h, ms in (("SQA", [8, 4], 50.0), ("rSQA", [4, 8], 56.0))
]  # fmt: skip
LONG = [
    {"model": "llama-1b", "engine": e, "length": n, "variants": [
        {"model": "llama-1b", "engine": e, "length": n, "variant": "(16, 8)", "speedup": 1.5, "ideal_speedup": 1.6}]}
    for e in ("eager", "compiled") for n in (8192, 32768)
]  # fmt: skip
SCRATCH = [
    {"variant": v, "method": m, "seed": s, "tokens": 5, "loss": 2.0 + s / 10, "accuracy": 0.5}
    for v, m in (("MHA", "from scratch"), ("SQA", "from scratch"), ("SQA", "MHA, converted and healed")) for s in (0, 1)
]  # fmt: skip
LATER = {"paper_table_x.json": PAPER, "long_context_x.json": LONG, "train_from_scratch_x.json": SCRATCH}


def test_tables_are_those_of_their_data() -> None:
    made = tables()
    for name in made:
        assert TEXT.count(f"<!-- {name} -->") == TEXT.count(f"<!-- end of {name} -->") <= 1
    for name in ("minilm table", "gpt table", "engines table"):
        assert f"<!-- {name} -->" in TEXT, f"the README has lost the markers of its {name}"
    assert replaced(TEXT, made) == TEXT, "run examples/readme_plots.py"
    assert replaced(TEXT.replace("| 0.980 |", "| 0.999 |"), made) == TEXT


def test_plots_are_those_of_their_data() -> None:
    made = {picture.name: picture for picture in pictures()}
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", TEXT)
    assert shown and all(Path(path).parent == Path("examples/results") for path in shown)
    assert {Path(path).name for path in shown} <= made.keys(), "a plot of the README that readme_plots.py does not make"
    assert [name for name, picture in made.items() if not picture.is_current()] == [], "run examples/readme_plots.py"


def test_results_that_join_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, results)
    for name, rows in LATER.items():
        (results / name).write_text(json.dumps({"device": "x", "settings": {"layers": 8}, "rows": rows}))
    readme = tmp_path / "README.md"
    names = ("paper_table_x table", "train_from_scratch_x table")
    readme.write_text(TEXT + "\n".join(f"<!-- {name} -->\n<!-- end of {name} -->" for name in names))
    monkeypatch.setattr(readme_tables, "RESULTS", results)
    monkeypatch.setattr(readme_plots, "RESULTS", results)
    monkeypatch.setattr(readme_plots, "README", readme)
    assert readme_plots.main(["--check"]) == 1
    assert readme_plots.main([]) == 0 and readme_plots.main(["--check"]) == 0
    text = readme.read_text()
    assert "| SQA | 2.00x (2.01x) |" in text and "| rSQA | 1.79x |" in text
    assert "| MHA | 2.050 |  |  | 50.0% |" in text and "| SQA | 2.050 |  | 2.050 | 50.0% |" in text
    for picture in pictures():
        with Image.open(io.BytesIO((results / picture.name).read_bytes())) as image:
            assert image.width > 300 and image.info["Source"] == ", ".join(picture.sources)
    # Data that changes behind a picture's back.
    (results / "paper_table_x.json").write_text(json.dumps({"device": "y", "settings": {"layers": 8}, "rows": PAPER}))
    assert [p.name for p in pictures() if not p.is_current()] == ["readme_paper_table_x.png"]


def test_the_readme_names_what_there_is() -> None:
    for script in set(re.findall(r"examples/(\w+\.py)", TEXT)):
        assert (example_path.FOLDER / script).is_file(), script
