"""What a captured program demands of its sizes beyond ranges and equal symbols, such as a length divisible by four.

torch.export keeps these as guards and checks them when its own module is called; compiled files do not, and compute
something else for a size that breaks one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from sqa_fx.errors import InputError
from sqa_fx.exporters.program_names import user_inputs

# L['pair']['a'].size()[1]: an argument, keys into it, and an axis.
_SIZE = re.compile(r"L((?:\[(?:'[^']*'|\d+)\])+)\.size\(\)\[(\d+)\]")
_KEY = re.compile(r"\['?([^\]']*)'?\]")
_FUNCTIONS: dict[str, Any] = {"max": max, "min": min, "abs": abs}


def size_conditions(program: torch.export.ExportedProgram) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Conditions as Python expressions over ``size("input", axis)``, and the guards that cannot be said so.

    What follows from equal symbols alone is left out.
    """
    names = [spec.arg.name for spec in user_inputs(program)]
    values = {n.name: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
    shapes = {name: values[name].shape for name in names if isinstance(values[name], Tensor)}
    symbols = {name: [sympy.sympify(str(n)) for n in shape] for name, shape in shapes.items()}
    examples = {name: [_hint(n) for n in shape] for name, shape in shapes.items()}
    conditions, others = [], []
    for guard in dict.fromkeys(program._guards_code):
        condition = _SIZE.sub(lambda m: f"size({_input_name(m[1], names)!r}, {m[2]})", guard)
        try:
            if _holds(condition, examples) is not True:
                raise ValueError("it does not hold for the example")
        except Exception:  # whatever an expression in another form raises
            others.append(guard)
            continue
        if not _trivial(condition, symbols):
            conditions.append(condition)
    return tuple(conditions), tuple(others)


def check_conditions(conditions: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError when ``tensors``, by input name, break one of the ``conditions`` of ``size_conditions``."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for condition in conditions:
        try:
            held = bool(_holds(condition, shapes))
        except ZeroDivisionError:
            held = False
        if not held:
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise InputError(
                f"the exported program demands {condition}, which fails for {given}; use other sizes, or export again "
                "with an example of this size"
            )


def _input_name(path: str, names: Sequence[str]) -> str:
    keys = _KEY.findall(path)
    return names[int(keys[1])] if keys[0] == "flat_args" and len(keys) == 2 else "_".join(keys)


def _holds(condition: str, shapes: Mapping[str, Sequence[Any]]) -> Any:
    def size(name: str, axis: int) -> Any:
        return shapes[name][axis]

    return eval(condition, {"__builtins__": {}, "size": size, **_FUNCTIONS})


def _trivial(condition: str, symbols: Mapping[str, Sequence[Any]]) -> bool:
    try:
        return _holds(condition, symbols) in (True, sympy.true)
    except Exception:  # a relation that sympy cannot decide
        return False


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 0
