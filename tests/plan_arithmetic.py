"""What the plan's documented JSON means, written down again from its schema alone; shares no code with the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def entries(ranges: list[str]) -> Tensor:
    """Indices of ``start:stop`` and ``start:stop:step`` ranges, in order."""
    return torch.tensor([i for text in ranges for i in range(*map(int, text.split(":")))])


def cut(state: Mapping[str, Tensor], plan: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of the converted model from that of the original."""
    result = dict(state)
    for parameter in plan["parameters"]:
        old, axis = result[parameter["name"]], parameter["axis"]
        assert old.shape[axis] == parameter["size"][0]
        shape = list(old.shape)
        shape[axis] = parameter["size"][1]
        new = torch.full(shape, float("nan"), dtype=old.dtype) if old.is_floating_point() else old.new_zeros(shape)
        for block in parameter["blocks"]:
            sources = [old.index_select(axis, entries(source)) for source in block["from"]]
            merged = sources[0] if len(sources) == 1 else torch.stack(sources).mean(0)
            new.index_copy_(axis, entries(block["to"]), merged)
        result[parameter["name"]] = new
    return result


def masked(state: Mapping[str, Tensor], plan: Mapping[str, Any]) -> dict[str, Tensor]:
    """The original's state dict such that the original computes what the converted model must compute."""
    result = dict(state)
    for parameter in plan["parameters"]:
        old, axis = result[parameter["name"]], parameter["axis"]
        new = old.clone()
        for block in parameter["blocks"]:
            if len(block["replaces"]) > 1:
                merged = torch.stack([old.index_select(axis, entries(source)) for source in block["from"]]).mean(0)
                for ranges in block["replaces"]:
                    new.index_copy_(axis, entries(ranges), merged)
        if parameter["dropped"] and any(block["role"] == "o" for block in parameter["blocks"]):
            new.index_fill_(axis, entries(parameter["dropped"]), 0)
        result[parameter["name"]] = new
    return result


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved and every name of a shared one included."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().clone() for name, tensor in named}


def load_masked(model: nn.Module, plan: Mapping[str, Any]) -> None:
    """Put the masked weights into ``model`` itself. Every parameter that the mask changes must be the model's own."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    held = dict(named)
    known = [p for p in plan["parameters"] if p["name"] in held]
    for p in plan["parameters"]:
        merges = any(len(block["replaces"]) > 1 for block in p["blocks"])
        assert p in known or not (merges or any(block["role"] == "o" for block in p["blocks"])), p["name"]
    changed = masked({name: tensor.detach() for name, tensor in held.items()}, {"parameters": known})
    with torch.no_grad():
        for p in known:
            held[p["name"]].copy_(changed[p["name"]])
