"""Texts of the command line as values: head counts, head lists, input sets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn
from torch.export import ExportedProgram

from sqa_fx.errors import InputError, MissingError
from sqa_fx.inputs import Inputs, bind_inputs, example_inputs, parse_input_spec, vocabulary_size
from sqa_fx.models import LoadedModel
from sqa_fx.passes.budget import PREFIX
from sqa_fx.request import VARIANTS, HeadChoice, HeadCount, HeadScore, Request

SCORES: tuple[HeadScore, ...] = get_args(HeadScore)


def head_count(text: str) -> HeadCount:
    """``8`` as a number of heads, ``0.5`` as a fraction, ``sSQA`` as a variant, ``auto:0.5`` as a budget. Raises
    InputError for anything else."""
    if text in VARIANTS or text.startswith(PREFIX):
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise InputError(f"{text!r} is not a number of heads, a fraction such as 0.5, or one of {', '.join(VARIANTS)}")


def request(texts: Sequence[str] | None, option: str) -> Request:
    """The values of a repeated ``--hq`` or ``--hkv``: one count for all sites, or ``pattern=count`` for some.

    Raises InputError when plain counts are repeated or mixed with patterns.
    """
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return head_count(texts[0])
    plain = [text for text in texts if "=" not in text]
    if plain:
        raise InputError(
            f"{option} {plain[0]} and other values do not go together: write '*={plain[0]}' for all other sites"
        )
    return {pattern: head_count(count) for pattern, _, count in (text.rpartition("=") for text in texts)}


def head_choice(text: str) -> HeadChoice:
    """The name of a score or method, or the lists in a JSON file: ``{"site name": [query head, ...]}``.

    Raises:
        MissingError: there is no such file.
        InputError: it is not JSON of that form.
    """
    for name in SCORES:
        if text == name:
            return name
    path = Path(text)
    if not path.is_file():
        raise MissingError(f"--heads {text}: it is neither one of {', '.join(SCORES)} nor a file that is there")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    numbers = isinstance(value, dict) and all(
        isinstance(heads, list) and all(type(head) is int for head in heads) for heads in value.values()
    )
    if not numbers:
        raise InputError(f'{path} must hold head numbers by site, as in {{"encoder.layer.0.attention": [0, 2, 5]}}')
    choice: dict[str, list[int]] = value
    return choice


def axis_ranges(texts: Sequence[str]) -> dict[str, tuple[int, int, int]] | None:
    """Repeated ``--range input_ids.1=1,128,4096`` as min, opt and max by axis; None without any.

    Raises InputError for anything else.
    """
    found: dict[str, tuple[int, int, int]] = {}
    for text in texts:
        axis, equals, numbers = text.partition("=")
        parts = numbers.split(",")
        if not equals or len(parts) != 3 or not all(p.strip().isdigit() for p in parts):
            raise InputError(f"--range {text}: write it as INPUT.AXIS=MIN,OPT,MAX, such as input_ids.1=1,128,4096")
        low, best, high = (int(p) for p in parts)
        found[axis] = (low, best, high)
    return found or None


def tensor_sets(specs: Sequence[str], vocabulary: int | None) -> list[dict[str, Tensor]]:
    """The tensors of repeated ``--input`` texts; a name that comes again starts another set."""
    sets: list[dict[str, Tensor]] = [{}]
    for text in specs:
        name, tensor = parse_input_spec(text, vocabulary=vocabulary)
        if name in sets[-1]:
            sets.append({})
        sets[-1][name] = tensor
    short = [name for name in sets[0] if any(name not in other for other in sets)]
    if short:
        raise InputError(
            f"input {short[0]} is given for some input sets only: give all inputs of a set before the next"
        )
    return sets


def input_sets(loaded: LoadedModel | None, specs: Sequence[str]) -> list[Inputs]:
    """Inputs ``(args, kwargs)`` for a model: those of ``--input``, else its own, else what it says of itself.

    Without a model (both sides are ONNX files) only ``--input`` can tell.

    Raises:
        InputError: nothing says what the inputs are, or a name is not one of the model's.
    """
    model = loaded.module if loaded else None
    if specs:
        sets = tensor_sets(specs, vocabulary_size(model) if isinstance(model, nn.Module) else None)
        if model is None:
            return [((), dict(tensors)) for tensors in sets]
        return [bind_inputs(model, tensors) for tensors in sets]
    if loaded and (loaded.args is not None or loaded.kwargs is not None):
        return [(loaded.args or (), loaded.kwargs or {})]
    found = example_inputs(model) if isinstance(model, nn.Module) else None
    if found is None:
        origin = loaded.origin if loaded else "an ONNX file"
        raise InputError(f"{origin} does not say what its inputs are: give --input name:dtype[shape] for each of them")
    return [found]


def one_input_set(loaded: LoadedModel, specs: Sequence[str]) -> Inputs:
    """As `input_sets`, for a command that captures the model once. Raises InputError for more than one set."""
    sets = input_sets(loaded, specs)
    if len(sets) > 1:
        raise InputError("every --input once: this command takes one set of inputs (dynamic axes cover other sizes)")
    return sets[0]


def as_module(model: nn.Module | ExportedProgram) -> nn.Module:
    """The model as something to call."""
    return model.module() if isinstance(model, ExportedProgram) else model


def to_json(value: Mapping[str, Any] | str) -> str:
    """What ``--json`` prints: a report's own text, or its data."""
    return value if isinstance(value, str) else json.dumps(value, indent=2, default=str)
