"""Capture: a module, ExportedProgram or GraphModule becomes a functional pre-dispatch ATen graph."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from sqa_fx.errors import CaptureError, InputError
from sqa_fx.passes.data_sizes import learn_data_sizes
from sqa_fx.passes.graph import attribute, drop_dead_code
from sqa_fx.passes.hints import is_free, is_tensor, value_of
from sqa_fx.passes.ops import argument, op_name

DynamicShapes = Mapping[str, Any] | Sequence[Any] | Literal["auto"] | None
_TRY = (
    "what to try: pass inputs that reach the code path you serve; turn caches off (use_cache=False); "
    "pass dynamic_shapes=None for static shapes; or give an ExportedProgram that you exported yourself"
)


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
) -> Captured:
    """Capture ``model`` called as ``model(*args, **kwargs)``; the model itself is not changed.

    ``dynamic_shapes`` is "auto" (batch and sequence dimensions are dynamic where torch.export can), None (static), or a
    specification as for ``torch.export.export``. Raises CaptureError with torch's reason when the model cannot be
    exported.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    notes: list[str] = []
    if isinstance(model, torch.export.ExportedProgram):
        program, spec = model, None
        if not args and not kwargs and model.example_inputs is not None:
            args, kwargs = tuple(model.example_inputs[0]), dict(model.example_inputs[1])
        signature, training = None, False
    else:
        signature = _signature(model)
        training = model.training
        program, spec = _export(model, args, kwargs, dynamic_shapes, notes)
    try:
        with _quiet():
            program = program.run_decompositions({})
            module = program.module(check_guards=False)
    except Exception as error:
        raise CaptureError(f"torch.export could not make the graph functional: {_reason(error)}; {_TRY}") from error
    assert isinstance(module, fx.GraphModule)
    # The module's calls are checked by its wrapper, which says what to do; torch's own check would only forbid.
    module._forward_pre_hooks.clear()
    _normalise(module)
    learn_data_sizes(module, args, kwargs)
    dynamic, static = _dynamic_report(module)
    return Captured(module, args, kwargs, spec, training, signature, dynamic, static, notes)


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: DynamicShapes, notes: list[str]
) -> tuple[torch.export.ExportedProgram, Any]:
    spec: Any = automatic_shapes(model, args, kwargs) if isinstance(dynamic, str) else dynamic
    state = _state_versions(model)
    first: Exception | None = None

    def fresh() -> tuple[Any, ...]:
        # Export marks the dynamic dimensions on the tensors themselves: neither the user's nor a retry may see that.
        return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, (args, kwargs))  # type: ignore[no-any-return]

    try:
        if spec is not None:
            try:
                with _quiet():
                    return torch.export.export(model, *fresh(), dynamic_shapes=spec, strict=False), spec
            except Exception as error:
                if not isinstance(dynamic, str):
                    raise CaptureError(f"torch.export failed: {_reason(error)}; {_TRY}") from error
                first = error
        try:
            with _quiet():
                program = torch.export.export(model, *fresh(), strict=False)
        except Exception as error:
            raise CaptureError(f"torch.export failed: {_reason(error)}; {_TRY}") from error
        if first is not None:
            notes.append(f"all shapes are static, because dynamic ones failed: {_reason(first)}")
        return program, None
    finally:
        if _state_versions(model) != state:
            notes.append("tracing ran code that changed buffers of the model in place")


def _state_versions(model: nn.Module) -> list[int]:
    return [t._version for t in (*model.parameters(), *model.buffers()) if not t.is_inference()]


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:500]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No native attention fast path (it hides attention behind one op), gradients on, no export warnings."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def automatic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dim.AUTO for what is usually batch or sequence: the first two dimensions of integer and up to 3-D float inputs
    (not a last feature dimension), all of a mask, the first one of images and other inputs. A size of 0 or 1 stays
    static, since export specialises it anyway."""
    auto = torch.export.Dim.AUTO

    def spec(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        rank = leaf.dim()
        if rank >= 3 and leaf.dtype == torch.bool:
            dims = range(rank)
        elif not leaf.is_floating_point() or rank == 1:
            dims = range(min(rank, 2))
        elif rank <= 3:
            dims = range(rank - 1)
        else:
            dims = range(1)
        return {d: auto for d in dims if leaf.size(d) > 1}

    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise InputError(f"the example inputs do not fit the model's forward: {error}") from error
    parameters = inspect.signature(model.forward).parameters
    result: dict[str, Any] = {}
    for name, value in bound.items():
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            result.update({k: pytree.tree_map(spec, v) for k, v in value.items()})
        else:
            result[name] = pytree.tree_map(spec, value)
    return result


def _normalise(module: fx.GraphModule) -> None:
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
    drop_dead_code(graph)
    graph.lint()
    module.recompile()


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


def _dynamic_report(module: fx.GraphModule) -> tuple[tuple[str, ...], tuple[str, ...]]:
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
    return copy.deepcopy(module, memo)
