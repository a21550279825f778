"""The README's plots and tables, made from the files of results and from nothing else.

    python examples/readme_plots.py [--check]

Writes PNG files into examples/results and the tables between the README's markers. Every PNG holds the SHA-256 of the
JSON files that it shows; --check writes nothing, and ends with 1 where a plot or a table is not that of its files.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paper_figures
from long_context import flat
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from paper_report import figures
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from readme_tables import ENGINES, RESULTS, SHAPES, content, engine_speedups, gpt_loss, replaced, tables
from train_from_scratch import CONVERTED, HEALED, SCRATCH, summary

from sqa_fx.bench import BenchReport, BenchRow
from sqa_fx.latency_plot import latency_png
from sqa_fx.whole_file import write_whole

README = Path(__file__).parent.parent / "README.md"
DIGEST = "SHA-256 of the data"
Contents = Sequence[dict[str, Any]]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#555555", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Picture:
    """A PNG file of examples/results, the JSON files that it shows, and what draws them."""

    name: str
    sources: tuple[str, ...]
    draw: Callable[[Contents], bytes]

    def digest(self) -> str:
        """The SHA-256 of the sources, one after the other."""
        return hashlib.sha256(b"".join((RESULTS / name).read_bytes() for name in self.sources)).hexdigest()

    def is_current(self) -> bool:
        """Whether the PNG is there and was made from what the sources are now."""
        path = RESULTS / self.name
        if not path.is_file():
            return False
        with Image.open(path) as image:
            return bool(image.info.get(DIGEST) == self.digest())

    def write(self) -> None:
        """Draw it."""
        information = PngInfo()
        information.add_text("Source", ", ".join(self.sources))
        information.add_text(DIGEST, self.digest())
        held = io.BytesIO()
        with Image.open(io.BytesIO(self.draw([content(name) for name in self.sources]))) as image:
            image.save(held, format="png", pnginfo=information, optimize=True)
        write_whole(RESULTS / self.name, held.getvalue(), overwrite=True)


def panels(count: int, width: float = 5.0) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` axes side by side."""
    figure = Figure(figsize=(width * count, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    found = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    return figure, found


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    return held.getvalue()


def minilm(contents: Contents) -> bytes:
    """Latency of the demo's model."""
    setting, latency = contents[0]["setting"], contents[0]["latency"]
    title = f"all-MiniLM-L6-v2, ONNX Runtime, batch {setting['batch']}\n"
    title += f"{setting['heads']} heads against SQA hq={setting['hq']}, hkv={setting['hkv']}"
    fields = BenchRow.__dataclass_fields__
    rows = tuple(BenchRow(**{k: v for k, v in row.items() if k in fields}) for row in latency["rows"])
    return latency_png(BenchReport(rows, latency["device"], latency["threads"], latency["warmup"]), title=title)


def engines(contents: Contents) -> bytes:
    """Speed-up of SQA over the same engine's baseline at 32k tokens, and the ideal."""
    figure, (axes,) = panels(1, 7.5)
    for i, (engine, name) in enumerate(ENGINES.items()):
        x = [n + (i - 1.5) * 0.2 for n in range(len(contents))]
        axes.bar(x, [engine_speedups(c["rows"])[engine] for c in contents], 0.18, color=COLOURS[i], label=name)
        best = [engine_speedups(c["rows"], "ideal_speedup").get(engine) for c in contents]
        for place, value in zip(x, best, strict=True):
            if value is not None:
                axes.plot([place - 0.09, place + 0.09], [value] * 2, color="black", linewidth=1.5)
    axes.set_xticks(range(len(contents)), [*SHAPES])
    axes.set_title(f"SQA over the same engine's baseline, 32k tokens, bf16\n{contents[0]['device']}; lines: ideal")
    axes.set_ylabel("speed-up")
    axes.legend(frameon=False, ncols=4, fontsize=8)
    axes.set_ylim(0, 2.25)
    return png(figure)


def gpt(contents: Contents) -> bytes:
    """Loss of the converted GPT by healing tokens, from both starts, and of models trained from scratch."""
    rows = contents[0]["rows"]
    original = gpt_loss(rows, "MHA", "original")
    figure, both = panels(2)
    starts = {"reconstruct, joint, repaired": "chosen, merged and repaired", "weights, mean": "by weights, averaged"}
    for axes, (variant, name) in zip(both, {"sSQA": "sSQA (6, 6)", "SQA": "SQA (6, 3)"}.items(), strict=True):
        for i, (method, label) in enumerate(starts.items()):
            healed = f"{method}, healed"
            tokens = sorted({r["healing_tokens"] for r in rows if (r["variant"], r["method"]) == (variant, healed)})
            losses = [gpt_loss(rows, variant, method, 0), *(gpt_loss(rows, variant, healed, n) for n in tokens)]
            axes.plot([0, *(n / 1e6 for n in tokens)], losses, marker="o", color=COLOURS[i], label=label)
        axes.axhline(gpt_loss(rows, variant, "trained from scratch"), color=COLOURS[2], linestyle="--",
                     label="trained so from scratch")  # fmt: skip
        axes.axhline(original, color="grey", linestyle=":", label="all 12 heads")
        axes.set(title=f"{name} of 12 heads", xlabel="million tokens of healing", ylabel="nats per token")
        axes.legend(frameon=False, fontsize=8)
    return png(figure)


def paper(contents: Contents) -> bytes:
    """Speed-up over MHA by length: converted, by hand and the paper's."""
    layers, device = contents[0]["settings"]["layers"], contents[0]["device"]
    modes = list(dict.fromkeys(row["mode"] for row in contents[0]["rows"]))
    figure, axes_of = panels(len(modes))
    for axes, mode in zip(axes_of, modes, strict=True):
        rows = [r for r in contents[0]["rows"] if r["mode"] == mode and "milliseconds" in r]
        for i, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
            own = sorted((r for r in rows if r["variant"] == variant), key=lambda r: r["length"])
            for key, look in (("converted speedup", "o-"), ("by hand speedup", "x:")):
                points = [(r["length"], figures(r, layers)[key]) for r in own if key in figures(r, layers)]
                if points:
                    label = variant if look == "o-" else None
                    axes.plot(*zip(*points, strict=True), look, color=COLOURS[i], markersize=5, label=label)
            said = [(n, s) for n in paper_figures.LENGTHS if (s := paper_figures.speedup(variant, n)) is not None]
            if said and mode == "forward":
                axes.plot(*zip(*said, strict=True), "--", color=COLOURS[i], alpha=0.5)
        note = "crosses: by hand; dashed: the paper, A100" if mode == "forward" else "crosses: by hand"
        axes.set(title=f"{mode}, {device}\n{note}", xscale="log", xlabel="tokens", ylabel="speed-up over MHA")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.legend(frameon=False, fontsize=8)
    return png(figure)


def long_context(contents: Contents) -> bytes:
    """Speed-up by length of every model, in torch.compile where it ran, else in the first engine."""
    rows = [r for r in flat(contents[0]["rows"]) if r.get("speedup") and r["variant"] != "baseline"]
    models = list(dict.fromkeys(r["model"] for r in rows))
    figure, axes_of = panels(max(1, len(models)), 3.6)
    for axes, model in zip(axes_of, models, strict=False):
        engine = min({r["engine"] for r in rows if r["model"] == model}, key=lambda e: (e != "compiled", e))
        own = [r for r in rows if (r["model"], r["engine"]) == (model, engine)]
        for i, variant in enumerate(dict.fromkeys(r["variant"] for r in own)):
            these = sorted((r for r in own if r["variant"] == variant), key=lambda r: r["length"])
            axes.plot(
                [r["length"] for r in these], [r["speedup"] for r in these], "o-", color=COLOURS[i], label=variant
            )
            best = [(r["length"], r["ideal_speedup"]) for r in these if "ideal_speedup" in r]
            if best:
                axes.plot(*zip(*best, strict=True), "--", color=COLOURS[i], alpha=0.5)
        axes.set(title=f"{model}, {engine}\ndashed: ideal", xscale="log", xlabel="tokens", ylabel="speed-up")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.legend(frameon=False, fontsize=8)
    return png(figure)


def scratch(contents: Contents) -> bytes:
    """Loss by variant: trained from scratch, converted, and healed."""
    rows = summary(contents[0]["rows"])
    figure, (axes,) = panels(1, 7.5)
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    for i, method in enumerate((SCRATCH, CONVERTED, HEALED)):
        own = [r for r in rows if r["method"] == method]
        x = [variants.index(r["variant"]) + (i - 1) * 0.25 for r in own]
        axes.errorbar(x, [r["loss"] for r in own], [r.get("loss, spread", 0.0) for r in own], fmt="o", capsize=3,
                      color=COLOURS[i], label=method)  # fmt: skip
    axes.set_xticks(range(len(variants)), variants)
    axes.set(title="Next-token loss on held-out files", ylabel="nats per token")
    axes.legend(frameon=False, fontsize=8)
    return png(figure)


def pictures() -> list[Picture]:
    """All pictures whose data is there."""
    found = [
        Picture("minilm_cpu.png", ("minilm_cpu.json",), minilm),
        Picture("readme_engines.png", tuple(f"engines_{name}_h200.json" for name in SHAPES.values()), engines),
        Picture("readme_quality.png", ("quality_gpt_h200.json",), gpt),
    ]
    for prefix, draw in (("paper_table", paper), ("long_context", long_context), ("train_from_scratch", scratch)):
        found += [Picture(f"readme_{p.stem}.png", (p.name,), draw) for p in sorted(RESULTS.glob(f"{prefix}_*.json"))]
    return found


def main(argv: list[str] | None = None) -> int:
    """Write or check everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say what is not current")
    options = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    stale = [picture for picture in pictures() if not picture.is_current()]
    new = replaced(text, tables())
    said = [picture.name for picture in stale] + (["the README's tables"] if new != text else [])
    if options.check:
        print("\n".join(f"not that of its data: {name}" for name in said) or "all are those of their data")
        return 1 if said else 0
    for picture in stale:
        picture.write()
    write_whole(README, new.encode(), overwrite=True)
    print("written: " + (", ".join(said) or "nothing, all was current"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
