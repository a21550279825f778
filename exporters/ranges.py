"""Which sizes a dynamic axis may have: what the exported program allows, what the user says, and min, opt, max."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from sqa_fx.errors import InputError
from sqa_fx.exporters.sidecar import AxisRange, TensorSpec

Ranges = Mapping[str, Sequence[int]]
"""``{"input_ids.1": (1, 128, 4096)}``: input and axis (or the symbol of the axis) to min, opt, max."""
UNBOUNDED = 2**31


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int | str, ...]
    example: tuple[int, ...]


def input_specs(program: torch.export.ExportedProgram, ranges: Ranges | None = None) -> tuple[TensorSpec, ...]:
    """The tensor inputs of ``program`` in call order. A dynamic axis accepts what the program does, narrowed to
    ``ranges``; ``opt`` is the example's size unless ``ranges`` says otherwise.

    Raises InputError for a range of an axis that is not dynamic or not there, that is out of order, or that the program
    does not allow.
    """
    tensors = _tensors(program)
    given = _by_symbol(tensors, ranges or {})
    allowed = {str(symbol): _bounds(bounds) for symbol, bounds in program.range_constraints.items()}
    axes: dict[str, AxisRange] = {}
    for tensor in tensors:
        for size, example in zip(tensor.shape, tensor.example, strict=True):
            if isinstance(size, str) and size not in axes:
                lower, upper = allowed.get(size, (1, None))
                axes[size] = _axis(size, example, lower, upper, given.get(size))
    return tuple(
        TensorSpec(t.name, t.dtype, tuple(n if isinstance(n, int) else axes[n] for n in t.shape)) for t in tensors
    )


def output_specs(program: torch.export.ExportedProgram, names: Sequence[str] | None = None) -> tuple[TensorSpec, ...]:
    """The tensor outputs of ``program``. A dynamic size stands with its expression and no bounds."""
    values = {n.name: n.meta.get("val") for n in program.graph.nodes}
    specs = [s for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    found = [s.arg.name for s in specs if not isinstance(s.arg, ConstantArgument)]
    result = []
    for shown, name in zip(names or found, found, strict=True):
        value = values[name]
        if isinstance(value, Tensor):
            shape = tuple(n if isinstance(n, int) else AxisRange(str(n), 0, _hint(n), None) for n in value.shape)
            result.append(TensorSpec(shown, str(value.dtype), shape))
    return tuple(result)


def require_bounds(specs: Sequence[TensorSpec]) -> None:
    """Raise InputError when a dynamic axis has no upper bound, which an engine with profiles needs."""
    open_axes = {
        n.name: f"{s.name}.{axis}" for s in reversed(specs) for axis, n in enumerate(s.shape)
        if isinstance(n, AxisRange) and n.max is None
    }  # fmt: skip
    if open_axes:
        first = next(iter(open_axes.values()))
        raise InputError(
            f"{', '.join(sorted(open_axes.values()))} are dynamic without an upper bound, and an engine is built for a "
            f"range: give ranges={{{first!r}: (1, 128, 4096), ...}} (--range {first}=1,128,4096), or export static"
        )


def _hint(size: torch.SymInt) -> int:
    return int(size.node.hint) if size.node.has_hint() else 0


def _tensors(program: torch.export.ExportedProgram) -> list[_Tensor]:
    values = {n.name: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
    found = []
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT or isinstance(spec.arg, ConstantArgument):
            continue
        value = values[spec.arg.name]
        if not isinstance(value, Tensor):
            raise InputError(f"input {spec.arg.name} is a {type(value).__name__}; artifacts take tensors only")
        shape = tuple(int(str(n)) if str(n).isdecimal() else str(n) for n in value.shape)
        example = tuple(n if isinstance(n, int) else _hint(n) for n in value.shape)
        found.append(_Tensor(spec.arg.name, str(value.dtype), shape, example))
    return found


def _bounds(bounds: Any) -> tuple[int, int | None]:
    """Least and largest size of a symbol. torch.export writes 2 where it means "not specialised on 0 and 1", and the
    graph is right at 1; nothing is ever right at 0."""
    lower, upper = int(bounds.lower), bounds.upper
    return 1 if lower <= 2 else lower, int(upper) if upper.is_finite and upper < UNBOUNDED else None


def _by_symbol(tensors: Sequence[_Tensor], ranges: Ranges) -> dict[str, tuple[int, int, int]]:
    known = {f"{t.name}.{axis}": size for t in tensors for axis, size in enumerate(t.shape)}
    symbols = {size for size in known.values() if isinstance(size, str)}
    found: dict[str, tuple[int, int, int]] = {}
    for key, values in ranges.items():
        size = key if key in symbols else known.get(key)
        if size is None:
            raise InputError(f"range {key!r}: no such axis; there are {', '.join(known)}")
        if isinstance(size, int):
            raise InputError(f"range {key!r}: this axis has the fixed size {size}; export with dynamic shapes")
        numbers = tuple(int(v) for v in values)
        if len(numbers) != 3 or not 0 < numbers[0] <= numbers[1] <= numbers[2]:
            raise InputError(f"range {key!r} is {list(values)}: give min, opt and max, in order and positive")
        if found.setdefault(size, (numbers[0], numbers[1], numbers[2])) != numbers:
            raise InputError(f"range {key!r} is {list(values)}, but the same size {size} was given {found[size]}")
    return found


def _axis(name: str, example: int, lower: int, upper: int | None, given: tuple[int, int, int] | None) -> AxisRange:
    if given is None:
        return AxisRange(name, lower, example, upper)
    if given[0] < lower or (upper is not None and given[2] > upper):
        raise InputError(
            f"{name} was asked for in {given[0]}..{given[2]}, but the exported program takes {lower}..{upper or ''}; "
            "export with other dynamic_shapes"
        )
    return AxisRange(name, *given)
