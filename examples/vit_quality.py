"""A ViT classifier trained on generated images, converted to half its heads: top-1 before, after repair, after healing.

    python examples/vit_quality.py [--seed 0] [--out STEM]

The task: which digit is drawn, in any place, size and angle, among strokes that mean nothing. Writes STEM.json and
STEM.md after every row.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from quality_table import Row, write
from small_training import train
from torch import Tensor, nn

import sqa_fx

SIDE, PATCH = 48, 6
VARIANTS = {"sSQA": (0.5, 0.5), "SQA": (0.5, 1 / 3), "xSQA": (1 / 3, 1 / 3)}


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 48, 48] with values around 0, and the digits in them [count]."""
    from PIL import Image, ImageDraw, ImageFont

    random = np.random.default_rng(seed)
    fonts = [ImageFont.load_default(size) for size in range(14, 31, 2)]
    pixels = np.zeros((count, SIDE, SIDE), dtype=np.uint8)
    digits = random.integers(0, 10, count)
    for i, digit in enumerate(digits):
        font = fonts[random.integers(len(fonts))]
        tile = Image.new("L", (32, 36))
        ImageDraw.Draw(tile).text((6, 0), str(digit), fill=int(random.integers(150, 256)), font=font)
        tile = tile.rotate(float(random.uniform(-35, 35)))
        image = Image.new("L", (SIDE, SIDE))
        draw = ImageDraw.Draw(image)
        for _ in range(6):
            ends = random.integers(0, SIDE, 4).tolist()
            draw.line(ends, fill=int(random.integers(60, 200)), width=1)
        x, y = random.integers(-4, SIDE - 26, 2).tolist()
        image.paste(tile, (x, y), tile.point(lambda v: 255 if v > 40 else 0))
        pixels[i] = np.asarray(image)
    noisy = pixels / 255 + random.normal(0, 0.15, pixels.shape)
    return torch.tensor(noisy - 0.2, dtype=torch.float32)[:, None], torch.tensor(digits)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [batch, patches, width]."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(y)
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Vit(nn.Module):
    """Images [batch, 1, 48, 48] to logits [batch, 10]."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the digits."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


def shuffled(x: Tensor, y: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(x), (batch,), generator=generator)
        yield x[rows], y[rows]


def main() -> None:
    """Train, convert in every way, measure."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=192 if cuda else 96)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--images", type=int, default=200_000 if cuda else 400)
    parser.add_argument("--batch", type=int, default=256 if cuda else 32)
    parser.add_argument("--steps", type=int, default=15_000 if cuda else 20)
    parser.add_argument("--heal-steps", type=int, default=500 if cuda else 4)
    parser.add_argument("--out", type=Path, default=Path("demo-out/vit_quality"))
    options = parser.parse_args()
    device = "cuda" if cuda else "cpu"
    x, y = images(options.images, options.seed)
    held_x, held_y = images(min(5000, max(100, options.images // 10)), 10_000)
    torch.manual_seed(options.seed)
    model = Vit(options.width, options.layers, options.heads).to(device)
    feed = shuffled(x, y, options.batch, options.seed)
    train(model, feed, F.cross_entropy, options.steps, 1e-3, cuda)
    calibration = [next(feed)[0].to(device) for _ in range(16 if cuda else 4)]
    held_out = [
        {"x": a.to(device), "labels": b.to(device)} for a, b in zip(held_x.split(250), held_y.split(250), strict=True)
    ]
    rows: list[Row] = []
    about = {
        "model": f"ViT, {options.layers} layers, width {options.width}, {options.heads} heads, {len(x)} images",
        "calibration": f"{len(calibration)} batches of {options.batch} images, no labels",
        "seed": options.seed,
    }

    def add(variant: str, method: str, converted: nn.Module) -> None:
        found = sqa_fx.evaluate(converted, model, held_out, kind="classification")
        top1 = found.student["top-1"]
        rows.append({"seed": options.seed, "variant": variant, "method": method, "top-1": top1,
                     "points lost": 100 * (found.teacher["top-1"] - top1)})  # fmt: skip
        print(rows[-1], flush=True)
        write(rows, about, options.out, "A ViT on generated images with fewer heads")

    add("MHA", "original", model)
    for variant, (hq, hkv) in VARIANTS.items():
        request: dict[str, Any] = {"hq": hq, "hkv": hkv, "args": (calibration[0],)}
        add(variant, "weights, mean", sqa_fx.convert(model, **request))
        data: dict[str, Any] = {"calibration": calibration}
        add(variant, "reconstruct, joint", sqa_fx.convert(model, **request, **data, repair=False, verify=False))
        outputs = sqa_fx.convert(model, **request, **data, repair="outputs", verify=False)
        add(variant, "reconstruct, joint, outputs repaired", outputs)
        best = sqa_fx.convert(model, **request, **data)
        add(variant, "reconstruct, joint, repaired", best)
        steps = options.heal_steps
        batches = [next(feed)[0] for _ in range(steps)]
        sqa_fx.heal(best, model, batches, loss="kl", steps=steps, lr=3e-4, warmup=max(1, steps // 10), progress=False)
        add(variant, "reconstruct, joint, repaired, healed", best)


if __name__ == "__main__":
    main()
