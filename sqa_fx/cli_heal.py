"""The commands ``heal`` and ``evaluate``: a conversion, its original, and data."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

import sqa_fx
from sqa_fx.cli_data import PATH_HELP, add_rows, rows_of
from sqa_fx.cli_values import to_json
from sqa_fx.errors import InputError
from sqa_fx.heal_options import HealOptions
from sqa_fx.models import load_model
from sqa_fx.text_data import TokenBatches

_CHOICES = {
    "loss": ("auto", "kl", "embedding"),
    "precision": ("fp32", "bf16"),
    "train": ("all", "sites", "low-rank"),
    "resume": ("auto", "never", "must"),
}
_HELP = {
    "loss": "auto is kl for outputs with logits, else embedding",
    "steps": "optimiser steps",
    "lr": "highest learning rate of AdamW",
    "final_lr": "share of it at the end of the cosine",
    "warmup": "steps over which it rises",
    "weight_decay": "on parameters with two or more axes",
    "max_grad_norm": "gradients are scaled down to it",
    "accumulate": "batches for a step",
    "precision": "bf16 is autocast",
    "train": "which parameters; low-rank updates are merged into the weights at the end",
    "rank": "of low-rank updates",
    "site_warmup": "steps at first that match the output of each converted site",
    "seed": "of the order of the data and of dropout",
    "device": "auto is the accelerator if there is one",
    "evaluate_every": "steps between evaluations on held-out data",
    "patience": "stop after so many evaluations without a better loss",
    "checkpoints": "folder for checkpoints; a run that was killed goes on from the last one",
    "checkpoint_every": "steps between checkpoints",
    "keep": "how many checkpoints stay",
    "resume": "never refuses a checkpoint, must needs one",
    "log": "write the numbers to this file, JSON by line",
    "log_every": "steps between entries",
    "tensorboard": "write the numbers to this folder for TensorBoard",
}
_TYPES = {"patience": int, "checkpoints": Path, "log": Path, "tensorboard": Path}


def add_pair(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which models, on which data."""
    parser.add_argument("student", metavar="STUDENT", help="a folder that sqa-fx convert or heal wrote")
    parser.add_argument("--teacher", required=True, metavar="MODEL", help="the model that it was converted from")
    parser.add_argument("--pretrained", action="store_true", help="trained weights for a timm:NAME teacher")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help=PATH_HELP)
    add_rows(parser)
    parser.add_argument("--rows", type=int, metavar="N", help="read no more rows than these")


def add_heal(parser: argparse.ArgumentParser) -> None:
    """The arguments that only ``heal`` has."""
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to save to")
    parser.add_argument("--held-out", type=Path, metavar="PATH", help="data to evaluate on")
    parser.add_argument(
        "--held-out-share", type=float, default=0.05, metavar="X",
        help="without --held-out, this share of the rows of --data (default: 0.05; 0: none)",
    )  # fmt: skip
    for field in dataclasses.fields(HealOptions):
        if field.name not in _HELP:
            continue
        default = f" (default: {field.default})" if field.default is not None else ""
        kind: Any = _TYPES.get(field.name, type(field.default))
        choices = _CHOICES.get(field.name)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=field.default, choices=choices,
            metavar=None if choices else {int: "N", float: "X", Path: "PATH"}.get(kind, "NAME"),
            help=_HELP[field.name] + default,
        )  # fmt: skip
    parser.add_argument(
        "--deterministic", action="store_true", help="only algorithms that give the same bits on a GPU, too"
    )


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """The arguments that only ``evaluate`` has."""
    parser.add_argument("--kind", choices=("auto", "lm", "embedding", "classification"), default="auto")
    parser.add_argument("--pairs", type=int, default=2048, metavar="N", help="rows whose similarities are compared")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    parser.add_argument("--device", default="auto", help="auto is the accelerator if there is one")


def run_heal(options: argparse.Namespace) -> int:
    """``sqa-fx heal``: heal a saved conversion and save the result."""
    if options.output.exists() and not options.overwrite:
        raise InputError(f"{options.output} exists: choose another path, or pass --overwrite")
    if not options.output.absolute().parent.is_dir():
        raise InputError(f"cannot write {options.output}: its folder does not exist")
    chosen = HealOptions(
        **{name: getattr(options, name) for name in _HELP},
        deterministic=options.deterministic,
        progress=sys.stderr.isatty(),
    )
    student, teacher = _models(options)
    data = _data(options.data, options, student, teacher, seed=chosen.seed)
    held_out = None
    if options.held_out is not None:
        held_out = _data(options.held_out, options, student, teacher)
    elif options.held_out_share:
        data, held_out = data.split(options.held_out_share)
    if not len(data):
        raise InputError(f"{options.data} has fewer rows than a batch of {options.batch}: give a smaller --batch")
    report = sqa_fx.heal(student, teacher, data, held_out=held_out, options=chosen)
    if int(os.environ.get("RANK", "0")):
        return 0  # the first process writes and tells
    student.save(options.output, overwrite=options.overwrite)
    if options.json:
        print(report.to_json())
    else:
        print(report.table())
        print(f"saved to {options.output}")
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """``sqa-fx evaluate``: the measures of a conversion beside those of its original."""
    student, teacher = _models(options)
    found = sqa_fx.evaluate(
        student,
        teacher,
        _data(options.data, options, student, teacher),
        kind=options.kind,
        device=options.device,
        precision=options.precision,
        pairs=options.pairs,
    )
    print(to_json(found.to_json()) if options.json else found.table())
    return 0


def _models(options: argparse.Namespace) -> tuple[sqa_fx.ConvertedModule, nn.Module]:
    student = load_model(options.student).module
    if not isinstance(student, sqa_fx.ConvertedModule):
        raise InputError(f"{options.student} is no conversion that sqa-fx saved: make one with sqa-fx convert")
    teacher = load_model(options.teacher, pretrained=options.pretrained).module
    if isinstance(teacher, ExportedProgram):
        raise InputError(f"--teacher {options.teacher} is an exported program: give the model as a module")
    return student, teacher


def _data(
    path: Path,
    options: argparse.Namespace,
    student: sqa_fx.ConvertedModule,
    teacher: nn.Module,
    seed: int | None = None,
) -> TokenBatches:
    """The rows of ``path``: for training with a ``seed``, in its order and in full batches only."""
    return rows_of(path, options, teacher, options.rows, "attention_mask" in student._binder._captured, seed)
