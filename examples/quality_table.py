"""Rows of a quality example as JSON and Markdown; several runs as one table, with the spread over seeds.

python examples/quality_table.py OUT_STEM RUN.json [RUN.json ...] --title TEXT
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measured_rows import fact_lines

from sqa_fx.environment import environment

Row = dict[str, Any]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table; numbers with four digits behind the point."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in (row.get(name, "") for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(rows: Sequence[Row], about: Mapping[str, Any], stem: Path, title: str) -> None:
    """What was measured so far: STEM.json and STEM.md."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    facts = {**about, **environment(device)}
    stem.with_suffix(".json").write_text(json.dumps({**facts, "rows": list(rows)}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(f"# {title}\n\n{fact_lines(facts)}\n\n{markdown(rows)}\n")


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in their seed and in what was measured only, as one: the mean, and the standard deviation over
    seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple((k, v) for k, v in row.items() if not isinstance(v, float) and k != "seed")
        # A method may be run twice for one seed, as a part of two tables.
        if row not in groups.setdefault(key, []):
            groups[key].append(row)
    found = []
    for key, own in groups.items():
        seeds = {row.get("seed"): row for row in own}
        merged: Row = dict(key)
        for name in [k for k, v in own[0].items() if isinstance(v, float)]:
            values = [row[name] for row in seeds.values()]
            merged[name] = statistics.fmean(values)
            if len(values) > 1:
                merged[f"{name}, spread"] = statistics.stdev(values)
        found.append({**merged, "seeds": len(seeds)})
    return found


def main() -> None:
    """Merge runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--title", required=True)
    options = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in options.runs]
    rows = [row for run in runs for row in run["rows"]]
    facts = {k: v for k, v in runs[0].items() if k not in ("rows", "seed") and v is not None}
    # Runs beside each other share a machine: their times say nothing.
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    shown = over_seeds(rows) if "seed" in rows[0] else rows
    options.out.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(f"# {options.title}\n\n{fact_lines(facts)}\n\n{markdown(shown)}\n")


if __name__ == "__main__":
    main()
