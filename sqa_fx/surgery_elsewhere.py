"""A record of surgery that was found on a small sibling, for the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sqa_fx.config_search import Heads
from sqa_fx.errors import SurgeryError
from sqa_fx.module_names import kind_of
from sqa_fx.plan import Plan
from sqa_fx.surgery_record import AttributeChange, ClassChange, Resized, Surgery, value_at


def surgery_elsewhere(
    record: Surgery,
    small: nn.Module,
    small_groups: Sequence[Heads],
    full: nn.Module,
    groups: Sequence[Heads],
    plan: Plan,
) -> Surgery:
    """``record``, found on ``small``, for ``full`` of the same class: the same attributes of the modules of the same
    kinds, with the values that the same quantities have there. Tensors are resized as ``plan`` says.

    Raises SurgeryError where a value is no quantity of the heads, or one of several.
    """
    by_kind: dict[str, list[str]] = {}
    for path, _ in full.named_modules():
        by_kind.setdefault(kind_of(path), []).append(path)
    changes: list[AttributeChange] = []
    for change in record.attributes:
        made: dict[tuple[Any, Any], list[str]] = {}
        for path in _modules(change.modules, by_kind):
            old = value_at(full.get_submodule(path), change.path)
            new = _value(change, old, small_groups, groups)
            made.setdefault((old, new), []).append(path)
        changes.extend(AttributeChange(tuple(paths), change.path, old, new) for (old, new), paths in made.items())
    classes = tuple(ClassChange(tuple(_modules(c.modules, by_kind)), c.old, c.new) for c in record.classes)
    cut = {kind_of(entry.name) for entry in record.parameters}
    held = dict((*full.named_parameters(), *full.named_buffers()))
    resized = tuple(
        Resized(p.name, p.axis, p.size) for p in plan.parameters if p.name in held and kind_of(p.name) in cut
    )
    return Surgery(resized, tuple(changes), classes)


def _modules(paths: Sequence[str], by_kind: Mapping[str, list[str]]) -> list[str]:
    """The modules of the full model that are of the kinds of ``paths``."""
    return [own for kind in dict.fromkeys(map(kind_of, paths)) for own in by_kind.get(kind, ())]


def _value(change: AttributeChange, old: Any, small: Sequence[Heads], full: Sequence[Heads]) -> Any:
    """The new value of an attribute that is ``old`` in the full model."""
    if isinstance(change.new, bool):
        if old != change.old:
            raise SurgeryError(f"{change.attribute} is {old!r}, and {change.old!r} in the sibling")
        return change.new
    values = set()
    for a, b in zip(small, full, strict=True):
        there = b.quantities()
        for name, quantity in a.quantities().items():
            if quantity == (change.old, change.new) and name in there and there[name][0] == old:
                values.add(there[name][1])
    if len(values) != 1:
        raise SurgeryError(f"{change.attribute} {change.old} -> {change.new} is no quantity of the heads alone")
    return values.pop()
