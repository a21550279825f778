"""What ``sqa-fx bench`` measures besides the artifacts themselves, and the files that it writes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from torch.export import ExportedProgram

from sqa_fx.api import convert
from sqa_fx.attention_flops import attention_flops
from sqa_fx.attention_time import measure_attention
from sqa_fx.bench import BenchReport
from sqa_fx.bench_report import write_html, write_markdown
from sqa_fx.cuda_graph_runner import CudaGraphs
from sqa_fx.errors import InputError
from sqa_fx.ideal import site_times, with_ideal
from sqa_fx.inputs import Inputs
from sqa_fx.latency_plot import plot_latency, require_matplotlib
from sqa_fx.module import ConvertedModule
from sqa_fx.runners import Runner


def add_bench(parser: argparse.ArgumentParser) -> None:
    """The arguments that only ``bench`` has."""
    parser.add_argument("--iterations", type=int, default=20, help="measured turns of each artifact (default: 20)")
    parser.add_argument(
        "--burst", type=int, metavar="N", help="calls in a turn, without waiting between them (default: about 10 ms)"
    )
    parser.add_argument("--warmup", type=int, default=3, help="calls before them, at least (default: 3)")
    parser.add_argument(
        "--max-warmup", type=int, default=50, help="calls before them, at most, until times settle (default: 50)"
    )
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="also measure eager and compiled artifacts as CUDA graphs"
    )
    parser.add_argument(
        "--ideal",
        action="store_true",
        help="time the attention of the first artifact alone, and say which share of the speed-up that the dropped "
        "heads allow the other models reached (conversions and .pt2 files of torch.export)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the latencies into this .png")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write picture, table and data as one .html")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as .md")


def check_files(options: argparse.Namespace) -> None:
    """Before anything is measured: raise InputError for a file that exists or has no folder, and MissingError for a
    picture without matplotlib."""
    wanted = [(options.plot, ".png"), (options.html, ".html"), (options.markdown, ".md")]
    for path, suffix in wanted:
        if path is None:
            continue
        if path.suffix != suffix:
            raise InputError(f"{path}: give a path that ends in {suffix}")
        if path.exists() and not options.overwrite:
            raise InputError(f"{path} exists: choose another path, or pass --overwrite")
        if not path.parent.is_dir():
            raise InputError(f"there is no folder {path.parent} to write {path.name} to: make it first")
    paths = [path.resolve() for path, _ in wanted if path is not None]
    if len(set(paths)) < len(paths):
        raise InputError("--plot, --html and --markdown must be different files")
    if options.plot is not None or options.html is not None:
        require_matplotlib()


def with_cuda_graphs(runners: Sequence[Runner], wanted: bool) -> list[Runner]:
    """The runners, each eager or compiled one followed by itself as a CUDA graph where that is ``wanted``.

    Raises MissingError without CUDA, and InputError when there is no such runner.
    """
    if not wanted:
        return list(runners)
    if not any(runner.kind in ("eager", "compiled") for runner in runners):
        raise InputError(
            "--cuda-graphs records eager and compiled artifacts, and there is none: add one, or leave it out"
        )
    found: list[Runner] = []
    for runner in runners:
        found.append(runner)
        if runner.kind in ("eager", "compiled"):
            found.append(CudaGraphs(runner, clone_outputs=False))
    return found


def ideal_shares(
    report: BenchReport,
    baseline: object,
    others: Mapping[str, object],
    sets: Sequence[Inputs],
    iterations: int,
) -> BenchReport:
    """The report with the share of the ideal speed-up that each of ``others`` (by runner) reached over ``baseline``,
    and with the attention TFLOP/s of all of them.

    Raises InputError when the baseline is no model, or no other artifact is a captured graph, and what `site_times`
    raises.
    """
    graphs = {name: m for name, m in others.items() if isinstance(m, ConvertedModule | ExportedProgram)}
    if not isinstance(baseline, nn.Module | ExportedProgram) or not graphs:
        raise InputError(
            "--ideal compares conversions (folders of `sqa-fx convert`) or .pt2 files with a model, which comes first"
        )
    labels = list(dict.fromkeys(row.label for row in report.rows))
    sites, measured = {}, {}
    for label, inputs in zip(labels, sets, strict=True):
        graph = baseline
        if not isinstance(graph, ConvertedModule | ExportedProgram):
            # With every head kept it is the model's own graph.
            graph = convert(graph, hq=1.0, args=inputs[0], kwargs=inputs[1], dynamic_shapes=None, verify=False)
        if not isinstance(graph, ConvertedModule | ExportedProgram):
            raise InputError("--ideal: torch.export does not take the whole baseline, so its attention cannot be timed")
        for name, other in {report.rows[0].runner: graph, **graphs}.items():
            measured[name, label] = attention_flops(other, inputs), measure_attention(other, inputs, iterations)
        for name, other in graphs.items():
            sites[name, label] = site_times(graph, other, inputs, iterations)
    return with_ideal(report.with_attention(measured), sites)


def write_files(report: BenchReport, options: argparse.Namespace) -> None:
    """Write what ``--plot``, ``--html`` and ``--markdown`` ask for. Raises InputError for what cannot be written."""
    if options.plot is not None:
        plot_latency(report, options.plot, x_label="input", overwrite=options.overwrite)
    if options.html is not None:
        write_html(report, options.html, overwrite=options.overwrite)
    if options.markdown is not None:
        write_markdown(report, options.markdown, overwrite=options.overwrite)
