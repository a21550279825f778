"""The converted module: the original's call signature and parameter names over a rewritten graph."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from sqa_fx.calls import CallBinder, signature_from_json, signature_to_json
from sqa_fx.checkpointing import in_segments
from sqa_fx.errors import InputError
from sqa_fx.flat_program import widened_outputs
from sqa_fx.passes.aten_call import argument, op_name, set_argument
from sqa_fx.passes.capture import dropout_nodes
from sqa_fx.plan import Plan
from sqa_fx.report import Report

PLAN_TENSORS = "plan.safetensors"


class ConvertedModule(nn.Module):
    """A converted model. It is called, trained, saved and compiled like the original.

    ``plan`` says what was done, ``report`` what it saves and how it was proved. Parameter names are the original's.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        *,
        plan: Plan,
        report: Report,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        dynamic_shapes: Any,
        training: bool,
        signature: inspect.Signature | None,
    ) -> None:
        super().__init__()
        self.plan, self.report = plan, report
        self.example_args, self.example_kwargs = args, dict(kwargs)
        self.dynamic_shapes = dynamic_shapes
        self._captured_training = training
        self._binder = CallBinder(graph_module.graph, signature, args, kwargs)
        # The graph's own tables are this module's: one set of parameters under the original's names.
        self._parameters, self._buffers, self._modules = (
            graph_module._parameters,
            graph_module._buffers,
            graph_module._modules,
        )
        self._non_persistent_buffers_set = graph_module._non_persistent_buffers_set
        self.__dict__["graph_module"] = graph_module
        self.__dict__["_segments"] = None
        self.__dict__["_dropout"] = {n.name: _rate(n) for n in dropout_nodes(graph_module)}
        nn.Module.train(self, training)

    graph_module: fx.GraphModule
    _dropout: dict[str, float]
    _segments: Callable[..., Any] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's outputs. Raises InputError when an input does not fit what the graph was captured for."""
        floating = next((p.dtype for p in self.parameters() if p.is_floating_point()), None)
        args, kwargs = self._binder.bind(args, kwargs, floating)
        if self._segments is None or not torch.is_grad_enabled():
            return self.graph_module(*args, **kwargs)
        outputs = self._segments(*pytree.tree_leaves((args, kwargs)))
        info = self.graph_module.graph._codegen.pytree_info  # type: ignore[attr-defined]
        return pytree.tree_unflatten(outputs, info.out_spec)

    def widened(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, computed in float64 whatever dtype the graph was captured in: a reference for comparisons."""
        args, kwargs = self._binder.bind(args, kwargs)
        return widened_outputs(self.graph_module, pytree.tree_leaves((args, kwargs)))

    def checkpoint_activations(self, enabled: bool = True) -> ConvertedModule:
        """Compute activations again in the backward pass instead of keeping them: one segment for each attention.

        It saves memory as ``gradient_checkpointing_enable()`` of the original does, and costs one more forward pass.
        """
        self.__dict__["_segments"] = in_segments(self.graph_module) if enabled else None
        return self

    def train(self, mode: bool = True) -> ConvertedModule:
        """Switch dropout on or off. A module captured in eval mode holds no dropout: convert(model.train()) to keep it.

        Raises InputError for a graph whose batch norm was captured in training mode.
        """
        if mode and not self._captured_training:
            warnings.warn(
                "this model was captured in eval mode, so its graph holds no dropout; "
                "convert(model.train(), ...) keeps it",
                stacklevel=2,
            )
        if not mode and any(
            op_name(n).removesuffix("_functional") in ("batch_norm", "_native_batch_norm_legit", "native_batch_norm")
            and True in n.args
            for n in self.graph_module.graph.nodes
        ):
            raise InputError("batch norm was captured in training mode; convert(model.eval(), ...) for evaluation")
        for node in self.graph_module.graph.nodes:
            if node.name in self._dropout:
                if op_name(node) == "scaled_dot_product_attention":
                    set_argument(node, "dropout_p", self._dropout[node.name] if mode else 0.0)
                else:
                    set_argument(node, "train", mode)
        if self._dropout:
            self.graph_module.recompile()
            self.checkpoint_activations(self._segments is not None)
        for module in self.children():
            _set_mode(module, mode)
        self.training = mode
        return self

    def exported_program(self) -> torch.export.ExportedProgram:
        """The converted graph as an ExportedProgram with the dynamic shapes of the capture."""
        with _silence():
            return torch.export.export(
                self.graph_module,
                self.example_args,
                self.example_kwargs,
                dynamic_shapes=self.dynamic_shapes,
                strict=False,
            )

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write weights (safetensors), graph, plan and report (JSON) to ``directory``, wholly or not at all.

        The tensors of a plan from calibration data go into a safetensors file of their own.

        Raises InputError when ``directory`` exists (unless ``overwrite``) or cannot be written.
        """
        from sqa_fx.storage import save_program

        extra = {
            "plan": self.plan.to_json(),
            "report": self.report.to_json(),
            "training": self._captured_training,
            "signature": signature_to_json(self._binder.signature),
        }
        beside = {}
        if self.plan.tensors:
            extra["plan_tensors"] = PLAN_TENSORS
            beside[PLAN_TENSORS] = self.plan.tensor_bytes()
        save_program(self.exported_program(), directory, extra, beside=beside, overwrite=overwrite)

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvertedModule:
        """A copy with parameters of its own."""
        twin = ConvertedModule(
            copy.deepcopy(self.graph_module, memo),
            plan=self.plan,
            report=self.report,
            args=self.example_args,
            kwargs=self.example_kwargs,
            dynamic_shapes=self.dynamic_shapes,
            training=self._captured_training,
            signature=self._binder.signature,
        )
        twin.__dict__["_dropout"] = dict(self._dropout)
        if twin.training != self.training:
            twin.train(self.training)
        twin.checkpoint_activations(self._segments is not None)
        memo[id(self)] = twin
        # What code around a converted submodule reads of it (see partly.put_in_place).
        for name in self.__dict__.keys() - twin.__dict__.keys():
            twin.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        return twin

    def extra_repr(self) -> str:
        """A line a site."""
        return "\n".join(f"{s.name}: {s.heads}/{s.kv_heads} -> {s.hq}/{s.hkv} heads" for s in self.plan.sites)


def load(directory: str | os.PathLike[str]) -> ConvertedModule:
    """Read what :meth:`ConvertedModule.save` wrote. Nothing is unpickled.

    Raises MissingError when there is nothing, InputError when it is truncated, altered or foreign.
    """
    from sqa_fx.storage import dynamic_shapes_of, load_program

    program, extra = load_program(directory)
    if not {"plan", "report", "training", "signature"} <= extra.keys():
        raise InputError(f"{directory} holds an exported program, but not one that sqa_fx converted")
    with _silence():
        module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    inputs = program.example_inputs
    if inputs is None:
        raise InputError(f"{directory} holds no example inputs")
    plan = Plan.from_json(extra["plan"])
    if "plan_tensors" in extra:  # whose digest load_program has compared
        plan = plan.with_tensors((Path(directory) / PLAN_TENSORS).read_bytes())
    return ConvertedModule(
        module,
        plan=plan,
        report=Report.from_json(extra["report"]),
        args=tuple(inputs[0]),
        kwargs=inputs[1],
        dynamic_shapes=dynamic_shapes_of(program, list(inspect.signature(module.forward).parameters)),
        training=bool(extra["training"]),
        signature=signature_from_json(extra["signature"]),
    )


def _rate(node: fx.Node) -> float:
    name = "dropout_p" if op_name(node) == "scaled_dot_product_attention" else "p"
    return float(argument(node, name))


def _set_mode(module: nn.Module, mode: bool) -> None:
    module.training = mode
    for child in module.children():
        _set_mode(child, mode)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
