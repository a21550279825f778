"""Convert every model of a zoo folder; print what was found, converted, proved and refused, and check the results.

    python examples/coverage.py --zoo PATH [--only PATTERN ...] [--json] [--timeout SECONDS]

PATH holds ``allzoo.py`` with ``ZOO``: name -> entry with ``impls``, ``build(impl) -> (model, kwargs)`` and ``n_attn``
(the true number of attention layers, or None). A model that does not build for an implementation is no run. Beside
the proof that convert makes, every converted model is compared with the user's own module, run in ordinary eager,
after masked weights (worked out here from the plan's JSON alone) were loaded into it. Exit code 1 when a wrong result
passed the proof.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import logging
import signal
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sqa_fx
from sqa_fx.errors import CaptureError, NoAttentionError, VerifyError
from sqa_fx.torchvision_ops import make_torchvision_importable

# Ordinary eager in float32 on both sides: far above rounding, far below what a wrong head does.
WRONG = 1e-4


@dataclass
class Run:
    """One entry in one implementation."""

    name: str
    impl: str
    status: str = ""
    found: int = 0
    true: int | None = None
    converted: int = 0
    proved: int = 0
    proof_error: float | None = None
    proof_precision: str = ""
    eager_error: float | None = None
    eager_check: str = ""
    refused: list[str] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0


class OutOfTime(BaseException):
    """The entry took too long. Not an Exception, so that nobody's handler swallows it."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise OutOfTime after ``seconds``, again and again in case something caught it."""

    armed = [True]

    def stop(number: int, frame: types.FrameType | None) -> None:
        if armed:
            raise OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _entries(ranges: list[str]) -> Tensor:
    return torch.tensor([i for text in ranges for i in range(*map(int, text.split(":")))])


def load_masked(model: nn.Module, plan: Mapping[str, Any]) -> str:
    """Put the masked weights into the user's module: dropped output columns zero, merged heads replaced by their mean.

    Returns "" or why the module's own weights cannot express it.
    """
    held: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    held.update(model.named_buffers(remove_duplicate=False))
    for parameter in plan["parameters"]:
        merged = [b for b in parameter["blocks"] if len(b["replaces"]) > 1]
        zeroed = parameter["dropped"] if any(b["role"] == "o" for b in parameter["blocks"]) else []
        if not merged and not zeroed:
            continue
        if parameter["name"] not in held:
            return f"{parameter['name']} is no parameter of the module"
        tensor, axis = held[parameter["name"]], parameter["axis"]
        with torch.no_grad():
            old = tensor.detach().clone()
            for block in merged:
                mean = (
                    torch.stack([old.index_select(axis, _entries(s)).double() for s in block["from"]])
                    .mean(0)
                    .to(old.dtype)
                )
                for ranges in block["replaces"]:
                    tensor.index_copy_(axis, _entries(ranges), mean)
            if zeroed:
                tensor.index_fill_(axis, _entries(zeroed), 0)
    return ""


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Mapping):
        outputs = dict(outputs)
    elif hasattr(outputs, "__dict__") and not isinstance(outputs, Tensor | list | tuple):
        outputs = vars(outputs)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def eager_error(model: nn.Module, converted: nn.Module, kwargs: Mapping[str, Any]) -> tuple[float | None, str]:
    """Largest difference over the largest value: the masked original module against the converted one, in eval mode."""
    with torch.no_grad():
        if model.training:
            model.eval()
            converted.eval()
        torch.manual_seed(1)
        try:
            expected = _tensors(model(**kwargs))
            torch.manual_seed(1)
            if any(
                not torch.equal(a, b)
                for a, b in zip(expected, _tensors(model(**kwargs)), strict=True)
                if not a.isnan().any()
            ):
                return None, "the original gives another result on every call"
        except (RuntimeError, TypeError, ValueError) as error:
            return None, f"the masked original does not run: {str(error)[:100]}"
        torch.manual_seed(1)
        actual = _tensors(converted(**kwargs))
    if len(expected) != len(actual):
        return None, f"{len(expected)} output tensors in eager, {len(actual)} converted"
    worst, compared, skipped = 0.0, 0, 0
    for e, a in zip(expected, actual, strict=True):
        if e.shape != a.shape or not e.is_floating_point():
            skipped += e.shape != a.shape  # an output that carries heads, such as a KV cache
            continue
        e, a = e.double(), a.double()
        finite = e.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return float("inf"), "other places are infinite or NaN"
        if finite.any():
            compared += 1
            worst = max(worst, float((e - a)[finite].abs().max() / e[finite].abs().max().clamp(min=1e-12)))
    if not compared:
        return None, "no output of the same shape to compare"
    return worst, f"{skipped} outputs of another shape" if skipped else ""


def run_entry(name: str, entry: Any, impl: str) -> Run:
    """Convert one entry, and compare what comes out with the user's own module."""
    run = Run(name, impl, true=entry.n_attn)
    try:
        torch.manual_seed(0)
        model, kwargs = entry.build(impl)
    except Exception as error:
        run.reason = f"does not build: {type(error).__name__}: {str(error)[:160]}"
        run.status = "no run"
        return run
    if "train" not in impl:
        model.eval()
    try:
        converted = sqa_fx.convert(model, hq=0.5, hkv=0.5, kwargs=kwargs)
    except CaptureError as error:
        run.status, run.reason = "not exportable", str(error)[:300]
        return run
    except NoAttentionError as error:
        run.status, run.reason = "refused", str(error)[:300]
        return run
    except VerifyError as error:
        run.status, run.reason = "not proved", str(error)[:300]
        return run
    except sqa_fx.SqaError as error:
        run.status, run.reason = "refused", f"{type(error).__name__}: {str(error)[:300]}"
        return run
    except Exception as error:
        run.status, run.reason = "crashed", f"{type(error).__name__}: {str(error)[:300]}"
        return run
    assert isinstance(converted, sqa_fx.ConvertedModule | sqa_fx.PartlyConvertedModule)
    report = converted.report
    run.converted = len(report.sites)
    run.refused = [f"{r.name}: {r.reason} ({', '.join(r.nodes)})" for r in report.refused]
    run.found = run.converted + len(run.refused)
    if report.proof is not None:
        run.proof_error, run.proof_precision = report.proof["error"], report.proof["precision"]
        run.proved = sum(not site["silent"] for site in report.proof["sites"])
    try:
        problem = load_masked(model, converted.plan.to_json())
        run.eager_error, run.eager_check = (None, problem) if problem else eager_error(model, converted, kwargs)
    except Exception as error:
        run.eager_check = f"not compared: {type(error).__name__}: {str(error)[:120]}"
    if run.eager_error is not None and not run.eager_error <= WRONG:
        run.status = "WRONG"
    elif run.proved < run.converted:
        run.status = "partial"
        run.reason = (
            f"{run.converted - run.proved} sites give zeros on the example inputs, so nothing is proved of them"
        )
    elif (run.true is not None and run.converted >= run.true) or (
        run.true is None and run.converted and not run.refused
    ):
        run.status = "whole"
    else:
        run.status = "partial" if run.converted else "refused"
    return run


def _line(run: Run) -> str:
    sites = (
        f"found {run.found}/{run.true if run.true is not None else '?'} converted {run.converted} proved {run.proved}"
    )
    proof = f" proof {run.proof_error:.0e} ({run.proof_precision})" if run.proof_error is not None else ""
    eager = f" eager {run.eager_error:.0e}" if run.eager_error is not None else ""
    extra = [*([run.reason] if run.reason else []), *([run.eager_check] if run.eager_check else []), *run.refused[:2]]
    return f"{run.status:14} {run.name}:{run.impl} {sites}{proof}{eager} {run.seconds:.1f}s" + "".join(
        f" | {e[:200]}" for e in extra
    )


def main(argv: list[str] | None = None) -> int:
    """Run the zoo. Returns 1 when a wrong result passed the proof, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True, help="folder with allzoo.py")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="entries to run, as name or name:impl (glob)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    parser.add_argument("--timeout", type=int, default=120, metavar="SECONDS", help="per entry and implementation")
    options = parser.parse_args(argv)
    if not (options.zoo / "allzoo.py").is_file():
        print(f"{options.zoo} holds no allzoo.py", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    make_torchvision_importable()
    sys.path.insert(0, str(options.zoo.resolve()))
    import allzoo

    runs: list[Run] = []
    for name, entry in allzoo.ZOO.items():
        for impl in entry.impls:
            if options.only and not any(
                fnmatch.fnmatchcase(t, p) for t in (name, f"{name}:{impl}") for p in options.only
            ):
                continue
            start = time.perf_counter()
            try:
                with time_limit(options.timeout):
                    run = run_entry(name, entry, impl)
            except OutOfTime:
                run = Run(name, impl, "out of time", true=entry.n_attn)
            run.seconds = time.perf_counter() - start
            runs.append(run)
            if not options.json:
                print(_line(run), flush=True)
    counted = [r for r in runs if r.status != "no run"]
    summary: dict[str, Any] = {"runs": len(counted), "do not build": len(runs) - len(counted)}
    summary.update(Counter(r.status for r in counted))
    whole = summary.get("whole", 0)
    summary["whole share"] = round(whole / len(counted), 4) if counted else 0.0
    compared = [r for r in counted if r.eager_error is not None]
    summary["compared in eager"] = len(compared)
    summary["worst eager error"] = max((r.eager_error or 0.0 for r in compared), default=None)
    summary["wrong results"] = sum(r.status == "WRONG" for r in counted)
    if options.json:
        print(json.dumps({"summary": summary, "runs": [asdict(r) for r in runs]}, indent=1))
    else:
        print(*(f"{key}: {value}" for key, value in summary.items()), sep="\n")
    return 1 if summary["wrong results"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
