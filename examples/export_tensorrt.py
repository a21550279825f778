"""TensorRT engines of an encoder and of its SQA form: built, and where there is a GPU, validated and measured.

    python examples/export_tensorrt.py [--to tensorrt-rtx] [--model bert-base] [--lengths 128 512 2048]
        [--compute-capability sm_89] [--variant SQA | --hq 6 --hkv 3] [--layers 2]

Without a GPU, tensorrt-rtx builds for a named compute capability, and what needs the GPU is skipped. In float16, with
random weights; one batch size, since the sequence is what varies.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bench_models import SHAPES, build
from example_steps import arguments, convert, ending
from torch import nn

import sqa_fx
from sqa_fx.bench import bench
from sqa_fx.exporters.tensorrt_library import gpu_capability, library
from sqa_fx.open_artifact import open_artifact
from sqa_fx.validate import validate

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def engine(module: nn.Module, path: Path, example: torch.Tensor, options: argparse.Namespace) -> str | None:
    """Build the engine of ``module`` and say what is known of it; the GPU that it is built for."""
    shape = SHAPES[options.model]
    shortest, opt, longest = (sorted(options.lengths)[i] for i in (0, len(options.lengths) // 2, -1))
    artifact = sqa_fx.export(
        module,
        path,
        to=options.to,
        args=(example,),
        dynamic_shapes=length_is_free(longest),
        ranges={f"{'input_ids' if shape.tokens else 'x'}.1": (shortest, opt, longest)},
        overwrite=True,
        # None: the GPU that is here.
        **({"compute_capability": options.compute_capability} if options.compute_capability else {}),
    )
    about = artifact.sidecar
    check = about.validation or {}
    print(f"wrote {path}: {about.format} for {about.built_for}, {artifact.bytes / 2**20:.1f} MiB")
    for text in (*about.attention, *about.notes):
        print(f"  {text}")
    if check.get("checked"):
        print(f"  check: error {check['error']:.3g}, allowed {check['tolerance']:.3g}, at {', '.join(check['labels'])}")
    else:
        print(f"  {check.get('reason')}")
    return about.built_for


def length_is_free(longest: int) -> Any:
    """Dynamic shapes of a model with one input [batch, length, ...]."""
    return ({1: torch.export.Dim("length", min=2, max=longest)},)


def run(options: argparse.Namespace) -> bool:
    """The whole example; whether the engines that could be run are right."""
    library(options.to)  # missing: say so before any work
    here = gpu_capability()
    if here is None and options.to == "tensorrt-rtx" and options.compute_capability is None:
        options.compute_capability = "sm_89"
        print("there is no GPU here: building for sm_89 (--compute-capability names another)")
    device, dtype, shape = "cuda" if here else "cpu", DTYPES[options.dtype], SHAPES[options.model]
    longest = max(options.lengths)
    base = build(options.model, options.layers or (None if here else 2), longest, dtype, device)
    example = shape.inputs(1, min(64, longest), dtype, device)
    converted = convert(base, options, args=(example,), dynamic_shapes=length_is_free(longest))
    modules = {"baseline": base, "SQA": converted}

    options.out.mkdir(parents=True, exist_ok=True)
    paths = {name: options.out / f"{name.lower()}.engine" for name in modules}
    built_for = {engine(module, paths[name], example, options) for name, module in modules.items()}
    if built_for != {here}:
        reason = "there is no GPU here" if here is None else f"this GPU is {here}"
        print(f"skipped validation and latency: the engines are for {', '.join(map(str, built_for))}, and {reason}")
        return True

    runners = {name: open_artifact(path, name) for name, path in paths.items()}
    labels = [str(length) for length in options.lengths]
    sets: list[Any] = [((shape.inputs(1, length, dtype, device),), {}) for length in options.lengths]
    reports = {name: validate(modules[name], [runners[name]], sets, labels=labels) for name in modules}
    for report in reports.values():
        print(report.table())
    latency = bench(
        list(runners.values()),
        sets,
        iterations=options.iterations,
        tokens=options.lengths,
        progress=sys.stderr.isatty(),
    )
    print(latency.table())
    result = {
        "validation": {name: json.loads(report.to_json()) for name, report in reports.items()},
        "latency": json.loads(latency.to_json()),
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return all(report.passed for report in reports.values())


def main() -> int:
    """Read the command line and run."""
    parser = arguments(__doc__, "tensorrt-out")
    parser.add_argument("--to", default="tensorrt-rtx", choices=["tensorrt-rtx", "tensorrt"])
    parser.add_argument("--model", default="bert-base", choices=[*SHAPES], help="the shapes of this model")
    parser.add_argument("--dtype", default="fp16", choices=[*DTYPES])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="least, best and most tokens")
    parser.add_argument("--compute-capability", metavar="sm_XX", help="the GPU to build for (default: the one here)")
    return ending(run, parser)


if __name__ == "__main__":
    sys.exit(main())
