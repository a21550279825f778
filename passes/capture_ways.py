"""The ways of calling torch.export, tried in order: what a user would try by hand when the first one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from sqa_fx.errors import CaptureError, InputError

Free = Callable[[Tensor], Sequence[int]]
DynamicShapes = Mapping[str, Any] | Sequence[Any] | Literal["auto"] | None
TRY = (
    "what to try: pass inputs that reach the code path you serve; turn caches off (use_cache=False); "
    "pass dynamic_shapes=None for static shapes; or give an ExportedProgram that you exported yourself"
)
_PLAIN = (Tensor, int, float, complex, str, bytes, torch.SymInt, torch.SymFloat, torch.SymBool, torch.dtype,
          torch.device, torch.layout, torch.memory_format, type(None))  # fmt: skip
_ABOUT_GRADIENTS = re.compile(r"backward|requires_grad|autograd", re.IGNORECASE)


@dataclass
class Exported:
    """A program, the call and the dynamic shapes that made it, and how it was made when not in the first way."""

    program: torch.export.ExportedProgram
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: Any
    gradients: bool = True
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Way:
    spec: Any
    strict: bool = False
    no_cache: bool = False
    gradients: bool = True
    strip: bool = False

    def __str__(self) -> str:
        words = ["strict export with "] if self.strict else []
        words.append("static shapes" if self.spec is None else "dynamic shapes")
        words.extend([" and use_cache=False"] if self.no_cache else [])
        words.extend([] if self.gradients else [", without gradients"])
        words.extend([", its cache left out of the outputs"] if self.strip else [])
        return "".join(words)


def export_some_way(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: DynamicShapes, free: Free
) -> Exported:
    """Export ``model`` in the first way that works; its notes say which one it was and why those before it failed.

    Non-strict export comes before strict export and dynamic shapes before static ones. A model that would return a KV
    cache nobody asked for is asked for none (``use_cache=False``). Classes in the outputs that torch does not know
    are registered with pytree: by their library where it offers that, otherwise as what they are, data classes or
    plain objects. Shapes that the caller specified are never dropped. Raises CaptureError with torch's reasons.
    """
    automatic = isinstance(dynamic, str)
    known = register_caches(args, kwargs)
    ladder = _Ladder(model, args, kwargs, automatic_shapes(model, args, kwargs, free) if automatic else dynamic)
    ladder.notes.extend(known)
    versions = _state_versions(model)
    try:
        return ladder.climb(static_too=automatic)
    finally:
        if _state_versions(model) != versions:
            ladder.notes.append("tracing ran code that changed buffers of the model in place")


class _Ladder:
    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], spec: Any) -> None:
        self.model, self.args, self.kwargs, self.spec = model, args, kwargs, spec
        self.notes: list[str] = []
        self.failed: list[tuple[_Way, str]] = []
        self.unknown: set[type] = set()
        """The classes that torch does not know in what the model returned last."""
        self.caches = False
        """Whether a cache was among it."""

    def climb(self, static_too: bool) -> Exported:
        optional_cache = cache_is_optional(self.model, self.args, self.kwargs)
        specs = [self.spec] if self.spec is None or not static_too else [self.spec, None]
        ways = [_Way(self.spec)]
        ways += [_Way(s, no_cache=optional_cache) for s in specs]
        ways += [_Way(s, strict=True, no_cache=optional_cache) for s in specs]
        with_cache: Exported | None = None
        for way in [w for i, w in enumerate(ways) if w not in ways[:i]]:
            done = self.attempt(way, register=way.no_cache or not optional_cache)
            if optional_cache and not way.no_cache and self.caches:
                with_cache = done
                self.failed = [(way, "it would return a KV cache, which nobody asked for")]
            elif with_cache is not None:
                # Nothing but the first way returned a cache. It stays when the next one cannot do without.
                return done or self._settle(with_cache)
            elif done is not None:
                return done
        if any(_ABOUT_GRADIENTS.search(why) for way, why in self.failed if not way.strict):
            for spec in specs:
                done = self.attempt(_Way(spec, no_cache=optional_cache, gradients=False))
                if done is not None:
                    return done
        if self.caches:
            for spec in specs:
                done = self.attempt(_Way(spec, no_cache=optional_cache, strip=True))
                if done is not None:
                    return done
        raise CaptureError(f"torch.export failed: {self._reasons()}; {TRY}") from self.error

    def _settle(self, done: Exported) -> Exported:
        self.notes.append(f"the outputs hold a KV cache, because {self.failed[-1][1]}")
        return done

    def attempt(self, way: _Way, register: bool = True) -> Exported | None:
        self.unknown = set()
        done = self._export(way)
        while done is None and register and self.unknown:
            names = [
                f"{cls.__module__}.{cls.__qualname__}" for cls in sorted(self.unknown, key=str) if register_class(cls)
            ]
            if not names:
                break
            self.notes.append(f"registered with torch's pytree, to be returned by a graph: {', '.join(names)}")
            self.failed.pop()
            self.unknown = set()
            done = self._export(way)
        if done is not None and (self.failed or way != _Way(self.spec)):
            self.notes.append(self._story(way))
        return done

    def _export(self, way: _Way) -> Exported | None:
        kwargs = {**self.kwargs, "use_cache": False} if way.no_cache else self.kwargs
        spec = way.spec
        if way.no_cache and isinstance(spec, Mapping):
            spec = {**spec, "use_cache": None}

        def look(module: nn.Module, given: Any, output: Any) -> Any:
            self.unknown |= {type(leaf) for leaf in pytree.tree_leaves(output) if not isinstance(leaf, _PLAIN)}
            leaves = pytree.tree_leaves(output, is_leaf=lambda v: is_cache_class(type(v)))
            self.caches = any(is_cache_class(type(leaf)) for leaf in leaves)
            return _without_caches(output) if way.strip else output

        # Dynamo would trace the hook; what non-strict export sees comes first and is the same.
        hook = None if way.strict else self.model.register_forward_hook(look)
        try:
            with quiet(way.gradients), attributes_kept(self.model):
                # Export marks the dynamic dimensions on the tensors: neither the user's nor a retry may see that.
                args, named = fresh((self.args, kwargs))
                _name_every_input(self.model, args, named)
                program = torch.export.export(self.model, args, named, dynamic_shapes=spec, strict=way.strict)
            return Exported(program, self.args, kwargs, spec, way.gradients, self.notes)
        except Exception as error:
            self.error = error
            self.failed.append((way, reason(error)))
            return None
        finally:
            if hook is not None:
                hook.remove()

    def _story(self, way: _Way) -> str:
        return f"captured with {way}" + (f", because {self._reasons(160)}" if self.failed else "")

    def _reasons(self, length: int = 500) -> str:
        """Every failure once, in order, with the ways that it closes; all but the first one short."""
        by_reason: dict[str, list[str]] = {}
        for way, why in self.failed:
            by_reason.setdefault(why, []).append(str(way))
        parts = [
            f"{why[: length if i == 0 else 160]} (with {'; '.join(ways)})"
            for i, (why, ways) in enumerate(by_reason.items())
        ]
        return "; ".join(parts)


def register_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Make the caches among the inputs known to pytree, nested ones too; what the notes say of it."""
    names: list[str] = []
    while True:
        kinds = {type(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if not isinstance(leaf, _PLAIN)}
        caches = [cls for cls in kinds if is_cache_class(cls)]
        new = [f"{cls.__module__}.{cls.__qualname__}" for cls in sorted(caches, key=str) if register_class(cls)]
        if not new:
            return [f"registered with torch's pytree, to be an input of a graph: {', '.join(names)}"] if names else []
        names.extend(new)


def _name_every_input(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give ``model`` a forward that names what its ``**kwargs`` would collect, since torch.export takes dynamic shapes
    for named inputs only. It is an attribute of the instance; the caller puts the attributes back."""
    original = model.forward
    try:
        signature = inspect.signature(original)
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return
    kinds = {name: signature.parameters[name].kind for name in bound}
    collected = next((name for name, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD), None)
    if collected is None or inspect.Parameter.VAR_POSITIONAL in kinds.values():
        return
    names = [*(name for name in bound if name != collected), *bound[collected]]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    parameter = inspect.Parameter
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter(name, parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names]
    )
    model.forward = forward


def cache_is_optional(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True when the model can be told to return no cache, was not told either way, and would not do so by itself."""
    try:
        signature = inspect.signature(model.forward)
        given = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return False
    if "use_cache" in given or "use_cache" in kwargs:
        return False
    own = getattr(getattr(model, "config", None), "use_cache", None)
    parameter = signature.parameters.get("use_cache")
    if parameter is None:
        # ``**kwargs`` takes anything; only a configuration that turns the cache on says that it means something.
        return own is True and any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if parameter.kind is parameter.POSITIONAL_ONLY:
        return False
    return parameter.default is not False and not (parameter.default is None and own is False)


def is_cache_class(cls: type) -> bool:
    """True for the class of a KV cache, by its name or that of a base."""
    return any(base.__name__.endswith("Cache") for base in cls.__mro__)


def register_class(cls: type) -> bool:
    """Make ``cls`` known to pytree: by its own library, as a data class, or as a plain object. False if it cannot be.

    A class with slots or one that is built outside Python has no fields that could be listed.
    """
    if cls in pytree.SUPPORTED_NODES:
        return False
    name = f"{cls.__module__}.{cls.__qualname__}"
    if _by_library(cls):
        return cls in pytree.SUPPORTED_NODES
    try:
        if dataclasses.is_dataclass(cls):
            torch.export.register_dataclass(cls, serialized_type_name=name)
            return True
        if not hasattr(cls, "__dict__") or getattr(cls, "__dictoffset__", 0) == 0:
            return False
        pytree.register_pytree_node(cls, _fields, lambda values, form: _object(cls, values, form),
                                    serialized_type_name=name, flatten_with_keys_fn=_fields_with_keys)  # fmt: skip
    except (TypeError, ValueError):
        return False
    return True


def _by_library(cls: type) -> bool:
    """Ask the library that defines a cache class for its own registration, where it has one."""
    library = cls.__module__.partition(".")[0]
    if library not in sys.modules or not is_cache_class(cls):
        return False
    try:
        helper: Callable[[type], None] = importlib.import_module(
            f"{library}.exporters.exporter_dynamo"
        ).register_pytree_node
        helper(cls)
    except (ImportError, AttributeError, TypeError, ValueError):
        return False
    return True


def _fields(value: Any) -> tuple[list[Any], list[Any]]:
    """The fields of a plain object. Texts are part of its form: torch could not save a graph that returns one."""
    names = sorted(vars(value))
    texts = {name: vars(value)[name] for name in names if isinstance(vars(value)[name], str)}
    others = [name for name in names if name not in texts]
    return [vars(value)[name] for name in others], [others, texts]


def _fields_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], list[Any]]:
    values, form = _fields(value)
    return [(pytree.GetAttrKey(n), v) for n, v in zip(form[0], values, strict=True)], form


def _object(cls: type, values: Any, form: list[Any]) -> Any:
    names, texts = form
    made: Any = object.__new__(cls)
    vars(made).update(zip(names, values, strict=True))
    vars(made).update(texts)
    return made


def _without_caches(output: Any) -> Any:
    """The output with every cache object replaced by None."""
    if is_cache_class(type(output)):
        return None
    if isinstance(output, Mapping):
        kept = {name: _without_caches(value) for name, value in output.items()}
        return kept if type(output) is dict else type(output)(**kept)
    if isinstance(output, tuple | list):
        values = [_without_caches(value) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    return output


def fresh(values: Any) -> Any:
    """The same structure with copies of the tensors, cut off from any autograd graph."""
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, values)


def _state_versions(model: nn.Module) -> list[int]:
    return [t._version for t in (*model.parameters(), *model.buffers()) if not t.is_inference()]


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Tracing runs the model's Python code: attributes that it set (to traced tensors, even) are put back."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            now = module.__dict__
            for name in [n for n in now if n not in attributes]:
                del now[name]
            now.update((n, v) for n, v in attributes.items() if n not in now or now[n] is not v)


def reason(error: BaseException) -> str:
    """The first lines of an error, on one line."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:500]


@contextlib.contextmanager
def quiet(gradients: bool = True) -> Iterator[None]:
    """No native attention fast path (it hides attention behind one op), gradients on or off, no export warnings, and
    no half-made graphs on stderr."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(),
            torch.set_grad_enabled(gradients),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def free_dimensions(tensor: Tensor) -> list[int]:
    """The dimensions that are usually batch or sequence: the first two of integer and up to 3-D float inputs (not a
    last feature dimension), all of a mask, the first one of images and other inputs."""
    rank = tensor.dim()
    if rank >= 3 and tensor.dtype == torch.bool:
        return list(range(rank))
    if not tensor.is_floating_point() or rank == 1:
        return list(range(min(rank, 2)))
    return list(range(rank - 1)) if rank <= 3 else [0]


def _cache_dimensions(tensor: Tensor) -> list[int]:
    """The dimensions of keys or values [batch, KV heads, positions, head dim] in a cache that are batch and
    positions."""
    return [0, tensor.dim() - 2] if tensor.is_floating_point() and tensor.dim() > 2 else []


def automatic_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: Free = free_dimensions
) -> Any:
    """Dim.AUTO for the ``free`` dimensions of every input. A size of 0 or 1 stays static, since export specialises it
    anyway. Raises InputError when the inputs do not fit the model's forward."""
    auto = torch.export.Dim.AUTO

    def spec(value: Any, cache: bool = False) -> Any:
        if isinstance(value, Tensor):
            dims = _cache_dimensions(value) if cache else free(value)
            return {d: auto for d in dims if value.size(d) > 1}
        if type(value) in (list, tuple):
            nested = cache or all(type(v) in (list, tuple) for v in value)
            return type(value)(spec(v, nested) for v in value)
        if type(value) is dict:
            return {k: spec(v, cache) for k, v in value.items()}
        if type(value) in pytree.SUPPORTED_NODES:
            # torch.export wants a list for the children of any class that is registered.
            children, _ = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
            return [spec(v, cache or is_cache_class(type(value))) for v in children]
        return None

    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise InputError(f"the example inputs do not fit the model's forward: {error}") from error
    parameters = inspect.signature(model.forward).parameters
    result: dict[str, Any] = {}
    for name, value in bound.items():
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            result.update({k: spec(v) for k, v in value.items()})
        else:
            result[name] = spec(value)
    return result
