"""Record an eager call: how every submodule is called, and which submodules compute attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sqa_fx.passes.capture_ways import attributes_kept, free_dimensions, quiet


@dataclass(frozen=True)
class Call:
    """The inputs of one call of a submodule; the tensors are copies."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """The tensors among the inputs, in the order of pytree."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


@dataclass
class Recording:
    """The submodules whose own code computes attention, and the calls, in order, of those that it lies in."""

    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    attention: set[nn.Module] = field(default_factory=set)


def record(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Recording:
    """Call ``model`` once, without gradients, and record. Raises whatever the call raises.

    An op that may be attention is a fused one, or a softmax over at least three dimensions (the softmax of a router or
    a classifier has two); what it really is, the analysis of the exported submodule says.
    """
    recording = Recording()
    stack: list[nn.Module] = []
    copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        # One copy per tensor and version: what a layer hands down to its parts is held once.
        key = (id(leaf), leaf._version if not leaf.is_inference() else -1)
        return copies.setdefault(key, (leaf, leaf.detach().clone()))[1]

    def enter(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        stack.append(module)
        if module is not model:
            calls = recording.calls.setdefault(module, [])
            calls.append(Call(*pytree.tree_map(copy, (given, dict(named)))))

    def leave(module: nn.Module, given: Any, output: Any) -> None:
        while stack and stack.pop() is not module:
            pass

    handles: list[Any] = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        with undisturbed(model), _Attention(stack, recording.attention):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    bearing = {m for m in model.modules() if any(part in recording.attention for part in m.modules())}
    recording.calls = {module: calls for module, calls in recording.calls.items() if module in bearing}
    return recording


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without gradients and from the same random state each time; its attributes and buffers, and the
    random state, are put back."""
    tables = [(module, dict(module._buffers)) for module in model.modules()]
    values = {t: t.detach().clone() for _, table in tables for t in table.values() if t is not None}
    try:
        with attributes_kept(model), torch.random.fork_rng(), quiet(gradients=False):
            torch.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for module, table in tables:
                module._buffers.update(table)
            for tensor, value in values.items():
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


class _Attention(TorchDispatchMode):
    """Notes which module runs an op that may be attention."""

    supports_higher_order_operators = True

    def __init__(self, stack: list[nn.Module], found: set[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack, self.found = stack, found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1] if isinstance(func, torch._ops.OpOverload) else str(func)
        if self.stack and (
            "attention" in name or ("softmax" in name and args and isinstance(args[0], Tensor) and args[0].dim() >= 3)
        ):
            self.found.add(self.stack[-1])
        return func(*args, **(kwargs or {}))


def other_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The same inputs at other batch and sequence sizes: all of them one larger, one smaller, the batch one larger.

    Dimensions of equal size change together, so that inputs still fit each other; added rows repeat the first ones.
    """
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    free = {leaf.size(d) for leaf in leaves for d in free_dimensions(leaf)} - {0, 1}
    first = {leaf.size(0) for leaf in leaves if leaf.dim()} & free
    for sizes, step in ((free, 1), (free, -1), (first, 1)):
        if not sizes or min(sizes) + step < 2:
            continue

        def resized(leaf: Any, sizes: set[int] = sizes, step: int = step) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            for d in free_dimensions(leaf):
                if leaf.size(d) in sizes:
                    rows = torch.arange(leaf.size(d) + step, device=leaf.device) % leaf.size(d)
                    leaf = leaf.index_select(d, rows)
            return leaf

        yield pytree.tree_map(resized, (args, kwargs))
