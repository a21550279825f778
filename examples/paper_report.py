"""What the rows of the paper's table say: speed-ups, shares of the ideal, and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import paper_figures
from measured_rows import Row, markdown, report_facts

from sqa_fx.errors import InputError
from sqa_fx.ideal import SiteTime, ideal_ms

AS_FAST = 0.98
"""A conversion must be at least so many times as fast as the model written by hand."""
PROPORTIONAL = 0.05
"""How far attention time may be from proportional to its heads, as a share."""
IDEAL_SHARE = 0.95
"""The share of the ideal speed-up to reach at `IDEAL_FROM` tokens and more."""
IDEAL_FROM = 131072
HEADS = 16


def figures(row: Row, layers: int) -> Row:
    """The figures of a row; those that cannot be told are left out.

    Attention that shrinks with its heads is MHA's kernels inside the model where they were seen, else MHA's attention
    alone, times the layers. Only that shrinks in the ideal (Amdahl's law); projections that got smaller, too, can take
    a row beyond it.
    """
    ms, found = row.get("milliseconds", {}), Row()
    length, variant = row["length"], row["variant"]
    if (paper := paper_figures.speedup(variant, length)) is not None:
        found["paper"] = paper
    base, hand = ms.get("MHA"), ms.get("by hand")
    for way in ("converted", "backend", "by hand"):
        if way in ms and base:
            found[f"{way} speedup"] = base / ms[way]
        if way in ms and hand and way != "by hand":
            found[f"{way} / by hand"] = hand / ms[way]
    heads = max(row["heads"]) if "heads" in row else HEADS
    alone = row.get("attention_ms", {})
    if "MHA" in alone and variant in alone:
        found["attention / proportional"] = alone[variant] / (alone["MHA"] * heads / HEADS)
    attention = row.get("attention_in_model_ms") or alone.get("MHA", 0.0) * layers
    if base and attention:
        try:
            best = ideal_ms(base, [SiteTime("attention", attention, HEADS / heads)])
        except InputError:  # attention alone took longer than the whole model: sizes too small to tell
            return found
        found |= {"attention share": attention / base, "ideal speedup": base / best}
        for way in ("converted", "backend"):
            if way in ms:
                found[f"{way} / ideal"] = best / ms[way]
    return found


def verdicts(row: Row, layers: int) -> dict[str, bool]:
    """What the row must show, by name; what does not apply or is not known is left out."""
    f, found = figures(row, layers), {}
    if row["mode"] == "forward" and "paper" in f and "converted speedup" in f:
        found["as the paper"] = f["converted speedup"] >= f["paper"]
    for name, way in (("as by hand", "converted"), ("backend as by hand", "backend")):
        if f"{way} / by hand" in f:
            found[name] = f[f"{way} / by hand"] >= AS_FAST
    if "attention / proportional" in f:
        found["proportional"] = abs(f["attention / proportional"] - 1) <= PROPORTIONAL
    if row["length"] >= IDEAL_FROM and "converted / ideal" in f:
        found["ideal"] = f["converted / ideal"] >= IDEAL_SHARE
    if "converted_attention" in row:
        graph = row["converted_attention"]
        found["causal, no mask"] = graph["causal"] and not graph["masks"]
    return found


def report(content: Mapping[str, Any]) -> str:
    """The Markdown of a results file."""
    rows, layers = content["rows"], content["settings"]["layers"]
    parts = ["# The paper's table with converted models", report_facts(content)]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == mode]
        parts += [f"## {mode}", speeds(own, layers), attention(own, layers)]
    parts.append(remarks(rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def speeds(rows: Sequence[Row], layers: int) -> str:
    """Milliseconds, speed-ups over MHA and verdicts beside the paper's figures."""
    head = ["tokens x batch", "variant", "MHA ms", "converted ms", "backend ms", "by hand ms", "speed-up: converted",
            "backend", "by hand", "paper (A100)", "paper s: MHA", "variant", "ideal", "share", "backend's",
            "converted / by hand", "backend / by hand", "verdicts"]  # fmt: skip
    body = []
    for row in rows:
        f, ms = figures(row, layers), row.get("milliseconds", {})
        said = "; ".join(f"{name}: {'yes' if good else 'NO'}" for name, good in verdicts(row, layers).items())
        base, own = (paper_figures.seconds(name, row["length"]) for name in ("MHA", row["variant"]))
        body.append([
            f"{row['length']} x {row['batch']}", named(row), *(number(ms.get(w), ".2f") for w in WAYS),
            *(number(f.get(f"{w} speedup"), ".2f") for w in WAYS[1:]), number(f.get("paper"), ".2f"),
            number(base if own else None, ".4f"), number(own, ".4f"), number(f.get("ideal speedup"), ".2f"),
            *(number(f.get(f"{w} / ideal"), ".0%") for w in WAYS[1:3]),
            *(number(f.get(f"{w} / by hand"), ".3f") for w in WAYS[1:3]), said,
        ])  # fmt: skip
    return markdown(head, body)


WAYS = ("MHA", "converted", "backend", "by hand")


def attention(rows: Sequence[Row], layers: int) -> str:
    """One layer's attention alone, against proportional to its heads, and MHA's share of the model."""
    head = ["tokens x batch", "variant", "MHA's attention alone, ms", "its own, ms", "/ proportional to heads",
            "MHA's kernels in the model, ms", "share of MHA's time"]  # fmt: skip
    body = []
    for row in rows:
        alone, f = row.get("attention_ms", {}), figures(row, layers)
        body.append([
            f"{row['length']} x {row['batch']}", named(row), number(alone.get("MHA"), ".3f"),
            number(alone.get(row["variant"]), ".3f"), number(f.get("attention / proportional"), ".3f"),
            number(row.get("attention_in_model_ms"), ".2f"), number(f.get("attention share"), ".0%"),
        ])  # fmt: skip
    return markdown(head, body)


def remarks(rows: Sequence[Row]) -> str:
    """What failed, was refused, or computes something else."""
    found = []
    for row in rows:
        where = f"{row['mode']}, {row['length']} x {row['batch']}, {row['variant']}"
        if "refused" in row:
            found.append(f"- {where}: not converted, written by hand only: {row['refused']}")
        failed = row.get("failed", {})
        for name, why in {"the row": failed}.items() if isinstance(failed, str) else failed.items():
            found.append(f"- {where}, {name}: {why}")
    worst = [e for row in rows for e in row.get("errors", {}).values() if isinstance(e, float)]
    if worst:
        found.append(f"- All ways compute what the converted model computes in eager: relative error {max(worst):.2g}.")
    return "\n".join(found)


def named(row: Row) -> str:
    """The variant with its heads."""
    return f"{row['variant']} ({row['heads'][0]}, {row['heads'][1]})" if "heads" in row else str(row["variant"])


def number(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)
