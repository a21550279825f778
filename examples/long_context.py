"""Converted models of today's shapes at long contexts, beside their baselines, in every engine that is here.

    python examples/long_context.py --out STEM [--models llama-1b llama-8b vit-l-1024px diffusion document-encoder]
        [--engines eager compiled onnx tensorrt-rtx torch-tensorrt aoti] [--tokens 8192 32768] [--layers 2]
        [--validate-to 8192] [--resume] [--max-seconds 540]

Grouped models (32 query heads over 8 KV heads) become (16, 8) and (16, 4), the others SQA, sSQA and xSQA. A row is one
model and length in one engine: baseline and conversions in interleaved turns. Up to --validate-to tokens each result is
compared with the model in float64, beyond with the same module in eager. "ideal" is Amdahl's law with the baseline's
attention kernels as measured in that engine. Weights are random. STEM.json and STEM.md are written after every row,
STEM.png at the end; --resume goes on with them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_models import SHAPES
from compare_engines import (
    ENGINES,
    References,
    add_times,
    length_is_free,
    plot,
    references_of,
    remarks,
    runner_of,
    verdicts,
)
from long_context_models import CASES, Case, scaled
from measured_rows import MeasuredRows, Row, arguments, failure, markdown, report_facts
from torch import Tensor, nn

import sqa_fx
from sqa_fx.environment import environment
from sqa_fx.errors import InputError
from sqa_fx.export import PRECISIONS
from sqa_fx.runners import Runner

KEY = ("model", "dtype", "engine", "length")
ALIKE = 0.999
"""The cosine with eager that a result must have where there is no reference in float64."""


class LongBench:
    """The modules of one model and its runners in one engine; a new model or engine takes the place of the last."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.dtype = PRECISIONS[options.dtype]
        self.model: str | None = None
        self.engine: str | None = None
        self.modules: dict[str, Any] = {}
        self.references: dict[str, dict[int, tuple[Tensor, Any]]] = {}
        self.runners: dict[str, tuple[Runner, list[str]]] = {}
        self.skipped: dict[str, str] = {}
        self.folder = tempfile.TemporaryDirectory()

    def take(self, model: str, engine: str, case: Case) -> None:
        """Build what is not there yet."""
        options, o = self.options, argparse.Namespace(**vars(self.options))
        o.lengths = self.lengths(case)
        longest = max(o.lengths)
        example = case.shape.inputs(1, min(64, longest), self.dtype, options.device)
        if self.model != model:
            self.model, self.engine = model, None
            self.runners, self.modules, self.references = {}, {}, {}
            SHAPES[model] = case.shape  # where the functions of compare_engines look shapes up
            torch.manual_seed(0)
            shape = case.shape
            base = shape.build(shape, options.layers, longest).to(options.device, self.dtype).eval()
            self.modules = {"baseline": base}
            for name, (hq, hkv) in case.heads.items():
                self.modules[name] = convert(base, hq, hkv, example, longest)
            o.lengths = [n for n in o.lengths if n <= options.validate_to]
            graphs = {**self.modules} if o.lengths else {}
            if graphs:
                # A conversion that keeps every head is the baseline's graph, whose float64 run fits at any length.
                graphs["baseline"] = convert(base, shape.heads, shape.kv_heads, example, longest)
            for name, module in graphs.items():
                found: References = references_of(module, shape, self.dtype, o)
                self.references[name] = {length: (x, reference) for length, x, reference in found}
            o.lengths = self.lengths(case)
        if self.engine != engine:
            torch._dynamo.reset()
            self.engine, self.runners, self.skipped = engine, {}, {}
            self.folder.cleanup()
            self.folder = tempfile.TemporaryDirectory()
            for name, module in self.modules.items():
                try:
                    self.runners[name] = runner_of(engine, name, module, example, o, Path(self.folder.name))
                except Exception as error:  # an engine may fail in its own ways; the others go on
                    self.skipped[name] = failure(error)

    def lengths(self, case: Case) -> list[int]:
        """The lengths of a case, or those asked for."""
        return list(self.options.tokens or case.lengths)

    def row(self, model: str, engine: str, length: int) -> Row:
        """All variants of one model in one engine at one length."""
        case = scaled(CASES[model], self.options.head_dim)
        self.take(model, engine, case)
        x = case.shape.inputs(1, length, self.dtype, self.options.device)
        about = {"model": model, "dtype": self.options.dtype, "engine": engine}
        rows = [{**about, "variant": name, "length": length, "skipped": why} for name, why in self.skipped.items()]
        runners: dict[str, Runner] = {}
        for name, (runner, said) in self.runners.items():
            try:
                rows.append(self.verdict(about, name, runner, x, length, said))
                runners[name] = runner
            except Exception as error:  # it may not fit, and the next one may
                rows.append({**about, "variant": name, "length": length, "skipped": failure(error)})
                if x.is_cuda:
                    torch.cuda.empty_cache()
        timed = [row for row in rows if "skipped" not in row]
        o = argparse.Namespace(**{**vars(self.options), "lengths": [length]})
        add_times(timed, runners, self.modules, case.shape, self.dtype, o)
        return {"heads": [case.shape.heads, case.shape.kv_heads], "variants": rows}

    def verdict(self, about: dict[str, str], name: str, runner: Runner, x: Tensor, length: int, said: list[str]) -> Row:
        """Whether the runner is right: against float64, or beyond what is validated so, against eager."""
        if length in self.references.get(name, {}):
            own, reference = self.references[name][length]
            return verdicts(about, name, runner, [(length, own, reference)], said)[0]
        (actual,) = runner.run((x,), {})
        with torch.no_grad():
            expected = self.modules[name](x)
        cosine = float(torch.nn.functional.cosine_similarity(actual.float(), expected.float(), dim=-1).mean())
        return {**about, "variant": name, "length": length, "passed": cosine >= ALIKE, "cosine": cosine,
                "reference": "eager", "problem": None if cosine >= ALIKE else f"cosine {cosine:.4f} with eager",
                "said": said}  # fmt: skip


def convert(base: nn.Module, hq: int, hkv: int, example: Tensor, longest: int) -> Any:
    """The conversion to ``hq`` query and ``hkv`` KV heads, with a free length."""
    return sqa_fx.convert(base, hq=hq, hkv=hkv, args=(example,), dynamic_shapes=length_is_free(longest))


def flat(rows: Sequence[Row]) -> list[Row]:
    """A row for each variant; rows that failed as a whole are one."""
    found: list[Row] = []
    for row in rows:
        found += row.get("variants") or [{**row, "variant": "all", "skipped": row.get("failed", "")}]
    return found


def report(content: Mapping[str, Any]) -> str:
    """The Markdown of a results file."""
    rows = content["rows"]
    return "\n\n".join(["# Long contexts", report_facts(content), table(rows), remarks(flat(rows))]).strip() + "\n"


def table(rows: Sequence[Row]) -> str:
    """All variants as Markdown."""
    head = ["model", "engine", "tokens", "variant", "p50 ms", "tokens/s", "speed-up", "ideal", "share", "attention ms",
            "verdict"]  # fmt: skip
    forms = {"p50_ms": ".2f", "tokens_per_s": ".0f", "speedup": ".2f", "ideal_speedup": ".2f", "ideal_share": ".0%",
             "attention_ms": ".2f"}  # fmt: skip
    body = []
    for row in flat(rows):
        cells = [row["model"], row["engine"], str(row["length"]), row["variant"]]
        if "skipped" in row:
            body.append([*cells, *[""] * len(forms), f"skipped: {row['skipped'][:120]}"])
            continue
        how = "against float64" if row["reference"] != "eager" else "against eager"
        said = f"ok, {how}" if row["passed"] else f"WRONG {how}: {row['problem']}"
        body.append([*cells, *(format(row[k], form) if k in row else "" for k, form in forms.items()), said])
    return markdown(head, body)


def parser() -> argparse.ArgumentParser:
    """The options."""
    cuda = torch.cuda.is_available()
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(found)
    found.add_argument("--models", nargs="+", default=[*CASES], choices=[*CASES])
    found.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    found.add_argument("--tokens", nargs="+", type=int, default=None if cuda else [64], help="instead of each model's")
    found.add_argument("--layers", type=int, default=2 if cuda else 1)
    found.add_argument("--head-dim", type=int, default=None if cuda else 8, help="instead of each model's own")
    found.add_argument("--device", default="cuda" if cuda else "cpu")
    found.add_argument("--dtype", default="bf16" if cuda else "fp32", choices=[*PRECISIONS])
    found.add_argument("--iterations", type=int, default=10 if cuda else 3)
    found.add_argument("--validate-to", type=int, default=8192, help="tokens up to which float64 is the reference")
    return found


def measure(rows: MeasuredRows, bench: LongBench, options: argparse.Namespace) -> bool:
    """All rows that are not there yet; False where the budget did not do."""
    for model in options.models:
        for engine in options.engines:
            for length in bench.lengths(CASES[model]):

                def row(m: str = model, e: str = engine, n: int = length) -> Row:
                    return bench.row(m, e, n)

                if not rows.measure(row, model=model, dtype=options.dtype, engine=engine, length=length):
                    return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write."""
    options = parser().parse_args(argv)
    # Converted modules share one forward, and dynamo counts its forms over all of them.
    torch._dynamo.config.recompile_limit = 64
    names = ("dtype", "layers", "head_dim", "iterations", "validate_to")
    settings = {"batch": 1, **{name: getattr(options, name) for name in names}}
    cuda = options.device.startswith("cuda")
    about = {**environment(torch.device("cuda", 0) if cuda else None), "settings": settings}
    try:
        rows = MeasuredRows(options, about, KEY, report)
        bench = LongBench(options)
        if measure(rows, bench, options):
            rows.say("complete")
        rows.write()
        plot(flat(rows.rows), rows.path.with_suffix(".png"))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(rows.rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
