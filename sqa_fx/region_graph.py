"""The regions of attention sites as plain data for a drawing: boxes with a role, and which box reads which."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from sqa_fx.passes.aten_call import moved_from, op_name
from sqa_fx.passes.hints import is_tensor, shape_of, value_of
from sqa_fx.passes.labels import EMPTY, varying
from sqa_fx.passes.op_kinds import Aligned, Move
from sqa_fx.passes.ops import step
from sqa_fx.passes.pipeline import Analysis
from sqa_fx.passes.region import region
from sqa_fx.passes.site import Refusal, Site
from sqa_fx.plan import SitePlan

Role = Literal["q", "k", "v", "qkv", "core", "o", "side", "input", "uncut", "refused", "obstacle"]
_REFUSED_NODES = 48
_LINE = 34


@dataclass(frozen=True)
class Box:
    """One or several operators in a row, a parameter, or a tensor that enters the region.

    ``cut`` marks a parameter that a conversion makes smaller.
    """

    role: Role
    lines: tuple[str, ...]
    cut: bool = False


@dataclass(frozen=True)
class RegionGraph:
    """The region of ``sites``, which look all the same; ``refused`` is the reason when they cannot be converted."""

    sites: tuple[str, ...]
    locations: tuple[str, ...]
    heading: tuple[str, ...]
    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]
    refused: str = ""


def region_graphs(analysis: Analysis, plans: Mapping[str, SitePlan]) -> list[RegionGraph]:
    """The regions of all sites, convertible ones first; equal ones (repeated layers) are one."""
    graphs = [_site_graph(analysis, site, plans.get(site.name)) for site in analysis.sites]
    graphs += [_refused_graph(analysis, refusal) for refusal in analysis.refusals]
    merged: dict[RegionGraph, list[RegionGraph]] = {}
    for graph in graphs:
        # What makes an input of the region is no part of it: the first layer reads something else than the others.
        boxes = tuple(replace(box, lines=box.lines[1:]) if box.role == "input" else box for box in graph.boxes)
        merged.setdefault(replace(graph, sites=(), locations=(), boxes=boxes), []).append(graph)
    return [
        replace(
            alike[0],
            sites=tuple(g.sites[0] for g in alike),
            locations=tuple(dict.fromkeys(place for g in alike for place in g.locations)),
        )
        for alike in merged.values()
    ]


def _site_graph(analysis: Analysis, site: Site, plan: SitePlan | None) -> RegionGraph:
    roles: dict[fx.Node, list[str]] = {}
    for label, node in site.labels:
        roles.setdefault(node, []).append(label)
    for node in site.projections:
        roles.setdefault(node, ["o"])
    cuts = {use.node for use in site.leaves}
    core = {n for c in site.cores for n in (c.anchor, c.score, c.value)}
    boxes = {}
    for node, own in roles.items():
        role: Role = "core" if node in core else _role(own)
        boxes[node] = Box(role, tuple(_lines(node, site, plan)), node in cuts)
    heads = f"{site.heads} query heads, {site.kv_heads} KV heads of {site.head_dim}"
    if plan is not None:
        heads += f" -> {plan.hq}, {plan.hkv}"
    return _graph(analysis, site.name, site.place.where, (heads,), boxes, "")


def _refused_graph(analysis: Analysis, refusal: Refusal) -> RegionGraph:
    anchors = [refusal.anchor] if refusal.anchor is not None else []
    obstacles = {n for n in analysis.facts.module.graph.nodes if n.name in refusal.nodes and is_tensor(n)}
    nodes = {n for n in region(analysis.facts, anchors, _REFUSED_NODES, obstacles) if is_tensor(n)}
    boxes = {
        n: Box("obstacle" if n in obstacles else "core" if n in anchors else "refused", tuple(_lines(n)))
        for n in nodes | obstacles
    }
    return _graph(
        analysis, refusal.name, refusal.place.where, (f"to convert: {refusal.advice}",), boxes, refusal.reason
    )


def _role(roles: Sequence[str]) -> Role:
    known = {"side" if r.startswith("side:") else r for r in roles}
    if len(known) == 1:
        return known.pop()  # type: ignore[return-value]
    return "qkv" if known <= {"q", "k", "v"} else "side"


def _lines(node: fx.Node, site: Site | None = None, plan: SitePlan | None = None) -> list[str]:
    """What a box says of one node: the op or parameter, and the shape with the dimensions of the heads marked."""
    marked: set[int] = set()
    if site is not None:
        for (_, other), labels in site.labels.items():
            if other is node:
                marked |= set(varying(labels))
    shape = shape_of(node)
    text = ", ".join(f"{size}{'*' if dim in marked else ''}" for dim, size in enumerate(shape))
    lines = [_title(node), f"[{text}]"]
    smaller = _smaller(node, site, plan) if site is not None and plan is not None else None
    if smaller is not None and smaller != shape:
        lines.append(f"-> [{', '.join(map(str, smaller))}]")
    return lines


def _title(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    maker = moved_from(node)
    name = op_name(maker) or str(node.target)
    return f"{name} [{node.args[1]}]" if node.target is operator.getitem else name


def _smaller(node: fx.Node, site: Site, plan: SitePlan) -> tuple[int, ...] | None:
    """The shape of a parameter after the plan; None for what is no parameter."""
    shape = list(shape_of(node))
    uses = [use for use in site.leaves if use.node is node]
    for use in uses:
        labelled = int((use.labels != EMPTY).sum())
        if site.kinds[use.role] == "kv":
            kept = labelled * plan.hkv // site.kv_heads
        else:
            kept = labelled * (plan.hq if use.role == "q" else max(plan.hq, plan.hkv)) // site.heads
        shape[use.axis] -= labelled - kept
    return tuple(shape) if uses else None


def _graph(
    analysis: Analysis, name: str, location: str, heading: tuple[str, ...], boxes: dict[fx.Node, Box], refused: str
) -> RegionGraph:
    """Close the region with what enters it, join operators in a row into one box, and number the boxes."""
    order, constants = analysis.facts.order, analysis.facts.constants
    sources = {n: _tensor_inputs(n) for n in boxes}
    for node in list(boxes):
        for source in sources[node]:
            if source in boxes:
                continue
            if source not in constants:
                boxes[source] = Box("input", tuple(_lines(source)))
            elif refused and source.op == "get_attr":
                boxes[source] = Box("uncut", tuple(_lines(source)))
    readers: dict[fx.Node, list[fx.Node]] = {n: [] for n in boxes}
    for node, read in sources.items():
        for source in read:
            if source in boxes:
                readers[source].append(node)
    ordered = _from_the_ends(sorted(boxes, key=order.__getitem__), sources)
    last: dict[fx.Node, fx.Node] = {}  # the end of the row that a node belongs to
    for node in reversed(ordered):
        following = readers[node]
        joined = (
            len(following) == 1
            and [s for s in sources.get(following[0], []) if s in boxes] == [node]
            and _joins(node, boxes[node])
            and _joins(following[0], boxes[following[0]])
            and boxes[node].role == boxes[following[0]].role
        )
        last[node] = last[following[0]] if joined else node
    rows: dict[fx.Node, list[fx.Node]] = {}
    for node in ordered:
        rows.setdefault(last[node], []).append(node)
    number = {end: i for i, end in enumerate(rows)}
    shown = []
    path = _module_of(name)
    for end, row in rows.items():
        box = boxes[end]
        titles = [_short(boxes[n].lines[0], path) for n in row]
        shown.append(replace(box, lines=(*_wrapped(titles), *box.lines[1:])))
    edges = {
        (number[last[source]], number[last[node]])
        for node, read in sources.items()
        for source in read
        if source in boxes and last[source] is not last[node]
    }
    places = (location,) if location else ()
    return RegionGraph((name,), places, heading, tuple(shown), tuple(sorted(edges)), refused)


def _from_the_ends(nodes: Sequence[fx.Node], sources: Mapping[fx.Node, Sequence[fx.Node]]) -> list[fx.Node]:
    """``nodes`` with inputs before their readers, in an order that only their arguments decide: equal regions come out
    equal, whatever order the model made them in."""
    found: dict[fx.Node, None] = {}
    known = set(nodes)
    for end in reversed(nodes):
        stack = [(end, False)]
        while stack:
            node, done = stack.pop()
            if done:
                found.setdefault(node)
            elif node not in found:
                stack.append((node, True))
                stack.extend((s, False) for s in reversed(sources.get(node, ())) if s in known and s not in found)
    return list(found)


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that ``node`` reads; an op with several results stands for its own inputs."""
    found: list[fx.Node] = []
    for source in node.all_input_nodes:
        if is_tensor(source):
            found.append(source)
        elif isinstance(value_of(source), tuple | list):
            found.extend(_tensor_inputs(source))
    return list(dict.fromkeys(found))


def _joins(node: fx.Node, box: Box) -> bool:
    """True for an operator that may share a box with its neighbours: it moves elements or works one by one."""
    if node.op != "call_function" or box.role in ("input", "obstacle"):
        return False
    description = step(node)
    return isinstance(description, Move) or (
        isinstance(description, Aligned) and not description.contraction and not description.locked
    )


def _module_of(site: str) -> str:
    return site.partition("#")[0]


def _short(title: str, path: str) -> str:
    """A parameter's name below its site; above it, only the last parts, so that equal layers look equal."""
    if title.startswith(path + "."):
        return title[len(path) + 1 :]
    parts, above = title.split("."), path.split(".")
    while len(parts) > 1 and above and parts[0] == above[0]:
        parts, above = parts[1:], above[1:]
    return ".".join(parts)


def _wrapped(titles: Iterable[str]) -> list[str]:
    lines = [""]
    for title in titles:
        text = f"{lines[-1]} · {title}" if lines[-1] else title
        if lines[-1] and len(text) > _LINE:
            lines[-1] += " ·"
            text = title
            lines.append("")
        lines[-1] = text
    return lines
