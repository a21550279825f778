"""The subcommands on one model: inspect, convert, export."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

import sqa_fx
from sqa_fx.cli_data import PATH_HELP, add_rows, rows_of
from sqa_fx.cli_values import SCORES, axis_ranges, head_choice, one_input_set, request, to_json
from sqa_fx.errors import InputError, SqaError
from sqa_fx.export import FORMATS, PRECISIONS, format_of, in_precision
from sqa_fx.inputs import Inputs
from sqa_fx.models import LoadedModel, load_model
from sqa_fx.passes.budget import PREFIX
from sqa_fx.progress import steps
from sqa_fx.region_drawing import check_target
from sqa_fx.request import MERGED_BY_DATA, WITHOUT_DATA, KvMerge
from sqa_fx.text_data import TokenBatches


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which model and with which inputs."""
    parser.add_argument("model", metavar="MODEL", help="see `sqa-fx --help` for the forms")
    parser.add_argument("--pretrained", action="store_true", help="trained weights for a timm: model (downloads them)")
    parser.add_argument(
        "--input", action="append", default=[], metavar="SPEC", help="name:dtype[shape], once per input of the model"
    )


def add_request(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how many heads are to remain."""
    for option, what in (("--hq", "query"), ("--hkv", "KV")):
        parser.add_argument(
            option,
            action="append",
            metavar="N",
            help=f"{what} heads to keep: a number, a fraction (0.5), a variant name, "
            + ("auto:0.5 (with --calibration: that share of the FLOPs), " if option == "--hq" else "")
            + "or pattern=value, repeated",
        )
    parser.add_argument(
        "--allow-inexact",
        action="store_true",
        help="convert sites with a norm or a mean over all heads too: it then runs over the kept ones (marked)",
    )


def add_conversion(parser: argparse.ArgumentParser) -> None:
    """The arguments of a conversion beside its head counts."""
    parser.add_argument("--plan", type=Path, metavar="FILE", help="apply this saved plan instead of --hq and --hkv")
    parser.add_argument(
        "--heads",
        metavar="CHOICE",
        help="first, weights (default), or a JSON file of lists by site; with --calibration also reconstruct (default "
        "then), importance, activation, wifv, taylor, fisher",
    )
    parser.add_argument(
        "--kv-merge",
        choices=get_args(KvMerge),
        help="how KV heads become one: mean (default) or select; with --calibration also aligned, joint (default then)",
    )
    parser.add_argument("--static", action="store_true", help="keep the sizes of the example inputs")
    parser.add_argument("--no-verify", action="store_true", help="skip the proof against the masked original")
    parser.add_argument(
        "--calibration", type=Path, metavar="PATH", help=f"choose, merge and repair by this data: {PATH_HELP}"
    )
    add_rows(parser)
    parser.add_argument(
        "--calibration-batches", type=int, default=32, metavar="N", help="read no more batches than these (default: 32)"
    )
    repairs = parser.add_mutually_exclusive_group()
    repairs.add_argument("--no-repair", action="store_true", help="do not fit projections again after --calibration")
    repairs.add_argument("--keep-values", action="store_true", help="fit output projections only, not values with them")


def add_export(parser: argparse.ArgumentParser) -> None:
    """The arguments of an export: the format, and what the formats take."""
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write (huggingface: a directory)"
    )
    parser.add_argument("--to", choices=FORMATS, help="the format (default: by suffix: .onnx, .pt2 is aoti, .ep)")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="cast the model first (default: as it is)")
    parser.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="INPUT.AXIS=MIN,OPT,MAX",
        help="sizes of a dynamic axis; TensorRT needs one for each",
    )
    parser.add_argument("--opset", type=int, default=24, help="ONNX operator set (default: 24)")
    parser.add_argument(
        "--attention",
        choices=("causal", "masked", "plain"),
        help="how attention is written for ONNX and TensorRT (default: the first that the check finds right)",
    )
    parser.add_argument(
        "--baseline", action="store_true", help="export the unconverted model too: FILE.baseline.SUFFIX"
    )
    parser.add_argument("--no-check", action="store_true", help="do not run the file against the model")
    parser.add_argument("--compute-capability", metavar="sm_XX", help="the GPU to build for (tensorrt-rtx)")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="TensorRT's, read and written")
    parser.add_argument("--strict", action="store_true", help="fail when torch_tensorrt leaves operators to PyTorch")
    parser.add_argument(
        "--original", metavar="MODEL", help="what a saved conversion was made from, for its config (huggingface)"
    )
    parser.add_argument("--no-native", action="store_true", help="do not search a config that says SQA (huggingface)")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="as in save_pretrained, such as 5GB (huggingface)")


def export_options(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``sqa_fx.export``. Raises InputError for a malformed range, and for options that the
    format does not have."""
    given: dict[str, Any] = {
        "to": options.to,
        "ranges": axis_ranges(options.range),
        "opset": options.opset,
        "attention": options.attention,
        "check": not options.no_check,
    }
    if options.static:
        given["dynamic_shapes"] = None
    for name, formats in (
        ("compute_capability", ("tensorrt-rtx",)),
        ("timing_cache", ("tensorrt", "tensorrt-rtx")),
        ("strict", ("torch-tensorrt",)),
        ("original", ("huggingface",)),
        ("no_native", ("huggingface",)),
        ("max_shard_size", ("huggingface",)),
    ):
        value = getattr(options, name)
        if value:
            if format_of(options.output, options.to) not in formats:
                raise InputError(f"--{name.replace('_', '-')} belongs to --to {' or '.join(formats)}")
            given[name] = value
    if given.pop("no_native", False):
        given["native"] = False
    if "original" in given:
        given["original"] = load_model(given["original"]).module
    return given


def run_inspect(options: argparse.Namespace) -> int:
    """``sqa-fx inspect``: the attention sites of a model, and what a conversion would save."""
    if options.graph is not None:
        check_target(options.graph, options.overwrite)
    loaded = load_model(options.model, pretrained=options.pretrained)
    args, kwargs = one_input_set(loaded, options.input)
    hq, hkv = request(options.hq, "--hq"), request(options.hkv, "--hkv")
    with _without_partial_graphs(options.debug):
        report = sqa_fx.inspect(
            loaded.module,
            hq=hq,
            hkv=hkv,
            args=args,
            kwargs=kwargs,
            allow_inexact=options.allow_inexact,
            graph=options.graph,
            overwrite=options.overwrite,
        )
    print(to_json(report.to_json()) if options.json else report.table())
    return 0


def run_convert(options: argparse.Namespace) -> int:
    """``sqa-fx convert``: convert, prove and save a model."""
    _refuse_existing(options.output, options.overwrite)
    if options.save_plan is not None:
        _refuse_existing(options.save_plan, options.overwrite)
        if options.calibration is not None:
            _refuse_existing(options.save_plan.with_suffix(".safetensors"), options.overwrite)
    with steps("load", "convert", "save") as step:
        step()
        loaded = load_model(options.model, pretrained=options.pretrained)
        step()
        converted = _convert(loaded, *_inputs(loaded, options), options)
        step()
        converted.save(options.output, overwrite=options.overwrite)
        if options.save_plan is not None:
            converted.plan.save(options.save_plan, overwrite=options.overwrite)
    if options.json:
        print(to_json({"output": str(options.output), "report": converted.report.to_json()}))
    else:
        print(converted.report.table())
        print(f"saved to {options.output}")
    return 0


def run_export(options: argparse.Namespace) -> int:
    """``sqa-fx export``: write a model for an engine, converted first where heads are asked for."""
    outputs = [options.output, *([_baseline_path(options.output)] if options.baseline else [])]
    for path in outputs:
        _refuse_existing(path, options.overwrite)
    with steps("load", "convert", "export") as step:
        step()
        loaded = load_model(options.model, pretrained=options.pretrained)
        step()
        args, kwargs = _inputs(loaded, options)
        precision = options.precision
        original = loaded.module
        if precision is None or isinstance(original, sqa_fx.ConvertedModule):
            pass  # a conversion keeps the casts of the dtype that it was captured in, so that export refuses
        elif isinstance(original, nn.Module):
            module, (args, kwargs) = in_precision(original, (args, kwargs), precision)
            loaded = dataclasses.replace(loaded, module=module, args=args, kwargs=kwargs)
            precision = None
        wanted = options.hq or options.hkv or options.plan
        if not wanted and (options.heads or options.kv_merge or options.no_verify or options.calibration):
            raise InputError(
                "--heads, --kv-merge, --calibration and --no-verify belong to a conversion: give --hq, --hkv or --plan "
                "too"
            )
        if options.baseline and not wanted:
            raise InputError(
                "--baseline exports the unconverted model beside the converted one: give --hq, --hkv or --plan"
            )
        model = _convert(loaded, args, kwargs, options) if wanted else loaded.module
        step()
        artifacts = []
        with _without_partial_graphs(options.debug):
            for exported, path in zip((model, loaded.module), outputs, strict=False):
                artifacts.append(
                    sqa_fx.export(
                        exported,
                        path,
                        args=args,
                        kwargs=kwargs,
                        precision=precision,
                        overwrite=options.overwrite,
                        **export_options(options),
                    )
                )
    if options.json:
        print(to_json({"artifacts": [{"path": str(a.path), **dataclasses.asdict(a.sidecar)} for a in artifacts]}))
        return 0
    for artifact in artifacts:
        print(_described(artifact))
    return 0


def _baseline_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.baseline{path.suffix}")


def _described(artifact: sqa_fx.Artifact) -> str:
    """What the sidecar says, in lines."""
    about = artifact.sidecar
    built = ", ".join(
        text
        for text in (
            about.format,
            f"opset {about.opset}" if about.opset else "",
            about.precision or "",
            f"for {about.built_for}" if about.built_for else "",
            f"{artifact.bytes / 2**20:.1f} MiB",
        )
        if text
    )
    checked = about.validation or {}
    if checked.get("checked"):
        at = ", ".join(checked["labels"])
        said = f"check: error {checked['error']:.3g}, allowed {checked['tolerance']:.3g}, at {at}"
    else:
        said = f"check: not made: {checked.get('reason')}"
    lines = [f"wrote {artifact.path}: {built}"]
    for what, specs in (("input", about.inputs), ("output", about.outputs)):
        lines += [f"{what} {s.name}: {s.dtype} [{', '.join(str(n) for n in s.shape)}]" for s in specs]
    lines += [*(f"attention: {text}" for text in about.attention), said, *(f"note: {note}" for note in about.notes)]
    return "\n".join(lines)


def _convert(loaded: LoadedModel, args: Any, kwargs: Any, options: argparse.Namespace) -> Any:
    if options.plan is not None and (
        options.hq or options.hkv or options.heads or options.kv_merge or options.calibration
    ):
        raise InputError(
            "--plan holds every choice already: leave out --hq, --hkv, --heads, --kv-merge and --calibration"
        )
    if options.plan is None and not (options.hq or options.hkv):
        raise InputError("say how many heads are to remain: --hq, --hkv, or a saved plan with --plan")
    chosen: dict[str, Any] = {"plan": sqa_fx.Plan.load(options.plan)} if options.plan is not None else {}
    chosen["allow_inexact"] = options.allow_inexact
    if options.heads:
        chosen["heads"] = head_choice(options.heads)
    if options.kv_merge:
        chosen["kv_merge"] = options.kv_merge
    if options.calibration is not None:
        chosen["calibration"] = _rows(loaded, kwargs, options)
        chosen["repair"] = "outputs" if options.keep_values else not options.no_repair
    else:
        _check_without_data(options)
    if options.static:
        chosen["dynamic_shapes"] = None
    chosen |= {"hq": request(options.hq, "--hq"), "hkv": request(options.hkv, "--hkv")}
    with _without_partial_graphs(options.debug):
        return sqa_fx.convert(loaded.module, args=args, kwargs=kwargs, verify=not options.no_verify, **chosen)


def _inputs(loaded: LoadedModel, options: argparse.Namespace) -> Inputs:
    """The example inputs; for a model that does not say what they are, a first batch of the calibration data."""
    try:
        args, kwargs = one_input_set(loaded, options.input)
    except InputError:
        if options.calibration is None or options.input:
            raise
        args, kwargs = (), dict(next(iter(_rows(loaded, {}, options))))
    ids, model = kwargs.get("input_ids"), loaded.module
    named = isinstance(model, nn.Module) and "attention_mask" in inspect.signature(model.forward).parameters
    if options.calibration is not None and options.pad and named and isinstance(ids, Tensor):
        # Padded rows have a mask, which the graph takes only if it was captured with one.
        kwargs = {"attention_mask": torch.ones_like(ids), **kwargs}
    return args, kwargs


def _rows(loaded: LoadedModel, kwargs: dict[str, Any], options: argparse.Namespace) -> TokenBatches:
    if options.calibration_batches < 1:
        raise InputError(f"--calibration-batches {options.calibration_batches}: give at least 1")
    return rows_of(
        options.calibration,
        options,
        loaded.module if isinstance(loaded.module, nn.Module) else None,
        options.calibration_batches * options.batch,
        "attention_mask" in kwargs,
    )


def _check_without_data(options: argparse.Namespace) -> None:
    needs = [
        *([f"--heads {options.heads}"] if options.heads in SCORES and options.heads not in WITHOUT_DATA else []),
        *([f"--kv-merge {options.kv_merge}"] if options.kv_merge in MERGED_BY_DATA else []),
        *([f"--hq {text}" for text in options.hq or () if text.startswith(PREFIX)]),
        *(["--no-repair"] if options.no_repair else []),
        *(["--keep-values"] if options.keep_values else []),
    ]
    if needs:
        raise InputError(f"{needs[0]} needs data to tell: give --calibration PATH")


@contextlib.contextmanager
def _without_partial_graphs(debug: bool) -> Iterator[None]:
    """Drop stderr when a call fails: torch.export then prints the graph so far, which buries the message."""
    held = io.StringIO()
    try:
        with contextlib.redirect_stderr(held):
            yield
    except SqaError:
        if debug:
            sys.stderr.write(held.getvalue())
        raise
    except BaseException:
        sys.stderr.write(held.getvalue())
        raise
    sys.stderr.write(held.getvalue())


def _refuse_existing(path: Path, overwrite: bool) -> None:
    """Say so before the work, not after it."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: choose another path, or pass --overwrite")
    if not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.absolute().parent} does not exist")
