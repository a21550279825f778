"""Load a model by the name that the command line takes."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqa_fx.archive import read_archive
from sqa_fx.errors import InputError, MissingError
from sqa_fx.storage import is_saved_program
from sqa_fx.torchvision_ops import make_torchvision_importable
from sqa_fx.transformers_class import transformers_class

FORMS = """a model is one of
  package.module:factory   a callable (or a module) there; it returns a module, (module, args) or (module, args, kwargs)
  DIRECTORY                saved by transformers (config.json with safetensors), or by sqa-fx
  timm:NAME                a timm model, such as timm:vit_tiny_patch16_224
  FILE.pt2                 an ExportedProgram written by torch.export.save"""


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, the example inputs that came with it (if any), and where it is from."""

    module: nn.Module | torch.export.ExportedProgram
    args: tuple[Any, ...] | None
    kwargs: dict[str, Any] | None
    origin: str


def load_model(name: str, *, pretrained: bool = False) -> LoadedModel:
    """Load the model that ``name`` says, in eval mode, from local files only; nothing is unpickled.

    Args:
        name: ``package.module:factory`` (the current folder is on the path), a directory saved by transformers or by
            sqa-fx, ``timm:NAME``, or a ``.pt2`` file.
        pretrained: whether a timm model gets its trained weights; they are downloaded where they are not cached.

    Raises:
        InputError: there is no such model (the message lists the forms), or its files cannot be used.
        MissingError: a library is missing; the message has the pip line.
    """
    if name.startswith("timm:"):
        return _from_timm(name.removeprefix("timm:"), pretrained)
    path = Path(name)
    if path.is_dir():
        if is_saved_program(path):
            return _from_saved(path)
        if (path / "config.json").is_file():
            return _from_transformers(path)
        raise InputError(f"{name} holds neither a config.json nor an sqa_fx.json;\n{FORMS}")
    if path.suffix == ".pt2":
        ep = read_archive(path)
        args, kwargs = ep.example_inputs or (None, None)
        return LoadedModel(ep, args, kwargs, f"{path} (torch.export)")
    module, colon, attribute = name.partition(":")
    if colon and all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        return _from_factory(module, attribute)
    raise InputError(f"no model {name!r};\n{FORMS}")


def _from_saved(path: Path) -> LoadedModel:
    import sqa_fx
    from sqa_fx.pretrained import from_pretrained, read_own

    if read_own(path) is not None:
        return LoadedModel(from_pretrained(path), None, None, f"{path} (sqa-fx, a transformers model)")
    converted = sqa_fx.load(path)
    return LoadedModel(converted, converted.example_args, converted.example_kwargs, f"{path} (sqa-fx)")


def _from_factory(module_name: str, attribute: str) -> LoadedModel:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise InputError(
                f"no module {module_name!r} on the Python path or in {Path(here).name}/;\n{FORMS}"
            ) from error
        raise MissingError(f"{module_name} needs {error.name}: pip install {error.name}") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise InputError(f"{module_name} has no {attribute!r};\n{FORMS}")
        value = getattr(value, part)
    origin = f"{module_name}:{attribute}"
    if not isinstance(value, nn.Module):
        if not callable(value):
            raise InputError(f"{origin} is a {type(value).__name__}: it must be a module or a callable that makes one")
        value = value()
    args: Any = None
    kwargs: Any = None
    if isinstance(value, tuple) and 1 <= len(value) <= 3:
        value, args, kwargs = (*value, None, None)[:3]
    if not isinstance(value, nn.Module):
        raise InputError(
            f"{origin} returned a {type(value).__name__}: it must return a module, optionally with args, kwargs"
        )
    if args is not None and not isinstance(args, tuple | list):
        raise InputError(f"{origin} returned args of type {type(args).__name__}: they must be a tuple of inputs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise InputError(f"{origin} returned kwargs of type {type(kwargs).__name__}: they must be a dict")
    given = args is not None or kwargs is not None
    return LoadedModel(value.eval(), tuple(args or ()) if given else None, kwargs or {} if given else None, origin)


def _from_timm(name: str, pretrained: bool) -> LoadedModel:
    make_torchvision_importable()
    try:
        import timm
    except ImportError as error:
        raise MissingError(f"timm:{name} needs timm: pip install timm") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise InputError(f"timm has no model {name!r}" + (f"; it has {', '.join(near)}" if near else ""))
    module: nn.Module = timm.create_model(name, pretrained=pretrained)
    return LoadedModel(module.eval(), None, None, f"timm:{name}")


def _from_transformers(path: Path) -> LoadedModel:
    try:
        config = json.loads((path / "config.json").read_bytes())
    except ValueError as error:
        raise InputError(f"{path / 'config.json'} is not JSON ({error})") from error
    architectures = config.get("architectures") if isinstance(config, dict) else None
    if not architectures:
        raise InputError(f"{path / 'config.json'} names no architecture: it must say which class to build")
    if not any(path.glob("*.safetensors")):
        other = [
            p.name for p in sorted(path.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt")
        ]
        found = f"it holds {', '.join(other)}, which would have to be unpickled" if other else "it holds no weights"
        raise InputError(
            f"{path} has no *.safetensors: {found}. Save it with save_pretrained of a current transformers"
        )
    cls = transformers_class(architectures[0], path)
    import transformers

    try:
        with _quiet_off_terminal(transformers.utils.logging):
            module, info = cls.from_pretrained(
                path, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # transformers and safetensors raise many kinds; each means that the files are at fault
        raise InputError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    if info.get("mismatched_keys"):
        raise InputError(f"{path}: sizes differ from the config for {sorted(map(str, info['mismatched_keys']))[:5]}")
    if info.get("missing_keys"):
        missing = sorted(info["missing_keys"])
        warnings.warn(f"{path} has no weights for {', '.join(missing[:5])}: they are random", stacklevel=3)
    model: nn.Module = module.eval()
    return LoadedModel(model, None, None, f"{path} ({architectures[0]})")


@contextlib.contextmanager
def _quiet_off_terminal(library: Any) -> Iterator[None]:
    """No progress bars of transformers where stderr is a file."""
    if sys.stderr.isatty() or not library.is_progress_bar_enabled():
        yield
        return
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.enable_progress_bar()
