"""The subcommands on several artifacts: validate, bench."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sqa_fx.bench import bench
from sqa_fx.cli_bench import check_files, ideal_shares, with_cuda_graphs, write_files
from sqa_fx.cli_values import as_module, input_sets, to_json
from sqa_fx.divergence import Divergence, first_divergent_site, onnx_engine
from sqa_fx.errors import InputError, MissingError, SqaError
from sqa_fx.exporters.sidecar import Sidecar, sidecar_path
from sqa_fx.inputs import Inputs, bind_inputs, vocabulary_size
from sqa_fx.models import LoadedModel, load_model
from sqa_fx.module import ConvertedModule
from sqa_fx.open_artifact import SUFFIXES, is_artifact, open_artifact
from sqa_fx.runners import CompiledRunner, EagerRunner, Runner, module_dtype
from sqa_fx.shape_sets import SHAPES, input_sets_at_shapes, is_floating, laid_out, shared_specs
from sqa_fx.validate import ValidationReport, validate

_KINDS = ("eager", "compiled", "onnx")


@dataclass(frozen=True)
class Artifact:
    """One side of a comparison: a loaded model to run eagerly or compiled, or an exported file."""

    name: str
    kind: str
    loaded: LoadedModel | None

    @property
    def module(self) -> nn.Module | None:
        """The module to call, where it is not an exported file."""
        return as_module(self.loaded.module) if self.loaded else None


def add_artifacts(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is compared, and on which inputs."""
    parser.add_argument(
        "artifacts",
        nargs="+",
        metavar="ARTIFACT",
        help="a MODEL (eager:MODEL, compiled:MODEL) or an exported file: .onnx, .engine, .ep, .pt2 with its sidecar",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where models and .onnx files run (default: cpu)"
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SPEC",
        help="name:dtype[shape], once per input; a name that comes again starts another set of inputs",
    )


def add_validation(parser: argparse.ArgumentParser) -> None:
    """The arguments that only ``validate`` has, besides the tolerance."""
    parser.add_argument(
        "--shapes",
        metavar="LIST",
        help="of min,opt,max,odd: sizes within the range that the sidecar of an artifact tells (default: all, without "
        "--input)",
    )
    parser.add_argument(
        "--locate",
        action="store_true",
        help="name the first attention that a failed .onnx computes differently, by exporting the reference again",
    )


def read_artifact(text: str) -> Artifact:
    """The artifact that ``[eager:|compiled:|onnx:]NAME`` names; kind "exported" is what a sidecar describes.

    Raises InputError for a kind that does not fit, and what `load_model` raises.
    """
    kind, colon, name = text.partition(":")
    if not colon or kind not in _KINDS:
        kind, name = ("onnx" if text.endswith(".onnx") else "eager"), text
        if kind == "eager" and is_artifact(name):
            return Artifact(text, "exported", None)
    if kind == "onnx":
        if not name.endswith(".onnx"):
            raise InputError(
                f"{text}: only an .onnx file runs in onnxruntime; write one with `sqa-fx export {name} -o ...`"
            )
        return Artifact(text, kind, None)
    if name.endswith(".onnx"):
        raise InputError(f"{text}: an .onnx file runs in onnxruntime only; leave out {kind!r}")
    if Path(name).is_file() and Path(name).suffix in SUFFIXES and Path(name).suffix != ".pt2":
        raise InputError(f"{text}: an engine needs its sidecar, {sidecar_path(name).name}, beside it")
    return Artifact(text, kind, load_model(name))


def run_validate(options: argparse.Namespace) -> int:
    """``sqa-fx validate``: the first artifact is the reference for all others; 1 when one of them disagrees."""
    _require_device(options.device)
    if len(options.artifacts) < 2:
        raise InputError("validate takes two artifacts or more: the reference, and what is compared with it")
    artifacts = [read_artifact(text) for text in options.artifacts]
    reference = artifacts[0].module
    if reference is None:
        raise InputError(f"{artifacts[0].name}: the reference runs in float64, so it must be a model; put it first")
    loaded = artifacts[0].loaded
    original = loaded.module if loaded is not None else None
    if options.locate and not isinstance(original, ConvertedModule | ExportedProgram):
        raise InputError(f"--locate: {artifacts[0].name} is no conversion and no .pt2: run `sqa-fx convert` first")
    made, labels = _shaped_inputs(artifacts, options)
    sets = [_moved(inputs, options.device) for inputs in made]
    runners = _runners(artifacts[1:], options.device)
    reference = reference.to(options.device)
    report = validate(reference, runners, sets, atol=options.atol, labels=labels)
    if not options.json:
        print(report.table())
    found: dict[str, Divergence | str] = {}
    if options.locate and isinstance(original, ConvertedModule | ExportedProgram):
        found = _located(original, report, {r.name for r in runners if r.kind == "onnx"}, sets, options.atol)
    if options.json:
        places = {name: at if isinstance(at, str) else at.to_json() for name, at in found.items()}
        print(to_json({**json.loads(report.to_json()), **({"divergence": places} if options.locate else {})}))
    else:
        print("".join(f"{name}: {at}\n" for name, at in found.items()), end="")
    return 0 if report.passed else 1


def run_bench(options: argparse.Namespace) -> int:
    """``sqa-fx bench``: latency of all artifacts on the same inputs, in turns."""
    _require_device(options.device)
    artifacts = [read_artifact(text) for text in options.artifacts]
    check_files(options)
    sets = [_moved(inputs, options.device) for inputs in _inputs(artifacts, options)]
    runners = _runners(artifacts, options.device)
    report = bench(
        with_cuda_graphs(runners, options.cuda_graphs),
        sets,
        warmup=options.warmup,
        max_warmup=options.max_warmup,
        iterations=options.iterations,
        burst=options.burst,
        labels=_labels(sets),
        progress=sys.stderr.isatty(),
    )
    if options.ideal:
        models = [artifact.loaded.module if artifact.loaded is not None else None for artifact in artifacts]
        others = {runner.name: model for runner, model in zip(runners[1:], models[1:], strict=True)}
        report = ideal_shares(report, models[0], others, sets, options.iterations)
    write_files(report, options)
    print(to_json(report.to_json()) if options.json else report.table())
    return 0


def _require_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingError("--device cuda: torch sees no GPU here; `sqa-fx doctor` says what is usable")


def _runners(artifacts: Sequence[Artifact], device: str) -> list[Runner]:
    runners: list[Runner] = []
    names: set[str] = set()
    for artifact in artifacts:
        name, again = artifact.name, 2
        while name in names:
            name, again = f"{artifact.name} ({again})", again + 1
        names.add(name)
        module = artifact.module
        if module is None:
            runners.append(open_artifact(artifact.name.removeprefix("onnx:"), name, device=device))
        else:
            module = module.to(device)
            runners.append(EagerRunner(module, name) if artifact.kind == "eager" else CompiledRunner(module, name))
    return runners


def _inputs(artifacts: Sequence[Artifact], options: argparse.Namespace) -> list[Inputs]:
    loaded = next((artifact.loaded for artifact in artifacts if artifact.loaded), None)
    return input_sets(loaded, options.input)


def _moved(inputs: Inputs, device: str) -> Inputs:
    args, kwargs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, inputs)
    return args, kwargs


def _located(
    model: ConvertedModule | ExportedProgram,
    report: ValidationReport,
    candidates: Collection[str],
    sets: Sequence[Inputs],
    atol: float | None,
) -> dict[str, Divergence | str]:
    """For each of ``candidates`` that failed: the first site that differs when ``model`` is exported again, on the
    first input set that failed; else why there is none."""
    found: dict[str, Divergence | str] = {}
    for c in report.comparisons:
        if c.passed or c.candidate not in candidates or c.candidate in found:
            continue
        try:
            at = first_divergent_site(model, onnx_engine, sets[c.input_set], atol=atol)
        except SqaError as error:  # the comparison stands, wherever it fails
            found[c.candidate] = f"not located: {error}"
        else:
            found[c.candidate] = at or "agrees when the reference is exported now: the file is of another model"
    return found


def _shaped_inputs(artifacts: Sequence[Artifact], options: argparse.Namespace) -> tuple[list[Inputs], list[str] | None]:
    """The inputs at the shapes that the sidecars beside the artifacts tell of, with labels; without a sidecar, or with
    ``--input``, those of `_inputs`, without. Raises InputError for ``--shapes`` where it has no meaning."""
    files = [Path(a.name.removeprefix(f"{a.kind}:")) for a in artifacts if a.loaded is None]
    sidecars = [Sidecar.read(file, check=False) for file in files if sidecar_path(file).is_file()]
    if options.shapes and options.input:
        raise InputError("--shapes and --input both say what the inputs are: give one of them")
    if options.shapes and not sidecars:
        raise InputError("--shapes: no artifact has a sidecar (FILE.json) that tells its shapes: give --input")
    loaded = artifacts[0].loaded
    if options.input or not sidecars or loaded is None:
        return _inputs(artifacts, options), None
    model = loaded.module
    shapes = [part.strip() for part in options.shapes.split(",")] if options.shapes else list(SHAPES)
    specs = shared_specs(sidecars[0].inputs, [sidecar.inputs for sidecar in sidecars[1:]])
    own = module_dtype(as_module(model))  # validate casts from the reference's dtype to that of each candidate
    specs = tuple(replace(spec, dtype=str(own)) if is_floating(spec) else spec for spec in specs)
    known = vocabulary_size(model) if isinstance(model, nn.Module) else None
    made = input_sets_at_shapes(specs, vocabulary=known, shapes=shapes, odd="odd" in shapes)
    if loaded.args is not None or loaded.kwargs is not None:
        sets = [laid_out(tensors, loaded.args or (), loaded.kwargs or {}) for _, tensors in made]
    else:
        sets = [bind_inputs(model, tensors) for _, tensors in made]
    return sets, [f"{which} {label}" for (which, _), label in zip(made, _labels(sets), strict=True)]


def _labels(sets: Sequence[Inputs]) -> list[str]:
    """Each input set by the shape of its first tensor, as 2x128; counted where these repeat."""
    labels = []
    for args_kwargs in sets:
        first = next((x for x in pytree.tree_leaves(args_kwargs) if isinstance(x, torch.Tensor)), None)
        labels.append("x".join(map(str, first.shape)) if first is not None and first.dim() else "scalar")
    if len(set(labels)) < len(labels):
        labels = [f"{number}: {label}" for number, label in enumerate(labels)]
    return labels
