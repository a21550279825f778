"""Dotted names of modules and of their tensors."""

from __future__ import annotations

import re

from torch import nn


def kind_of(name: str) -> str:
    """A name without the numbers of layers: "model.layers.*.self_attn"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def has_module(model: nn.Module, path: str) -> bool:
    """Whether ``model`` has a module at ``path``."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
