"""Baseline against SQA in every engine that is here: verdicts, latencies and speed-ups in one table and one plot.

    python examples/compare_engines.py [--models vit-b bert-base llama-1b] [--variants SQA sSQA xSQA]
        [--dtypes bf16 fp16] [--engines eager compiled onnx tensorrt-rtx torch-tensorrt aoti]
        [--lengths 512 4096 32768] [--layers 4] [--budget SECONDS] [--out STEM]

For every model, dtype and engine: the unconverted model and its SQA variants are built, each is compared with its own
graph in float64 (error at most twice that of eager in the same dtype, plus a few roundings), and all are measured in
interleaved turns. "ideal" is Amdahl's law with the attention kernels of the baseline as measured in that engine:
1 / (1 - a + a * hq / H). A file that its own check refuses is measured all the same, and said to be. What cannot run
here is said and left out. Without a GPU everything is small.
Writes STEM.json, STEM.md and STEM.png after every group, and starts no group after --budget seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from bench_models import SHAPES, Shape, build
from torch import nn

import sqa_fx
from sqa_fx.bench import bench
from sqa_fx.environment import environment
from sqa_fx.errors import SqaError, VerifyError
from sqa_fx.export import PRECISIONS
from sqa_fx.gpu_kernels import attention_kernels, gpu_kernels
from sqa_fx.open_artifact import open_artifact
from sqa_fx.runners import CompiledRunner, EagerRunner, Runner
from sqa_fx.validate import Reference, validate

ENGINES = ["eager", "compiled", "onnx", "tensorrt-rtx", "torch-tensorrt", "aoti"]
LOOKS = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "v")]
SUFFIX = {"onnx": ".onnx", "tensorrt-rtx": ".engine", "torch-tensorrt": ".ep", "aoti": ".pt2"}
Row = dict[str, Any]
References = list[tuple[int, torch.Tensor, Reference]]
"""Length, input and reference, for each length."""


def runner_of(
    engine: str, name: str, module: Any, example: torch.Tensor, options: argparse.Namespace, folder: Path
) -> tuple[Runner, list[str]]:
    """The runner of ``module`` in one engine, and what its sidecar says. Raises what the export raises."""
    if engine == "eager":
        return EagerRunner(module, name), []
    if engine == "compiled":
        return CompiledRunner(module, name, dynamic=False), []
    path = folder / f"{name}{SUFFIX[engine]}"
    given = "input_ids" if example.dtype == torch.int64 else "x"
    longest = max(options.lengths)
    export = functools.partial(
        sqa_fx.export,
        module,
        path,
        to=engine,
        args=(example,),
        # One batch size: engines are tuned for it, and the length is what varies.
        dynamic_shapes=length_is_free(longest),
        ranges={f"{given}.1": (1, sorted(options.lengths)[len(options.lengths) // 2], longest)},
        overwrite=True,
    )
    refusal: list[str] = []
    try:
        # TensorRT has several forms of attention, and not every one is right on every GPU: the export finds out.
        artifact = export(check=engine == "tensorrt-rtx")
    except VerifyError as error:
        refusal = [f"refused by the check of its export ({first_line(error)}), and measured all the same"]
        artifact = export(check=False)
    said = [*artifact.sidecar.attention, *artifact.sidecar.notes, *refusal]
    return open_artifact(path, name, device=options.device), said


def length_is_free(longest: int) -> Any:
    """Dynamic shapes of a model with one input [batch, length, ...]."""
    return ({1: torch.export.Dim("length", min=2, max=longest)},)


def group(
    options: argparse.Namespace,
    model: str,
    dtype_name: str,
    engine: str,
    modules: dict[str, Any],
    references: dict[str, References],
) -> list[Row]:
    """All variants of one model in one engine: a row for each variant and length, or rows that say what failed."""
    shape, dtype = SHAPES[model], PRECISIONS[dtype_name]
    example = shape.inputs(1, min(64, max(options.lengths)), dtype, options.device)
    about = {"model": model, "dtype": dtype_name, "engine": engine}
    runners: dict[str, Runner] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, module in modules.items():
            start = time.perf_counter()
            try:
                runner, said = runner_of(engine, name, module, example, options, Path(folder))
            except Exception as error:  # an engine may fail in its own ways; the others go on
                rows.append({**about, "variant": name, "skipped": f"{type(error).__name__}: {first_line(error)}"})
                print(json.dumps(rows[-1]), flush=True)
                continue
            runners[name] = runner
            rows += verdicts(about, name, runner, references[name], said)
            print(f"  {engine} {name}: {time.perf_counter() - start:.0f} s", flush=True)
        add_times(rows, runners, modules, shape, dtype, options)
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def references_of(module: nn.Module, shape: Shape, dtype: torch.dtype, options: argparse.Namespace) -> References:
    """Inputs and outputs in float64 at every length."""
    found = []
    for length in options.lengths:
        x = shape.inputs(1, length, dtype, options.device)
        found.append((length, x, Reference(module, [((x,), {})])))
    return found


def verdicts(about: dict[str, str], name: str, runner: Runner, references: References, said: list[str]) -> list[Row]:
    """The verdict of one runner at every length."""
    rows = []
    for length, x, reference in references:
        report = validate(reference, [runner], [((x,), {})], labels=[str(length)])
        c = report.comparisons[0]
        rows.append(
            {
                **about,
                "variant": name,
                "length": length,
                "passed": report.passed,
                "error": c.max_abs,
                "tolerance": c.tolerance,
                "cosine": c.cosine,
                "problem": c.problem,
                "reference": report.reference_dtype,
                "said": said,
            }
        )
    return rows


def add_times(
    rows: list[Row], runners: dict[str, Runner], modules: dict[str, Any], shape: Any, dtype: torch.dtype, options: Any
) -> None:
    """Latencies of all runners in interleaved turns, and the share of the ideal speed-up."""
    for length in options.lengths:
        runs = {r["variant"] for r in rows if r.get("length") == length and r["cosine"] is not None}
        wanted = {n: r for n, r in runners.items() if n in runs}
        if not wanted:
            continue
        x = shape.inputs(1, length, dtype, options.device)
        report = bench(
            list(wanted.values()), [((x,), {})], iterations=options.iterations, labels=[length], progress=False
        )
        kernels = {}
        for name, runner in wanted.items():
            if options.device == "cuda":
                kernels[name] = gpu_kernels(runner, (x,), {})
        for timed, name in zip(report.rows, wanted, strict=True):
            row = next(r for r in reversed(rows) if r.get("length") == length and r["variant"] == name)
            row |= {
                "p50_ms": timed.p50_ms,
                "p90_ms": timed.p90_ms,
                "p99_ms": timed.p99_ms,
                "tokens_per_s": length / timed.p50_ms * 1e3,
                "peak_memory_bytes": timed.peak_memory_bytes,
            }
            base = report.rows[0]
            if "baseline" in wanted:
                row["speedup"] = base.p50_ms / timed.p50_ms
            if name in kernels:
                total = sum(k.microseconds for k in kernels[name]) / 1e3
                spent = sum(k.microseconds for k in kernels[name] if k.attention) / 1e3
                row |= {
                    "kernel_ms": total,
                    "attention_ms": spent,
                    "attention_kernels": attention_kernels(kernels[name]),
                }
                if "baseline" in kernels and name != "baseline":
                    first = kernels["baseline"]
                    a = sum(k.microseconds for k in first if k.attention) / max(
                        1e-9, sum(k.microseconds for k in first)
                    )
                    ratio = 1 / heads_ratio(modules[name])
                    if a > 0:
                        row["ideal_speedup"] = 1 / (1 - a + a * ratio)
                        row["ideal_share"] = row["speedup"] / row["ideal_speedup"]


def heads_ratio(module: nn.Module) -> float:
    """H/hq of a converted module."""
    site = module.report.sites[0] if isinstance(module, sqa_fx.ConvertedModule) else None
    return 1.0 if site is None else site.heads / site.hq


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or [""])[0][:400]


def variants_of(model: str, base: nn.Module, options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """The baseline and its conversions; a variant that the model's heads do not allow is said and left out."""
    found: dict[str, Any] = {"baseline": base}
    for variant in options.variants:
        try:
            found[variant] = converted(base, SHAPES[model], variant, options, dtype)
        except SqaError as error:
            print(f"{model}: no {variant}: {first_line(error)}", flush=True)
    return found


def converted(base: nn.Module, shape: Shape, heads: Any, options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The conversion to ``heads``: a variant by name, or a share of the query heads."""
    example = shape.inputs(1, min(64, max(options.lengths)), dtype, options.device)
    return sqa_fx.convert(base, hq=heads, args=(example,), dynamic_shapes=length_is_free(max(options.lengths)))


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = ["model", "dtype", "engine", "variant", "tokens", "verdict", "error / allowed"]
    head += ["p50 ms", "speed-up", "ideal", "share"]
    body = []
    for row in rows:
        cells = [row["model"], row["dtype"], row["engine"], row["variant"]]
        if "skipped" in row:
            body.append([*cells, "", f"skipped: {row['skipped'][:120]}", *[""] * 5])
            continue
        verdict = "ok" if row["passed"] else f"WRONG: {row['problem']}"
        cells += [str(row["length"]), verdict, f"{row['error']:.2g} / {row['tolerance']:.2g}"]
        forms = {"p50_ms": ".3f", "speedup": ".2f", "ideal_speedup": ".2f", "ideal_share": ".0%"}
        body.append([*cells, *(format(row[key], form) if key in row else "" for key, form in forms.items())])
    return "\n".join(["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *body)])


def remarks(rows: list[Row]) -> str:
    """What the exports said of themselves, each once, as a Markdown list."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.get("said"):
            names = found.setdefault((row["model"], row["engine"], "; ".join(row["said"])), [])
            name = f"{row['dtype']} {row['variant']}"
            if name not in names:
                names.append(name)
    return "\n".join(
        f"- {model}, {engine}, {', '.join(names)}: {said}" for (model, engine, said), names in found.items()
    )


def plot(rows: list[Row], path: Path) -> None:
    """Speed-up over the baseline of the same engine by length: a panel for each model and dtype."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [r for r in rows if r.get("speedup") and not r["variant"].startswith("baseline")]
    panels = sorted({(r["model"], r["dtype"]) for r in shown})
    if not panels:
        return
    variants = list(dict.fromkeys(r["variant"] for r in shown))  # engines differ in colour, variants in line
    looks = {v: {"linestyle": line, "marker": mark} for v, (line, mark) in zip(variants, cycle(LOOKS), strict=False)}
    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key in sorted({(r["engine"], r["variant"]) for r in shown if (r["model"], r["dtype"]) == panel}):
            own = [r for r in shown if (r["model"], r["dtype"], r["engine"], r["variant"]) == (*panel, *key)]
            points = sorted((r["length"], r["speedup"]) for r in own)
            color = f"C{ENGINES.index(key[0])}"
            axes.plot(*zip(*points, strict=True), color=color, markersize=4, label=" ".join(key), **looks[key[1]])
        axes.set(title=f"{panel[0]}, {panel[1]}", xscale="log", xlabel="tokens")
        axes.set_ylabel("speed-up over the same engine's baseline")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Compare, print and write."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*SHAPES], choices=[*SHAPES])
    parser.add_argument("--variants", nargs="+", default=["SQA", "sSQA", "xSQA"] if cuda else ["SQA"])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp16"] if cuda else ["fp32"], choices=[*PRECISIONS])
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 4096, 32768] if cuda else [64, 128])
    parser.add_argument("--layers", type=int, help="layers of every model (default: its own number; 1 without a GPU)")
    parser.add_argument("--iterations", type=int, default=20 if cuda else 3)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no group is started")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.device = "cuda" if cuda else "cpu"
    options.layers = options.layers or (None if cuda else 1)
    # Converted modules share one forward, and dynamo counts its forms over all of them: past 8 it runs them eagerly.
    torch._dynamo.config.recompile_limit = 64
    start = time.perf_counter()
    rows: list[Row] = []
    about = {"layers": options.layers, "batch": 1, **environment(torch.device("cuda", 0) if cuda else None)}
    save: Callable[[], None] = functools.partial(write, rows, about, options.out)
    for dtype_name in options.dtypes:
        for model in options.models:
            if time.perf_counter() - start > options.budget:
                break
            dtype = PRECISIONS[dtype_name]
            base = build(model, options.layers, max(options.lengths), dtype, options.device)
            modules = variants_of(model, base, options, dtype)
            # A conversion that keeps every head: the baseline's graph, whose float64 run fits at any length.
            graphs = {**modules, "baseline": converted(base, SHAPES[model], 1.0, options, dtype)}
            references = {name: references_of(graph, SHAPES[model], dtype, options) for name, graph in graphs.items()}
            for engine in options.engines:
                if time.perf_counter() - start > options.budget:
                    break
                torch._dynamo.reset()
                rows += group(options, model, dtype_name, engine, modules, references)
                save()
    print(table(rows))


def write(rows: list[Row], about: dict[str, Any], stem: Path | None) -> None:
    """What was measured so far."""
    if stem is None:
        return
    stem.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    said = ", ".join(f"{k} {v}" for k, v in about.items() if v is not None)
    parts = ["# Engines compared", said, table(rows), remarks(rows)]
    stem.with_suffix(".md").write_text("\n\n".join(part for part in parts if part) + "\n")
    try:
        plot(rows, stem.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
