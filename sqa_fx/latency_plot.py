"""A picture of a BenchReport."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from sqa_fx.bench import BenchReport, BenchRow
from sqa_fx.errors import InputError, MissingError
from sqa_fx.whole_file import write_whole

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def plot_latency(
    report: BenchReport,
    path: str | os.PathLike[str],
    *,
    title: str = "Latency",
    x_label: str = "sequence length",
    overwrite: bool = False,
) -> Path:
    """Write what `latency_png` draws to ``path``, which ends in .png. The file appears complete or not at all.

    Raises MissingError without matplotlib, and InputError for a path that cannot be written.
    """
    require_matplotlib()
    target = Path(path)
    if target.suffix != ".png":
        raise InputError(f"the plot is a PNG file, but the path is {target}; give a path that ends in .png")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists already; pass overwrite=True to replace it, or give another path")
    return write_whole(target, latency_png(report, title=title, x_label=x_label), overwrite=overwrite)


def require_matplotlib() -> None:
    """Raise MissingError, with the pip line, where matplotlib is not installed."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise MissingError("plotting needs matplotlib, which is not installed: pip install matplotlib") from e


def latency_png(report: BenchReport, *, title: str = "Latency", x_label: str = "sequence length") -> bytes:
    """The median latency of every runner as the bytes of a PNG, each bar or point marked with its speed-up over the
    first runner.

    Labels that are all numbers become a logarithmic x axis with lines, where there are three or more of them; otherwise
    there are groups of bars. Raises MissingError without matplotlib.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(row.label for row in report.rows))
    runners = list(dict.fromkeys(row.runner for row in report.rows))
    rows = {(row.runner, row.label): row for row in report.rows}
    # Not pyplot: that would choose a display backend and keep the figure alive.
    figure = Figure(figsize=(max(6.4, 1.2 + 0.55 * len(labels) * len(runners)), 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(labels) >= 3 and all(label.isdecimal() and int(label) > 0 for label in labels):
        _lines(axes, rows, runners, labels)
    else:
        _bars(axes, rows, runners, labels)
    axes.set_title(f"{title}\n{report.device}, {report.threads} threads", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel("median latency (ms)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()


def _lines(axes: Any, rows: dict[tuple[str, str], BenchRow], runners: list[str], labels: list[str]) -> None:
    order = sorted(labels, key=int)
    for index, runner in enumerate(runners):
        own = [rows[runner, label] for label in order if (runner, label) in rows]
        x, y = [int(row.label) for row in own], [row.p50_ms for row in own]
        axes.plot(x, y, marker="o", color=_COLOURS[index % len(_COLOURS)], label=runner)
        if index:
            _annotate(axes, list(zip(x, y, own, strict=True)), below=True)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([int(label) for label in order], order)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(_decades())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(y=0.15)


def _bars(axes: Any, rows: dict[tuple[str, str], BenchRow], runners: list[str], labels: list[str]) -> None:
    width = 0.8 / len(runners)
    for index, runner in enumerate(runners):
        own = [(i, rows[runner, label]) for i, label in enumerate(labels) if (runner, label) in rows]
        x = [i + (index - (len(runners) - 1) / 2) * width for i, _ in own]
        y = [row.p50_ms for _, row in own]
        axes.bar(x, y, width * 0.94, color=_COLOURS[index % len(_COLOURS)], label=runner)
        if index:
            _annotate(axes, [(a, b, row) for a, b, (_, row) in zip(x, y, own, strict=True)], below=False)
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(y=0.3)
    axes.set_ylim(bottom=0)


def _annotate(axes: Any, points: list[tuple[float, float, BenchRow]], *, below: bool) -> None:
    for x, y, row in points:
        axes.annotate(
            f"{row.speedup:.2f}x",
            (x, y),
            xytext=(0, -6 if below else 3),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=9,
        )


def _decades() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1.0, 2.0, 5.0))
