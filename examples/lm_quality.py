"""A GPT trained on local Python source, converted to fewer heads: its loss by method, after repair, after healing.

    python examples/lm_quality.py [--part heal|convert|scratch] [--seed 0] [--base FILE] [--out STEM]

``heal`` trains the model with all heads, converts it, and heals it (KL on logits) with 5% of the training tokens, from
the closed-form start and from the naive one. ``convert`` compares every head choice with and without closed-form
repair, and KV heads merged in every way. ``scratch`` trains SQA models on the whole budget. Losses are nats per token
on held-out files. ``--base`` keeps the trained model for the other parts.
Writes STEM.json and STEM.md after every row; several seeds are several runs.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from python_source import source_tokens, windows
from quality_table import Row, write
from safetensors.torch import load_file, save_file
from small_gpt import Gpt
from small_training import language_loss, train
from torch import Tensor, nn

import sqa_fx

VARIANTS = {"sSQA": (0.5, 0.5), "SQA": (0.5, 0.25), "xSQA": (0.25, 0.25)}
REPAIRS: dict[Any, str] = {False: "", "outputs": ", outputs repaired", True: ", repaired"}
SCORES = ["weights", "taylor", "fisher", "activation", "wifv", "importance", "reconstruct"]


def next_token_loss(logits: Tensor, batch: tuple[Tensor]) -> Tensor:
    """The same for a batch of inputs alone: every token is predicted from those before it."""
    return language_loss(logits[:, :-1], batch[0][:, 1:])


class Quality:
    """One run: the data, the rows so far, and how the loss is measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokens, held, ratio = source_tokens(options.vocabulary, options.megabytes, options.cache)
        self.train_windows = windows(self.tokens, options.batch, options.length, options.seed, self.device)
        # Everything but training has one shape, so that conversions can have fixed sizes.
        size = options.heal_batch
        self.windows = windows(self.tokens, size, options.length, 500 + options.seed, self.device)
        calibration = windows(self.tokens, size, options.length, 1000 + options.seed, self.device)
        self.calibration = [(next(calibration)[0],) for _ in range(options.calibration)]
        check = windows(held, size, options.length, 2000, self.device)
        self.held_out = [next(check) for _ in range(options.evaluations)]
        self.rows: list[Row] = []
        self.about: dict[str, Any] = {
            "model": f"{options.layers} layers, width {options.width}, {options.heads} heads",
            "training tokens": options.steps * options.batch * options.length,
            "data": f"{len(self.tokens)} tokens of Python source, {ratio:.2f} bytes each, vocabulary "
            f"{options.vocabulary}; held out by file",
            "calibration tokens": options.calibration * size * options.length,
            "healing": f"batches of {size} windows of {options.length} tokens, lr {options.heal_lr}",
            "seed": options.seed,
        }
        self.start = time.perf_counter()

    def model(self, hq: int, hkv: int) -> Gpt:
        """A new model."""
        o = self.options
        torch.manual_seed(o.seed)
        return Gpt(o.vocabulary, o.width, o.layers, o.heads, hq, hkv).to(self.device)

    def trained(self, hq: int, hkv: int) -> Gpt:
        """A model trained on the whole budget."""
        model = self.model(hq, hkv)
        train(model, self.train_windows, language_loss, self.options.steps, self.options.lr, self.device == "cuda")
        torch.compiler.reset()
        return model

    def base(self) -> Gpt:
        """The trained model with all heads; kept in the file ``--base``."""
        heads, path = self.options.heads, self.options.base
        if path is None or not path.exists():
            model = self.trained(heads, heads)
            if path is not None:
                save_file(model.state_dict(), path)
            return model
        model = self.model(heads, heads)
        model.load_state_dict(load_file(path, device=self.device))
        return model.eval()

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Nats per token on held-out files."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            losses = [language_loss(model(x), y) for x, y in self.held_out]
        return float(torch.stack(losses).mean())

    def add(self, variant: str, method: str, loss: float, **more: Any) -> None:
        """A row; all rows so far are written."""
        self.rows.append({"seed": self.options.seed, "variant": variant, "method": method, "loss": loss, **more})
        print(f"{time.perf_counter() - self.start:.0f} s", self.rows[-1], flush=True)
        write(self.rows, self.about, self.options.out, "A GPT on Python source with fewer heads")

    def converted(self, base: nn.Module, variant: str, **how: Any) -> nn.Module:
        """A conversion of ``base``; ``how`` are options of sqa_fx.convert."""
        hq, hkv = VARIANTS[variant]
        if how.get("heads", "reconstruct") not in ("first", "weights") or how.get("kv_merge") in ("aligned", "joint"):
            how = {"calibration": self.calibration, "loss": next_token_loss, **how}
        elif how.get("repair") or "calibration" in how:
            how = {"calibration": self.calibration, **how}
        how = {"verify": False, "dynamic_shapes": None, **how}
        return sqa_fx.convert(base, hq=hq, hkv=hkv, args=self.calibration[0], **how)

    def heal(self, student: nn.Module, base: nn.Module, variant: str, method: str, loss: Any = "kl") -> None:
        """Heal with a twentieth of the training tokens; rows along the way tell what fewer would have given."""
        o = self.options
        steps = max(4, o.steps * o.batch // (20 * o.heal_batch))
        data = [next(self.windows)[0] for _ in range(steps)]
        shares = sorted({max(1, steps // 8), max(1, steps // 4), max(1, steps // 2), steps})
        for share in shares:
            own = copy.deepcopy(student)
            sqa_fx.heal(
                own, base, [(x,) for x in data[:share]], steps=share, lr=o.heal_lr, warmup=max(1, share // 10),
                loss=loss, precision="bf16" if self.device == "cuda" else "fp32", progress=False,
            )  # fmt: skip
            tokens = share * o.heal_batch * o.length
            self.add(variant, f"{method}, healed", self.loss(own), healing_tokens=tokens)


def heal_part(quality: Quality) -> None:
    """Convert and heal, from the closed-form start and from the naive one."""
    base = quality.base()
    quality.add("MHA", "original", quality.loss(base))
    for variant in quality.options.variants:
        naive = quality.converted(base, variant, heads="weights", kv_merge="mean")
        quality.add(variant, "weights, mean", quality.loss(naive))
        best = quality.converted(base, variant, verify=True)
        quality.add(variant, "reconstruct, joint, repaired", quality.loss(best))
        quality.heal(best, base, variant, "reconstruct, joint, repaired")
        quality.heal(naive, base, variant, "weights, mean")
        if variant == "SQA":
            quality.heal(best, base, variant, "reconstruct, joint, repaired, cross-entropy", _labels)


def _labels(student: Any, teacher: Any, batch: Any) -> Tensor:
    return next_token_loss(student, batch)


def convert_part(quality: Quality) -> None:
    """Convert in every way."""
    base = quality.base()
    quality.add("MHA", "original", quality.loss(base))
    for variant in ("sSQA", "SQA"):
        for score in SCORES:
            for repair, repaired in REPAIRS.items():
                done = quality.converted(base, variant, heads=score, kv_merge="mean", repair=repair)
                quality.add(variant, f"{score}, mean{repaired}", quality.loss(done))
    for merge in ("select", "aligned", "joint"):
        for repair, repaired in REPAIRS.items():
            done = quality.converted(base, "SQA", heads="reconstruct", kv_merge=merge, repair=repair)
            quality.add("SQA", f"reconstruct, {merge}{repaired}", quality.loss(done))


def scratch_part(quality: Quality) -> None:
    """Train the SQA models themselves."""
    heads = quality.options.heads
    for variant, (q, kv) in VARIANTS.items():
        model = quality.trained(int(heads * q), int(heads * kv))
        quality.add(variant, "trained from scratch", quality.loss(model))


def main() -> None:
    """Run one part."""
    cuda = torch.cuda.is_available()
    parts: dict[str, Callable[[Quality], None]] = {"heal": heal_part, "convert": convert_part, "scratch": scratch_part}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*parts], default="heal")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS], help="to heal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=8 if cuda else 2)
    parser.add_argument("--width", type=int, default=384 if cuda else 64)
    parser.add_argument("--heads", type=int, default=12 if cuda else 8)
    parser.add_argument("--vocabulary", type=int, default=4096 if cuda else 512)
    parser.add_argument("--megabytes", type=float, default=40 if cuda else 2, help="source to read")
    parser.add_argument("--cache", type=Path, help="file for the tokens, made by the first run that names it")
    parser.add_argument("--base", type=Path, help="file for the trained model, made by the first run that names it")
    parser.add_argument("--length", type=int, default=512 if cuda else 64)
    parser.add_argument("--batch", type=int, default=64 if cuda else 8)
    parser.add_argument("--steps", type=int, default=1200 if cuda else 40)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--heal-lr", type=float, default=5e-4)
    parser.add_argument("--heal-batch", type=int, default=32 if cuda else 4, help="windows, for all but training")
    parser.add_argument("--calibration", type=int, default=16 if cuda else 4, help="batches")
    parser.add_argument("--evaluations", type=int, default=16 if cuda else 2, help="batches, held out")
    parser.add_argument("--out", type=Path, default=Path("demo-out/lm_quality"))
    options = parser.parse_args()
    parts[options.part](Quality(options))


if __name__ == "__main__":
    main()
