"""A model without weights: built from a config.json, or the twin of a model that is given."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from sqa_fx.errors import InputError, MissingError
from sqa_fx.transformers_class import transformers_class


def model_of_config(path: Path) -> nn.Module:
    """The transformers model that ``config.json`` (or the directory that holds it) describes, on the meta device, in
    eval mode: it has shapes and no weights.

    Raises MissingError when there is no such file or no transformers; InputError when the config is not JSON, names no
    architecture that transformers has (code in the folder is not run), or cannot be built.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise MissingError(f"{file}: no such file; a model without weights is built from its config.json") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not JSON ({error})") from error
    architectures = config.get("architectures") if isinstance(config, dict) else None
    if not architectures:
        raise InputError(f"{file} names no architecture: it must say which class to build")
    cls = transformers_class(architectures[0], file)
    import transformers

    try:
        known = transformers.AutoConfig.from_pretrained(file.parent, local_files_only=True, trust_remote_code=False) \
            if file.name == "config.json" else cls.config_class.from_dict(config)  # fmt: skip
        with torch.device("meta"):
            model: nn.Module = cls(known)
    except Exception as error:  # transformers raises many kinds; each means that the config is at fault
        raise InputError(f"{file} cannot be built: {type(error).__name__}: {error}") from error
    return model.eval()


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are on the meta device, ties kept; the model is not changed."""
    memo: dict[int, Any] = {}
    for held in (*model.parameters(), *model.buffers()):
        if isinstance(held, UninitializedParameter | UninitializedBuffer):
            raise InputError("the model has parameters without a shape (lazy modules): call it once first")
        made: Tensor = torch.empty_strided(tuple(held.shape), held.stride(), dtype=held.dtype, device="meta")
        memo[id(held)] = nn.Parameter(made, requires_grad=held.requires_grad) \
            if isinstance(held, nn.Parameter) else made  # fmt: skip
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied without its weights ({type(error).__name__}: {error}): build it "
            "under torch.device('meta')"
        ) from error


def on_meta(value: Any) -> Any:
    """The same inputs without values."""
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For every name of the state dict, the names that are the same tensor, itself among them."""
    by_tensor: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, held in state.items():
        by_tensor.setdefault(id(held), []).append(name)
    return {name: by_tensor[id(held)] for name, held in state.items()}


def has_weights(model: nn.Module) -> bool:
    """True when the parameters of ``model`` have values: none is on the meta device, or a FakeTensor."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not any(p.is_meta or isinstance(p.data, FakeTensor) for p in model.parameters())


def unstored(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that a checkpoint of ``model`` does not hold: what it computes when it is built."""
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    return [name for name in names if name not in state]
