"""A diffusion transformer (DiT) with fewer heads: convert, prove, export to ONNX, validate and measure.

    python examples/convert_diffusion.py [--variant SQA | --hq 4 --hkv 2] [--heads 8] [--size 32]

diffusers' DiT from a config, with random weights: one denoising step of a latent [batch, 4, size, size].
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from example_steps import arguments, convert, device_and_dtype, ending, export_and_compare, library
from torch import Tensor, nn


class Step(nn.Module):
    """One step: noise predicted for a latent [batch, 4, size, size], at timesteps [batch], for classes [batch]."""

    def __init__(self, options: argparse.Namespace, layers: int) -> None:
        super().__init__()
        diffusers = library("diffusers", "pip install diffusers")
        self.model = diffusers.DiTTransformer2DModel(
            num_attention_heads=options.heads,
            attention_head_dim=options.head_dim,
            num_layers=layers,
            sample_size=options.size,
        )

    def forward(self, latent: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """See the class."""
        noise: Tensor = self.model(latent, timestep, label, return_dict=False)[0]
        return noise


def run(options: argparse.Namespace) -> bool:
    """The whole example; whether both ONNX files are right."""
    device, dtype = device_and_dtype()
    torch.manual_seed(0)
    model = Step(options, options.layers or (2 if device == "cpu" else 28)).to(device, dtype).eval()

    def call(batch: int) -> tuple[Any, ...]:
        latent = torch.randn(batch, 4, options.size, options.size, device=device, dtype=dtype)
        return latent, *(torch.randint(1000, (batch,), device=device) for _ in range(2))

    converted = convert(model, options, args=call(2))
    # With guidance every image is computed twice, with its class and without.
    sets: dict[str, Any] = {f"batch {n}": (call(n), {}) for n in options.batch}
    tokens = [n * (options.size // 2) ** 2 for n in options.batch]
    return export_and_compare(model, converted, sets, options, tokens)


def main() -> int:
    """Read the command line and run."""
    parser = arguments(__doc__, "diffusion-out")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--size", type=int, default=32, help="height and width of the latent (default: 32, 256 tokens)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2], help="batch sizes to measure")
    return ending(run, parser)


if __name__ == "__main__":
    sys.exit(main())
