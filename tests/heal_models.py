"""A small language model that is converted and healed, the same in every process."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from attention_models import VOCABULARY, FusedAttention
from torch import Tensor, nn

import sqa_fx

ROWS, LENGTH, WIDTH, HEADS = 6, 7, 40, 4


class Speaker(nn.Module):
    """Logits of the next token from two causal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([FusedAttention(WIDTH, HEADS) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """[batch, sequence] both -> logits [batch, sequence, vocabulary]."""
        x = self.embedding(input_ids) * attention_mask[..., None]
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return {"logits": self.head(x)}


def teacher() -> nn.Module:
    """The original: attention matters much in it."""
    torch.manual_seed(3)
    model = Speaker().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_attn.weight" in name or "c_proj.weight" in name:
                parameter.mul_(3)
    return model


def batch(seed: int, rows: int = ROWS) -> dict[str, Tensor]:
    """Token ids with padding at the end of some rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (rows, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths).long()}


def student(model: nn.Module | None = None, **options: Any) -> sqa_fx.ConvertedModule:
    """Half of the heads of ``teacher``."""
    asked = {"hq": 2, "hkv": 2, "verify": False, **options}
    converted = sqa_fx.convert(model or teacher(), kwargs=batch(0), **asked)
    assert isinstance(converted, sqa_fx.ConvertedModule)
    return converted


TRAIN = [batch(seed) for seed in range(5)]
HELD_OUT = [batch(100), batch(101, 5)]


def main(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Heal ``student`` in the folder as each of ``runs`` says and write weights and report; one of several processes,
    or one that is killed.

    ``take_away`` names a checkpoint that is deleted before.
    """
    torch.set_num_threads(1)
    first, original = os.environ.get("RANK", "0") == "0", teacher()
    for number, options in enumerate(runs):
        gone = options.pop("take_away", None)
        if gone is not None and first:
            shutil.rmtree(Path(options["checkpoints"]) / gone)
        healed = sqa_fx.load(folder / "student")
        options = {"progress": False, "device": "cpu", **options}
        report = sqa_fx.heal(healed, original, TRAIN, held_out=HELD_OUT, **options)
        if first:
            torch.save(dict(healed.named_parameters()), folder / f"weights-{number}.pt")
            (folder / f"report-{number}.json").write_text(report.to_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
