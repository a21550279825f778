"""What the conversion examples share: their arguments, and convert -> prove -> export -> validate -> bench."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sqa_fx
from sqa_fx.bench import bench
from sqa_fx.cli_values import head_count
from sqa_fx.errors import CaptureError, MissingError, SqaError
from sqa_fx.inputs import Inputs
from sqa_fx.open_artifact import open_artifact
from sqa_fx.request import VARIANTS
from sqa_fx.runners import EagerRunner, Runner
from sqa_fx.torchvision_ops import make_torchvision_importable
from sqa_fx.validate import ValidationReport, validate


def arguments(description: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with what every example takes: the heads to keep, the folder of the results, measured turns."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--hq", type=head_count, help="query heads to keep: a number or a fraction (0.5)")
    parser.add_argument("--hkv", type=head_count, help="KV heads to keep: a number or a fraction")
    parser.add_argument("--variant", choices=[*VARIANTS], help="both by name (default: SQA, unless --hq or --hkv)")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder for the files (default: {out})")
    parser.add_argument("--iterations", type=int, default=10, help="measured turns (default: 10)")
    parser.add_argument("--layers", type=int, help="layers of the model (default: 2 without a GPU)")
    parser.add_argument("--no-baseline", action="store_true", help="do not export the unconverted model")
    return parser


def heads(options: argparse.Namespace) -> dict[str, Any]:
    """``hq`` and ``hkv`` for sqa_fx.convert."""
    default = "SQA" if options.hkv is None else None
    return {"hq": options.hq if options.hq is not None else options.variant or default, "hkv": options.hkv}


def library(name: str, install: str) -> Any:
    """The module ``name``. Raises MissingError, with the pip line, when it is not here."""
    make_torchvision_importable()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(f"{name} is not here ({error}): {install}") from error


def device_and_dtype() -> tuple[str, torch.dtype]:
    """The GPU in half precision where there is one, else the CPU in float32."""
    if torch.cuda.is_available():
        return "cuda", torch.float16
    print("skipped CUDA: there is no GPU here; small sizes on the CPU, in float32")
    return "cpu", torch.float32


def convert(model: nn.Module, options: argparse.Namespace, **call: Any) -> sqa_fx.ConvertedModule:
    """The converted, proved model; prints the report, whose last lines say what was proved."""
    converted = sqa_fx.convert(model, **heads(options), **call)
    print(converted.report.table())
    if not isinstance(converted, sqa_fx.ConvertedModule):
        raise CaptureError("the model was converted in parts, and these examples export it whole")
    return converted


def export_and_compare(
    model: nn.Module,
    converted: sqa_fx.ConvertedModule,
    sets: Mapping[str, Inputs],
    options: argparse.Namespace,
    tokens: Sequence[int],
) -> bool:
    """Export both models (with ``--no-baseline`` the converted one) to ONNX, validate the files on the input ``sets``,
    and measure all in eager PyTorch and in ONNX Runtime; whether the files are right.

    Writes baseline.onnx, sqa.onnx and result.json into ``options.out``. Raises MissingError, after the rest, without
    the libraries for ONNX.
    """
    device = next(model.parameters()).device.type
    options.out.mkdir(parents=True, exist_ok=True)
    runners: list[Runner] = [EagerRunner(model, "baseline"), EagerRunner(converted, "SQA")]
    result: dict[str, Any] = {"report": converted.report.to_json(), "validation": {}, "latency": {}, "skipped": []}
    reports: list[ValidationReport] = []
    missing: MissingError | None = None
    for name, module in (*([] if options.no_baseline else [("baseline", model)]), ("SQA", converted)):
        path = options.out / f"{name.lower()}.onnx"
        call: dict[str, Any] = {"args": converted.example_args, "kwargs": converted.example_kwargs}
        try:
            artifact = sqa_fx.export(module, path, **call, dynamic_shapes=converted.dynamic_shapes, overwrite=True)
            print(f"\nwrote {path}: {', '.join(artifact.sidecar.attention)}")
            runner, measured = onnx_runner(path, name, device, result["skipped"])
        except MissingError as error:
            missing = error
            break
        reports.append(validate(module, [runner], list(sets.values()), labels=list(sets)))
        print(reports[-1].table())
        result["validation"][name] = json.loads(reports[-1].to_json())
        if measured:
            runners.append(runner)
    for kind in ("eager", "onnx"):
        if not (timed := [r for r in runners if r.kind == kind]):
            continue
        latency = bench(
            timed,
            list(sets.values()),
            iterations=options.iterations,
            tokens=tokens,
            labels=list(sets),
            progress=sys.stderr.isatty(),
        )
        print(f"\nLatency on {device}, {kind}\n{latency.table()}")
        result["latency"][kind] = json.loads(latency.to_json())
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out / 'result.json'} written")
    if missing is not None:
        raise missing
    return all(report.passed for report in reports)


def onnx_runner(path: Path, name: str, device: str, skipped: list[str]) -> tuple[Runner, bool]:
    """The file in ONNX Runtime on ``device``, and True; on the CPU, and False, where ONNX Runtime has no CUDA."""
    try:
        return open_artifact(path, name, device=device), True
    except MissingError as missing:
        if device == "cpu":
            raise
        skipped.append(f"{name} in ONNX Runtime on CUDA, validated on the CPU and not measured: {missing}")
        print(f"skipped {skipped[-1]}")
        return open_artifact(path, name), False


def ending(run: Callable[[argparse.Namespace], bool], parser: argparse.ArgumentParser) -> int:
    """Run an example; its exit code: 0 all agreed, 1 something differs, 2 bad input, 3 something is missing."""
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # from torch about itself
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if getattr(options, "pretrained", False) else "1")
    try:
        if options.variant and (options.hq is not None or options.hkv is not None):
            parser.error("--variant says both head counts: leave out --hq and --hkv")
        return 0 if run(options) else 1
    except SqaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
