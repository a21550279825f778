"""Load a directory in the Hugging Face layout that a stock ``from_pretrained`` refuses, because no config says SQA.

Beside the stock config.json and safetensors under the stock names, it holds ``sqa_fx.json``::

    {"format": "sqa-fx-huggingface", "version": 1, "class": "BertModel", "why": "no field of BertConfig gives ...",
     "surgery": {"format": "sqa-fx-surgery", ...}, "plan": {"format": "sqa-fx-plan", ...}, "proof": {...}}

``surgery`` is what makes a freshly built stock model take the cut weights, ``why`` why that is needed. Without a record
of surgery ("surgery": null) the weights cannot be loaded into the stock class; ``why`` says so.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sqa_fx.checkpoint_layout import read_checkpoint
from sqa_fx.checkpoint_model import tied_names
from sqa_fx.checkpoint_names import match_names
from sqa_fx.errors import InputError, MissingError, first_line
from sqa_fx.module import load
from sqa_fx.stock_model import quiet, stock_of_config
from sqa_fx.storage import META
from sqa_fx.surgery_record import Surgery

FORMAT = "sqa-fx-huggingface"
VERSION = 1


def from_pretrained(directory: str | Path) -> Any:
    """The model in ``directory``, which ``sqa_fx.export(..., to="huggingface")`` or ``convert_checkpoint`` wrote.

    Where surgery on the stock class was proved, that is a plain transformers model with cut weights: its ``generate``,
    ``save_pretrained`` and all else are its own. A directory that loads natively is loaded natively. Where it holds the
    converted graph only, that is returned (a ConvertedModule), with a warning that says so.

    Raises MissingError when there is nothing, InputError when it is damaged or foreign, or cannot be loaded by anybody
    (a checkpoint for which nothing was proved).
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise MissingError(f"{folder}: no such directory")
    if not (folder / META).is_file():
        from sqa_fx.models import load_model

        return load_model(str(folder)).module
    data = read_own(folder)
    if data is None:
        warnings.warn(f"{folder} holds a converted graph, not a transformers model", stacklevel=2)
        return load(folder)
    if data["surgery"] is None:
        raise InputError(f"{folder} cannot be loaded as a model: {data['why']}")
    return operated_model(folder, Surgery.from_json(data["surgery"]))


def read_own(folder: Path) -> dict[str, Any] | None:
    """The content of sqa_fx.json; None when it belongs to a saved graph. Raises InputError when it is damaged."""
    file = folder / META
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return None
    if data.get("version") != VERSION:
        raise InputError(f"{file}: version {data.get('version')!r} is not known; this release reads {VERSION}")
    if "surgery" not in data or "why" not in data:
        raise InputError(f"{file} is incomplete: export the model again")
    return data


def own_bytes(cls: str, why: str, surgery: Surgery | None, plan: Mapping[str, Any], proof: Mapping[str, Any]) -> bytes:
    """The content of sqa_fx.json."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "class": cls,
        "why": why,
        "surgery": None if surgery is None else surgery.to_json(),
        "plan": plan,
        "proof": proof,
    }
    return (json.dumps(data, indent=1) + "\n").encode()


def operated_model(folder: Path, surgery: Surgery) -> nn.Module:
    """The stock model that config.json in ``folder`` describes, after ``surgery``, with the weights there.

    Raises InputError when record and weights do not fit it.
    """
    try:
        stock = stock_of_config(folder)
    except (InputError, MissingError) as error:
        raise type(error)(f"{folder}: {error}") from error
    dtype = getattr(torch, str(stock.fields.get("dtype") or "float32").removeprefix("torch."))
    try:
        model: Any = stock.build(dtype=dtype)
    except Exception as error:  # transformers raises many kinds; each means that the config is at fault
        raise InputError(f"{folder / 'config.json'} cannot be built: {first_line(error)}") from error
    surgery.apply(model)
    load_weights(model, folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        with quiet():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()  # type: ignore[no-any-return]


def load_weights(model: Any, folder: Path) -> None:
    """Put the safetensors in ``folder`` into ``model``: all of its state dict, ties kept. Raises InputError when a
    tensor is missing, too many, or of another shape."""
    files = read_checkpoint(folder)
    tied = tied_names(model)
    names = {min(group): group for group in tied.values()}
    keys = match_names(list(names), files.entries, tied)
    more = sorted(set(files.entries) - {key for own in keys.values() for key in own})
    if more:
        raise InputError(f"{folder} holds tensors that {type(model).__name__} has not: {', '.join(more[:5])}")
    held: dict[str, Tensor] = {}
    for shard in files.shards:
        held |= load_file(folder / shard)
    state = {name: held[keys[first][0]] for first, group in names.items() for name in group}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"the weights in {folder} do not fit: {error}") from error
    model.tie_weights()
