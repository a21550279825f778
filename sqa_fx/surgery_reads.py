"""Which whole numbers a forward pass reads from attributes: of modules, and of plain objects that modules hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sqa_fx.surgery_record import Path

_DEEP = 3
"""How many containers a number may lie in."""


class Reads:
    """What was read: (id of the object, attribute)."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, str]] = set()
        self.blind: set[int] = set()
        """Objects whose class does not let reads be seen: everything of them may have been read."""

    def has(self, owner: object, name: str) -> bool:
        """Whether ``name`` of ``owner`` was read, or may have been."""
        return (id(owner), name) in self.seen or id(owner) in self.blind


@contextlib.contextmanager
def recording(model: nn.Module, reads: Reads) -> Iterator[None]:
    """Note in ``reads`` what is read within. The classes of the model's modules, and of the objects that they hold, get
    another ``__getattribute__`` for so long."""
    held: list[object] = list(model.modules())
    known = {id(o) for o in held}
    for module in model.modules():
        for value in vars(module).values():
            for found in _objects(value):
                if id(found) not in known:
                    known.add(id(found))
                    held.append(found)
    before: list[tuple[type, Any]] = []
    try:
        for cls in dict.fromkeys(type(o) for o in held):
            own = cls.__dict__.get("__getattribute__")
            plain = cls.__getattribute__

            def noting(self: Any, name: str, plain: Any = plain) -> Any:
                reads.seen.add((id(self), name))
                return plain(self, name)

            try:
                cls.__getattribute__ = noting  # type: ignore[method-assign]
            except TypeError:  # a class made in C
                reads.blind.update(id(o) for o in held if type(o) is cls)
                continue
            before.append((cls, own))
        yield
    finally:
        for cls, own in reversed(before):
            if own is None:
                del cls.__getattribute__
            else:
                cls.__getattribute__ = own


def _objects(value: Any, depth: int = 2) -> Iterator[object]:
    """Plain objects with attributes (a config) in ``value`` and, once, in what they hold."""
    if isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            if not isinstance(entry, int | float | str | bool | None | nn.Module | Tensor):
                yield from _objects(entry, depth - 1) if depth else ()
    elif is_plain(value):
        yield value
        if depth:
            for inner in vars(value).values():
                if is_plain(inner):
                    yield from _objects(inner, depth - 1)


def is_plain(value: Any) -> bool:
    """True for an object of an ordinary class with attributes: a config, a data class, a processor."""
    return hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | Tensor) and not callable_only(value)


def callable_only(value: Any) -> bool:
    """True for functions, methods and modules of Python: their attributes are no state of the model."""
    return type(value).__module__ in ("builtins", "types", "functools", "torch", "weakref", "abc")


def numbers(module: nn.Module, reads: Reads) -> Iterator[tuple[Path, int]]:
    """Every whole number that ``module`` was read for: an attribute, or what lies in its containers and objects."""
    own = vars(module)
    names = [n for n in own if reads.has(module, n)]
    names += [n for (i, n) in sorted(reads.seen) if i == id(module) and n not in own and _class_number(module, n)]
    for name in names:
        value = own[name] if name in own else getattr(module, name)
        for inner, number in _numbers(value, reads, _DEEP):
            yield (name, *inner), number


def _class_number(module: nn.Module, name: str) -> bool:
    """True for an attribute of the class that an attribute of the instance would hide."""
    return type(getattr(type(module), name, None)) is int


def _numbers(value: Any, reads: Reads, depth: int) -> Iterator[tuple[Path, int]]:
    if type(value) is int:
        yield (), value
    elif depth and isinstance(value, Mapping):
        for key, entry in value.items():
            if isinstance(key, str):
                yield from _prefixed(key, entry, reads, depth)
    elif depth and isinstance(value, list | tuple) and len(value) <= 16:
        for index, entry in enumerate(value):
            yield from _prefixed(index, entry, reads, depth)
    elif depth and is_plain(value):
        for owner, name in sorted(reads.seen):
            if owner == id(value) and not name.startswith("__"):
                with contextlib.suppress(Exception):  # a property that does not work for this object
                    yield from _prefixed(name, getattr(value, name), reads, depth)
        if id(value) in reads.blind:
            for name, entry in vars(value).items():
                yield from _prefixed(name, entry, reads, depth)


def _prefixed(step: str | int, value: Any, reads: Reads, depth: int) -> Iterator[tuple[Path, int]]:
    for inner, number in _numbers(value, reads, depth - 1):
        yield (step, *inner), number
