"""Time of the passes: find + plan + rewrite as a share of torch.export's, and the growth from 12 to 48 layers.

    python examples/pass_time.py [--repeats 3] [--layers 12 48] [--json]

Export and passes are measured side by side in one process, best of the repeats. Verification and capture's own
bookkeeping are not part of either number.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqa_fx.passes.capture import capture
from sqa_fx.passes.capture_ways import automatic_shapes
from sqa_fx.passes.pipeline import Timings, find_sites, make_plan, run_passes
from sqa_fx.torchvision_ops import make_torchvision_importable

WIDTH, HEADS, VOCABULARY = 192, 12, 101


class _Attention(nn.Module):
    """Attention of a BERT or a Llama, for where transformers is not installed."""

    def __init__(self, kv_heads: int, rotary: bool) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv_heads * size), nn.Linear(WIDTH, kv_heads * size)
        self.kv_heads, self.rotary = kv_heads, rotary

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, -1).transpose(1, 2)
        k, v = (f(x).view(b, t, self.kv_heads, -1).transpose(1, 2) for f in (self.k, self.v))
        if self.rotary:
            angle = torch.arange(t)[:, None] / 10000 ** torch.linspace(0, 1, q.shape[-1])
            q, k = (y * angle.cos() + torch.cat([-y[..., 8:], y[..., :8]], -1) * angle.sin() for y in (q, k))
        k, v = (y.repeat_interleave(HEADS // self.kv_heads, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.rotary)
        out: Tensor = self.o(y.transpose(1, 2).reshape(b, t, -1))
        return out


class _Layer(nn.Module):
    def __init__(self, kv_heads: int, rotary: bool) -> None:
        super().__init__()
        self.attention, self.first, self.second = (
            _Attention(kv_heads, rotary),
            nn.Linear(WIDTH, 256),
            nn.Linear(256, WIDTH),
        )
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        out: Tensor = x + self.second(F.gelu(self.first(self.norms[1](x))))
        return out


def _plain(layers: int, kv_heads: int, rotary: bool) -> tuple[nn.Module, dict[str, Any]]:
    return nn.Sequential(*(_Layer(kv_heads, rotary) for _ in range(layers))).eval(), {
        "input": torch.randn(2, 16, WIDTH)
    }


def bert(layers: int) -> tuple[nn.Module, dict[str, Any]]:
    """An encoder with separate projections and a padding mask (transformers' BERT where it is installed)."""
    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        return _plain(layers, HEADS, False)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=256,
        num_hidden_layers=layers,
    )
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 9:] = 0
    return BertModel(config).eval(), {"input_ids": torch.randint(4, 99, (2, 16)), "attention_mask": mask}


def llama(layers: int) -> tuple[nn.Module, dict[str, Any]]:
    """A decoder with rotary embeddings and grouped KV heads (transformers' Llama where it is installed)."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return _plain(layers, 4, True)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
        intermediate_size=256,
        num_hidden_layers=layers,
    )
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(4, 99, (2, 16)), "use_cache": False}


def measure(build: Callable[[int], tuple[nn.Module, dict[str, Any]]], layers: int, repeats: int) -> dict[str, Any]:
    """Best times in seconds: of torch.export.export, and of each pass on what it captured."""
    model, kwargs = build(layers)
    best: dict[str, float] = {}
    sites = 0
    for _ in range(repeats):
        shapes = automatic_shapes(model, (), kwargs)
        start = time.perf_counter()
        torch.export.export(model, (), kwargs, dynamic_shapes=shapes, strict=False)
        spent = {"export": time.perf_counter() - start}

        captured = capture(model, (), kwargs)
        timings = Timings()
        start = time.perf_counter()
        analysis = timings.timed("find", lambda: find_sites(captured.graph_module))  # noqa: B023 (called at once)
        plans = timings.timed("plan", lambda: make_plan(analysis, 0.5, 2, "weights", "mean"))  # noqa: B023
        done = run_passes(analysis, plans, timings)
        spent["passes"] = time.perf_counter() - start
        spent.update({name: ms / 1e3 for name, ms in timings.milliseconds.items()})
        sites = len(analysis.sites) - len(done.refused)
        best = {name: min(seconds, best.get(name, math.inf)) for name, seconds in spent.items()}
    return {"layers": layers, "sites": sites, "seconds": best, "share": best["passes"] / best["export"]}


def main(argv: list[str] | None = None) -> int:
    """Print the shares and the growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="best of this many")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    make_torchvision_importable()
    results: dict[str, Any] = {}
    for name, build in (("bert", bert), ("llama", llama)):
        measure(build, 1, 1)  # imports and caches
        rows = [measure(build, layers, options.repeats) for layers in options.layers]
        first, last = rows[0], rows[-1]
        results[name] = {
            "rows": rows,
            "layers grow by": last["layers"] / first["layers"],
            "passes grow by": last["seconds"]["passes"] / first["seconds"]["passes"],
            "export grows by": last["seconds"]["export"] / first["seconds"]["export"],
        }
        if options.json:
            continue
        for row in rows:
            parts = ", ".join(f"{k} {v:.2f}" for k, v in row["seconds"].items() if k not in ("export", "passes"))
            print(
                f"{name:6} {row['layers']:3} layers, {row['sites']} sites: export {row['seconds']['export']:.2f} s, "
                f"passes {row['seconds']['passes']:.2f} s = {row['share']:.0%} of export ({parts})",
                flush=True,
            )
        if len(rows) > 1:
            grown = results[name]
            print(
                f"{name:6} {grown['layers grow by']:.0f}x the layers: passes {grown['passes grow by']:.2f}x, "
                f"export {grown['export grows by']:.2f}x",
                flush=True,
            )
    if options.json:
        print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
