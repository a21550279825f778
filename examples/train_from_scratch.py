"""The dense model of the paper trained on local text: MHA, GQA, MQA, the SQA family, and MHA converted and healed.

    python examples/train_from_scratch.py --out STEM [--variants MHA SQA sSQA] [--seeds 0 1 2] [--steps 1000]
        [--converted SQA sSQA xSQA] [--jobs 4] [--cache FILE] [--resume] [--max-seconds 540]

Every model sees the same windows of Python source for as many steps. Each seed's MHA is then converted by calibration
(chosen, merged and repaired), and healed from there with a share of the training tokens. Loss (nats per token) and
accuracy are those of the next token in held-out files. Variants other than --seeded ones are trained with the first
seed only. --jobs runs models in so many processes; on one GPU their seconds say nothing then. STEM.json and STEM.md are
written after every model, --resume goes on with them; a trained MHA is kept as STEM_mha_SEED.safetensors.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import paper_figures
import torch
from measured_rows import MeasuredRows, Row, arguments, report_facts
from paper_model import VARIANTS, DenseModel, Sizes
from parallel_runs import in_processes
from python_source import source_tokens, windows
from quality_table import markdown, over_seeds
from safetensors.torch import load_file, save_file
from small_training import language_loss, train
from torch import Tensor, nn

import sqa_fx
from sqa_fx.environment import environment
from sqa_fx.errors import InputError

KEY = ("variant", "seed", "method")
SCRATCH, CONVERTED, HEALED = "from scratch", "MHA, converted", "MHA, converted and healed"


class Training:
    """The data of one process, and the MHA model that conversions start from."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sizes = Sizes(options.width, options.layers, 16, 3 * options.width, options.vocabulary)
        self.tokens, held_out, self.bytes = source_tokens(options.vocabulary, options.megabytes, options.cache)
        check = windows(held_out, options.batch // 2, options.length, 2000, options.device)
        self.held_out = [next(check) for _ in range(options.evaluations)]
        self.base: tuple[int, nn.Module] | None = None

    def scratch(self, variant: str, seed: int) -> Row:
        """A row for a model trained on the whole budget."""
        o = self.options
        start = time.perf_counter()
        torch.manual_seed(seed)
        model = DenseModel(self.sizes, *VARIANTS[variant]).to(o.device)
        late = train(model, windows(self.tokens, o.batch, o.length, seed, o.device), language_loss, o.steps, o.lr,
                     o.device == "cuda")  # fmt: skip
        torch.compiler.reset()
        spent = time.perf_counter() - start
        if variant == "MHA":
            self.base = seed, model
            save_file(model.state_dict(), self.checkpoint(seed))
        return {
            **self.quality(model),
            "training_loss": late,
            "seconds": spent,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": o.steps * o.batch * o.length,
        }

    def checkpoint(self, seed: int) -> Path:
        """Where the trained MHA is."""
        path: Path = self.options.out.with_name(f"{self.options.out.name}_mha_{seed}.safetensors")
        return path

    def mha(self, seed: int) -> nn.Module:
        """The trained MHA of this seed: the last one, the kept one, or trained again."""
        if self.base is None or self.base[0] != seed:
            if not self.checkpoint(seed).exists():
                self.scratch("MHA", seed)
            model = DenseModel(self.sizes, *VARIANTS["MHA"]).to(self.options.device)
            model.load_state_dict(load_file(self.checkpoint(seed), device=self.options.device))
            self.base = seed, model.eval()
        return self.base[1]

    def converted(self, variant: str, seed: int, rows: MeasuredRows) -> bool:
        """Rows for the conversion, and for its healing; False where the budget did not do."""
        o = self.options
        if rows.has(variant=variant, seed=seed, method=CONVERTED) and rows.has(
            variant=variant, seed=seed, method=HEALED
        ):
            return True
        made: list[nn.Module] = []

        def conversion() -> nn.Module:
            if not made:
                source = windows(self.tokens, o.heal_batch, o.length, 1000 + seed, o.device)
                calibration = [(next(source)[0],) for _ in range(o.calibration)]
                hq, hkv = VARIANTS[variant]
                made.append(sqa_fx.convert(self.mha(seed), hq=hq, hkv=hkv, args=calibration[0],
                                           calibration=calibration))  # fmt: skip
            return made[0]

        def plain() -> Row:
            start = time.perf_counter()
            student = conversion()
            return {**self.quality(student), "seconds": time.perf_counter() - start, "tokens": self.calibration_tokens}

        def healed() -> Row:
            start = time.perf_counter()
            student = conversion()
            source = windows(self.tokens, o.heal_batch, o.length, 500 + seed, o.device)
            steps = max(2, round(o.steps * o.heal_share * o.batch / o.heal_batch))
            sqa_fx.heal(
                student, self.mha(seed), [(next(source)[0],) for _ in range(steps)], steps=steps, lr=o.heal_lr,
                warmup=max(1, steps // 10), loss="kl", precision="bf16" if o.device == "cuda" else "fp32",
                progress=False,
            )  # fmt: skip
            return {
                **self.quality(student),
                "seconds": time.perf_counter() - start,
                "tokens": self.calibration_tokens + steps * o.heal_batch * o.length,
            }

        return rows.measure(plain, variant=variant, seed=seed, method=CONVERTED) and rows.measure(
            healed, variant=variant, seed=seed, method=HEALED
        )

    @property
    def calibration_tokens(self) -> int:
        """How many tokens a conversion reads."""
        o = self.options
        return int(o.calibration * o.heal_batch * o.length)

    @torch.no_grad()
    def quality(self, model: nn.Module) -> Row:
        """Loss in nats per token and accuracy of the next token, on held-out files."""
        losses, right = [], []
        device = self.options.device
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            for x, target in self.held_out:
                logits: Tensor = model(x)
                losses.append(language_loss(logits, target))
                right.append((logits.argmax(-1) == target).float().mean())
        return {"loss": float(torch.stack(losses).mean()), "accuracy": float(torch.stack(right).mean())}


def work(options: argparse.Namespace) -> list[str]:
    """What is to be done, as VARIANT:SEED; MHA comes first, since its conversions go with it and take longest."""
    todo = [f"{v}:{seed}" for v in options.variants for seed in options.seeds
            if v in options.seeded or seed == options.seeds[0]]  # fmt: skip
    return sorted(todo, key=lambda name: not name.startswith("MHA:"))


def measure(options: argparse.Namespace) -> None:
    """All rows in this process."""
    names = ("steps", "batch", "length", "lr", "heal_lr", "heal_batch", "heal_share", "calibration", "evaluations")
    sizes = ("layers", "width", "vocabulary", "megabytes")
    settings = {name: getattr(options, name) for name in (*names, *sizes)}
    cuda = options.device == "cuda"
    about = {**environment(torch.device("cuda", 0) if cuda else None), "settings": settings}
    rows = MeasuredRows(options, about, KEY, report)
    training = Training(options)
    for entry in options.work or work(options):
        variant, _, number = entry.partition(":")
        seed = int(number)

        def scratch(v: str = variant, s: int = seed) -> Row:
            return training.scratch(v, s)

        if not rows.measure(scratch, variant=variant, seed=seed, method=SCRATCH):
            return
        for target in options.converted if variant == "MHA" else ():
            if not training.converted(target, seed, rows):
                return
    rows.write()
    rows.say("complete")


def report(content: Mapping[str, Any]) -> str:
    """The Markdown of a results file."""
    failed = [f"- {r['variant']}, seed {r['seed']}, {r['method']}: {r['failed']}" for r in content["rows"]
              if "failed" in r]  # fmt: skip
    said = (
        "Means over seeds; the paper's figures are of its own data (half of the English Wikipedia): only how variants "
        "are ordered can be compared. Tokens are those that the method read after what it started from."
    )
    about = report_facts(content)
    parts = ["# Trained from scratch, and converted", about, markdown(summary(content["rows"])), said, *failed]
    return "\n\n".join(parts) + "\n"


def summary(rows: list[Row]) -> list[Row]:
    """Means and spreads over seeds, how far from MHA, and the paper's loss and accuracy."""
    names = ("variant", "method", "seed", "tokens", "loss", "accuracy")
    merged = over_seeds([{name: row[name] for name in names} for row in rows if "failed" not in row])
    original = next((row["loss"] for row in merged if row["variant"] == "MHA"), None)
    order = list(VARIANTS)
    found = []
    for row in sorted(merged, key=lambda r: order.index(r["variant"])):
        if original is not None:
            row["loss over MHA"] = row["loss"] - original
        paper = paper_figures.VALIDATION.get(row["variant"]) if row["method"] == SCRATCH else None
        found.append({**row, **({"paper's loss": paper[0], "paper's accuracy": paper[1]} if paper else {})})
    return found


def parser() -> argparse.ArgumentParser:
    """The options."""
    cuda = torch.cuda.is_available()
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(found)
    found.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    found.add_argument("--converted", nargs="*", default=["SQA", "sSQA", "xSQA"], choices=[*VARIANTS])
    found.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    found.add_argument("--seeded", nargs="*", default=["MHA", "SQA", "sSQA"], help="variants trained with every seed")
    found.add_argument("--jobs", type=int, default=1, help="processes that train at once")
    found.add_argument("--work", nargs="+", help="VARIANT:SEED to train, instead of all")
    found.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cuda", "cpu"])
    found.add_argument("--layers", type=int, default=Sizes.layers if cuda else 1)
    found.add_argument("--width", type=int, default=Sizes.width if cuda else 64)
    found.add_argument("--vocabulary", type=int, default=Sizes.vocabulary if cuda else 512)
    found.add_argument("--megabytes", type=float, default=40 if cuda else 1, help="source to read")
    found.add_argument("--cache", type=Path, help="file for the tokens, made by the first run that names it")
    found.add_argument("--length", type=int, default=1024 if cuda else 32)
    found.add_argument("--batch", type=int, default=32 if cuda else 8)
    found.add_argument("--steps", type=int, default=1000 if cuda else 20)
    found.add_argument("--lr", type=float, default=2e-3)
    found.add_argument("--heal-lr", type=float, default=6e-4)
    found.add_argument("--heal-batch", type=int, default=2, help="windows, for calibration too")
    found.add_argument("--heal-share", type=float, default=0.05, help="of the training tokens")
    found.add_argument("--calibration", type=int, default=128 if cuda else 2, help="batches")
    found.add_argument("--evaluations", type=int, default=16 if cuda else 2, help="batches as in training, held out")
    return found


def main(argv: list[str] | None = None) -> int:
    """Train, print and write."""
    given = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(given)
    code = 0
    try:
        if options.jobs > 1:
            options.cache = options.cache or options.out.with_name(f"{options.out.name}_tokens.pt")
            options.cache.parent.mkdir(parents=True, exist_ok=True)
            source_tokens(options.vocabulary, options.megabytes, options.cache)  # once for all processes
            own = [*given, "--cache", str(options.cache)]
            code = in_processes(__file__, options, own, "--work", options.work or work(options), report)
        else:
            measure(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.out.with_suffix(".md").exists():
        print(options.out.with_suffix(".md").read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
