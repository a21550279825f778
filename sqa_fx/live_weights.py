"""A converted graph over the user's own parameters: cut in the graph, or cut once and again whenever they change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqa_fx.dynamo_graph import DynamoGraph
from sqa_fx.passes.cut_in_graph import cut_in_graph
from sqa_fx.passes.parameters import cut_tensor
from sqa_fx.plan import ParameterPlan, Plan

Compiled = Callable[..., Any]


def over_inputs(graph: DynamoGraph, plan: Plan, in_graph: bool) -> tuple[fx.GraphModule, list[CutWeight]]:
    """``graph.module`` (converted) with the placeholders that dynamo's graph has, in its order.

    With ``in_graph`` every cut is a part of the graph, so that gradients reach the original parameters. Without, the
    cut tensors are buffers of the graph, listed with the input that each one is made from.
    """
    module = graph.module
    plans = {p.name: p for p in plan.parameters}
    made: list[CutWeight] = []
    new = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    by_name = {n.name: n for n in module.graph.find_nodes(op="placeholder")}
    positions = {position: name for name, position in graph.names.items()}
    attributes: dict[str, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        attributes.setdefault(str(node.target), []).append(node)
    inputs: dict[str, fx.Node] = {}
    for position, old in enumerate(graph.original.graph.find_nodes(op="placeholder")):
        placeholder = new.placeholder(old.name)
        placeholder.meta = dict(old.meta)
        if position in positions:
            inputs[positions[position]] = placeholder
        else:
            placeholder.meta["val"] = by_name[old.name].meta.get("val")
            known[by_name[old.name]] = placeholder
    for name, placeholder in inputs.items():
        placeholder.meta["val"] = graph.fakes[name]
        if name not in attributes:
            continue
        cut = plans.get(name)
        if cut is not None and not in_graph:
            made.append(CutWeight(name, graph.names[name], cut))
            continue
        value = placeholder if cut is None else cut_in_graph(new, placeholder, cut)
        known.update(dict.fromkeys(attributes[name], value))
    for node in module.graph.nodes:
        if node not in known and node.op != "placeholder":
            known[node] = new.node_copy(node, known.__getitem__)
    result = fx.GraphModule(module, new)
    result.meta = dict(graph.original.meta)
    return result, made


class CutWeight:
    """A cut tensor that is a buffer of the graph, and the input that it is cut from."""

    def __init__(self, name: str, position: int, plan: ParameterPlan) -> None:
        self.name, self.position, self.plan = name, position, plan
        self._seen: tuple[weakref.ref[Tensor], int, int] | None = None

    def refresh(self, source: Tensor, buffer: Tensor) -> None:
        """Cut again when ``source`` is another tensor, lies elsewhere, or was written to since (its version)."""
        # Inference tensors have no version: nothing can tell whether they changed.
        version = -1 if source.is_inference() else source._version
        seen = self._seen
        if version < 0 or seen is None or seen[0]() is not source or seen[1:] != (version, source.data_ptr()):
            with torch.no_grad():
                buffer.copy_(cut_tensor(source.detach(), self.plan))
            self._seen = (weakref.ref(source), version, source.data_ptr())


class LiveCall:
    """The compiled graph with buffers for the cut weights; every call first brings them up to date."""

    def __init__(self, compiled: Compiled, weights: Sequence[CutWeight], buffers: Sequence[Tensor]) -> None:
        self.compiled = compiled
        self.weights = list(zip(weights, buffers, strict=True))

    def __call__(self, *args: Any) -> Any:
        """The outputs for dynamo's inputs."""
        for weight, buffer in self.weights:
            weight.refresh(args[weight.position], buffer)
        return self.compiled(*args)
