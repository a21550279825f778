"""The README's tables of measured figures, made from the files in examples/results.

A table stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->``; `readme_plots.py` writes them.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measured_rows import Row
from paper_figures import LENGTHS
from paper_figures import speedup as paper_speedup
from paper_model import VARIANTS
from paper_report import figures
from train_from_scratch import CONVERTED, HEALED, SCRATCH, summary

RESULTS = Path(__file__).parent / "results"
SHAPES = {"ViT-B": "vit", "BERT-base": "bert", "Llama-1B": "llama"}
ENGINES = {"compiled": "torch.compile", "onnx": "ONNX Runtime", "tensorrt-rtx": "TensorRT-RTX",
           "torch-tensorrt": "torch_tensorrt"}  # fmt: skip
# No KV heads are merged in sSQA, whichever way the rows name.
GPT_MERGES = {"sSQA": "mean", "SQA": "joint"}


def content(name: str) -> dict[str, Any]:
    """A results file."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers, in all columns but the first, to the right."""
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    return "\n".join([f"| {' | '.join(head)} |".replace("|  |", "| |"), f"|{rule}|",
                      *(f"| {' | '.join(row)} |" for row in body)])  # fmt: skip


def minilm() -> str:
    """Mean cosine of the sentence encoder by method."""
    # Of several healings the longest comes last.
    rows = {(row["heads"], row["method"]): row for row in content("quality_minilm_h200.json")["rows"]}
    healed = "reconstruct, repaired, healed"
    methods = ["weights", "importance", "reconstruct, repaired", healed]
    head = ["query heads, KV heads", "by weights", "by importance", "chosen, merged and repaired", "and healed",
            "healing steps"]  # fmt: skip
    heads = dict.fromkeys(h for h, _ in rows)
    return table(head, [[h.replace(",", ", "), *(f"{rows[h, m]['mean cosine']:.3f}" for m in methods),
                         str(rows[h, healed]["healing steps"])] for h in heads])  # fmt: skip


def gpt_loss(rows: Sequence[Row], variant: str, method: str, tokens: int | None = None) -> float:
    """Mean loss over seeds, after healing with so many tokens (None: the most)."""
    own = [row for row in rows if (row["variant"], row["method"]) == (variant, method)]
    most = max(row.get("healing_tokens", 0) for row in own)
    wanted = most if tokens is None else tokens
    return statistics.fmean({r["seed"]: r["loss"] for r in own if r.get("healing_tokens", 0) == wanted}.values())


def gpt() -> str:
    """Loss of the GPT by method."""
    rows = content("quality_gpt_h200.json")["rows"]
    head = ["", "by weights, KV averaged", "chosen and merged", "outputs repaired", "values and outputs repaired",
            "and healed on 5% of the tokens", "trained with so few heads from scratch"]  # fmt: skip
    names = {"sSQA": "sSQA (6, 6)", "SQA": "SQA (6, 3)"}
    body = []
    for variant, name in names.items():
        merged = f"reconstruct, {GPT_MERGES[variant]}"
        repaired = "reconstruct, joint, repaired"
        methods = ["weights, mean", merged, f"{merged}, outputs repaired", repaired, f"{repaired}, healed",
                   "trained from scratch"]  # fmt: skip
        body.append([name, *(f"{gpt_loss(rows, variant, m):.3f}" for m in methods)])
    return table(head, body)


def engine_speedups(rows: Sequence[Row], key: str = "speedup") -> dict[str, float]:
    """By engine, SQA over baseline in bf16 at 32k tokens."""
    wanted = {"dtype": "bf16", "variant": "SQA", "length": 32768}
    return {r["engine"]: r[key] for r in rows if key in r and all(r.get(k) == v for k, v in wanted.items())}


def engines() -> str:
    """Speed-up of SQA by shape and engine."""
    body = []
    for name, file in SHAPES.items():
        found = engine_speedups(content(f"engines_{file}_h200.json")["rows"])
        body.append([f"[{name}](examples/results/engines_{file}_h200.md)", *(f"{found[e]:.2f}x" for e in ENGINES)])
    return table(["shape", *ENGINES.values()], body)


def paper(file: str) -> str:
    """Speed-ups of the converted model in a forward pass, and in brackets the paper's."""
    measured = content(file)
    found = {(r["variant"], r["length"]): figures(r, measured["settings"]["layers"]) for r in measured["rows"]
             if r["mode"] == "forward" and "failed" in r and not isinstance(r["failed"], str)}  # fmt: skip
    lengths = [n for n in LENGTHS if any(length == n for _, length in found)]
    body = []
    for variant in sorted({v for v, _ in found}, key=[*VARIANTS].index):
        cells = []
        for length in lengths:
            own, said = found.get((variant, length), {}).get("converted speedup"), paper_speedup(variant, length)
            cells.append(("" if own is None else f"{own:.2f}x") + ("" if said is None else f" ({said:.2f}x)"))
        body.append([variant, *cells])
    return table(["variant", *(f"{n // 1000}k tokens" for n in lengths)], body)


def scratch(file: str) -> str:
    """Loss trained from scratch, converted, and healed, as means over seeds."""
    rows = {(r["variant"], r["method"]): r for r in summary(content(file)["rows"])}
    body = []
    for variant in dict.fromkeys(v for v, _ in rows):
        losses = [rows.get((variant, m), {}).get("loss") for m in (SCRATCH, CONVERTED, HEALED)]
        accuracy = rows.get((variant, SCRATCH), {}).get("accuracy")
        body.append([variant, *("" if x is None else f"{x:.3f}" for x in losses),
                     "" if accuracy is None else f"{accuracy:.1%}"])  # fmt: skip
    return table(["variant", SCRATCH, CONVERTED, HEALED, "accuracy from scratch"], body)


def tables() -> dict[str, str]:
    """All tables by name, those of files that are not there left out."""
    made: dict[str, Callable[[], str]] = {"minilm": minilm, "gpt": gpt, "engines": engines}
    found = {f"{name} table": make() for name, make in made.items()}
    by_file: Mapping[str, Callable[[str], str]] = {"paper_table": paper, "train_from_scratch": scratch}
    for prefix, of in by_file.items():
        for path in sorted(RESULTS.glob(f"{prefix}_*.json")):
            found[f"{path.stem} table"] = of(path.name)
    return found


def replaced(text: str, made: Mapping[str, str]) -> str:
    """``text`` with every table between markers written anew."""
    for name, body in made.items():
        pattern = re.compile(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
        text = pattern.sub(lambda m: f"{m[1]}\n{body}\n\n{m[2]}", text)  # noqa: B023 (called at once)
    return text
