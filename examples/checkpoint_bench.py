"""Measure a checkpoint that is converted shard by shard against cp of the same directory, and plans made from configs.

    python examples/checkpoint_bench.py --directory /var/tmp --output examples/results/checkpoint_bench

makes a checkpoint of random bf16 weights (9 GB; a Llama of 20 layers), and takes turns: cp, convert-checkpoint. Each
turn begins with the input out of the page cache and ends when everything is on the disk. Peak memory is the largest
resident set of the process, and the largest sum of its own and those of the processes that it started, in which
libraries that they share count for each. Then it plans models of 70 billion parameters from their configs alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sqa_fx.checkpoint_format import make_header
from sqa_fx.torchvision_ops import make_torchvision_importable

PLANNED: dict[str, dict[str, Any]] = {
    "Llama-3 70B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "dtype": "bfloat16",
    },
    "Qwen2 72B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "dtype": "bfloat16",
    },
}


@dataclass(frozen=True)
class Turn:
    """One measurement: seconds until the command ended, seconds until all was on the disk, peak memory in bytes of the
    process, and of it and its children together."""

    ended: float
    on_disk: float
    peak: int
    together: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the measurements and write FILE.json and FILE.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--layers", type=int, default=20, help="layers of 0.44 GB (default: 20)")
    parser.add_argument("--width", type=int, default=4096, help="hidden size (default: 4096)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--no-plans", action="store_true", help="leave out the plans of 70B models")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {
        "machine": {"processor": _processor(), "cpus": os.cpu_count(), "torch": torch.__version__},
        "load": os.getloadavg()[0],
    }
    if not options.no_plans:
        results["plans"] = {name: plan_from_config(name, config) for name, config in PLANNED.items()}
    results["checkpoint"] = measure(options.directory, options.layers, options.width, options.rounds)
    text = table(results)
    print(text)
    if options.output is not None:
        options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(text, encoding="utf-8")


def plan_from_config(name: str, config: dict[str, Any]) -> dict[str, float]:
    """Seconds and peak memory (bytes) of ``sqa-fx plan`` on a config.json."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        file = Path(folder) / "plan.json"
        turn = run([*SQA_FX, "plan", folder, "--hq", "0.5", "--hkv", "0.5", "-o", str(file)])
        sites = len(json.loads(file.read_bytes())["sites"])
        print(f"{name}: {sites} sites planned in {turn.ended:.0f} s, {turn.peak / 1e6:.0f} MB", file=sys.stderr)
        return {"seconds": turn.ended, "peak_bytes": turn.peak, "sites": sites, "plan_bytes": file.stat().st_size}


SQA_FX = (sys.executable, "-m", "sqa_fx")


def measure(place: Path, layers: int, width: int, rounds: int) -> dict[str, Any]:
    """cp and convert-checkpoint in turns, with one job and with two."""
    size = 2 * (layers * width * width * 13 + 2 * 32000 * width)
    free = shutil.disk_usage(place).free
    if free < 3.2 * size:
        sys.exit(f"{place} has {free / 1e9:.0f} GB free, {3.2 * size / 1e9:.0f} GB are needed: --directory, --layers")
    kind = subprocess.run(["stat", "-f", "-c", "%T", place], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(dir=place) as folder:
        source, copy, target = (Path(folder) / name for name in ("in", "copy", "out"))
        largest = make_checkpoint(source, layers, width)
        total = sum(path.stat().st_size for path in source.iterdir())
        print(f"made {total / 1e9:.2f} GB on {kind}", file=sys.stderr)
        plan = Path(folder) / "plan.json"
        planned = run([*SQA_FX, "plan", str(source), "--hq", "0.5", "--hkv", "0.5", "-o", str(plan)])
        command = [*SQA_FX, "convert-checkpoint", str(source), str(target), "--plan", str(plan), "--jobs"]
        ways = {
            "cp": (["cp", "-r", str(source), str(copy)], copy),
            "convert-checkpoint --jobs 1": ([*command, "1"], target),
            "convert-checkpoint --jobs 2": ([*command, "2"], target),
            "convert-checkpoint --jobs 2 --no-native": ([*command, "2", "--no-native"], target),
        }
        turns: dict[str, list[Turn]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (own, made) in ways.items():
                _forget(source)
                turns[name].append(run(own, made))
                print(f"{name}: {turns[name][-1]}", file=sys.stderr)
                shutil.rmtree(made)
                os.sync()
    return {
        "filesystem": kind,
        "bytes": total,
        "largest_tensor_bytes": largest,
        "plan_with_weights": {"seconds": planned.ended, "peak_bytes": planned.peak},
        "turns": {name: [vars(turn) for turn in own] for name, own in turns.items()},
    }


def make_checkpoint(folder: Path, layers: int, width: int, shard_bytes: int = 2 * 10**9) -> int:
    """Write a Llama of random bf16 weights with 32 query and 8 KV heads; returns the largest tensor's bytes."""
    make_torchvision_importable()
    import transformers

    folder.mkdir()
    inner = width * 7 // 2
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [32000, width]}
    for i in range(layers):
        own = {
            "self_attn.q_proj": [width, width],
            "self_attn.k_proj": [width // 4, width],
            "self_attn.v_proj": [width // 4, width],
            "self_attn.o_proj": [width, width],
            "mlp.gate_proj": [inner, width],
            "mlp.up_proj": [inner, width],
            "mlp.down_proj": [width, inner],
            "input_layernorm": [width],
            "post_attention_layernorm": [width],
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in own.items()}
    shapes |= {"model.norm.weight": [width], "lm_head.weight": [32000, width]}
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if sum(sizes[n] for n in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    generator = torch.Generator().manual_seed(0)
    where = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(make_header([(n, "BF16", shapes[n], sizes[n]) for n in names], {"format": "pt"}))
            for name in names:
                where[name] = file
                block = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
                out.write(memoryview(block.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
            out.flush()
            os.fsync(out.fileno())
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return max(sizes.values())


def run(command: Sequence[str], made: Path | None = None) -> Turn:
    """Run ``command``; then bring what it made to the disk."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = together = polls = 0
    while process.poll() is None:
        if polls % 50 == 0:  # this reads a file of every process
            family = _family(process.pid)
        polls += 1
        peak = _memory(process.pid, "VmHWM") or peak
        together = max(together, sum(_memory(member, "VmRSS") for member in family))
        time.sleep(0.01)
    ended = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    for path in made.rglob("*") if made is not None else ():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    return Turn(ended, time.perf_counter() - start, peak, max(peak, together))


def _family(process: int) -> list[int]:
    """A process and the processes that it started, and those that they did."""
    started: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = int(file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
            started.setdefault(parent, []).append(int(file.parent.name))
    family = [process]
    for member in family:
        family += started.get(member, [])
    return family


def _memory(process: int, field: str) -> int:
    """The resident set of a running process, in bytes: what it is (VmRSS), or the largest it was (VmHWM). (rusage would
    count what its parent had when it was forked.)"""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{field}:")), 0)


def _forget(folder: Path) -> None:
    """Take the files of ``folder`` out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    own, machine = results["checkpoint"], results["machine"]
    total, largest = own["bytes"], own["largest_tensor_bytes"]
    bound = 1.3 * largest + 300e6
    lines = [
        "# Checkpoints larger than memory",
        "",
        f"{machine['processor']}, {machine['cpus']} processors (load {results['load']:.1f} at the start), "
        f"{own['filesystem']}, torch {machine['torch']}. Made by `examples/checkpoint_bench.py`.",
        "",
        f"{total / 1e9:.2f} GB of random bf16 weights in shards of 2 GB, half of the query and KV heads kept. Medians "
        f"of {len(own['turns']['cp'])} turns; every turn starts with the input out of the page cache and ends when all "
        f"is on the disk. The largest tensor has {largest / 1e6:.0f} MB; 1.3 times that and 300 MB are "
        f"{bound / 1e6:.0f} MB. Peaks are those of the process that writes the shards, and of it together with the one "
        "that proves the config beside it (libraries that they share count for each).",
        "",
        "| command | seconds | to its end | input GB/s | of cp | peak MB | with children |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    seconds = {name: statistics.median(t["on_disk"] for t in turns) for name, turns in own["turns"].items()}
    for name, turns in own["turns"].items():
        ended = statistics.median(t["ended"] for t in turns)
        lines.append(
            f"| `{name}` | {seconds[name]:.1f} | {ended:.1f} | {total / seconds[name] / 1e9:.2f} | "
            f"{seconds['cp'] / seconds[name]:.2f} | {max(t['peak'] for t in turns) / 1e6:.0f} | "
            f"{max(t['together'] for t in turns) / 1e6:.0f} |"
        )
    with_weights = own["plan_with_weights"]
    lines += [
        "",
        f"The plan of this checkpoint, its heads chosen by the norms of their weights, took "
        f"{with_weights['seconds']:.0f} s and {with_weights['peak_bytes'] / 1e6:.0f} MB.",
    ]
    if "plans" in results:
        lines += [
            "",
            "| planned from config.json alone | sites | seconds | peak MB | plan MB |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, row in results["plans"].items():
            lines.append(
                f"| {name} | {row['sites']} | {row['seconds']:.0f} | {row['peak_bytes'] / 1e6:.0f} | "
                f"{row['plan_bytes'] / 1e6:.1f} |"
            )
    return "\n".join(lines) + "\n"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
