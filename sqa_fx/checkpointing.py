"""Activation checkpointing of a converted graph: segments that the backward pass computes again.

A captured graph is flat, so that there are no layers to wrap in ``torch.utils.checkpoint``. Here the graph is cut
between attention sites, each time where the fewest bytes cross (the residual stream), and every segment is wrapped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from sqa_fx.passes.aten_call import op_name
from sqa_fx.passes.find import SDPA, SOFTMAX
from sqa_fx.passes.hints import hint, value_of

_PART = "submod_"  # how split_module names the parts


class Segment(nn.Module):
    """A part of a graph whose activations are not kept for the backward pass."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *args: Any) -> Any:
        """The outputs of the part."""
        return checkpoint(self.body, *args, use_reentrant=False)


def in_segments(module: fx.GraphModule) -> Callable[..., Any]:
    """``module``, whose calls take and return flat tuples, as a chain of checkpointed segments, one for each attention.

    The segments read the tables of parameters and buffers of ``module``, whatever is put into them later. What the
    graph writes to buffers is written once, outside of the segments.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    order = {node: i for i, node in enumerate(graph.nodes)}
    cuts = _boundaries(graph, order, [order[n] for n in graph.nodes if op_name(n) == SDPA or op_name(n) in SOFTMAX])
    writes = len(cuts) + 1

    def part(node: fx.Node) -> int:
        return writes if op_name(node) == "copy_" else sum(order[node] >= cut for cut in cuts)

    split = split_module(
        fx.GraphModule(module, graph), module, part, keep_original_order=True, keep_original_node_name=True
    )
    bodies = {name: body for name, body in split.named_children() if name.startswith(_PART)}
    split._parameters, split._buffers = module._parameters, module._buffers
    split._modules = dict(module._modules)
    for name, body in bodies.items():
        split._modules[name] = body if name == f"{_PART}{writes}" else Segment(body)
    split.recompile()
    return split


def _boundaries(graph: fx.Graph, order: dict[fx.Node, int], cores: Sequence[int]) -> list[int]:
    """Between every two cores, the position before which the fewest bytes are alive that came from activations."""
    weight = _alive(graph, order)
    return [min(range(a + 1, b + 1), key=lambda i: (weight[i], i)) for a, b in itertools.pairwise(cores)]


def _alive(graph: fx.Graph, order: dict[fx.Node, int]) -> list[int]:
    """For every position, the bytes of values made before it and used at or after it."""
    change = [0] * (len(order) + 2)
    for node, position in order.items():
        value = value_of(node)
        if node.op == "get_attr" or not isinstance(value, Tensor) or not node.users:
            continue
        size = math.prod(int(hint(n)) for n in value.shape) * value.element_size()
        last = max(order[user] for user in node.users)
        change[position + 1] += size
        change[last + 1] -= size
    alive, total = [], 0
    for step in change:
        total += step
        alive.append(total)
    return alive
