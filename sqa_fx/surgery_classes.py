"""Modules of torch whose code cannot have fewer heads become a subclass that can, under the same parameter names."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from sqa_fx.surgery_record import AttributeChange, ClassChange, read


def narrow_classes(
    model: nn.Module, names: Collection[str]
) -> tuple[tuple[ClassChange, ...], tuple[AttributeChange, ...]]:
    """What becomes of torch's attention modules that hold a tensor of ``names``, and the attributes by which torch's
    encoders choose their native path, which knows nothing of fewer heads. Subclasses with code of their own stay."""
    cut = {id(read(model, name)) for name in names}
    modules = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.MultiheadAttention and any(id(p) in cut for p in module.parameters(recurse=False))
    }
    if not modules:
        return (), ()
    encoders = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoder)
        and vars(module).get("use_nested_tensor") is True
        and any(m in modules.values() for m in module.modules())
    ]
    flags = [AttributeChange(tuple(encoders), ("use_nested_tensor",), True, False)] if encoders else []
    return (ClassChange(tuple(modules)),), tuple(flags)


@contextlib.contextmanager
def reclassed(model: nn.Module, changes: Sequence[ClassChange]) -> Iterator[None]:
    """The modules are instances of the new classes within."""
    before: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for change in changes:
            for path in change.modules:
                module = model.get_submodule(path)
                before.append((module, type(module)))
                module.__class__ = change.classes()[1]
        yield
    finally:
        for module, kind in reversed(before):
            module.__class__ = kind
