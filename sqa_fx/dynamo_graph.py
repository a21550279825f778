"""A graph that torch.compile hands to a backend, as the functional ATen graph that the passes read, and back again.

Dynamo's graph calls torch functions and takes every parameter as an input. Here it is traced once more with the fake
tensors that dynamo made, so that shape symbols and guards stay dynamo's own. Composite operators stay whole, autocast
becomes casts, mutations become ``copy_`` at the end, and what ran without gradients is detached.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._export.utils import _is_preservable_cia_op, _special_op_to_preserve_cia
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import Source, TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.exported_program import _override_composite_implicit_decomp
from torch.fx import traceback as fx_traceback
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from sqa_fx.dynamo_steps import GraphRunner
from sqa_fx.dynamo_trace import Writes, only_reads, record
from sqa_fx.errors import CaptureError, first_line

log = logging.getLogger(__name__)

_TABLE = re.compile(r"\._(?:modules|parameters|buffers)\[")
_STEP = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]|\.(\w+)|\[(?:'([^']*)'|(\d+))\]")
_ROOT = re.compile(r"^[A-Z]+\['([^']*)'\]|^[A-Za-z_]\w*")
_WHOLE = frozenset(
    """linear matmul einsum scaled_dot_product_attention softmax log_softmax layer_norm rms_norm group_norm batch_norm
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d""".split()
)


@dataclass
class DynamoGraph:
    """Dynamo's graph, traced to ATen: ``module`` holds the model's parameters and buffers (get_attr) under their names
    in the model; ``inputs`` are the values of the placeholders that remain."""

    module: fx.GraphModule
    inputs: list[Any]
    names: dict[str, int]
    """For every parameter and buffer of ``module``, its position among dynamo's placeholders."""
    original: fx.GraphModule
    fakes: dict[str, Any] = field(default_factory=dict)
    """The fake value of each parameter and buffer."""
    roots: dict[str, Source] = field(default_factory=dict)
    """Where dynamo found the modules that hold the parameters, outermost ones, by the expression that names them."""

    def root(self) -> nn.Module | None:
        """The module that is compiled, when it is one and dynamo tells."""
        if len(self.roots) != 1:
            return None
        (expression,) = self.roots
        try:
            output = InstructionTranslator.current_tx().output
            found = eval(expression, {"L": output.local_scope, "G": output.global_scope})
        except (AttributeError, LookupError, NameError, TypeError):
            return None
        return found if isinstance(found, nn.Module) else None


def trace(module: fx.GraphModule, inputs: Sequence[Any], gradients: bool) -> DynamoGraph:
    """Trace dynamo's ``module`` to ATen. ``inputs`` are the real values of its placeholders, and ``gradients`` says
    whether the graph will be differentiated.

    Raises CaptureError when that would change what the graph does, or when it cannot be traced.
    """
    _check_traceable(module, gradients)
    placeholders = module.graph.find_nodes(op="placeholder")
    fakes = _fakes(placeholders, inputs)
    held = _held_tensors(module)
    mode = _fake_mode(fakes)
    fakes += [mode.from_tensor(t, static_shapes=True) for t in held.values()]
    runner = GraphRunner(module, list(held), gradients)
    composites = {op: _special_op_to_preserve_cia for name in _called(module) for op in _composites(name)}
    mutated: dict[int, str] = {}
    try:
        with (
            mode,
            mock.patch.object(mode, "allow_scalar_outputs", True),
            _override_composite_implicit_decomp(composites),
            fx_traceback.preserve_node_meta(),
            enable_python_dispatcher(),
        ):
            traced = _traced_as_it_is(runner, fakes, mode, composites)
            if traced is None:
                made, signature = aot_export_module(runner, fakes, trace_joint=False, decompositions={})
                assert isinstance(made, fx.GraphModule)
                traced = made
                written = signature.user_inputs_to_mutate.items()
                mutated = {signature.user_inputs.index(name): out for out, name in written}
    except Exception as error:
        raise CaptureError(f"the graph cannot be traced to ATen operators: {first_line(error)[:300]}") from error
    names = [n.name for n in placeholders]
    return _assemble(module, traced, names, placeholders, [*inputs, *held.values()], list(held), mutated)


def _traced_as_it_is(
    runner: GraphRunner, fakes: Sequence[Any], mode: FakeTensorMode, whole: Collection[torch._ops.OpOverload]
) -> fx.GraphModule | None:
    """The ATen graph, or None where it must be made functional: it writes to tensors, or holds operators that may.

    AOTAutograd runs the graph twice to make it functional, which for most graphs is there to find that they are.
    """
    own = [mode.from_tensor(f) if isinstance(f, FakeTensor) and f.fake_mode is not mode else f for f in fakes]
    with torch.no_grad():
        try:
            graph = record(lambda recorder: runner.run(own, recorder), own, mode, whole)
            return _LazyGraphModule(nn.Module(), graph)
        except Writes:
            return None
        except Exception as error:
            # The recorder is there for speed: errors are make_fx's to raise.
            log.debug("traced by make_fx: %s", first_line(error))
        traced: fx.GraphModule = make_fx(runner, tracing_mode="real")(*own)
    calls = [n for n in traced.graph.nodes if n.op == "call_function"]
    return traced if all(_only_reads(n.target) for n in calls) else None


def _only_reads(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in ("_operator", "math", "torch.fx.experimental.sym_node", "torch")
    return only_reads(target)


def _called(module: fx.GraphModule) -> set[str]:
    """The names of what dynamo's graph calls, and of the operators that must stay whole wherever they are called."""
    names = set(_WHOLE)
    for inner in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in inner.graph.nodes:
            names.add(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
    return names


@functools.cache
def _composites(name: str) -> tuple[torch._ops.OpOverload, ...]:
    """The composite operators of this name that can stay whole. (Torch's own table of all of them takes as long to
    make and to apply as the trace itself.)"""
    if not name.isidentifier():
        return ()
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return ()
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return tuple(op for op in overloads if _is_preservable_cia_op(op))


def _check_traceable(module: fx.GraphModule, gradients: bool) -> None:
    """Refuse what tracing below autograd would lose: backward functions written by hand, and unknown contexts."""
    for inner in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in inner.graph.nodes:
            name = getattr(node.target, "__name__", str(node.target))
            if "inference_mode" in name:
                raise CaptureError("the graph enters inference mode, which ATen operators cannot say")
            if gradients and "_checkpoint_context_fn" in inner.meta:
                raise CaptureError("the graph holds an activation checkpoint with a policy of its own")
            if gradients and name in ("autograd_function_apply", "AutogradFunctionApply"):
                raise CaptureError("the graph holds a torch.autograd.Function, whose own backward would be lost")


def _fakes(placeholders: Sequence[fx.Node], inputs: Sequence[Any]) -> list[Any]:
    found = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders]
    if all(f is not None for f in found):
        return found
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in inputs]


def _fake_mode(fakes: Sequence[Any]) -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    return next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None) or FakeTensorMode()


def _held_tensors(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that the graph holds itself: constants, and parameters where dynamo does not make them inputs."""
    found: dict[str, Tensor] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value = _attribute(module, node.target)
        if isinstance(value, Tensor):
            found[str(node.target)] = value
    return found


def _attribute(owner: Any, path: Any) -> Any:
    for name in str(path).split("."):
        owner = getattr(owner, name)
    return owner


def _assemble(
    original: fx.GraphModule,
    traced: fx.GraphModule,
    names: list[str],
    placeholders: Sequence[fx.Node],
    values: Sequence[Any],
    held: Sequence[str],
    mutated: Mapping[int, str],
) -> DynamoGraph:
    """Placeholders of parameters and buffers become attributes, and mutated inputs are written at the end."""
    graph = traced.graph
    root = nn.Module()
    found: dict[str, int] = {}
    fakes: dict[str, Any] = {}
    roots = _module_roots(placeholders)
    arguments: list[Any] = []
    originals = dict(original.meta.get("dynamo_flat_name_to_original_fqn", {}))
    for position, node in enumerate(list(graph.find_nodes(op="placeholder"))):
        if position < len(names):
            name = _parameter_name(placeholders[position], values[position], position in mutated, roots)
        else:
            target = held[position - len(names)]
            name = originals.get(target, target)
        if name is None:
            node.name = names[position] if position < len(names) else node.name
            node.target = node.name
            arguments.append(values[position])
            continue
        path = _register(root, name, values[position])
        with graph.inserting_before(node):
            # Not graph.get_attr, which warns: the module that will hold it is not the one that was traced.
            attribute = graph.create_node("get_attr", path)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
        if position < len(names):
            found[path] = position
            fakes[path] = node.meta["val"]
    for name, value in vars(traced).items():
        if isinstance(value, Tensor | fx.GraphModule):
            _set(root, name, value)
    for table in (traced._buffers, traced._parameters, traced._modules):
        for name, value in table.items():
            if value is not None:
                _set(root, name, value)
    _write_back(graph, mutated, names)
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {k: (source_path(str(v[0]), roots), v[1]) for k, v in stack.items()}
    # The passes read graphs and run them node by node: Python code would be made of each for nothing.
    module = _LazyGraphModule(root, graph)
    module.meta = dict(original.meta)
    return DynamoGraph(module, arguments, found, original, fakes, roots)


def _write_back(graph: fx.Graph, mutated: Mapping[int, str], names: Sequence[str]) -> None:
    """Mutations that functionalisation made outputs are written to the inputs at the end of the graph."""
    output = graph.output_node()
    (results,) = output.args
    assert isinstance(results, tuple | list)
    by_name = {n.name: n for n in graph.nodes}
    inputs = {n.name: n for n in graph.find_nodes(op="placeholder")}
    for position, made in mutated.items():
        if position >= len(names) or names[position] not in inputs:
            raise CaptureError("the graph writes to a tensor that it holds itself")
        with graph.inserting_before(output):
            written = graph.call_function(torch.ops.aten.copy_.default, (inputs[names[position]], by_name[made]))
        written.meta = {"val": inputs[names[position]].meta["val"]}
    output.args = (tuple(results[len(mutated) :]),)


def _expression(source: Any) -> str:
    """The expression by which dynamo's guards name a value."""
    return source.name if isinstance(source.name, str) else str(source.name())  # a method in torch 2.11


def _module_roots(placeholders: Sequence[fx.Node]) -> dict[str, Source]:
    """The outermost modules that the graph takes parameters, buffers or submodules of: ``L['self']``, or
    ``L['args'][0]`` where a decorator of forward takes any arguments."""
    found: dict[str, Source] = {}
    for node in placeholders:
        source: Any = getattr(node.meta.get("grapharg"), "source", None)
        table = _TABLE.search(_expression(source)) if source is not None else None
        if table is None:
            continue
        root = _expression(source)[: table.start()]
        while source is not None and _expression(source) != root:
            source = getattr(source, "base", None)
        if source is not None:
            found[root] = source
    return {r: s for r, s in found.items() if not any(r != o and r.startswith((f"{o}.", f"{o}[")) for o in found)}


def _parameter_name(node: fx.Node, value: Any, written: bool, roots: Collection[str]) -> str | None:
    """The model's name of a parameter or buffer that dynamo made an input; None for the call's own inputs.

    What the graph writes to (a cache) stays an input: it belongs to the caller, with its sizes.
    """
    marks = node.meta.get("tensor_dict") or {}
    static = "_dynamo_static_input_type" in marks or isinstance(value, nn.Parameter)
    if written or not static or not isinstance(value, Tensor):
        return None
    source = getattr(node.meta.get("grapharg"), "source", None)
    return source_path(_expression(source), roots) if source else node.name


def source_path(source: str, roots: Collection[str] = ()) -> str:
    """The path in the model that an expression of dynamo's names: "L['self']._modules['a']._parameters['w']" is
    "a.w". ``roots`` are expressions of whole models."""
    own = min((r for r in roots if source == r or source.startswith((f"{r}.", f"{r}["))), key=len, default=None)
    root = _ROOT.match(source)
    rest = source[len(own) :] if own is not None else source[root.end() :] if root else source
    steps = [next(g for g in match.groups() if g is not None) for match in _STEP.finditer(rest)]
    return ".".join(s for s in steps if s not in ("__dict__", "_modules", "_parameters", "_buffers", "_orig_mod"))


def _register(root: nn.Module, path: str, value: Any) -> str:
    """Put ``value`` under ``path``; the path it got, which differs when something else has it."""
    *owners, name = (path or "tensor").split(".")
    holder, taken = root, []
    for step in owners:
        while hasattr(holder, step) and not isinstance(getattr(holder, step), nn.Module):
            step += "_"
        if not hasattr(holder, step):
            holder.add_module(step, nn.Module())
        holder = holder.get_submodule(step)
        taken.append(step)
    while hasattr(holder, name):
        name += "_"
    _set(holder, name, value)
    return ".".join((*taken, name))


def _set(owner: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    elif isinstance(value, nn.Module):
        owner.add_module(name, value)
    elif isinstance(value, Tensor):
        owner.register_buffer(name, value, persistent=False)
    else:
        setattr(owner, name, value)
