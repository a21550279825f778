"""Draw the regions of attention sites as SVG or PNG."""

from __future__ import annotations

import io
import itertools
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqa_fx.errors import InputError, MissingError
from sqa_fx.layered_layout import Layering, layered
from sqa_fx.region_graph import Box, RegionGraph, Role
from sqa_fx.whole_file import write_whole

# Fill and border by role: tints of Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS: dict[Role, tuple[str, str, str]] = {
    "q": ("#CCE3F0", "#0072B2", "queries"),
    "k": ("#FAEBCC", "#E69F00", "keys"),
    "v": ("#CCECE3", "#009E73", "values"),
    "qkv": ("#E3E3F5", "#5B5BA8", "several of these"),
    "core": ("#FCFAD9", "#A89F00", "attention"),
    "o": ("#F5E4ED", "#CC79A7", "output"),
    "side": ("#DDF0FB", "#56B4E9", "bias, mask or gate with heads"),
    "input": ("#FFFFFF", "#999999", "enters the region"),
    "uncut": ("#F2F2F2", "#777777", "parameter"),
    "refused": ("#F7EDE8", "#B08977", "of a refused site"),
    "obstacle": ("#F7CFC2", "#D55E00", "in the way"),
}
_SIZE = 8.0  # points
_CHARACTER = _SIZE * 0.602 / 72  # inches; the advance of a monospaced glyph
_LINE = _SIZE * 1.3 / 72
_PAD, _GAP, _RISE = 0.07, 0.22, 0.34
_MARGIN, _BETWEEN = 0.35, 0.6
_PANELS_ACROSS, _LEGEND_ACROSS = 4, 4
_HEADING = 64  # characters
_SUFFIXES = (".svg", ".png")
_PIXELS = 30_000  # what a raster image may measure at most


def check_target(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """``path`` as a place to draw into, checked before the work is done.

    Raises MissingError without matplotlib, and InputError for a path that cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise MissingError("drawing needs matplotlib, which is not installed: pip install matplotlib") from e
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise InputError(f"the drawing is an SVG or PNG file, but the path is {target}; end it in .svg or .png")
    if target.is_dir() or (target.exists() and not overwrite):
        raise InputError(f"{target} exists: choose another path, or pass --overwrite (overwrite=True)")
    if not target.absolute().parent.is_dir():
        raise InputError(f"cannot write {target}: the folder {target.absolute().parent} does not exist")
    return target


def draw_regions(
    graphs: Sequence[RegionGraph],
    path: str | os.PathLike[str],
    *,
    left_alone: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Draw every region with its operators from top to bottom; ``left_alone`` are lines of text below them.

    The file appears complete or not at all. Raises as :func:`check_target` does.
    """
    target = check_target(path, overwrite)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [_Panel(graph) for graph in graphs]
    rows = [panels[i : i + _PANELS_ACROSS] for i in range(0, len(panels), _PANELS_ACROSS)]
    footer = [line for text in left_alone for line in textwrap.wrap(f"left alone: {text}", 2 * _HEADING)]
    if not panels:
        footer.insert(0, "no attention site")
    legend = _legend_entries(graphs)
    width = max([sum(p.width + _BETWEEN for p in row) - _BETWEEN for row in rows] + [_HEADING * _CHARACTER * 1.6])
    heights = [max(p.height for p in row) for row in rows]
    below = (len(footer) + 1) * _LINE + -(-len(legend) // _LEGEND_ACROSS) * (_LINE + 3 * _PAD)
    size = (width + 2 * _MARGIN, sum(heights) + _BETWEEN * len(rows) + below + 2 * _MARGIN)
    style = {"svg.fonttype": "none", "svg.hashsalt": "sqa-fx", "font.family": "monospace", "font.size": _SIZE}
    with matplotlib.rc_context(style):
        # Not pyplot: that would choose a display backend and keep the figure alive.
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, size[0])
        axes.set_ylim(size[1], 0)
        axes.axis("off")
        y = _MARGIN
        for row, height in zip(rows, heights, strict=True):
            x = _MARGIN
            for panel in row:
                panel.draw(axes, x, y)
                x += panel.width + _BETWEEN
            y += height + _BETWEEN
        for line in footer:
            _text(axes, _MARGIN, y, line)
            y += _LINE
        _legend(axes, legend, y + _LINE)
        names = ", ".join(name for graph in graphs for name in graph.sites)
        _write(figure, target, f"attention sites: {names}", min(150.0, _PIXELS / max(size)))
    return target


class _Panel:
    """One region with its heading, measured in inches."""

    def __init__(self, graph: RegionGraph) -> None:
        self.graph = graph
        self.heading = _heading(graph)
        sizes = [_box_size(box) for box in graph.boxes]
        self.sizes = sizes
        self.layout: Layering = layered(graph.edges, [w for w, _ in sizes], _GAP)
        count = max(self.layout.layers, default=-1) + 1
        self.tall = [0.0] * count
        for (_, height), layer in zip(sizes, self.layout.layers, strict=True):
            self.tall[layer] = max(self.tall[layer], height)
        self.top = (len(self.heading) + 1) * _LINE
        self.width = max([self.layout.width] + [len(text) * _CHARACTER for text, _ in self.heading])
        self.height = self.top + sum(self.tall) + _RISE * max(count - 1, 0)

    def _middle(self, layer: int) -> float:
        return self.top + sum(self.tall[:layer]) + _RISE * layer + self.tall[layer] / 2

    def draw(self, axes: Any, left: float, top: float) -> None:
        """Draw at (left, top); y grows downwards."""
        for number, (text, bold) in enumerate(self.heading):
            colour = "#B34700" if self.graph.refused and number else "#000000"
            _text(axes, left, top + number * _LINE, text, colour=colour, bold=bold)
        left += (self.width - self.layout.width) / 2
        layers = self.layout.layers
        for (start, end), bends in zip(self.graph.edges, self.layout.bends, strict=True):
            points = [(left + self.layout.x[start], top + self._middle(layers[start]) + self.sizes[start][1] / 2)]
            for step, x in enumerate(bends, layers[start] + 1):
                middle = top + self._middle(step)
                points += [(left + x, middle - self.tall[step] / 2), (left + x, middle + self.tall[step] / 2)]
            points.append((left + self.layout.x[end], top + self._middle(layers[end]) - self.sizes[end][1] / 2))
            _edge(axes, points)
        for box, (width, height), x, layer in zip(self.graph.boxes, self.sizes, self.layout.x, layers, strict=True):
            _box(axes, box, left + x - width / 2, top + self._middle(layer) - height / 2, width, height)


def _heading(graph: RegionGraph) -> list[tuple[str, bool]]:
    """Lines above a region, and whether each is bold."""
    names = graph.sites[0] if len(graph.sites) == 1 else f"{graph.sites[0]} ... {graph.sites[-1]}  x {len(graph.sites)}"
    if len(graph.sites) == 2:
        names = f"{graph.sites[0]}, {graph.sites[1]}  x 2"
    lines = [(names, True)]
    if graph.locations:
        more = f" and {len(graph.locations) - 1} more" if len(graph.locations) > 1 else ""
        lines.append((f"at {graph.locations[0]}{more}", False))
    said = ([f"refused: {graph.refused}"] if graph.refused else []) + list(graph.heading)
    lines += [(line, False) for text in said for line in textwrap.wrap(text, _HEADING)]
    return lines


def _box_size(box: Box) -> tuple[float, float]:
    return max(map(len, box.lines)) * _CHARACTER + 2 * _PAD, len(box.lines) * _LINE + 2 * _PAD


def _box(axes: Any, box: Box, left: float, top: float, width: float, height: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    fill, border, _ = _COLOURS[box.role]
    inner = 0.04
    axes.add_patch(
        FancyBboxPatch(
            (left + inner, top + inner),
            width - 2 * inner,
            height - 2 * inner,
            boxstyle=f"round,pad={inner}",
            facecolor=fill,
            edgecolor=border,
            linewidth=2.2 if box.cut or box.role == "obstacle" else 0.8,
            linestyle="--" if box.role == "input" else "-",
            zorder=2,
        )
    )
    for number, line in enumerate(box.lines):
        middle = left + width / 2
        _text(axes, middle, top + _PAD + number * _LINE, line, centred=True, bold=box.cut and number == 0)


def _edge(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """A line down through ``points``, curved between every two so that it leaves and arrives upright."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    vertices, codes = [points[0]], [Curve.MOVETO]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        vertices += [(x0, middle), (x1, middle), (x1, y1)]
        codes += [Curve.CURVE4] * 3
    axes.add_patch(
        FancyArrowPatch(
            path=Curve(vertices, codes),
            arrowstyle="-|>,head_length=3,head_width=1.5",
            color="#777777",
            linewidth=0.8,
            zorder=1,
            shrinkA=0,
            shrinkB=0,
        )
    )


def _text(
    axes: Any, x: float, y: float, text: str, *, colour: str = "#000000", centred: bool = False, bold: bool = False
) -> None:
    axes.text(
        x,
        y,
        text,
        color=colour,
        ha="center" if centred else "left",
        va="top",
        fontsize=_SIZE,
        fontweight="bold" if bold else "normal",
        parse_math=False,
        zorder=3,
    )


def _legend_entries(graphs: Sequence[RegionGraph]) -> list[Box]:
    roles = {box.role for graph in graphs for box in graph.boxes}
    entries = [Box(role, (said,)) for role, (_, _, said) in _COLOURS.items() if role in roles]
    if any(box.cut for graph in graphs for box in graph.boxes):
        entries.append(Box("uncut", ("bold: a parameter that is cut",), cut=True))
        entries.append(Box("input", ("*: the heads lie along this dimension",)))
    return entries


def _legend(axes: Any, entries: Sequence[Box], top: float) -> None:
    x = _MARGIN
    for number, box in enumerate(entries):
        width, height = _box_size(box)
        if number and number % _LEGEND_ACROSS == 0:
            x, top = _MARGIN, top + height + _PAD
        _box(axes, box, x, top, width, height)
        x += width + _GAP


def _write(figure: Any, target: Path, description: str, dots_per_inch: float) -> None:
    """Draw into the target, whole or not at all."""
    kind = target.suffix[1:]
    # The same drawing is the same file.
    metadata = {"Title": "sqa-fx inspect", "Description": description} | ({"Date": None} if kind == "svg" else {})
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=dots_per_inch, metadata=metadata)
    write_whole(target, drawn.getvalue(), overwrite=True)  # what may be replaced was asked before drawing
