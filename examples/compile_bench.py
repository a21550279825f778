"""torch.compile with backend "sqa_fx" beside the same architecture written by hand, and what the passes cost.

    python examples/compile_bench.py [--tokens 1024x16 4096x4 32768x1] [--width 1024] [--layers 4] [--out STEM]

For every size, in one process and in interleaved runs: the model as it is, the same model through the backend, the
same model converted ahead of time, and an SQA model written by hand with as many heads, all under torch.compile
(Inductor); inference (no gradients), with and without CUDA graphs, and a training step (forward, backward, AdamW).
Prints medians and ratios, and how far the compiled outputs are from the converted model's in eager. Compile times are
cold: Inductor's caches are off. Writes STEM.json and STEM.md after every row, and stops after --budget seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sqa_fx

HEAD_DIM = 64
CASES = ["inference", "training step", "inference, CUDA graphs"]


class Attention(nn.Module):
    """Causal rotary attention with ``heads`` query heads and ``kv_heads`` KV heads of 64."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q, self.o = (
            nn.Linear(width, heads * HEAD_DIM, bias=False),
            nn.Linear(heads * HEAD_DIM, width, bias=False),
        )
        self.k, self.v = (nn.Linear(width, kv_heads * HEAD_DIM, bias=False) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, length, width]; cos and sin [length, 64]."""
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, HEAD_DIM).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv_heads, HEAD_DIM).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv_heads, HEAD_DIM).transpose(1, 2)
        q, k = (y * cos + torch.cat([-y[..., HEAD_DIM // 2 :], y[..., : HEAD_DIM // 2]], -1) * sin for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        out: Tensor = self.o(y.transpose(1, 2).reshape(b, t, -1))
        return out


class Model(nn.Module):
    """A Llama-shaped decoder without embedding."""

    def __init__(self, width: int, layers: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width, heads, kv_heads) for _ in range(layers)])
        self.gates = nn.ModuleList([nn.Linear(width, 2 * 3 * width, bias=False) for _ in range(layers)])
        self.downs = nn.ModuleList([nn.Linear(3 * width, width, bias=False) for _ in range(layers)])
        self.norms = nn.ModuleList([nn.RMSNorm(width) for _ in range(2 * layers)])

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [batch, length, width]."""
        t = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        rates = 10000 ** -torch.linspace(0, 1, HEAD_DIM // 2, device=x.device)
        angles = torch.cat([t[:, None] * rates] * 2, -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, attention in enumerate(self.attentions):
            x = x + attention(self.norms[2 * i](x), cos, sin)
            gate, up = self.gates[i](self.norms[2 * i + 1](x)).chunk(2, -1)
            x = x + self.downs[i](F.silu(gate) * up)
        return x


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def burst(call: Callable[[], Any], device: str, count: int) -> float:
    """Milliseconds per call of ``count`` calls in a row, as in a training loop: nobody waits for the device between."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / count * 1e3


def interleaved(calls: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each call. The calls take turns of at least 50 ms, every time in another order: a device
    that is warm from a heavier model runs the next one at lower clocks."""
    counts = {name: max(1, round(50 / max(burst(call, device, 2) for _ in range(2)))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeats):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order if turn % 2 else reversed(order):
            times[name].append(burst(calls[name], device, counts[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def step_of(model: Any, parameters: Sequence[nn.Parameter], x: Tensor) -> Callable[[], None]:
    """One training step on a fixed batch."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=x.device.type == "cuda")

    def step() -> None:
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()

    return step


def timed_first_call(call: Callable[[], Any], device: str) -> float:
    """Seconds of a call that compiles."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def measure(options: argparse.Namespace, batch: int, length: int, case: str) -> dict[str, Any]:
    """One size: times of the four models, compile times, and the share of the passes."""
    training, mode = case == "training step", "reduce-overhead" if "CUDA graphs" in case else None
    device, dtype = options.device, getattr(torch, options.dtype)
    heads = options.width // HEAD_DIM
    hq, hkv = heads // 2, heads // 4
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(batch, length, options.width, device=device, dtype=dtype)
    base = Model(options.width, options.layers, heads, heads).to(device, dtype)
    own = Model(options.width, options.layers, hq, hkv).to(device, dtype)
    small = torch.randn(2, 64, options.width, device=device, dtype=dtype)
    converted = sqa_fx.convert(base, hq=hq, hkv=hkv, args=(small,))
    request = {"hq": hq, "hkv": hkv, "on_refused": "raise"}
    models: dict[str, tuple[Any, list[nn.Parameter]]] = {
        "original": (torch.compile(base, mode=mode), list(base.parameters())),
        "hand-written SQA": (torch.compile(own, mode=mode), list(own.parameters())),
        "converted ahead of time": (torch.compile(converted, mode=mode), list(converted.parameters())),
        "backend sqa_fx": (torch.compile(base, backend=sqa_fx.backend(**request, mode=mode)), list(base.parameters())),
    }
    calls: dict[str, Callable[[], Any]] = {}
    compile_seconds: dict[str, float] = {}
    with torch.set_grad_enabled(training):
        for name, (model, parameters) in models.items():
            calls[name] = step_of(model, parameters, x) if training else functools.partial(model, x)
            compile_seconds[name] = timed_first_call(calls[name], device)
        graph = sqa_fx.compiled_graphs()[-1]
        error = None if training else distance(calls["backend sqa_fx"](), converted(x))
        milliseconds = interleaved(calls, device, options.repeats)
    spent = {name: ms for name, ms in graph.report.milliseconds.items() if name != "capture"}
    passes = sum(ms for name, ms in spent.items() if name != "verify") / 1e3
    proof = graph.report.proof
    return {
        "batch": batch,
        "length": length,
        "case": case,
        "relative_error_of_backend": error,
        "heads": [heads, hq, hkv],
        "milliseconds": milliseconds,
        "backend_over_hand_written": milliseconds["hand-written SQA"] / milliseconds["backend sqa_fx"],
        "ahead_of_time_over_hand_written": milliseconds["hand-written SQA"] / milliseconds["converted ahead of time"],
        "backend_over_original": milliseconds["original"] / milliseconds["backend sqa_fx"],
        "compile_seconds": compile_seconds,
        "passes_milliseconds": spent,
        "passes_share_of_compile": passes / compile_seconds["original"],
        "passes_and_proof_share_of_compile": (passes + spent.get("verify", 0.0) / 1e3) / compile_seconds["original"],
        "proof": None if proof is None else {"precision": proof["precision"], "error": proof["error"]},
    }


def distance(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of ``expected``."""
    difference = (actual.float() - expected.float()).norm() / expected.float().norm()
    return float(difference)


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    head = ["case", "tokens x batch", "original ms", "by hand ms", "ahead of time ms", "backend ms",
            "backend / by hand", "ahead of time / by hand", "speed-up", "passes / compile", "with proof",
            "error"]  # fmt: skip
    body = []
    for row in rows:
        ms = row["milliseconds"]
        body.append([
            row["case"], f"{row['length']} x {row['batch']}", *(f"{v:.2f}" for v in ms.values()),
            f"{row['backend_over_hand_written']:.3f}", f"{row['ahead_of_time_over_hand_written']:.3f}",
            f"{row['backend_over_original']:.2f}x", f"{row['passes_share_of_compile']:.1%}",
            f"{row['passes_and_proof_share_of_compile']:.1%}",
            "" if row["relative_error_of_backend"] is None else f"{row['relative_error_of_backend']:.1e}",
        ])  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in body)])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", default=["1024x16", "4096x4", "32768x1"], help="LENGTHxBATCH")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no row is started")
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()
    # The first compilation of a process also imports the compilers, Inductor and the passes.
    tiny, request = Model(128, 1, 2, 2).to(options.device), {"hq": 1, "hkv": 1, "on_refused": "raise"}
    for first in (torch.compile(tiny), torch.compile(tiny, backend=sqa_fx.backend(**request))):
        first(torch.randn(2, 16, 128, device=options.device)).sum().backward()
    rows: list[dict[str, Any]] = []
    for size in options.tokens:
        length, batch = (int(n) for n in size.split("x"))
        for case in options.cases:
            if time.perf_counter() - start < options.budget:
                rows.append(measure(options, batch, length, case))
                print(json.dumps(rows[-1]), flush=True)
                write(options, rows)
    print(table(rows))


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """What was measured so far, as JSON and Markdown."""
    if options.out is None:
        return
    where = platform.processor() or platform.machine()
    if options.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        where = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().replace(",", " driver")
    about = {
        "device": where,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dtype": options.dtype,
        "width": options.width,
        "layers": options.layers,
        "head_dim": HEAD_DIM,
        "command": shlex.join(["python", "examples/compile_bench.py", *sys.argv[1:]]),
    }
    options.out.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    said = ", ".join(f"{k} {v}" for k, v in about.items())
    options.out.with_suffix(".md").write_text(f"# torch.compile with the sqa_fx backend\n\n{said}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
