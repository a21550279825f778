"""The subcommands on several artifacts: validate, bench."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sqa_fx.bench import bench
from sqa_fx.cli_bench import check_files, with_cuda_graphs, write_files
from sqa_fx.cli_values import as_module, input_sets, to_json
from sqa_fx.errors import InputError
from sqa_fx.inputs import Inputs
from sqa_fx.models import LoadedModel, load_model
from sqa_fx.runners import CompiledRunner, EagerRunner, OnnxRunner, Runner
from sqa_fx.validate import validate

_KINDS = ("eager", "compiled", "onnx")


@dataclass(frozen=True)
class Artifact:
    """One side of a comparison: a loaded model to run eagerly or compiled, or an ONNX file."""

    name: str
    kind: str
    loaded: LoadedModel | None

    @property
    def module(self) -> nn.Module | None:
        """The module to call, where it is not an ONNX file."""
        return as_module(self.loaded.module) if self.loaded else None


def add_artifacts(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is compared, and on which inputs."""
    parser.add_argument(
        "artifacts", nargs="+", metavar="ARTIFACT", help="a MODEL or FILE.onnx; eager:, compiled:, onnx:"
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SPEC",
        help="name:dtype[shape], once per input; a name that comes again starts another set of inputs",
    )


def read_artifact(text: str) -> Artifact:
    """The artifact that ``[eager:|compiled:|onnx:]NAME`` names.

    Raises InputError for a kind that does not fit, and what `load_model` raises.
    """
    kind, colon, name = text.partition(":")
    if not colon or kind not in _KINDS:
        kind, name = ("onnx" if text.endswith(".onnx") else "eager"), text
    if kind == "onnx":
        if not name.endswith(".onnx"):
            raise InputError(
                f"{text}: only an .onnx file runs in onnxruntime; write one with `sqa-fx export {name} -o ...`"
            )
        return Artifact(text, kind, None)
    if name.endswith(".onnx"):
        raise InputError(f"{text}: an .onnx file runs in onnxruntime only; leave out {kind!r}")
    return Artifact(text, kind, load_model(name))


def run_validate(options: argparse.Namespace) -> int:
    """``sqa-fx validate``: the first artifact is the reference for all others; 1 when one of them disagrees."""
    if len(options.artifacts) < 2:
        raise InputError("validate takes two artifacts or more: the reference, and what is compared with it")
    artifacts = [read_artifact(text) for text in options.artifacts]
    reference = artifacts[0].module
    if reference is None:
        raise InputError(f"{artifacts[0].name}: the reference runs in float64, so it must be a model; put it first")
    report = validate(reference, _runners(artifacts[1:]), _inputs(artifacts, options), atol=options.atol)
    print(to_json(report.to_json()) if options.json else report.table())
    return 0 if report.passed else 1


def run_bench(options: argparse.Namespace) -> int:
    """``sqa-fx bench``: latency of all artifacts on the same inputs, in turns."""
    artifacts = [read_artifact(text) for text in options.artifacts]
    check_files(options)
    sets = _inputs(artifacts, options)
    report = bench(
        with_cuda_graphs(_runners(artifacts), options.cuda_graphs),
        sets,
        warmup=options.warmup,
        max_warmup=options.max_warmup,
        iterations=options.iterations,
        burst=options.burst,
        labels=_labels(sets),
        progress=sys.stderr.isatty(),
    )
    write_files(report, options)
    print(to_json(report.to_json()) if options.json else report.table())
    return 0


def _runners(artifacts: Sequence[Artifact]) -> list[Runner]:
    runners: list[Runner] = []
    names: set[str] = set()
    for artifact in artifacts:
        name, again = artifact.name, 2
        while name in names:
            name, again = f"{artifact.name} ({again})", again + 1
        names.add(name)
        module = artifact.module
        if module is None:
            runners.append(OnnxRunner(Path(artifact.name.removeprefix("onnx:")), name))
        else:
            runners.append(EagerRunner(module, name) if artifact.kind == "eager" else CompiledRunner(module, name))
    return runners


def _inputs(artifacts: Sequence[Artifact], options: argparse.Namespace) -> list[Inputs]:
    loaded = next((artifact.loaded for artifact in artifacts if artifact.loaded), None)
    return input_sets(loaded, options.input)


def _labels(sets: Sequence[Inputs]) -> list[str]:
    """Each input set by the shape of its first tensor, as 2x128; counted where these repeat."""
    labels = []
    for args_kwargs in sets:
        first = next((x for x in pytree.tree_leaves(args_kwargs) if isinstance(x, torch.Tensor)), None)
        labels.append("x".join(map(str, first.shape)) if first is not None and first.dim() else "scalar")
    if len(set(labels)) < len(labels):
        labels = [f"{number}: {label}" for number, label in enumerate(labels)]
    return labels
