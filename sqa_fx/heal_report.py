"""What healing did: the course of the loss, and which weights were given back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from sqa_fx.text_table import text_table


@dataclass(frozen=True)
class HealReport:
    """The result of `sqa_fx.heal`.

    ``history`` has an entry for every ``log_every`` steps and every evaluation: ``step``, ``loss`` (mean over what
    counts; the loss of sites while ``phase`` is "sites"), ``lr``, ``grad_norm`` (before clipping), ``tokens_per_s``,
    and after an evaluation ``held_out_loss`` and, where there are logits, ``held_out_agreement`` (the share of
    positions with the teacher's most likely class). Step 0 is before training. ``best_step`` has the lowest
    ``held_out_loss``, and its weights were given back (step 0: nothing was better than not to heal); None without
    held-out data. ``resumed_from`` is the step of the checkpoint that the run went on from.
    """

    history: tuple[dict[str, Any], ...]
    steps: int
    best_step: int | None
    stopped_early: bool
    resumed_from: int | None
    trained_parameters: int
    processes: int

    def held_out(self, step: int) -> dict[str, float] | None:
        """The held-out numbers after ``step``, or None where there was no evaluation."""
        entry = next((e for e in self.history if e["step"] == step and "held_out_loss" in e), None)
        return None if entry is None else {k: v for k, v in entry.items() if k.startswith("held_out_")}

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps({"version": 1, **asdict(self)}, indent=2, allow_nan=False)

    def table(self) -> str:
        """The report as aligned text: the evaluations, or without any the logged steps (20 at most)."""
        rows = [e for e in self.history if "held_out_loss" in e] or list(self.history)
        every = -(-len(rows) // 20)
        shown = [e for i, e in enumerate(rows) if i % every == 0 or i == len(rows) - 1 or e["step"] == self.best_step]
        names = {"step": "step", "loss": "loss", "held_out_loss": "held-out loss",
                 "held_out_agreement": "held-out top-1 agreement", "lr": "lr"}  # fmt: skip
        kept = [name for name in names if any(name in e for e in shown)]
        cells = [[f"{e[name]:.4g}" if name in e else "-" for name in kept] for e in shown]
        lines = [text_table([names[name] for name in kept], cells)] if shown else []
        lines.append(f"{self.steps} steps, {self.trained_parameters:,} parameters trained")
        if self.resumed_from is not None:
            lines[-1] += f", resumed from step {self.resumed_from}"
        if self.stopped_early:
            lines.append("stopped early: the held-out loss did not fall any more")
        if self.best_step is not None:
            lines.append(f"weights of step {self.best_step}, the best on held-out data")
        return "\n".join(lines)

    __str__ = table
