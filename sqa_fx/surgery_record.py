"""What surgery on an eager module changed, as data: it makes a freshly built model of the stock class take the cut
weights, without searching again.

JSON schema, version 1::

    {"format": "sqa-fx-surgery", "version": 1,
     "parameters": [{"name": "encoder.layer.0.attention.self.query.weight", "axis": 0, "size": [96, 48]}, ...],
     "attributes": [
       {"modules": ["encoder.layer.0.attention.self", ...], "path": ["num_attention_heads"], "old": 8, "new": 4},
       {"modules": ["h.0.attn"], "path": ["config", "num_heads"], "old": 8, "new": 4}, ...],
     "classes": [{"modules": ["layers.0.self_attn"], "old": "torch.nn.MultiheadAttention",
                  "new": "sqa_fx.narrow_attention.NarrowMultiheadAttention"}, ...]}

``parameters`` are the tensors (parameters, buffers, plain tensor attributes) that are shorter now along ``axis``; of
tied ones, one name is listed. ``path`` leads from a module to the value: an attribute, then attributes of plain
objects (a config), keys of mappings and indices of sequences. What lies between the module and the value is copied
before it is changed, so that nobody else who holds it sees the change. ``classes`` (may be left out) are modules of
torch whose code cannot have fewer heads, and the subclass that they became; no other class is ever taken by name.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sqa_fx.errors import InputError
from sqa_fx.module_names import has_module, kind_of
from sqa_fx.narrow_attention import NarrowMultiheadAttention

FORMAT = "sqa-fx-surgery"
VERSION = 1
Path = tuple[str | int, ...]
_CLASSES: dict[tuple[str, str], tuple[type[nn.Module], type[nn.Module]]] = {
    ("torch.nn.MultiheadAttention", "sqa_fx.narrow_attention.NarrowMultiheadAttention"): (
        nn.MultiheadAttention,
        NarrowMultiheadAttention,
    )
}


@dataclass(frozen=True)
class Resized:
    """A tensor of the model that went from ``size[0]`` to ``size[1]`` entries along ``axis``."""

    name: str
    axis: int
    size: tuple[int, int]


@dataclass(frozen=True)
class AttributeChange:
    """The whole number (or flag) at ``path`` of every module in ``modules`` became ``new``."""

    modules: tuple[str, ...]
    path: Path
    old: int
    new: int

    @property
    def pattern(self) -> str:
        """The modules as one text, layer numbers left out: "encoder.layer.*.attention.self"."""
        patterns = dict.fromkeys(kind_of(path) or "(model)" for path in self.modules)
        return ", ".join(patterns) if len(self.modules) > 1 else self.modules[0] or "(model)"

    @property
    def attribute(self) -> str:
        """The path as it would be written in Python: "config.num_heads", "sizes[0]"."""
        return str(self.path[0]) + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in self.path[1:])

    def line(self) -> str:
        """The change as one line of text."""
        return f"{self.pattern}: {self.attribute} {self.old} -> {self.new}"


@dataclass(frozen=True)
class ClassChange:
    """The modules became instances of a subclass of theirs that takes its head counts from its parameters."""

    modules: tuple[str, ...]
    old: str = "torch.nn.MultiheadAttention"
    new: str = "sqa_fx.narrow_attention.NarrowMultiheadAttention"

    def classes(self) -> tuple[type[nn.Module], type[nn.Module]]:
        """The two classes. Raises InputError for any others than those that this release knows."""
        if (self.old, self.new) not in _CLASSES:
            raise InputError(f"the record of surgery makes a {self.new} of a {self.old}, which is not known")
        return _CLASSES[self.old, self.new]

    def line(self) -> str:
        """The change as one line of text."""
        new = self.new.rpartition(".")[2]
        return f"{AttributeChange(self.modules, ('class',), 0, 0).pattern}: {self.old} -> {new}"


@dataclass(frozen=True)
class Surgery:
    """All changes of shapes and attributes; see the module's docstring for the JSON schema."""

    parameters: tuple[Resized, ...] = ()
    attributes: tuple[AttributeChange, ...] = ()
    classes: tuple[ClassChange, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record as JSON-ready data."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if not data["classes"]:
            del data["classes"]
        return {"format": FORMAT, "version": VERSION, **data}

    @staticmethod
    def from_json(data: Any) -> Surgery:
        """The record that :meth:`to_json` wrote. Raises InputError on anything else, naming what is wrong."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise InputError(f"this is no record of surgery: its 'format' is not {FORMAT!r}")
        if data.get("version") != VERSION:
            raise InputError(f"surgery version {data.get('version')!r} is not known; this release reads {VERSION}")
        try:
            return Surgery(
                tuple(Resized(str(p["name"]), _int(p["axis"]), _pair(p["size"])) for p in data["parameters"]),
                tuple(
                    AttributeChange(
                        tuple(str(m) for m in a["modules"]), _path(a["path"]), _number(a["old"]), _number(a["new"])
                    )
                    for a in data["attributes"]
                ),
                tuple(
                    ClassChange(tuple(str(m) for m in c["modules"]), str(c["old"]), str(c["new"]))
                    for c in data.get("classes", ())
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the record of surgery is damaged: {type(error).__name__}: {error}") from error

    def apply(self, model: nn.Module) -> None:
        """Give ``model``, freshly built by the stock class, the shapes and attributes of the one that was operated on.

        Its tensors keep the first entries of what they hold: load the cut weights (``load_state_dict``) next. Works on
        the meta device too. Raises InputError, with ``model`` unchanged, when it is not what the record was made for.
        """
        self.check(model)
        for entry in self.parameters:
            held = read(model, entry.name)
            with torch.no_grad():
                held.data = held.detach().narrow(entry.axis, 0, entry.size[1]).clone()
        for module, name, value in assignments(model, self.attributes):
            vars(module)[name] = value
        for change in self.classes:
            for path in change.modules:
                model.get_submodule(path).__class__ = change.classes()[1]
        fit_layers(model, self.parameters)

    def check(self, model: nn.Module) -> None:
        """Raise InputError when ``model`` has other shapes or attributes than the record was made for."""
        for entry in self.parameters:
            try:
                held = read(model, entry.name)
            except (AttributeError, LookupError) as error:
                raise InputError(f"the model has no {entry.name}, which the record of surgery resizes") from error
            if not isinstance(held, Tensor) or held.dim() <= entry.axis or held.shape[entry.axis] != entry.size[0]:
                shape = list(held.shape) if isinstance(held, Tensor) else type(held).__name__
                raise InputError(
                    f"{entry.name} is {shape}; the record of surgery expects {entry.size[0]} entries along axis "
                    f"{entry.axis}: the model was built from another configuration, or was operated on already"
                )
        for kind in self.classes:
            for path in kind.modules:
                if not has_module(model, path) or type(model.get_submodule(path)) is not kind.classes()[0]:
                    raise InputError(f"{path or 'the model'} is no {kind.old}, which the record of surgery changes")
        for change in self.attributes:
            for path in change.modules:
                try:
                    value = value_at(model.get_submodule(path), change.path)
                except (AttributeError, LookupError, TypeError) as error:
                    raise InputError(f"{path or 'the model'} has no {change.attribute}") from error
                if value != change.old:
                    raise InputError(
                        f"{path or 'the model'}.{change.attribute} is {value!r}, the record of surgery expects "
                        f"{change.old}: the model was built from another configuration, or was operated on already"
                    )

    def lines(self) -> list[str]:
        """The attributes that changed, a line each."""
        return [*(change.line() for change in self.classes), *(change.line() for change in self.attributes)]


def read(model: nn.Module, name: str) -> Any:
    """The tensor called ``name``. Raises AttributeError where there is none."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def value_at(module: Any, path: Path) -> Any:
    """What ``path`` leads to."""
    for step in path:
        module = _next(module, step)
    return module


def _next(value: Any, step: str | int) -> Any:
    if isinstance(value, Mapping):
        return value[step]
    return value[int(step)] if isinstance(value, Sequence) else getattr(value, str(step))


def with_value(value: Any, path: Path, new: int) -> Any:
    """A shallow copy of ``value`` in which ``path`` leads to ``new``; with an empty path ``new`` itself.

    Raises TypeError or AttributeError where something on the way cannot be copied and changed.
    """
    if not path:
        return new
    inner = with_value(_next(value, path[0]), path[1:], new)
    if isinstance(value, tuple):
        entries = list(value)
        entries[int(path[0])] = inner
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    twin = copy.copy(value)
    if isinstance(twin, MutableMapping | list):
        twin[path[0]] = inner  # type: ignore[index]
    else:
        setattr(twin, str(path[0]), inner)
    return twin


def assignments(model: nn.Module, changes: Iterable[AttributeChange]) -> list[tuple[nn.Module, str, Any]]:
    """(module, attribute, new value) for ``changes``. Modules that shared an object and change alike share its copy."""
    wanted: dict[tuple[str, str], list[tuple[Path, int]]] = {}
    for change in changes:
        for path in change.modules:
            wanted.setdefault((path, str(change.path[0])), []).append((change.path[1:], change.new))
    made: dict[tuple[int, tuple[tuple[Path, int], ...]], Any] = {}
    result = []
    for (path, name), own in wanted.items():
        module = model.get_submodule(path)
        held = getattr(module, name)
        key = (id(held), tuple(own))
        if key not in made:
            value = held
            for inner, new in own:
                value = with_value(value, inner, new)
            made[key] = value
        result.append((module, name, made[key]))
    return result


def assign(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Give ``module`` an attribute of its own. Returns what undoes that."""
    own = vars(module)
    there, before = name in own, own.get(name)

    def undo() -> None:
        if there:
            own[name] = before
        else:
            own.pop(name, None)

    own[name] = value
    return undo


_SIZES: tuple[tuple[type[nn.Module], str, int, str], ...] = (
    (nn.Linear, "weight", 0, "out_features"),
    (nn.Linear, "weight", 1, "in_features"),
    (nn.Bilinear, "weight", 0, "out_features"),
    (nn.Embedding, "weight", 0, "num_embeddings"),
    (nn.Embedding, "weight", 1, "embedding_dim"),
    (nn.Conv1d, "weight", 0, "out_channels"),
    (nn.Conv2d, "weight", 0, "out_channels"),
    (nn.Conv3d, "weight", 0, "out_channels"),
    (nn.GroupNorm, "weight", 0, "num_channels"),
    (nn.BatchNorm1d, "weight", 0, "num_features"),
    (nn.BatchNorm2d, "weight", 0, "num_features"),
)
"""What torch's own layers call an axis of their weight; most only print it, and libraries read it."""


def layer_sizes(model: nn.Module, resized: Iterable[Resized]) -> list[tuple[nn.Module, str, int]]:
    """(layer, attribute, size) for the layers of torch whose weights are resized: Linear's in_features and the like."""
    found = []
    entries: dict[int, Resized] = {id(read(model, entry.name)): entry for entry in resized}
    for module in model.modules():
        for kind, parameter, axis, name in _SIZES:
            entry = entries.get(id(module._parameters.get(parameter))) if isinstance(module, kind) else None
            if entry is not None and entry.axis == axis and vars(module).get(name) == entry.size[0]:
                found.append((module, name, entry.size[1]))
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            entry = entries.get(id(module._parameters.get("weight")))
            if entry is not None and entry.axis == 1 and module.in_channels == entry.size[0] * module.groups:
                found.append((module, "in_channels", entry.size[1] * module.groups))
    return found


def fit_layers(model: nn.Module, resized: Iterable[Resized]) -> None:
    """Let in_features, out_features and the like of torch's own layers follow their resized weights."""
    for module, name, size in layer_sizes(model, resized):
        vars(module)[name] = size


def _number(value: Any) -> int:
    return value if isinstance(value, bool) else _int(value)


def _int(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return _int(first), _int(second)


def _path(value: Any) -> Path:
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], str):
        raise ValueError(f"{value!r} is no path")
    if not all(isinstance(step, str | int) for step in value):
        raise ValueError(f"{value!r} is no path")
    return tuple(value)
