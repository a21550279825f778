"""How to heal: every option with what it does, checked when it is made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from sqa_fx.errors import InputError
from sqa_fx.heal_loss import LossFunction

_CHOICES = {
    "train": ("all", "sites", "low-rank"),
    "precision": ("fp32", "bf16"),
    "resume": ("auto", "never", "must"),
}
_LEAST = {
    **dict.fromkeys(("steps", "accumulate", "rank", "evaluate_every", "checkpoint_every", "keep", "log_every"), 1),
    **dict.fromkeys(("warmup", "site_warmup"), 0),
}
_NO_MATTER = (
    *("device", "checkpoints", "checkpoint_every", "keep", "resume", "log", "log_every", "tensorboard", "progress"),
    "accelerate",
)
"""What has no influence on the weights that come out."""


@dataclass(frozen=True)
class HealOptions:
    """Options of `sqa_fx.heal`. Raises InputError for values that make no sense.

    What is learned:
        loss: "kl" (logits), "embedding", "auto" (kl for outputs with logits, else embedding), or a function of
            (student outputs, teacher outputs, batch) that returns the mean loss of the batch.
        site_warmup: for so many steps at first, match what each converted site's output projection returns instead.
        train: "all" parameters, those of the converted "sites" only (their projections with biases), or "low-rank"
            updates of the sites' projections of ``rank``, which are merged into the weights at the end.
        rank: see ``train``.
    How:
        steps: optimiser steps. lr: the highest learning rate of AdamW. warmup: steps over which it rises; then it falls
            as a cosine to ``final_lr`` times that. weight_decay: on parameters with two or more axes. max_grad_norm:
            gradients are scaled down to it. accumulate: batches for a step. precision: "fp32", or "bf16" for autocast
            (weights stay float32; half-precision weights get float32 copies to train). seed: of the order of the data,
            of dropout and of low-rank updates. deterministic: only algorithms that give the same bits on a GPU, too.
        device: "auto" (the accelerator if there is one), or a name as "cuda:1". accelerate: use Hugging Face
            Accelerate; None does so when there are several processes.
    Held-out data:
        evaluate_every: steps between evaluations. patience: stop after so many evaluations without a better loss
            (None: never).
    What is written:
        checkpoints: a folder for them, every ``checkpoint_every`` steps; the last ``keep`` stay. resume: "auto" goes on
            from the last checkpoint if there is one, "must" needs one, "never" refuses one. log: a JSONL file, a line
            every ``log_every`` steps. tensorboard: a folder. progress: a bar on stderr.
    """

    loss: str | LossFunction = "auto"
    steps: int = 1000
    lr: float = 1e-4
    final_lr: float = 0.0
    warmup: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    train: Literal["all", "sites", "low-rank"] = "all"
    rank: int = 16
    site_warmup: int = 0
    seed: int = 0
    deterministic: bool = False
    device: str = "auto"
    evaluate_every: int = 100
    patience: int | None = None
    checkpoints: str | os.PathLike[str] | None = None
    checkpoint_every: int = 100
    keep: int = 2
    resume: Literal["auto", "never", "must"] = "auto"
    log: str | os.PathLike[str] | None = None
    log_every: int = 10
    tensorboard: str | os.PathLike[str] | None = None
    progress: bool = True
    accelerate: bool | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss) and self.loss not in ("auto", "kl", "embedding"):
            raise InputError(f"loss is {self.loss!r}: give 'auto', 'kl', 'embedding' or a function")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}: give one of {', '.join(choices)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{name} is {value!r}: give a whole number of at least {least}")
        if self.patience is not None and (type(self.patience) is not int or self.patience < 1):
            raise InputError(f"patience is {self.patience!r}: give a number of evaluations, or None")
        if not (self.lr > 0 and self.max_grad_norm > 0 and self.weight_decay >= 0 and 0 <= self.final_lr <= 1):
            raise InputError(
                f"lr ({self.lr}) and max_grad_norm ({self.max_grad_norm}) must be above 0, weight_decay "
                f"({self.weight_decay}) at least 0, and final_lr ({self.final_lr}), a share of lr, within 0 and 1"
            )
        if self.resume == "must" and self.checkpoints is None:
            raise InputError("resume='must' needs checkpoints=, the folder to go on from")

    def changed(self, changes: Mapping[str, Any]) -> HealOptions:
        """The options with some replaced. Raises InputError for a name that is none."""
        names = [f.name for f in fields(self)]
        unknown = sorted(set(changes) - set(names))
        if unknown:
            raise InputError(f"heal has no option {', '.join(unknown)}; its options are {', '.join(names)}")
        return dataclasses.replace(self, **changes)

    def that_matter(self) -> dict[str, Any]:
        """What the weights that come out depend on, as JSON-ready data."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NO_MATTER}
        if callable(self.loss):
            found["loss"] = f"{getattr(self.loss, '__module__', '')}.{getattr(self.loss, '__qualname__', 'function')}"
        return found
