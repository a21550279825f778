"""Run eager code in float64, whatever dtypes it names: op by op, so that no wide copy of the weights is held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


class EagerWidened(TorchDispatchMode):
    """Under this mode every operand is widened as it is used, and every cast or new tensor is wide. Tensors that are
    written to in place keep their own dtype, and dropout does nothing only in eval mode. Counts the operations; without
    ``wide`` that is all."""

    supports_higher_order_operators = True

    def __init__(self, wide: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.wide, self.count = wide, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        kwargs = kwargs or {}
        if not self.wide:
            return func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        if schema is None or schema.is_mutable:
            return func(*args, **kwargs)
        # A view must stay one: what is written through it must arrive.
        if any(a.alias_info is not None for a in schema.arguments):
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map(widened, (args, kwargs))
        return func(*args, **kwargs)


class WideOperands(TorchFunctionMode):
    """Widens the operands of functions that compare dtypes before any operation is dispatched; used together with
    EagerWidened."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        if name.startswith("conv") or name in ("scaled_dot_product_attention", "batch_norm", "lstm", "gru"):
            args, kwargs = pytree.tree_map(widened, (args, kwargs))
        return func(*args, **kwargs)


def widened(value: Any) -> Any:
    """A tensor or dtype in double width; anything else as it is."""
    if isinstance(value, Tensor) and value.dtype in WIDER:
        return value.to(WIDER[value.dtype])
    return WIDER.get(value, value) if isinstance(value, torch.dtype) else value
