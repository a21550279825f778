"""The stock transformers class behind a model: what its config says, and models built from changed configs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqa_fx.errors import InputError, MissingError
from sqa_fx.torchvision_ops import make_torchvision_importable
from sqa_fx.transformers_class import transformers_class

FieldPath = tuple[str, ...]
"""A field of a config, behind the names of the configs nested in one another that lead to it."""


@dataclass(frozen=True)
class Stock:
    """A class of transformers and the config of one of its models; no weights."""

    cls: Any
    config_class: Any
    fields: Mapping[str, Any]
    """The config as JSON-ready data, every field named."""
    generation_config: Any = None
    folder: Path | None = None
    """Where the model was loaded from, if it is a directory here: its tokenizer lies there."""

    @property
    def name(self) -> str:
        """The name of the class."""
        return str(self.cls.__name__)

    def config(self, fields: Mapping[str, Any] | None = None) -> Any:
        """The config object of ``fields`` (default: its own). Raises whatever the config's class raises."""
        with quiet():
            return self.config_class.from_dict(copy.deepcopy(dict(self.fields if fields is None else fields)))

    def bare(self, fields: Mapping[str, Any] | None = None) -> nn.Module:
        """The model of ``fields`` on the meta device. Raises whatever the class raises."""
        config = self.config(fields)
        with quiet(), torch.device("meta"):
            model: nn.Module = self.cls(config)
        return model.eval()

    def build(self, fields: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model of ``fields`` as the class initialises it. Raises whatever the class raises."""
        config = self.config(fields)
        with quiet(), _default_dtype(dtype):
            model: nn.Module = self.cls(config)
        return model.eval()

    def fill(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """``model``, built by this class, with the weights ``state`` and the generation config, ties kept, in eval
        mode. Raises whatever torch raises on weights that do not fit."""
        made: Any = model
        made.load_state_dict({name: held.detach() for name, held in state.items()}, strict=True, assign=True)
        made.tie_weights()
        if getattr(made, "generation_config", None) is not None and self.generation_config is not None:
            made.generation_config = copy.deepcopy(self.generation_config)
        return model.eval()

    def integer_fields(self) -> list[tuple[FieldPath, int]]:
        """Every field that is a whole number, those of nested configs too. What is nested in another way (rotary
        parameters, labels) is no size of the model."""
        found: list[tuple[FieldPath, int]] = []

        def walk(config: Any, data: Mapping[str, Any], path: FieldPath) -> None:
            for name, value in data.items():
                if type(value) is int and not name.startswith("_"):
                    found.append(((*path, name), value))
                elif isinstance(value, Mapping) and _is_config(getattr(config, name, None)):
                    walk(getattr(config, name), value, (*path, name))

        walk(self.config(), self.fields, ())
        return found

    def unset_fields(self) -> list[FieldPath]:
        """Fields that the class reads when a model is built and that have no value: None, or absent."""
        config = self.config()
        found: dict[FieldPath, None] = {}
        for path, part in _configs(config, ()):
            _watch(part, path, found)
        with contextlib.suppress(Exception), quiet(), torch.device("meta"):
            self.cls(config)
        return [path for path in found if not path[-1].startswith("_")]


def stock_of(model: nn.Module) -> Stock | None:
    """The stock class and config of ``model``; None where it is no model of a class that transformers itself has."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    if not _is_config(config) or not type(model).__module__.startswith("transformers."):
        return None
    make_torchvision_importable()
    import transformers

    if getattr(transformers, name, None) is not type(model):
        return None
    folder = Path(str(getattr(config, "_name_or_path", "") or ""))
    return Stock(
        type(model),
        type(config),
        plain_fields(config),
        copy.deepcopy(getattr(model, "generation_config", None)),
        folder if str(folder) != "." and folder.is_dir() else None,
    )


def stock_of_config(path: Path) -> Stock:
    """The stock class that the config.json in the directory ``path`` names.

    Raises MissingError (no config.json, no transformers) and InputError (a class that transformers does not have).
    """
    import json

    file = path / "config.json"
    if not file.is_file():
        raise MissingError("there is no config.json")
    try:
        architectures = json.loads(file.read_bytes()).get("architectures")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError("config.json is not a JSON object") from error
    if not architectures:
        raise InputError("config.json names no architecture")
    cls = transformers_class(architectures[0], "config.json")
    import transformers

    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; each means that the config is at fault
        raise InputError(f"config.json cannot be read: {type(error).__name__}: {error}") from error
    return Stock(cls, type(config), plain_fields(config), None, path)


def with_values(fields: Mapping[str, Any], values: Sequence[tuple[FieldPath, Any]]) -> dict[str, Any]:
    """A copy of ``fields`` in which the field at every path has its new value."""
    made = copy.deepcopy(dict(fields))
    for path, value in values:
        inner = made
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
    return made


def value_of(fields: Mapping[str, Any], path: FieldPath) -> Any:
    """What the field at ``path`` holds; None where there is none."""
    inner: Any = fields
    for name in path:
        inner = inner.get(name) if isinstance(inner, Mapping) else None
    return inner


def auto_class(stock: Stock) -> Any:
    """The Auto class of transformers that makes ``stock.cls`` from its config; the class itself where there is none."""
    import transformers

    for name in sorted(n for n in dir(transformers) if n.startswith("AutoModel")):
        auto = getattr(transformers, name, None)
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is None:
            continue
        with contextlib.suppress(Exception):  # an entry whose own libraries are missing
            own = mapping.get(stock.config_class, ())
            if stock.cls in (own if isinstance(own, tuple) else (own,)):
                return auto
    return stock.cls


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and progress bars of transformers."""
    import warnings

    import transformers

    library = transformers.utils.logging
    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def plain_fields(config: Any) -> dict[str, Any]:
    """Every field of a config object as JSON-ready data, but where it was loaded from."""
    import json

    fields: dict[str, Any] = config.to_dict()
    fields.pop("_name_or_path", None)
    made: dict[str, Any] = json.loads(json.dumps(config._encode_special_floats(fields)))
    return dict(config._decode_special_floats(made))


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(type(value), "from_dict") and hasattr(type(value), "model_type")


def _configs(config: Any, path: FieldPath) -> Iterator[tuple[FieldPath, Any]]:
    """The config and all that are nested in it."""
    yield path, config
    for name, value in list(vars(config).items()):
        if _is_config(value):
            yield from _configs(value, (*path, name))


def _watch(config: Any, path: FieldPath, found: dict[FieldPath, None]) -> None:
    """Let ``config`` note in ``found`` which of its attributes are read and have no value."""
    cls: Any = type(config)

    def read(self: Any, name: str) -> Any:
        try:
            value = cls.__getattribute__(self, name)
        except AttributeError:
            found[(*path, name)] = None
            raise
        if value is None:
            found[(*path, name)] = None
        return value

    with contextlib.suppress(TypeError):  # a class that cannot be derived from tells nothing
        config.__class__ = type(cls.__name__, (cls,), {"__getattribute__": read, "__module__": cls.__module__})
