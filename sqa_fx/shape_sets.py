"""Inputs at the ends and in the middle of what an exported file accepts: where an engine was tuned, and where not."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sqa_fx.call_tensors import path_name
from sqa_fx.errors import InputError
from sqa_fx.exporters.sidecar import AxisRange, TensorSpec
from sqa_fx.inputs import Inputs, make_input

SHAPES = ("min", "opt", "max", "odd")
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def input_sets_at_shapes(
    specs: Sequence[TensorSpec],
    *,
    vocabulary: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    shapes: Sequence[str] = ("min", "opt", "max"),
    odd: bool = True,
    cap: int | None = None,
) -> list[tuple[str, dict[str, Tensor]]]:
    """``(label, tensors by name)`` with every dynamic axis of ``specs`` at its min, at its opt, at its max, and at odd.

    One symbol has one size, in whatever inputs it stands; an axis that is an expression of the others ("s0 + s1")
    follows them. ``odd`` is a prime within the range, so that nothing divides it, other than min, opt and max, and
    other for each symbol where the ranges have room. No size is below 1. ``cap`` bounds maxima, without going below
    opt; a maximum that stays open counts as opt. A set with the sizes of an earlier one is left out. Values are those
    of `sqa_fx.inputs.parse_input_spec`; every input has a seed of its own.

    Raises InputError for an unknown shape or dtype, or an expression that leaves its range.
    """
    unknown = sorted(set(shapes) - set(SHAPES))
    if unknown:
        raise InputError(f"no shapes {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    axes: dict[str, AxisRange] = {}
    for spec in specs:
        axes |= {n.name: n for n in spec.shape if isinstance(n, AxisRange)}
    free, derived = _split(axes)
    sizes: dict[str, dict[str, int]] = {
        "min": {name: max(1, axis.min) for name, axis in free.items()},
        "opt": {name: max(1, axis.opt) for name, axis in free.items()},
        "max": {name: max(1, _upper(axis, cap) or axis.opt) for name, axis in free.items()},
        "odd": _odd_sizes(free, cap),
    }
    wanted = [which for which in SHAPES if which in shapes or (odd and which == "odd")]
    sets: list[tuple[str, dict[str, Tensor]]] = []
    seen: list[dict[str, int]] = []
    for which in wanted:
        chosen = sizes[which]
        if chosen in seen:
            continue
        seen.append(chosen)
        known = {**chosen, **{name: _evaluate(tree, chosen) for name, tree in derived.items()}}
        for name in derived:
            if known[name] not in axes[name]:
                raise InputError(f"at {which}, {name} is {known[name]}, outside of {axes[name]}: narrow the ranges")
        sets.append((which, _tensors(specs, known, vocabulary, seed, device)))
    return sets


def shared_specs(specs: Sequence[TensorSpec], others: Sequence[Sequence[TensorSpec]]) -> tuple[TensorSpec, ...]:
    """``specs`` with every range narrowed to what the same axis of the same input accepts in all of ``others``.
    Floating dtypes may differ.

    Raises InputError for inputs that differ in name, rank or dtype, or ranges without a size in common.
    """
    bounds: dict[str, AxisRange] = {}
    for spec in specs:
        for axis, own in enumerate(spec.shape):
            if isinstance(own, AxisRange):
                bounds.setdefault(own.name, own)
                for other in others:
                    bounds[own.name] = _narrowed(bounds[own.name], spec, axis, other)
    return tuple(
        replace(spec, shape=tuple(n if isinstance(n, int) else bounds[n.name] for n in spec.shape)) for spec in specs
    )


def laid_out(tensors: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
    """``tensors`` in the form of a call ``(args, kwargs)``: by name where a keyword has it, the others in order; what
    is no tensor stays. Raises InputError when the call has another number of tensors."""
    paths, spec = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    rest = dict(tensors)
    leaves: list[Any] = [leaf for _, leaf in paths]
    waiting = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for i in list(waiting):
        which, *path = paths[i][0]
        name = path_name(tuple(path))
        if path_name((which,)) == "1" and name in rest:  # 0 are the arguments by position
            leaves[i] = rest.pop(name)
            waiting.remove(i)
    if len(waiting) != len(rest):
        raise InputError(
            f"the model is called with {len(tensors) - len(rest) + len(waiting)} tensors, and the artifact takes "
            f"{len(tensors)}, {', '.join(tensors)}; give --input"
        )
    for i, value in zip(waiting, rest.values(), strict=True):
        leaves[i] = value
    made: Inputs = pytree.tree_unflatten(leaves, spec)
    return made


def _narrowed(own: AxisRange, spec: TensorSpec, axis: int, others: Sequence[TensorSpec]) -> AxisRange:
    like = next((s for s in others if s.name == spec.name), None)
    if like is None or len(like.shape) != len(spec.shape) or not _alike(like, spec):
        raise InputError(
            f"the artifacts do not take the same inputs: {spec.name} {spec.dtype} with {len(spec.shape)} axes in one, "
            + (f"{like.dtype} with {len(like.shape)} axes in another" if like else "and no such input in another")
            + "; validate them one by one"
        )
    size = like.shape[axis]
    low, high = (size, size) if isinstance(size, int) else (size.min, size.max)
    low, high = max(low, own.min), _lesser(high, own.max)
    if high is not None and low > high:
        raise InputError(f"input {spec.name} axis {axis}: no size fits both {own} and {size}; validate them one by one")
    opt = max(low, own.opt if high is None else min(own.opt, high))
    return AxisRange(own.name, low, opt, high)


def is_floating(spec: TensorSpec) -> bool:
    """Whether the tensor holds real numbers."""
    return spec.torch_dtype is not None and spec.torch_dtype.is_floating_point


def _alike(a: TensorSpec, b: TensorSpec) -> bool:
    return a.dtype == b.dtype or (is_floating(a) and is_floating(b))


def _lesser(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _tensors(
    specs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    vocabulary: int | None,
    seed: int,
    device: torch.device | str,
) -> dict[str, Tensor]:
    made = {}
    for index, spec in enumerate(specs):
        dtype = spec.torch_dtype
        if dtype is None or dtype.is_complex:
            raise InputError(f"input {spec.name} is {spec.dtype}, and values are made for real and bool dtypes only")
        shape = [n if isinstance(n, int) else sizes[n.name] for n in spec.shape]
        made[spec.name] = make_input(spec.name, shape, dtype, vocabulary, seed + index).to(device)
    return made


# --- sizes -----------------------------------------------------------------------------------------------------------


def _upper(axis: AxisRange, cap: int | None) -> int | None:
    """The largest size to try; None where nothing bounds it."""
    if cap is None:
        return axis.max
    return max(axis.opt, cap if axis.max is None else min(axis.max, cap))


def _odd_sizes(axes: Mapping[str, AxisRange], cap: int | None) -> dict[str, int]:
    """A prime for each symbol: the first above opt, else the last below it, that no other symbol has already."""
    chosen: dict[str, int] = {}
    for name, axis in axes.items():
        top = _upper(axis, cap)
        taken = {max(1, axis.min), max(1, axis.opt), top}
        above = range(axis.opt + 1, top + 1) if top is not None else count(axis.opt + 1)
        below = range(axis.opt - 1, axis.min - 1, -1)
        others = set(chosen.values())
        found: int | None = None
        for avoided in (taken | others, taken):  # a size of its own if there is one
            for sizes in (above, below):
                found = next((n for n in sizes if n > 2 and n not in avoided and _is_prime(n)), None)
                if found is not None:
                    break
            if found is not None:
                break
        if found is None:  # a range too narrow for a prime: any size besides, else the one that it is best at
            inner = range(max(1, axis.min), (top or axis.opt) + 1)
            found = next((n for n in inner if n not in taken), max(1, axis.opt))
        chosen[name] = found
    return chosen


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _split(axes: Mapping[str, AxisRange]) -> tuple[dict[str, AxisRange], dict[str, ast.expr]]:
    """The symbols with sizes of their own, and the expressions of these."""
    free: dict[str, AxisRange] = {}
    derived: dict[str, ast.expr] = {}
    for name, axis in axes.items():
        tree = _parsed(name)
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} if tree else set()
        if tree is not None and not isinstance(tree, ast.Name) and names and names <= axes.keys():
            derived[name] = tree
        else:
            free[name] = axis
    return free, derived


def _parsed(name: str) -> ast.expr | None:
    """The expression that a size is, read without evaluating anything; None when it is no sum, product or quotient."""
    try:
        tree = ast.parse(name, mode="eval").body
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        known = (
            isinstance(node, ast.Name | ast.Load | ast.BinOp)
            or type(node) in _OPERATORS
            or (isinstance(node, ast.Constant) and type(node.value) is int)
        )
        if not known:
            return None
    return tree


def _evaluate(tree: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(tree, ast.BinOp):
        return _OPERATORS[type(tree.op)](_evaluate(tree.left, sizes), _evaluate(tree.right, sizes))
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    assert isinstance(tree, ast.Constant) and isinstance(tree.value, int)
    return tree.value
