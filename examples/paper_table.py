"""The table of the SQA paper with converted models: every variant beside MHA, from 1k to 200k tokens.

    python examples/paper_table.py --out STEM [--variants sSQA SQA xSQA] [--modes forward training]
        [--tokens 1024x128 131072x1] [--jobs 2] [--resume] [--max-seconds 540]
    python examples/paper_table.py --out STEM --merge A.json B.json

The paper's dense model as plain multi-head attention is converted ahead of time (``converted``: sqa_fx.convert at 2 x
64 tokens, both sizes dynamic) and by torch.compile(backend="sqa_fx") (``backend``), and stands beside the same
architecture written by hand with the converted weights; all under torch.compile, in interleaved turns, medians. A row
is one variant at one size, as a forward pass without gradients or as a training step (forward, backward, AdamW).
Beside it: the paper's figures on an A100, Amdahl's ideal with MHA's attention as measured, attention alone, and
verdicts. Sizes are compiled once with dynamic shapes (--static: each by itself). --jobs runs variants in so many
processes, each on a GPU of its own. STEM.json and STEM.md are written after every row, --resume goes on with them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import paper_figures
import torch
from measured_rows import MeasuredRows, arguments
from paper_measure import MODES, WAYS, PaperBench
from paper_model import Sizes
from paper_report import report
from parallel_runs import in_processes, merge

from sqa_fx.environment import environment
from sqa_fx.errors import InputError, SqaError
from sqa_fx.export import PRECISIONS

KEY = ("variant", "mode", "length", "batch")
SIZES = [f"{length}x{paper_figures.BATCHES[length]}" for length in paper_figures.LENGTHS]
FIRST = ["SQA", "sSQA", "xSQA", "GQA", "MQA", "xSMQA", "lSQA", "rSQA"]
"""The variants in the order in which they are measured: those of the paper's claim first."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    cuda = torch.cuda.is_available()
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(found)
    found.add_argument("--variants", nargs="+", default=FIRST, choices=FIRST)
    found.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    found.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    found.add_argument("--tokens", nargs="+", default=SIZES if cuda else ["64x2"], help="LENGTHxBATCH")
    found.add_argument("--device", default="cuda" if cuda else "cpu")
    found.add_argument("--dtype", default="bf16" if cuda else "fp32", help="bf16, fp16 or fp32 (float32)")
    found.add_argument("--layers", type=int, default=Sizes.layers)
    found.add_argument("--width", type=int, default=Sizes.width)
    found.add_argument("--vocabulary", type=int, default=Sizes.vocabulary)
    found.add_argument("--turns", type=int, default=20, help="turns of every way")
    found.add_argument("--row-seconds", type=float, default=12, help="of these turns; never fewer than 3")
    found.add_argument("--eager", action="store_true", help="nothing under torch.compile")
    found.add_argument("--static", action="store_true", help="compile every size by itself")
    found.add_argument("--jobs", type=int, default=1, help="processes, each on a GPU of its own")
    found.add_argument("--merge", nargs="+", type=Path, help="make one table of these files, and measure nothing")
    return found


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for all rows of a file."""
    names = ("dtype", "layers", "width", "vocabulary", "turns", "row_seconds", "eager", "static")
    return {name: getattr(options, name) for name in names}


def measure(options: argparse.Namespace) -> None:
    """All rows in this process."""
    cuda = options.device.startswith("cuda")
    about = {**environment(torch.device("cuda", 0) if cuda else None), "settings": settings(options)}
    rows = MeasuredRows(options, about, KEY, report)
    options.sizes = Sizes(options.width, options.layers, 16, 3 * options.width, options.vocabulary)
    # All models share their forward's code, and dynamo counts its forms over all of them.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    torch.set_float32_matmul_precision("high")
    bench = PaperBench(options)
    for variant in options.variants:
        for mode in options.modes:
            for size in options.tokens:
                length, batch = (int(n) for n in size.split("x"))
                key = {"variant": variant, "mode": mode, "length": length, "batch": batch}

                def row(v: str = variant, m: str = mode, n: int = length, b: int = batch) -> dict[str, Any]:
                    return bench.row(m, v, n, b)

                if not rows.measure(row, **key):
                    return
    rows.write()
    rows.say("complete")


def main(argv: list[str] | None = None) -> int:
    """Measure or merge, and print the table."""
    given = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(given)
    options.dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(options.dtype, options.dtype)
    if options.dtype not in PRECISIONS:
        print(f"error: --dtype {options.dtype} is none of {', '.join(PRECISIONS)}", file=sys.stderr)
        return 2
    code = 0
    try:
        if options.merge:
            merge(options.out, options.merge, report)
        elif options.jobs > 1:
            if options.device.startswith("cuda") and options.jobs > torch.cuda.device_count():
                raise InputError(f"--jobs {options.jobs}, and there are {torch.cuda.device_count()} GPUs: models that "
                                 "share one cannot be timed")  # fmt: skip
            code = in_processes(__file__, options, given, "--variants", options.variants, report)
        else:
            measure(options)
    except SqaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.out.with_suffix(".md").exists():
        print(options.out.with_suffix(".md").read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
