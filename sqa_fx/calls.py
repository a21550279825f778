"""One way of calling a captured graph: the original signature, bound to the inputs it was captured with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from sqa_fx.errors import InputError
from sqa_fx.passes.hints import is_free, value_of


def signature_to_json(signature: inspect.Signature | None) -> list[dict[str, Any]] | None:
    """A signature as data; a default that is no plain value is kept only as "there is one" (null)."""
    if signature is None:
        return None
    rows = []
    for p in signature.parameters.values():
        row: dict[str, Any] = {"name": p.name, "kind": p.kind.name}
        if p.default is not inspect.Parameter.empty:
            row["default"] = p.default if isinstance(p.default, int | float | bool | str | None) else None
        rows.append(row)
    return rows


def signature_from_json(rows: Any) -> inspect.Signature | None:
    """The signature that :func:`signature_to_json` wrote."""
    if rows is None:
        return None
    empty = inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter(str(r["name"]), getattr(_KINDS, str(r["kind"])), default=r.get("default", empty))
            for r in rows
        ]
    )


_KINDS = inspect.Parameter


class CallBinder:
    """Turns any call that fits the original signature into the one call that the graph was captured with."""

    def __init__(
        self, graph: fx.Graph, signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.signature, self.args, self.kwargs = signature, args, dict(kwargs)
        leaves, self.spec = pytree.tree_flatten((args, dict(kwargs)))
        holders = [n for n in graph.nodes if n.op == "placeholder"]
        self.names = [n.name for n in holders]
        self.expected = [
            _Form.of(value_of(n)) if isinstance(leaf, torch.Tensor) else leaf
            for n, leaf in zip(holders, leaves, strict=True)
        ]
        self._captured = self._bound(args, dict(kwargs)) if signature is not None else {}

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Every given input by name, what ``**kwargs`` of the signature collects included."""
        assert self.signature is not None
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"the call does not fit the model's signature: {error}") from error
        found: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                found.update(value)
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                found.update({f"*{i}": v for i, v in enumerate(value)})
            else:
                found[name] = value
        return found

    def captured_names(self) -> set[str] | None:
        """The names of the inputs that the graph was captured with; None where only their order is known."""
        return set(self._captured) if self.signature is not None else None

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], floating: torch.dtype | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) for the graph. Raises InputError (what, shapes, the fix) when the call cannot be served.

        ``floating`` is the dtype that the module's parameters have now: after ``.double()`` or ``.half()`` its floating
        inputs change with it.
        """
        if self.signature is not None:
            args, kwargs = self._rearrange(args, kwargs)
        elif kwargs.keys() == self.kwargs.keys():
            kwargs = {name: kwargs[name] for name in self.kwargs}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            raise InputError(
                f"the graph was captured with inputs {self.names}; convert again with example inputs of this form"
            )
        for name, leaf, expected in zip(self.names, leaves, self.expected, strict=True):
            self._check(name, leaf, expected, floating)
        return args, kwargs

    def _rearrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self.signature is not None
        given = self._bound(args, kwargs)
        for name, value in given.items():
            if name not in self._captured:
                parameter = self.signature.parameters.get(name)
                if value is not None and (parameter is None or value is not parameter.default):
                    raise InputError(
                        f"input {name!r} was not there when the model was captured, so the graph cannot "
                        "use it; convert again with "
                        f"{name!r} among the example inputs (it was captured with: {', '.join(self._captured)})"
                    )
        names = list(self._captured)
        values = {}
        for name in names:
            if name in given:
                values[name] = given[name]
            elif self._captured[name] is None or not isinstance(self._captured[name], torch.Tensor):
                values[name] = self._captured[name]
            else:
                raise InputError(f"input {name!r} is missing; the graph was captured with: {', '.join(names)}")
        positional = names[: len(self.args)]
        return tuple(values[n] for n in positional), {n: values[n] for n in self.kwargs}

    @staticmethod
    def _check(name: str, leaf: Any, expected: Any, floating: torch.dtype | None) -> None:
        if not isinstance(expected, _Form):
            if isinstance(expected, int | float | bool | str | None) and leaf != expected:
                raise InputError(
                    f"input {name!r} was {expected!r} when the model was captured and is fixed; got {leaf!r}"
                )
            return
        if not isinstance(leaf, torch.Tensor):
            raise InputError(f"input {name!r} must be a tensor of shape {expected.text}; got {type(leaf).__name__}")
        if leaf.dtype != expected.dtype and not (expected.dtype.is_floating_point and leaf.dtype == floating):
            raise InputError(
                f"input {name!r} must have dtype {expected.dtype}; got {leaf.dtype} of shape {tuple(leaf.shape)}"
            )
        fits = leaf.dim() == len(expected.sizes) and all(
            wanted is None or size == wanted for size, wanted in zip(leaf.shape, expected.sizes, strict=True)
        )
        if not fits:
            raise InputError(
                f"input {name!r} must have shape {expected.text} (letters are free); got "
                f"{list(leaf.shape)}. Sizes that are "
                "fixed come from the example inputs: convert with others, or with a batch and length "
                "above 1, to free them"
            )


@dataclass(frozen=True)
class _Form:
    """What a tensor input must look like, as plain data, which torch.compile can trace. Free sizes are None."""

    dtype: torch.dtype
    sizes: tuple[int | None, ...]
    text: str

    @staticmethod
    def of(value: torch.Tensor) -> _Form:
        """The form of a captured input."""
        sizes = tuple(None if is_free(size) else int(size) for size in value.shape)
        return _Form(value.dtype, sizes, "[" + ", ".join(str(size) for size in value.shape) + "]")
