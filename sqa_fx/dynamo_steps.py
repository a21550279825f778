"""Dynamo's graph run node by node, so that it can be traced to ATen with what dynamo knows of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.amp import autocast_mode
from torch.utils.checkpoint import CheckpointPolicy

from sqa_fx.dynamo_trace import Recorder, Unusual

_checkpoints = itertools.count()


class GraphRunner(nn.Module):
    """Runs dynamo's graph with its tensors as arguments, and detaches what it computes with gradients off."""

    def __init__(self, module: fx.GraphModule, held: list[str], gradients: bool) -> None:
        super().__init__()
        # Not as a submodule: its parameters are arguments here.
        self.__dict__["_of"] = module
        self._held, self._gradients = held, gradients

    def forward(self, *args: Any) -> Any:
        """The outputs for the inputs and held tensors ``args``."""
        return self.run(args)

    def run(self, args: Sequence[Any], recorder: Recorder | None = None) -> Any:
        """The outputs; ``recorder`` is told of every node."""
        count = len(args) - len(self._held)
        held = dict(zip(self._held, args[count:], strict=True))
        steps = _Steps(self.__dict__["_of"], held, self._gradients, recorder, [])
        try:
            return steps.run(*args[:count])
        finally:
            # What an error kept the graph from leaving.
            for context in reversed(steps.entered):
                autocast_mode._exit_autocast(context)


class _Steps(fx.Interpreter):
    def __init__(
        self,
        module: fx.GraphModule,
        held: dict[str, Tensor],
        gradients: bool,
        recorder: Recorder | None,
        entered: list[Any],
    ) -> None:
        super().__init__(module)
        self.held, self.gradients, self.recorder, self.entered = held, gradients, recorder, entered
        self.enabled = True

    def run_node(self, n: fx.Node) -> Any:
        if self.recorder is None:
            return super().run_node(n)
        with self.recorder.coming_from(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return getattr(self, n.op)(n.target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.held[str(target)] if str(target) in self.held else super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch._C._set_grad_enabled:
            self.enabled = bool(args[0])
            return None
        if getattr(target, "__name__", "") == "tag_activation_checkpoint":
            result = self._inline(_tagged(args[0]), args[1:])
        elif getattr(target, "__name__", "") == "invoke_subgraph":
            result = self._inline(args[0], args[2:])
        else:
            if self.recorder is not None:
                _check_ordinary(target)
            result = super().call_function(target, args, kwargs)
            if target is autocast_mode._enter_autocast:
                self.entered.append(result)
            elif target is autocast_mode._exit_autocast:
                self.entered.remove(args[0])
        return result if self.enabled or not self.gradients else _detached(result)

    def _inline(self, body: fx.GraphModule, args: Sequence[Any]) -> Any:
        steps = _Steps(body, {}, self.gradients, self.recorder, self.entered)
        steps.enabled = self.enabled
        return steps.run(*args)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_method(target, args, kwargs)
        return result if self.enabled or not self.gradients else _detached(result)


def _check_ordinary(target: Any) -> None:
    """Raise Unusual for functions that call others, and for transforms, which an error would not leave."""
    if isinstance(target, torch._ops.HigherOrderOperator) or "functorch" in (getattr(target, "__module__", "") or ""):
        raise Unusual(f"the graph calls {target}")


def _tagged(body: fx.GraphModule) -> fx.GraphModule:
    """The body of an activation checkpoint, its nodes marked for the partitioner of AOTAutograd."""
    number = next(_checkpoints)
    for node in body.graph.nodes:
        node.meta["recompute"], node.meta["ac_graph_id"] = CheckpointPolicy.PREFER_RECOMPUTE, number
    return body


def _detached(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.detach() if result.is_floating_point() or result.is_complex() else result
    return type(result)(map(_detached, result)) if type(result) in (tuple, list) else result
