"""Eager calls of a model under surgery: in eval mode, undisturbed, with other tensors under its parameters' names."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from sqa_fx.partly import tensors_of
from sqa_fx.passes.capture_ways import fresh
from sqa_fx.passes.eager_widened import EagerWidened, WideOperands, widened
from sqa_fx.passes.record import undisturbed
from sqa_fx.passes.verify import TOLERANCE, distance
from sqa_fx.surgery_reads import is_plain
from sqa_fx.surgery_record import read

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within; every module's own mode behind."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag


_OWN = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def contents_kept(model: nn.Module) -> Iterator[None]:
    """What the model's code puts into containers and plain objects that its modules hold (a table of biases by device,
    a field of a config) is taken out again: it was computed from other weights."""
    tables: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, dict | list | set) and name not in _OWN:
                tables[id(value)] = value, copy.copy(value)
            elif is_plain(value) and type(vars(value)) is dict:
                tables[id(vars(value))] = vars(value), dict(vars(value))
    try:
        yield
    finally:
        for held, before in tables.values():
            if len(held) != len(before) or not _same_contents(held, before):
                held.clear()
                (held.extend if isinstance(held, list) else held.update)(before)


def _same_contents(held: Any, before: Any) -> bool:
    if isinstance(held, dict):
        return all(name in before and before[name] is value for name, value in held.items())
    return isinstance(held, set) or all(a is b for a, b in zip(held, before, strict=True))


@contextlib.contextmanager
def holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model's tensors of these names hold other values, of other shapes even, within. The tensors stay the very
    objects, so that ties, hooks and flags stay, too."""
    held = [(read(model, name), value) for name, value in tensors.items()]
    before = [(tensor, tensor.data) for tensor, _ in held]
    try:
        for tensor, value in held:
            tensor.data = value
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def run(model: nn.Module, inputs: Inputs, mode: EagerWidened) -> Any:
    """What the model returns. Raises whatever the model raises."""
    args, kwargs = fresh(inputs)
    if mode.wide:
        args, kwargs = pytree.tree_map(widened, (args, kwargs))
    return run_as(model, lambda module: module(*args, **kwargs), mode)


def run_as(model: nn.Module, function: Callable[[nn.Module], Any], mode: EagerWidened) -> Any:
    """What ``function``, which calls the model in some way, returns. Raises whatever it raises."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64 if mode.wide else default)
        with contents_kept(model), undisturbed(model), mode, WideOperands() if mode.wide else contextlib.nullcontext():
            return function(model)
    finally:
        torch.set_default_dtype(default)


def output_tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a model's outputs, caches of registered classes and plain objects included."""
    return [t for leaf in pytree.tree_leaves(outputs) for t in tensors_of(leaf)]


def farthest(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """The largest relative error among pairs of tensors of one shape; infinite where there is none."""
    if len(expected) != len(actual):
        return float("inf")
    pairs = [(e, a) for e, a in zip(expected, actual, strict=True) if e.shape == a.shape]
    return max((distance(e, a.to(e.dtype)) for e, a in pairs), default=float("inf"))


def nearest(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """The smallest relative error among pairs of tensors of one shape: an attention module may also give what is not
    comparable (weights averaged over other heads, keys). Without any pair there is nothing to say: 0."""
    if len(expected) != len(actual):
        return 0.0
    pairs = [(e, a) for e, a in zip(expected, actual, strict=True) if e.shape == a.shape and e.is_floating_point()]
    return min((distance(e, a.to(e.dtype)) for e, a in pairs), default=0.0)


def tolerance_of(tensors: Sequence[Tensor]) -> float:
    """What the error may be by the lowest of the tensors' dtypes."""
    return max([TOLERANCE[torch.float64], *(TOLERANCE.get(t.dtype, 0.0) for t in tensors if t.is_floating_point())])
