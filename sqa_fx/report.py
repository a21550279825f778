"""The report: what was found, converted and refused, what it saves, and how it was proved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sqa_fx.passes.locate import nodes_at
from sqa_fx.passes.site import Refusal


@dataclass(frozen=True)
class SiteReport:
    """One convertible site, before and after.

    ``flops_before``/``flops_after`` count the two attention products at the example inputs: 4 * batch * heads * q_len *
    kv_len * head_dim (two multiply-adds per score and value element). ``kv_bytes_*`` are bytes of K and V per token
    of context. ``location`` is the line of source that computes the attention, "file.py:123", '' when unknown.
    ``inexact`` says why the site cannot agree with the masked original (only with ``allow_inexact``), '' when it does.
    ``attentions`` counts the attention computations of the site: more than one where their outputs meet before one
    output projection (heads in a loop, attention over two sources added).
    ``error_before_repair`` and ``error_after_repair`` are the mean squared errors of the site's output against the
    original's on held-out calibration data, relative to its variance; None where it was not repaired.
    """

    name: str
    heads: int
    kv_heads: int
    hq: int
    hkv: int
    head_dim: int
    q_len: int
    kv_len: int
    flops_before: int
    flops_after: int
    kv_bytes_before: int
    kv_bytes_after: int
    attention: str
    query_heads: tuple[int, ...] = ()
    kv_groups: tuple[tuple[int, ...], ...] = ()
    proof_error: float | None = None
    location: str = ""
    inexact: str = ""
    attentions: int = 1
    error_before_repair: float | None = None
    error_after_repair: float | None = None


@dataclass(frozen=True)
class RefusedReport:
    """One site that stays as it was, with the reason and the nodes in its way.

    ``location`` ("file.py:123") and ``source`` are the line that computes the attention, ``node_locations`` the lines
    of ``nodes``; '' when unknown. ``kind`` is one of a fixed set of names (``sqa_fx.passes.advice.ADVICE``), and
    ``advice`` what would make the site convertible.
    """

    name: str
    reason: str
    nodes: tuple[str, ...]
    kind: str = "other"
    advice: str = ""
    location: str = ""
    source: str = ""
    node_locations: tuple[str, ...] = ()

    def line(self) -> str:
        """The refusal as one line of text."""
        at = f" ({self.location})" if self.location else ""
        nodes = nodes_at(self.nodes, self.node_locations, self.location)
        advice = f"; to convert: {self.advice}" if self.advice else ""
        return f"refused {self.name}{at}: {self.reason}" + (f" (node {nodes})" if nodes else "") + advice


@dataclass(frozen=True)
class OtherMixerReport:
    """A module that mixes positions by other means than softmax attention (recurrent, state-space, linear attention):
    seen and left alone."""

    name: str
    location: str
    what: str


def refused_entry(refusal: Refusal) -> RefusedReport:
    """What the report says of ``refusal``."""
    r = refusal
    return RefusedReport(r.name, r.reason, r.nodes, r.kind, r.advice, r.place.where, r.place.source, r.node_locations)


@dataclass
class Report:
    """Everything that convert or inspect has to say. Prints as a table; ``to_json`` gives the same as data."""

    sites: list[SiteReport] = field(default_factory=list)
    refused: list[RefusedReport] = field(default_factory=list)
    other_mixers: list[OtherMixerReport] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0
    dynamic: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    proof: dict[str, Any] | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)

    @property
    def flops_before(self) -> int:
        """Attention FLOPs of all sites before."""
        return sum(s.flops_before for s in self.sites)

    @property
    def flops_after(self) -> int:
        """Attention FLOPs of all sites after."""
        return sum(s.flops_after for s in self.sites)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        data = asdict(self)
        data["attention_flops"] = {"before": self.flops_before, "after": self.flops_after}
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Report:
        """The report that :meth:`to_json` wrote."""
        report = Report()
        for entry in data["sites"]:
            fields = dict(entry, query_heads=tuple(entry["query_heads"]))
            fields["kv_groups"] = tuple(tuple(g) for g in entry["kv_groups"])
            report.sites.append(SiteReport(**fields))
        for entry in data["refused"]:
            places = tuple(entry.get("node_locations", ()))
            report.refused.append(RefusedReport(**dict(entry, nodes=tuple(entry["nodes"]), node_locations=places)))
        report.other_mixers = [OtherMixerReport(**entry) for entry in data.get("other_mixers", ())]
        report.parameters_before = int(data["parameters_before"])
        report.parameters_after = int(data["parameters_after"])
        report.dynamic, report.static = tuple(data["dynamic"]), tuple(data["static"])
        report.notes, report.proof = list(data["notes"]), data["proof"]
        report.milliseconds = dict(data["milliseconds"])
        return report

    def table(self) -> str:
        """The report as text."""
        repaired = any(s.error_after_repair is not None for s in self.sites)
        head = (
            "site",
            "query heads",
            "KV heads",
            "attention GFLOPs",
            "KV bytes/token",
            "attention",
            *(["held-out error"] if repaired else []),
            "proof error",
            "at",
        )
        rows = [head]
        for s in self.sites:
            rows.append(
                (
                    s.name,
                    f"{s.heads} -> {s.hq}",
                    f"{s.kv_heads} -> {s.hkv}",
                    f"{s.flops_before / 1e9:.4g} -> {s.flops_after / 1e9:.4g}",
                    f"{s.kv_bytes_before} -> {s.kv_bytes_after}",
                    s.attention,
                    *([_errors(s)] if repaired else []),
                    "-" if s.proof_error is None else f"{s.proof_error:.1e}",
                    s.location,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.flops_after:
            ratio = self.flops_before / self.flops_after
            lines.append(f"attention FLOPs {self.flops_before:.4g} -> {self.flops_after:.4g} ({ratio:.2f}x fewer)")
        lines.append(f"parameters {self.parameters_before:,} -> {self.parameters_after:,}")
        if self.dynamic:
            lines.append(f"dynamic inputs: {', '.join(self.dynamic)}")
        if self.static:
            lines.append(f"static inputs: {', '.join(self.static)}")
        lines.extend(refused.line() for refused in self.refused)
        for mixer in self.other_mixers:
            at = f" ({mixer.location})" if mixer.location else ""
            lines.append(f"left alone {mixer.name}{at}: {mixer.what}")
        if self.proof is not None:
            lines.append(
                f"proved against the masked original in {self.proof['precision']}: relative error "
                f"{self.proof['error']:.2e}, "
                f"tolerance {self.proof['tolerance']:.0e}"
            )
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)

    __str__ = table


def _errors(site: SiteReport) -> str:
    """The held-out error of a site before and after its repair."""
    if site.error_before_repair is None or site.error_after_repair is None:
        return "-"
    return f"{site.error_before_repair:.3f} -> {site.error_after_repair:.3f}"
