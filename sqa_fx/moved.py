"""Converted modules on another device than the one that they were captured on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from sqa_fx.module import ConvertedModule


def copied_to(module: nn.Module, device: torch.device, *, move: bool = True) -> nn.Module:
    """A copy of ``module`` on ``device``. A captured graph names its device where it makes tensors; so it is changed
    there, too. Without ``move``, only there."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        if isinstance(part, ConvertedModule) and _retarget(part.graph_module, device):
            part.graph_module.recompile()
            part.checkpoint_activations(part._segments is not None)
    return twin.to(device) if move else twin


def _retarget(module: fx.GraphModule, device: torch.device) -> bool:
    """Let the graph make its tensors on ``device``; True when that changed something."""
    changed = False

    def other(value: Any) -> Any:
        nonlocal changed
        if isinstance(value, torch.device) and value != device:
            changed = True
            return device
        return value

    for node in module.graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, other)
            node.kwargs = fx.node.map_aggregate(node.kwargs, other)
    return changed
