"""Fake values of new nodes, computed once per distinct call: layers repeat, and fake tensors are slow."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree

_CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class FakeResults:
    """Runs ops on fake values, remembering results by op, shapes, strides and dtypes."""

    def __init__(self, fake_mode: Any) -> None:
        self.fake_mode = fake_mode
        self._known: dict[Any, Any] = {}
        self._keys: dict[int, tuple[Any, Any]] = {}

    def _key(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            held = self._keys.get(id(value))
            if held is None or held[0] is not value:
                sizes = tuple(self._key(s) for s in (*value.shape, *value.stride()))
                held = (value, (sizes, value.dtype, value.device, value.requires_grad))
                self._keys[id(value)] = held
            return held[1]
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return value.node.expr
        if isinstance(value, list | tuple):
            return tuple(self._key(v) for v in value)
        if isinstance(value, _CONSTANTS):
            return (type(value).__name__, value)
        raise TypeError(f"no key for {type(value)}")

    def run(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The fake result of ``target(*args, **kwargs)``; raises what the op raises when shapes do not fit."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        try:
            key = (target, str(spec), tuple(self._key(v) for v in leaves))
        except TypeError:
            key = None
        if key is not None and key in self._known:
            return self._known[key]
        with self.fake_mode:
            result = target(*args, **kwargs)
        if key is not None:
            self._known[key] = result
        return result
