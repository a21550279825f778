"""An ATen graph recorded from the operators that a function calls on fake tensors.

It is the graph that ``make_fx`` makes, at a fraction of its time: most graphs of dynamo's need none of its proxies,
symbols and constants. What is out of the ordinary raises :class:`Unusual` or :class:`Writes` and is not recorded.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import snapshot_fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

# What the nodes of a graph tell those that are made from them: their place in the source, and marks for later passes.
KEPT_META = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "recompute",
    "ac_graph_id",
    "has_backward_hook",
    "custom",
    "partitioner_tag",
)
_LITERALS = frozenset(
    (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
)
aten = torch.ops.aten
# They ask about a tensor, or make one that make_fx knows the numbers of.
_LEFT = frozenset((aten.size.default, aten.stride.default, aten.storage_offset.default, aten.lift_fresh.default))
_MASKS = (torch.bool, torch.uint8, torch.int8)
_DATA_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Unusual(Exception):
    """The recorder leaves this function to ``make_fx``."""


class Writes(Exception):
    """The function writes to tensors, or may: it is to be made functional."""


def record(
    run: Callable[[Recorder], Any],
    inputs: Sequence[Any],
    mode: FakeTensorMode,
    whole: Collection[torch._ops.OpOverload],
) -> fx.Graph:
    """The graph of what ``run`` computes from ``inputs``, fake tensors of ``mode``. Composite operators of ``whole``
    stay in one piece (torch is told so elsewhere). Raises Unusual, Writes, and what the operators raise."""
    recorder = Recorder(mode, whole)
    for i, value in enumerate(inputs):
        recorder.placeholder(f"arg{i}_1", value)
    with _recording(recorder):
        result = run(recorder)
    recorder.output(result)
    return recorder.graph


@contextmanager
def _recording(recorder: Recorder) -> Iterator[None]:
    """Record every operator. Autocast casts anew at every use: a cast from outside the graph would be unknown in it."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with unset_fake_temporarily(), recorder:
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def only_reads(target: torch._ops.OpOverload) -> bool:
    """Whether an operator says that it leaves its arguments as they are. Normalisations with running statistics write
    to these without saying so."""
    schema = target._schema
    return not schema.is_mutable and not any(a.name.startswith("running_") for a in schema.arguments)


class Recorder(TorchDispatchMode):
    """Runs ATen operators on fake tensors of ``mode`` and writes each one into ``graph``."""

    def __init__(self, mode: FakeTensorMode, whole: Collection[torch._ops.OpOverload]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if mode.propagate_real_tensors:
            raise Unusual("fake tensors carry real ones")
        self.graph = fx.Graph()
        self._mode, self._whole = mode, whole
        self._nodes: dict[int, tuple[TensorWeakRef, fx.Node]] = {}
        """The node of every tensor, by the id of that. Tensors are not held: torch makes a copy, by one more operator,
        of a new tensor that somebody else holds."""
        self._results: dict[Any, Any] = {}
        """Results by operator and arguments: layers repeat, and fake tensors are slow."""
        self._meta: dict[str, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch._disable_dynamo around every operator: nothing is compiled in here

    def placeholder(self, name: str, value: Any) -> None:
        """Make ``value`` an input of the graph."""
        if type(value) is not FakeTensor:
            raise Unusual(f"an input is a {type(value).__name__}")
        self._found(self.graph.placeholder(name), value, _snapshot(value))

    def output(self, result: Any) -> None:
        """End the graph."""
        self.graph.output(self._argument(result))

    @contextmanager
    def coming_from(self, node: fx.Node) -> Iterator[None]:
        """What is recorded meanwhile is made from ``node``."""
        outer = self._meta
        if node.meta:
            self._meta = {key: copy.copy(node.meta[key]) for key in KEPT_META if key in node.meta}
        try:
            yield
        finally:
            self._meta = outer

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return self._mode.dispatch(func, types, args, kwargs)
        name = _node_name(func)
        if func not in self._whole and _is_composite(func):
            raise Unusual(f"{func} is to be decomposed")
        if func is aten.index.Tensor and any(i is not None and i.dtype in _MASKS for i in args[1]):
            raise Unusual("a mask selects entries")
        arguments = tuple(map(self._argument, args))
        named = {key: self._argument(value) for key, value in kwargs.items()}
        key = func, torch.get_default_dtype(), _key(args), _key(tuple(kwargs.items()))
        if key in self._results:
            value = self._results[key]
            result = _snapshot(value)
        else:
            # Not through the dispatcher, which would take as long again.
            result = self._mode.dispatch(func, types, args, kwargs)
            value = _snapshot(result)
            if not any(self._node_of(part) for part in (result if isinstance(result, tuple | list) else (result,))):
                self._results[key] = value
        self._found(self.graph.create_node("call_function", func, arguments, named, name), result, value)
        return result

    def _found(self, node: fx.Node, result: Any, value: Any) -> None:
        """``node`` gives ``result``, and is told ``value`` of it."""
        node.meta.update(self._meta)
        if isinstance(result, Tensor):
            node.meta["val"] = value
            self._nodes[id(result)] = TensorWeakRef(result), node
        elif isinstance(result, tuple | list):
            node.meta["val"] = value
            for i, (part, of_part) in enumerate(zip(result, value, strict=True)):
                self._found(self.graph.call_function(operator.getitem, (node, i)), part, of_part)

    def _argument(self, value: Any) -> Any:
        """``value`` as an argument of nodes."""
        kind = type(value)
        if kind in _LITERALS:
            return value
        if kind is tuple or kind is list:
            return kind(map(self._argument, value))
        node = self._node_of(value)
        if node is None:
            raise Unusual(f"a {kind.__name__} that the graph has not made")
        return node

    def _node_of(self, value: Any) -> fx.Node | None:
        tensor, node = self._nodes.get(id(value), (None, None))
        return node if tensor is not None and tensor() is value else None


def _key(value: Any) -> Any:
    """What of an argument a result depends on."""
    if type(value) is FakeTensor:
        storage = value.untyped_storage().nbytes(), value.storage_offset()
        marks = value.is_conj(), value.is_neg(), value.requires_grad
        return value.shape, value.stride(), storage, value.dtype, value.fake_device, marks
    if type(value) in (tuple, list):
        return type(value), *map(_key, value)
    return type(value), value  # the type too: 1, 1.0 and True are equal


def _snapshot(value: Any) -> Any:
    """Tensors like those of a result: what becomes of one says nothing of the other."""
    if type(value) is FakeTensor:
        if value._has_symbolic_sizes_strides or value.layout is not torch.strided or value.constant is not None:
            raise Unusual("a tensor is sparse, of symbolic sizes, or constant")
        return snapshot_fake(value)
    if type(value) in (tuple, list):
        return type(value)(map(_snapshot, value))
    if type(value) not in (int, float, bool, type(None)):
        raise Unusual(f"an operator gives a {type(value).__name__}")
    return value


@functools.cache
def _node_name(func: Any) -> str:
    """What the nodes of an operator are called. Raises Unusual and Writes for operators that are not recorded."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        raise Unusual(f"{func} is no ATen operator")
    asks = func is not aten.index.Tensor and any(tag in func.tags for tag in _DATA_DEPENDENT)
    if func in _LEFT or asks:
        raise Unusual(f"{func} asks for numbers")
    if not only_reads(func):
        raise Writes(str(func))
    name: str = fx.Graph()._target_to_str(func.overloadpacket.__name__)
    return name


@functools.cache
def _is_composite(func: torch._ops.OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd)
