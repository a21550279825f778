"""The command ``sqa-fx``: its arguments, its exit codes, and how it says what went wrong."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sqa_fx import cli_bench, cli_checkpoint, cli_compare, cli_convert, cli_heal
from sqa_fx.errors import InputError, SqaError
from sqa_fx.inputs import SPEC_GRAMMAR
from sqa_fx.models import FORMS
from sqa_fx.version import __version__

_EPILOG = f"""
{FORMS}
an input is {SPEC_GRAMMAR}

exit codes: 0 fine; 1 a proof or a comparison failed; 2 bad usage or input; 3 a package, file or device is missing
"""


class _Parser(argparse.ArgumentParser):
    """Bad usage ends as every other error does, in `main`."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\n{self.format_usage().strip()}")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="sqa-fx",
        description="Rewrite the attention of a trained model into Sparse Query Attention; prove, export, compare it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sqa-fx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = commands.add_parser(
        "inspect", help="list the attention sites of a model, where they are, and what a conversion would save"
    )
    cli_convert.add_model(inspect)
    cli_convert.add_request(inspect)
    inspect.add_argument(
        "--graph", type=Path, metavar="FILE", help="draw the region of every site into this .svg or .png"
    )
    inspect.set_defaults(run=cli_convert.run_inspect)

    convert = commands.add_parser("convert", help="convert a model, prove the result and save it")
    cli_convert.add_model(convert)
    cli_convert.add_request(convert)
    cli_convert.add_conversion(convert)
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to save to")
    convert.add_argument(
        "--save-plan", type=Path, metavar="FILE", help="also write the plan as JSON (its tensors beside: .safetensors)"
    )
    convert.set_defaults(run=cli_convert.run_convert)

    plan = commands.add_parser("plan", help="make a plan from a config.json; no weights are loaded")
    cli_checkpoint.add_plan(plan)
    plan.set_defaults(run=cli_checkpoint.run_plan)

    checkpoint = commands.add_parser(
        "convert-checkpoint", help="convert a safetensors checkpoint shard by shard, also one larger than memory"
    )
    cli_checkpoint.add_convert(checkpoint)
    checkpoint.set_defaults(run=cli_checkpoint.run_convert)

    export = commands.add_parser(
        "export", help="write a model for an engine, converted first if --hq, --hkv or --plan says so"
    )
    cli_convert.add_model(export)
    cli_convert.add_request(export)
    cli_convert.add_conversion(export)
    cli_convert.add_export(export)
    export.set_defaults(run=cli_convert.run_export)

    validate = commands.add_parser("validate", help="compare artifacts with the first one, which runs in float64")
    cli_compare.add_artifacts(validate)
    validate.add_argument("--atol", type=float, help="slack on top of twice eager's own error (default: by dtype)")
    cli_compare.add_validation(validate)
    validate.set_defaults(run=cli_compare.run_validate)

    bench = commands.add_parser("bench", help="measure the latency of artifacts on the same inputs")
    cli_compare.add_artifacts(bench)
    cli_bench.add_bench(bench)
    bench.set_defaults(run=cli_compare.run_bench)

    heal = commands.add_parser("heal", help="distil the original into a conversion, on text or token ids")
    cli_heal.add_pair(heal)
    cli_heal.add_heal(heal)
    heal.set_defaults(run=cli_heal.run_heal)

    evaluate = commands.add_parser("evaluate", help="say how well a conversion does beside its original, on data")
    cli_heal.add_pair(evaluate)
    cli_heal.add_evaluate(evaluate)
    evaluate.set_defaults(run=cli_heal.run_evaluate)

    doctor = commands.add_parser("doctor", help="say which engines are usable here, and what is missing for the others")
    doctor.add_argument("--timeout", type=float, default=120.0, help="seconds for each probe (default: 120)")
    doctor.set_defaults(run=run_doctor)

    for command in (inspect, convert, plan, checkpoint, export, bench, heal):
        command.add_argument("--overwrite", action="store_true", help="replace what is at the output path")
    for command in (inspect, convert, plan, checkpoint, export, validate, bench, heal, evaluate, doctor):
        command.add_argument("--json", action="store_true", help="print JSON, errors too")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.epilog = _EPILOG
    return parser


def run_doctor(options: argparse.Namespace) -> int:
    """``sqa-fx doctor``: what every engine can do here. Always 0: a missing engine is an answer."""
    from sqa_fx.doctor import diagnose

    report = diagnose(timeout=options.timeout)
    print(report.to_json() if options.json else report.table())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process) and return its exit code.

    Every error is one message on stderr (with ``--json``, an object on stdout); ``--debug`` adds the traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            # Notes between torch and its own libraries; a warning of ours is a UserWarning and stays.
            for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
            options = build_parser().parse_args(arguments)
            code: int = options.run(options)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        # The reader went away (`sqa-fx inspect ... | head`): nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("sqa-fx: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(error, arguments)


def _report(error: Exception, arguments: Sequence[str]) -> int:
    known = isinstance(error, SqaError)
    code = error.exit_code if isinstance(error, SqaError) else 2
    message = str(error) if known else f"unexpected {type(error).__name__}: {error} (--debug shows where)"
    if "--debug" in arguments:
        traceback.print_exception(error)
    if "--json" in arguments:
        print(json.dumps({"error": {"kind": type(error).__name__, "message": message, "exit_code": code}}, indent=2))
    else:
        print(f"sqa-fx: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
