"""An exported program that is called with its tensors by name, as every exported file is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from sqa_fx.passes.widened import Widened


class FlatProgram(nn.Module):
    """Calls ``program`` with its tensor inputs as keywords, under their names in the graph; constants are filled in."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.program: fx.GraphModule = program.module()
        specs = [s.arg for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
        self._inputs: list[tuple[str, Any, bool]] = [
            (arg.name, getattr(arg, "value", None), isinstance(arg, ConstantArgument)) for arg in specs
        ]
        assert program.call_spec.in_spec is not None
        self._tree = program.call_spec.in_spec

    def forward(self, **tensors: Tensor) -> Any:
        """The program's outputs. Raises KeyError for a missing tensor."""
        args, kwargs = pytree.tree_unflatten(self._leaves(tensors), self._tree)
        return self.program(*args, **kwargs)

    def widened(self, **tensors: Tensor) -> Any:
        """The outputs, computed in float64."""
        return widened_outputs(self.program, self._leaves(tensors))

    def _leaves(self, tensors: dict[str, Tensor]) -> list[Any]:
        return [value if constant else tensors[name] for name, value, constant in self._inputs]


def widened_outputs(graph_module: fx.GraphModule, leaves: Sequence[Any]) -> Any:
    """The outputs of a graph that torch.export made, computed in float64 from flat inputs (see ``Widened``)."""
    with torch.no_grad():
        outputs = Widened(graph_module).run(*leaves, enable_io_processing=False)
    info = graph_module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    return pytree.tree_unflatten(outputs, info.out_spec)
