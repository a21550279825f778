"""Convert every model of a zoo folder in place with ``sqa_fx.convert_``; write which could be, and why others not.

    python examples/surgery_coverage.py --zoo PATH [--only PATTERN ...] [--jobs N] [--out STEM] [--timeout SECONDS]

What STEM.json holds of other models already stays, so that a zoo can be run in parts.

PATH is as for coverage.py, whose processes and time limits it shares. Every model that was converted in place is
compared once more, outside of sqa_fx: the user's module in ordinary eager with masked weights (worked out from the
plan's JSON alone) against the changed module. A model that was refused must be bit for bit what it was: parameters,
buffers, attributes, modes and classes. Exit code 1 when one of the two checks fails.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from coverage import WRONG, eager_error, load_masked, narrowed_outputs
from torch import Tensor, nn
from zoo_runs import Job, arguments, open_zoo, print_summary, run_all, said_error, summary_table, timed, write

import sqa_fx
from sqa_fx.errors import CaptureError, NoAttentionError, SurgeryError


@dataclass
class Run:
    """One entry in one implementation."""

    name: str
    impl: str
    status: str = ""
    sites: int = 0
    attributes: list[str] = field(default_factory=list)
    proof_error: float | None = None
    proof_precision: str = ""
    sizes: int = 0
    trials: int = 0
    eager_error: float | None = None
    reason: str = ""
    seconds: float = 0.0


def state_of(model: nn.Module) -> list[Any]:
    """Everything of a model that must be as it was: classes, modes, tensors with their bits, plain attributes."""
    found: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        found.append((path, type(module), module.training))
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    bits = None if tensor is None else tensor.detach().clone()
                    found.append((path, name, key, id(tensor), bits))
            elif isinstance(value, Tensor):
                found.append((path, name, value.detach().clone()))
            elif isinstance(value, int | float | str | bool | tuple | None):
                found.append((path, name, repr(value)))
            elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
                found.append((path, name, id(value), repr(sorted(map(str, vars(value))))))
    return found


def same_state(before: list[Any], after: list[Any]) -> bool:
    """Whether two states are equal bit for bit."""
    if len(before) != len(after):
        return False
    for a, b in zip(before, after, strict=True):
        for x, y in zip(a, b, strict=True):
            if isinstance(x, Tensor):
                if not isinstance(y, Tensor) or x.dtype != y.dtype or x.shape != y.shape:
                    return False
                if x.numel() and not torch.equal(
                    x.contiguous().view(-1).view(torch.uint8) if x.dim() else x,
                    y.contiguous().view(-1).view(torch.uint8) if y.dim() else y,
                ):
                    return False  # fmt: skip
            elif x != y:
                return False
    return True


def run_entry(name: str, entry: Any, impl: str) -> Run:
    """Convert one entry in place, and compare it with the user's own module."""
    run = Run(name, impl)
    try:
        torch.manual_seed(0)
        model, kwargs = entry.build(impl)
    except Exception as error:
        run.status, run.reason = "no run", f"does not build: {type(error).__name__}: {str(error)[:160]}"
        return run
    if "train" not in impl:
        model.eval()
    original = copy.deepcopy(model)
    before = state_of(model)
    try:
        report = sqa_fx.convert_(model, hq=0.5, hkv=0.5, kwargs=kwargs)
    except Exception as error:
        run.reason = f"{type(error).__name__}: {str(error)[:600]}"
        match error:
            case NoAttentionError() if not error.kinds or set(error.kinds) == {"one head"}:
                run.status = "nothing to convert"
            case SurgeryError():
                run.status = "refused"
            case CaptureError():
                run.status = "not exportable"
            case sqa_fx.SqaError():
                run.status = "not converted"
            case _:
                run.status = "crashed"
        if not same_state(before, state_of(model)):
            run.status = "CHANGED"
        return run
    run.status, run.sites = "in place", len(report.report.sites)
    run.attributes, run.trials = report.surgery.lines(), report.trials
    run.proof_error, run.proof_precision = report.proof.error, report.proof.precision
    run.sizes = len(report.proof.sizes)
    problem = load_masked(original, report.plan.to_json())
    if not problem:
        run.eager_error, problem = eager_error(original, model, kwargs, narrowed_outputs(report.report.notes))
    run.reason = problem
    if run.eager_error is not None and not run.eager_error <= WRONG:
        run.status = "WRONG"
    return run


def one_run(job: Job) -> Run:
    """One entry in one implementation, timed and limited."""
    import allzoo

    name, impl, seconds = job

    def convert() -> Run:
        try:
            return run_entry(name, allzoo.ZOO[name], impl)
        except Exception as error:
            return Run(name, impl, "crashed", reason=f"{type(error).__name__}: {str(error)[:300]}")

    run = timed(seconds, convert, Run(name, impl, "out of time"))
    run.seconds = round(run.seconds, 1)
    return run


def summarise(runs: list[Run]) -> dict[str, Any]:
    """Counts by run and by entry."""
    counted = [r for r in runs if r.status != "no run"]
    attention = [r for r in counted if r.status not in ("nothing to convert", "not exportable", "not converted")]
    entries: dict[str, list[str]] = {}
    for r in attention:
        entries.setdefault(r.name, []).append(r.status)
    whole = sum(set(s) == {"in place"} for s in entries.values())
    compared = [r.eager_error for r in counted if r.eager_error is not None]
    return {
        "runs": len(counted),
        **Counter(r.status for r in counted),
        "entries that convert() converts": len(entries),
        "entries proved in place": whole,
        "share of them": round(whole / len(entries), 4) if entries else 0.0,
        "compared in eager": len(compared),
        "worst eager error": max(compared, default=None),
        "wrong results": sum(r.status == "WRONG" for r in counted),
        "refused but changed": sum(r.status == "CHANGED" for r in counted),
    }


def markdown(summary: Mapping[str, Any], runs: list[Run]) -> str:
    """The summary and one row per run."""
    lines = [
        "# What converts in place",
        "",
        f"torch {torch.__version__}, `sqa_fx.convert_` with hq = hkv = 0.5. Made by",
        "`python examples/surgery_coverage.py --zoo PATH --out examples/results/surgery`.",
        "",
        *summary_table(summary),
        "",
        "| model | form | result | sites | proof error | sizes | eager error | attributes changed, or why not |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for r in runs:
        if r.status == "no run":
            continue
        proof, eager = said_error(r.proof_error), said_error(r.eager_error)
        why = "; ".join(r.attributes) if r.status == "in place" else r.reason[:240]
        lines.append(
            f"| {r.name} | {r.impl} | {r.status} | {r.sites or ''} | {proof} | {r.sizes or ''} | {eager} | "
            f"{why.replace('|', '/').replace(chr(10), ' ')} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the zoo. Returns 1 when a wrong result passed the proof or a refused model changed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser, timeout=240)
    options = parser.parse_args(argv)
    if not open_zoo(options.zoo):
        return 2

    def tell(runs: list[Run]) -> None:
        run = runs[-1]
        detail = "; ".join(run.attributes) if run.status == "in place" else run.reason
        print(f"{run.status:14} {run.name}:{run.impl} {run.seconds}s {run.trials} trials | {detail}", flush=True)
        if options.out is not None:  # after every model, so that what is done is not lost
            _write(options.out, runs)

    summary = summarise(run_all(one_run, options, tell))
    print_summary(summary)
    return 1 if summary["wrong results"] or summary["refused but changed"] else 0


def _write(stem: Path, runs: list[Run]) -> None:
    done = {(r.name, r.impl) for r in runs}
    file = stem.with_suffix(".json")
    earlier = [Run(**row) for row in json.loads(file.read_text())["runs"]] if file.is_file() else []
    runs = sorted([*(r for r in earlier if (r.name, r.impl) not in done), *runs], key=lambda r: (r.name, r.impl))
    summary = summarise(runs)
    write(stem, summary, runs, markdown(summary, runs))


if __name__ == "__main__":
    raise SystemExit(main())
