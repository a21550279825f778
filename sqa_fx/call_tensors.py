"""Which tensor of a call goes to which named input of an exported file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from sqa_fx.errors import InputError


def lay_out(
    input_names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], what: str
) -> dict[str, Tensor]:
    """The tensors of a call by input name, in the order of ``input_names``.

    Keyword tensors go to the inputs of their names, all others to the rest in order; what is no tensor is a constant
    that was written into the file. ``what`` names the file in messages. Raises InputError when there are too few or too
    many.
    """
    tensors: dict[str, Tensor] = {}
    in_order: list[Tensor] = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    for path, leaf in pytree.tree_flatten_with_path(dict(kwargs))[0]:
        if not isinstance(leaf, Tensor):
            continue
        name = path_name(path)
        if name in input_names:
            tensors[name] = leaf
        else:
            in_order.append(leaf)
    rest = [name for name in input_names if name not in tensors]
    if len(rest) != len(in_order):
        have = len(tensors) + len(in_order)
        raise InputError(
            f"{what} takes {len(input_names)} tensors, {', '.join(input_names)}, but got {have}"
            + (f", of which {', '.join(tensors)} by name" if tensors else "")
        )
    tensors.update(zip(rest, in_order, strict=True))
    return {name: tensors[name] for name in input_names}


def path_name(path: tuple[Any, ...]) -> str:
    """``hidden_states_0`` for the pytree path of ``output["hidden_states"][0]``."""
    parts = []
    for entry in path:
        values = [getattr(entry, a) for a in ("key", "idx", "name") if hasattr(entry, a)]
        parts.append(str(values[0] if values else entry))
    return "_".join(parts)
