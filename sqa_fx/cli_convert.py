"""The subcommands on one model: inspect, convert, export."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqa_fx
from sqa_fx.cli_values import head_choice, one_input_set, request, to_json
from sqa_fx.errors import InputError, SqaError
from sqa_fx.models import load_model
from sqa_fx.progress import steps
from sqa_fx.region_drawing import check_target


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
            help=f"{what} heads to keep: a number, a fraction (0.5), a variant name, or pattern=value, repeated",
        )
    parser.add_argument(
        "--allow-inexact",
        action="store_true",
        help="convert sites with a norm or a mean over all heads too: it then runs over the kept ones (marked)",
    )


def add_conversion(parser: argparse.ArgumentParser) -> None:
    """The arguments of a conversion beside its head counts."""
    parser.add_argument("--plan", type=Path, metavar="FILE", help="apply this saved plan instead of --hq and --hkv")
    parser.add_argument("--heads", metavar="CHOICE", help="first, weights (default), or a JSON file of lists by site")
    parser.add_argument("--kv-merge", choices=("mean", "select"), help="how KV heads become one (default: mean)")
    parser.add_argument("--static", action="store_true", help="keep the sizes of the example inputs")
    parser.add_argument("--no-verify", action="store_true", help="skip the proof against the masked original")


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
    with steps("load", "convert", "save") as step:
        step()
        loaded = load_model(options.model, pretrained=options.pretrained)
        step()
        converted = _convert(loaded, options)
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
    """``sqa-fx export``: write a model as ONNX, converted first where heads are asked for."""
    _refuse_existing(options.output, options.overwrite)
    with steps("load", "convert", "export") as step:
        step()
        loaded = load_model(options.model, pretrained=options.pretrained)
        step()
        args, kwargs = one_input_set(loaded, options.input)
        wanted = options.hq or options.hkv or options.plan
        if not wanted and (options.heads or options.kv_merge or options.no_verify):
            raise InputError(
                "--heads, --kv-merge and --no-verify belong to a conversion: give --hq, --hkv or --plan too"
            )
        model = _convert(loaded, options) if wanted else loaded.module
        shapes: dict[str, Any] = {"dynamic_shapes": None} if options.static else {}
        step()
        with _without_partial_graphs(options.debug):
            artifact = sqa_fx.export(
                model,
                options.output,
                args=args,
                kwargs=kwargs,
                opset=options.opset,
                overwrite=options.overwrite,
                **shapes,
            )
    data = dataclasses.asdict(artifact)
    if options.json:
        print(to_json(data))
    else:
        print(f"wrote {artifact.path}: opset {artifact.opset}, {artifact.bytes / 2**20:.1f} MiB")
        print(f"inputs {', '.join(artifact.input_names)}; outputs {', '.join(artifact.output_names)}")
        for note in artifact.notes:
            print(f"note: {note}")
    return 0


def _convert(loaded: Any, options: argparse.Namespace) -> Any:
    if options.plan is not None and (options.hq or options.hkv or options.heads or options.kv_merge):
        raise InputError("--plan holds every choice already: leave out --hq, --hkv, --heads and --kv-merge")
    if options.plan is None and not (options.hq or options.hkv):
        raise InputError("say how many heads are to remain: --hq, --hkv, or a saved plan with --plan")
    chosen: dict[str, Any] = {"plan": sqa_fx.Plan.load(options.plan)} if options.plan is not None else {}
    chosen["allow_inexact"] = options.allow_inexact
    if options.heads:
        chosen["heads"] = head_choice(options.heads)
    if options.kv_merge:
        chosen["kv_merge"] = options.kv_merge
    if options.static:
        chosen["dynamic_shapes"] = None
    args, kwargs = one_input_set(loaded, options.input)
    chosen |= {"hq": request(options.hq, "--hq"), "hkv": request(options.hkv, "--hkv")}
    with _without_partial_graphs(options.debug):
        return sqa_fx.convert(loaded.module, args=args, kwargs=kwargs, verify=not options.no_verify, **chosen)


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
