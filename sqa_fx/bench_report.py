"""A bench report to read and to keep: one HTML file without anything outside it, or Markdown.

The HTML holds the picture as a data URI and the report's JSON in ``<script type="application/json" id="bench">``, so
that it can be read again by a program.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqa_fx.bench import BenchReport
from sqa_fx.latency_plot import latency_png
from sqa_fx.whole_file import write_whole

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; font-variant-numeric: tabular-nums; }
th { border-bottom-color: #888; }
img { max-width: 100%; }
.failed { color: #a30000; }
"""
_COMPARED = ("candidate", "input_set", "label", "output", "dtype", "max_abs", "tolerance", "passed", "problem")
"""The columns of a validation report that are shown, where it has them."""

Table = tuple[list[str], list[list[str]]]


def write_html(
    report: BenchReport,
    path: str | os.PathLike[str],
    *,
    title: str = "Latency",
    x_label: str = "input",
    validation: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `to_html` to ``path``, completely or not at all; returns the path.

    Raises InputError for a path that exists (unless ``overwrite``) or cannot be written, and MissingError without
    matplotlib.
    """
    text = to_html(report, title=title, x_label=x_label, validation=validation)
    return write_whole(path, text.encode(), overwrite=overwrite)


def write_markdown(
    report: BenchReport,
    path: str | os.PathLike[str],
    *,
    title: str = "Latency",
    validation: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `to_markdown` to ``path``, completely or not at all; returns the path.

    Raises InputError for a path that exists (unless ``overwrite``) or cannot be written.
    """
    return write_whole(path, to_markdown(report, title=title, validation=validation).encode(), overwrite=overwrite)


def to_html(
    report: BenchReport,
    *,
    title: str = "Latency",
    x_label: str = "input",
    validation: Mapping[str, Any] | None = None,
) -> str:
    """The report as one HTML page: picture, table, environment and the JSON itself.

    ``validation`` is the data of a ValidationReport, ``json.loads(validation_report.to_json())``. Raises MissingError
    without matplotlib.
    """
    picture = base64.b64encode(latency_png(report, title=title, x_label=x_label)).decode("ascii")
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        _html_table(report.cells()),
        *(f"<p>{html.escape(note)}</p>" for note in report.notes()),
        f'<p><img alt="{html.escape(f"median latency by {x_label}")}" src="data:image/png;base64,{picture}"></p>',
    ]
    if validation is not None:
        passed = bool(validation.get("passed"))
        parts += [
            "<h2>Validation</h2>",
            f'<p class="{"passed" if passed else "failed"}">{html.escape(_verdict(validation))}</p>',
            _html_table(_comparisons(validation)),
            *(f"<p>{html.escape(str(note))}</p>" for note in validation.get("notes", ())),
        ]
    parts += ["<h2>Environment</h2>", _html_table(_environment(report))]
    data = {"bench": json.loads(report.to_json()), "validation": validation}
    parts += [f'<script type="application/json" id="bench">{_script_json(data)}</script>', "</body></html>", ""]
    return "\n".join(parts)


def to_markdown(report: BenchReport, *, title: str = "Latency", validation: Mapping[str, Any] | None = None) -> str:
    """The report as Markdown: table, notes, environment. ``validation`` is as for `to_html`."""
    lines = [f"# {_md(title)}", "", *_md_table(report.cells()), ""]
    lines += [line for note in report.notes() for line in (_md(note), "")]
    if validation is not None:
        lines += ["## Validation", "", _md(_verdict(validation)), "", *_md_table(_comparisons(validation)), ""]
        lines += [line for note in validation.get("notes", ()) for line in (_md(str(note)), "")]
    lines += ["## Environment", "", *_md_table(_environment(report))]
    return "\n".join(lines) + "\n"


def _environment(report: BenchReport) -> Table:
    known = {"device": report.device, "threads": str(report.threads), **report.environment}
    return ["what", "which"], [[name, str(value)] for name, value in known.items()]


def _verdict(validation: Mapping[str, Any]) -> str:
    against = validation.get("reference_dtype")
    verdict = "passed" if validation.get("passed") else "FAILED"
    return verdict + (f", against the reference in {against}" if against else "")


def _comparisons(validation: Mapping[str, Any]) -> Table:
    entries = list(validation.get("comparisons", ()))
    head = [name for name in _COMPARED if any(entry.get(name) is not None for entry in entries)]
    return head, [[_text(entry.get(name)) for name in head] for entry in entries]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _html_table(table: Table) -> str:
    head, rows = table

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<table>", line("th", head), *(line("td", row) for row in rows), "</table>"])


def _script_json(data: Any) -> str:
    """JSON that cannot end the script it stands in: entities mean nothing there, but JSON's own escapes do."""
    text = json.dumps(data, indent=1, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _md_table(table: Table) -> list[str]:
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell if row is lines[1] else _md(cell) for cell in row) + " |" for row in lines]


def _md(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    for sign in ("\\", "|", "`", "*", "_", "[", "]", "#"):
        text = text.replace(sign, "\\" + sign)
    return " ".join(html.escape(text, quote=False).split())
