"""Names for the inputs and outputs of an exported program."""

from __future__ import annotations

from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind
from torch.utils import _pytree as pytree


def user_inputs(program: torch.export.ExportedProgram) -> list[InputSpec]:
    """What the caller passes, in call order; parameters and buffers are no part of it."""
    return [s for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]


def tensor_inputs(program: torch.export.ExportedProgram) -> list[str]:
    """Names of the tensors among the arguments: ``x``, ``pair_0``, ``mask``."""
    return [s.arg.name for s in user_inputs(program) if not isinstance(s.arg, ConstantArgument)]


def tensor_outputs(program: torch.export.ExportedProgram) -> list[str]:
    """Names of the tensors returned: the keys that lead to each, as in ``hidden_states_0``, or ``output``."""
    specs = [s for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    spec = program.call_spec.out_spec
    try:
        tree = pytree.tree_unflatten(range(len(specs)), spec)
        paths = ["_".join(_key(k) for k in path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError:  # a container that was registered without its keys
        paths = [str(i) for i in range(len(specs))]
    if len(paths) != len(specs):
        paths = [str(i) for i in range(len(specs))]
    taken = set(tensor_inputs(program))
    names: list[str] = []
    for path, s in zip(paths, specs, strict=True):
        if isinstance(s.arg, ConstantArgument):
            continue
        name = path if path and not path[0].isdigit() else f"output_{path}" if path else "output"
        while name in taken:
            name += "_out"
        taken.add(name)
        names.append(name)
    return names


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return "".join(c if c.isalnum() or c in "_." else "_" for c in str(getattr(entry, attribute)))
    return str(entry)
