"""Run an ATen graph in float64, whatever dtypes its casts name, and without dropout: what others are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sqa_fx.passes.attention_in_rows import in_rows

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


class Widened(fx.Interpreter):
    """Runs a graph without dropout and without writing to its buffers; ``wide`` does it in float64, with attention in
    blocks of rows, so that the scores of long sequences fit."""

    def __init__(self, module: fx.GraphModule, wide: bool = True) -> None:
        super().__init__(module)
        self.wide = wide

    def widened(self, value: Any) -> Any:
        """A tensor or dtype in the width of this run; anything else as it is."""
        if not self.wide:
            return value
        if isinstance(value, Tensor) and value.dtype in _WIDER:
            return value.to(_WIDER[value.dtype])
        return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """See fx.Interpreter."""
        return self.widened(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """See fx.Interpreter."""
        return self.widened(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """See fx.Interpreter."""
        name = target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else ""
        if name in ("dropout", "alpha_dropout", "feature_dropout", "bernoulli"):
            return args[0]
        if name == "copy_":
            return args[1]  # a model that writes to its buffers, which a proof must not do
        if name == "scaled_dot_product_attention":
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        if self.wide:
            args, kwargs = pytree.tree_map(self.widened, (args, kwargs))
        if name == "scaled_dot_product_attention" and self.wide:
            return in_rows(*args, **kwargs)
        if name in ("view", "_unsafe_view"):
            return args[0].reshape(args[1])  # the fused kernels that the graph was traced for lay tensors out otherwise
        return super().call_function(target, args, kwargs)
