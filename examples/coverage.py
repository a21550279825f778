"""Convert every model of a zoo folder; print what was found, converted, proved and refused, and check the results.

    python examples/coverage.py --zoo PATH [--only PATTERN ...] [--jobs N] [--identity] [--out STEM] [--timeout SECONDS]

PATH holds ``allzoo.py`` with ``ZOO``: name -> entry with ``impls``, ``build(impl) -> (model, kwargs)`` and ``n_attn``
(the true number of attention layers, or None). A model that does not build for an implementation is no run. Beside
the proof that convert makes, every converted model is compared with the user's own module, run in ordinary eager,
after masked weights (worked out here from the plan's JSON alone) were loaded into it. With ``--identity`` it is also
converted to its own head counts, which must change no bit. A run is "whole" when every attention layer was converted
and proved; attentions of one head have none to drop, and do not count against it. "no attention" are models without
any softmax (or other weighing) over positions. Exit code 1 when a wrong result passed the proof.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from zoo_runs import Job, arguments, as_json, open_zoo, print_summary, run_all, said_error, summary_table, timed, write

import sqa_fx
from sqa_fx.errors import CaptureError, NoAttentionError, VerifyError

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
    attentions: int = 0
    proved: int = 0
    proof_error: float | None = None
    proof_precision: str = ""
    eager_error: float | None = None
    eager_check: str = ""
    refused: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    one_head: int = 0
    mixers: int = 0
    identity: str = ""
    way: str = ""
    reason: str = ""
    seconds: float = 0.0


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


def narrowed_outputs(notes: Iterable[str]) -> set[int]:
    """Positions of outputs that the report calls taken over the kept heads only (averaged attention weights)."""
    found: set[int] = set()
    for note in notes:
        if note.endswith("is taken over the kept heads only"):
            found.update(int(n) for n in note.removeprefix("output ").split(" of the model")[0].split(" and "))
    return found


def eager_error(
    model: nn.Module, converted: nn.Module, kwargs: Mapping[str, Any], changed: set[int]
) -> tuple[float | None, str]:
    """Largest difference over the largest value: the masked original module against the converted one, in eval mode.

    torch's native encoder fast path is off: it writes zeros where tokens are padded, and its own plain path does not.
    """
    torch.backends.mha.set_fastpath_enabled(False)
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
    for position, (e, a) in enumerate(zip(expected, actual, strict=True)):
        if e.shape != a.shape or position in changed or not e.is_floating_point():
            skipped += e.shape != a.shape or position in changed  # it carries heads, or is a mean over them
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
    return worst, f"{skipped} outputs carry heads or a mean over them" if skipped else ""


def identical(model: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """Whether the model converted to its own head counts gives the same bits in eager: "exact", or what differs."""
    same = sqa_fx.convert(model, hq=1.0, hkv=1.0, kwargs=kwargs, verify=False)
    model.eval()
    same.eval()
    with torch.no_grad():
        torch.manual_seed(1)
        expected = _tensors(model(**kwargs))
        torch.manual_seed(1)
        actual = _tensors(same(**kwargs))
    if len(expected) != len(actual):
        return f"{len(expected)} outputs became {len(actual)}"
    worst = 0.0
    for e, a in zip(expected, actual, strict=True):
        if e.shape != a.shape:
            return f"an output of shape {tuple(e.shape)} became {tuple(a.shape)}"
        if not torch.equal(e.isnan(), a.isnan()):
            return "NaN elsewhere"
        if not torch.equal(e.nan_to_num(), a.nan_to_num()):
            worst = max(worst, float((e.double() - a.double()).nan_to_num().abs().max()))
    return f"differs by {worst:.1e}" if worst else "exact"


def run_entry(name: str, entry: Any, impl: str, identity: bool) -> Run:
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
        run.kinds, run.reason = sorted(set(error.kinds)), str(error)[:300]
        run.status = "no attention" if not error.kinds else "refused"
        if run.kinds == ["one head"]:
            run.status, run.one_head = "nothing to drop", len(error.kinds)
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
    run.converted, run.attentions = len(report.sites), sum(site.attentions for site in report.sites)
    run.one_head = sum(r.kind == "one head" for r in report.refused)
    refused = [r for r in report.refused if r.kind != "one head"]
    run.refused = [f"{r.name}: {r.reason} ({', '.join(r.nodes)})" for r in refused]
    run.kinds = sorted({r.kind for r in refused})
    run.found = run.converted + len(report.refused)
    run.mixers = len(report.other_mixers)
    run.way = "per submodule" if isinstance(converted, sqa_fx.PartlyConvertedModule) else ""
    if report.proof is not None:
        run.proof_error, run.proof_precision = report.proof["error"], report.proof["precision"]
        run.proved = sum(not site["silent"] for site in report.proof["sites"])
    try:
        problem = load_masked(model, converted.plan.to_json())
        run.eager_error, run.eager_check = (
            (None, problem) if problem else eager_error(model, converted, kwargs, narrowed_outputs(report.notes))
        )
        if identity:
            run.identity = identical(model, kwargs)
    except Exception as error:
        run.eager_check = f"not compared: {type(error).__name__}: {str(error)[:120]}"
    if run.eager_error is not None and not run.eager_error <= WRONG:
        run.status = "WRONG"
    elif run.proved < run.converted:
        run.status = "partial"
        run.reason = (
            f"{run.converted - run.proved} sites give zeros on the example inputs, so nothing is proved of them"
        )
    elif (run.true is not None and run.attentions + run.one_head >= run.true) or (
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


def one_run(job: Job, identity: bool) -> Run:
    """One entry in one implementation, timed and limited."""
    import allzoo

    name, impl, seconds = job
    entry = allzoo.ZOO[name]
    late = Run(name, impl, "out of time", true=entry.n_attn)
    return timed(seconds, lambda: run_entry(name, entry, impl, identity), late)


def summarise(runs: list[Run]) -> dict[str, Any]:
    """Counts of statuses, shares of whole conversions by run and by entry, and the comparisons."""
    counted = [r for r in runs if r.status != "no run"]
    summary: dict[str, Any] = {"runs": len(counted), "do not build": len(runs) - len(counted)}
    summary.update(Counter(r.status for r in counted))
    attention = [r for r in counted if r.status not in ("no attention", "nothing to drop")]
    entries: dict[str, list[str]] = {}
    for r in attention:
        entries.setdefault(r.name, []).append(r.status)
    takeable = {name: s for name, s in entries.items() if "not exportable" not in s}
    summary["runs with attention to convert"] = len(attention)
    summary["whole share of runs"] = _share([r.status == "whole" for r in attention])
    summary["entries with attention to convert"] = len(entries)
    summary["whole share of entries"] = _share([set(s) == {"whole"} for s in entries.values()])
    summary["whole share of entries that export takes"] = _share([set(s) == {"whole"} for s in takeable.values()])
    compared = [r for r in counted if r.eager_error is not None]
    summary["compared in eager"] = len(compared)
    summary["worst eager error"] = max((r.eager_error or 0.0 for r in compared), default=None)
    summary["wrong results"] = sum(r.status == "WRONG" for r in counted)
    checked = [r.identity for r in counted if r.identity]
    if checked:
        summary["identity checked"] = len(checked)
        summary["identity exact"] = checked.count("exact")
    summary["refusals by kind"] = dict(Counter(k for r in counted if r.status != "whole" for k in r.kinds))
    return summary


def _share(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 4) if hits else 0.0


def markdown(summary: Mapping[str, Any], runs: list[Run]) -> str:
    """The summary and one row per run."""
    lines = [
        "# What converts",
        "",
        f"torch {torch.__version__}, hq = hkv = 0.5, proofs in float64. Made by",
        "`python examples/coverage.py --zoo PATH --identity --out examples/results/coverage`.",
        "",
        *summary_table(summary),
        "",
        "| model | form | result | converted | proof error | eager error | identity | refused or reason |",
        "|---|---|---|---:|---:|---:|---|---|",
    ]
    for r in runs:
        if r.status == "no run":
            continue
        proof, eager = said_error(r.proof_error), said_error(r.eager_error)
        why = "; ".join([*r.kinds, *([r.way] if r.way else []), *([r.reason[:90]] if r.reason else [])])
        total = r.true if r.true is not None else r.found
        lines.append(
            f"| {r.name} | {r.impl} | {r.status} | {r.converted}/{total} | {proof} | {eager} | {r.identity} | "
            f"{why.replace('|', '/')} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the zoo. Returns 1 when a wrong result passed the proof, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser, timeout=120)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    parser.add_argument("--identity", action="store_true", help="also convert to the model's own head counts")
    options = parser.parse_args(argv)
    if not open_zoo(options.zoo):
        return 2

    def tell(runs: list[Run]) -> None:
        if not options.json:
            print(_line(runs[-1]), flush=True)

    runs = run_all(functools.partial(one_run, identity=options.identity), options, tell)
    summary = summarise(runs)
    if options.out is not None:
        write(options.out, summary, runs, markdown(summary, runs))
    if options.json:
        print(as_json(summary, runs))
    else:
        print_summary(summary)
    return 1 if summary["wrong results"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
