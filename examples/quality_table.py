"""Rows of a quality example as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

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
    said = "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None)
    stem.with_suffix(".md").write_text(f"# {title}\n\n{said}\n\n{markdown(rows)}\n")
