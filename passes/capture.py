"""Capture: a module, ExportedProgram or GraphModule becomes a functional pre-dispatch ATen graph."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from sqa_fx.errors import CaptureError
from sqa_fx.passes.aten_call import argument, op_name
from sqa_fx.passes.capture_ways import (
    TRY,
    DynamicShapes,
    Exported,
    Free,
    export_some_way,
    free_dimensions,
    quiet,
    reason,
)
from sqa_fx.passes.data_sizes import learn_data_sizes
from sqa_fx.passes.graph import attribute, drop_dead_code
from sqa_fx.passes.hints import is_free, is_tensor, value_of


@dataclass
class Captured:
    """A captured model: an unlifted ATen graph whose get_attr nodes are the parameters, and the inputs that made it."""

    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    training: bool
    signature: inspect.Signature | None
    dynamic: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "auto",
    free: Free = free_dimensions,
) -> Captured:
    """Capture ``model`` called as ``model(*args, **kwargs)``; the model itself is not changed.

    ``dynamic_shapes`` is "auto" (the ``free`` dimensions, usually batch and sequence, are dynamic where torch.export
    can), None (static), or a specification as for ``torch.export.export``. Ways of exporting are tried in order, see
    capture_ways; the notes say which one worked when it was not the first. Raises CaptureError with torch's reasons
    when none does.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    if isinstance(model, torch.export.ExportedProgram):
        if not args and not kwargs and model.example_inputs is not None:
            args, kwargs = tuple(model.example_inputs[0]), dict(model.example_inputs[1])
        exported = Exported(model, args, kwargs, None)
        signature, training = None, False
    else:
        signature = _signature(model)
        training = model.training
        exported = export_some_way(model, args, kwargs, dynamic_shapes, free)
    try:
        with quiet(exported.gradients):
            module = exported.program.run_decompositions({}).module(check_guards=False)
    except Exception as error:
        raise CaptureError(f"torch.export could not make the graph functional: {reason(error)}; {TRY}") from error
    assert isinstance(module, fx.GraphModule)
    # The module's calls are checked by its wrapper, which says what to do; torch's own check would only forbid.
    module._forward_pre_hooks.clear()
    normalise(module)
    learn_data_sizes(module, exported.args, exported.kwargs)
    dynamic, static = dynamic_sizes(module)
    return Captured(
        module,
        exported.args,
        exported.kwargs,
        exported.spec,
        training,
        signature,
        dynamic,
        static,
        exported.notes,
    )


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


def normalise(module: fx.GraphModule) -> None:
    """One node per parameter, plain dropout for the functionalised one, no assertions on metadata, no dead code."""
    graph = module.graph
    first: dict[int, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            held = attribute(module, node.target)
            if isinstance(held, torch.Tensor):
                kept = first.setdefault(id(held), node)
                if kept is not node:
                    node.replace_all_uses_with(kept)
                    graph.erase_node(node)
        elif op_name(node) in ("_assert_tensor_metadata", "_assert_scalar"):
            if not node.users:
                graph.erase_node(node)
        elif op_name(node) == "type_as":
            # Only the dtype of the second operand matters; as an operand it would tie two tensors together.
            with graph.inserting_before(node):
                cast = graph.call_function(
                    torch.ops.aten._to_copy.default, (node.args[0],), {"dtype": value_of(node).dtype}
                )
            cast.meta = dict(node.meta)
            node.replace_all_uses_with(cast)
            graph.erase_node(node)
        elif op_name(node) == "native_dropout":
            _plain_dropout(graph, node)
        elif op_name(node) == "_native_batch_norm_legit_functional":
            _own_statistics(graph, node)
        elif op_name(node) == "copy_" and value_of(node) is None:
            node.meta["val"] = value_of(node.args[0])  # what the model writes to its own buffers, put back by export
    drop_dead_code(graph)
    graph.lint()
    module.recompile()


def _own_statistics(graph: fx.Graph, node: fx.Node) -> None:
    """Batch norm reads copies of its running statistics: autograd keeps them, and the graph writes to the buffers."""
    for position in (3, 4):
        held = node.args[position]
        if isinstance(held, fx.Node):
            with graph.inserting_before(node):
                copied = graph.call_function(torch.ops.aten.clone.default, (held,))
            copied.meta = dict(held.meta)
            node.update_arg(position, copied)


def _plain_dropout(graph: fx.Graph, node: fx.Node) -> None:
    users = list(node.users)
    if any(user.args[1] != 0 for user in users):
        return
    with graph.inserting_before(node):
        plain = graph.call_function(torch.ops.aten.dropout.default, (node.args[0], node.args[1], True))
    plain.meta = {**node.meta, "val": value_of(node)[0]}
    for user in users:
        user.replace_all_uses_with(plain)
        graph.erase_node(user)
    graph.erase_node(node)


def dynamic_sizes(module: fx.GraphModule) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The inputs of a graph that have free sizes, and those that have none, as "name[sizes]"."""
    dynamic: list[str] = []
    static: list[str] = []
    for node in module.graph.nodes:
        if node.op == "placeholder" and is_tensor(node):
            sizes = [str(s) for s in value_of(node).shape]
            free = any(is_free(s) for s in value_of(node).shape)
            (dynamic if free else static).append(f"{node.name}[{', '.join(sizes)}]")
    return tuple(dynamic), tuple(static)


def dropout_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose behaviour depends on train or eval mode through dropout."""
    names = {"dropout", "alpha_dropout", "feature_dropout"}
    return [
        n
        for n in module.graph.nodes
        if op_name(n) in names or (op_name(n) == "scaled_dot_product_attention" and argument(n, "dropout_p"))
    ]


def clone_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph and of the module tree that shares the parameter tensors."""
    memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            held = attribute(module, node.target)
            if isinstance(held, torch.Tensor):
                memo[id(held)] = held
        if "val" in node.meta:
            memo[id(node.meta["val"])] = node.meta["val"]
    twin = copy.deepcopy(module, memo)
    for node in twin.graph.nodes:
        node.meta.pop("sqa_step", None)  # what was remembered of an op names the nodes of the graph it was asked in
        node.meta.pop("sqa_key", None)
    return twin
