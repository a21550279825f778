"""Floating point operations of the attention of a captured graph, at the sizes of given inputs.

QK^T and PV each cost 2 FLOPs per multiply-add, so that attention costs

    4 * batch * query_heads * q_len * kv_len * head_dim

(2 * ... * (head_dim + v_dim) where values are wider or narrower than keys), and half of that with ``is_causal``, where
kernels skip what lies above the diagonal. A causal *mask tensor* is not skipped and counts in full. This is how
flash-attention counts: ``flops()`` in benchmarks/benchmark_flash_attention.py of Dao-AILab/flash-attention. Softmax,
scaling and masking are not counted. `sqa_fx.report.SiteReport` has the same figures at the example inputs, without the
halving.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sqa_fx.calls import CallBinder
from sqa_fx.errors import InputError, first_line
from sqa_fx.module import ConvertedModule
from sqa_fx.passes.aten_call import argument
from sqa_fx.passes.capture import capture
from sqa_fx.passes.find import GraphFacts, find_cores
from sqa_fx.passes.labels import aligned
from sqa_fx.passes.site import Core

Model = ConvertedModule | torch.export.ExportedProgram
"""What holds a captured graph."""


@dataclass(frozen=True)
class TensorForm:
    """What a tensor looks like: shape and strides in elements, type and device."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(value: Tensor) -> TensorForm:
        """The form of ``value``, whose sizes are plain numbers."""
        return TensorForm(tuple(map(int, value.shape)), tuple(map(int, value.stride())), value.dtype, value.device)


@dataclass(frozen=True)
class AttentionCall:
    """One attention of a graph at given input sizes.

    ``name`` is that of its node, ``module`` the path of the module whose code it is ('' when unknown). ``query`` is
    [..., query heads, q_len, head_dim], ``key`` and ``value`` are [..., kv heads, kv_len, head_dim or v_dim]: those of
    scaled_dot_product_attention where ``fused``, and in the model's own order of axes where attention is a softmax
    between two contractions.
    """

    name: str
    module: str
    fused: bool
    query: TensorForm
    key: TensorForm
    value: TensorForm
    mask: TensorForm | None
    causal: bool
    scale: float | None
    dropout: float
    gqa: bool
    flops: int

    @property
    def query_heads(self) -> int | None:
        """How many query heads there are; None where the order of axes is the model's own, or there is no such axis."""
        return self.query.shape[-3] if self.fused and len(self.query.shape) > 3 else None


def attention_flops(model: Model, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> int:
    """Attention FLOPs of one call of ``model`` with ``inputs``, (args, kwargs); see `attention_calls`."""
    return sum(call.flops for call in attention_calls(model, inputs))


def attention_calls(model: Model, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> list[AttentionCall]:
    """Every attention of ``model`` in the graph's order, at the sizes of ``inputs``, (args, kwargs).

    Nothing is computed: the graph runs on fake tensors. Attention that was refused for conversion counts too, what the
    passes do not see as attention at all (linear attention, a state-space layer) does not.

    Raises InputError for a model that is not a captured graph, inputs that do not fit it, and sizes that depend on
    data.
    """
    module, args, kwargs = _bound(model, inputs)
    found = find_cores(GraphFacts(module)).cores
    wanted = {n for _, c in found for n in (c.q, c.k, c.v, c.score, c.value, c.probabilities) if n is not None}
    wanted |= {m for _, core in found if isinstance(m := _mask(core), fx.Node)}
    seen = _sizes(module, args, kwargs, wanted)
    return [_call(name, core, seen) for name, core in found]


def _bound(
    model: Model, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]
) -> tuple[fx.GraphModule, tuple[Any, ...], Mapping[str, Any]]:
    """The graph, and the inputs in the order of its placeholders."""
    args, kwargs = tuple(inputs[0]), dict(inputs[1])
    if isinstance(model, ConvertedModule):
        floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        return model.graph_module, *model._binder.bind(args, kwargs, floating)
    if not isinstance(model, torch.export.ExportedProgram):
        raise InputError(
            f"a {type(model).__name__} is no captured graph: pass a converted module, or "
            "torch.export.export(model, ...)"
        )
    spec = model.call_spec.in_spec
    if spec is not None:
        names = list(spec.children()[1].context)
        if kwargs.keys() == set(names):
            kwargs = {name: kwargs[name] for name in names}
        if pytree.tree_structure((args, kwargs)) != spec:
            raise InputError(
                f"the exported program takes {spec.children()[0].num_leaves} positional tensors and the keywords "
                f"{names}; got {len(pytree.tree_leaves(args))} and {list(kwargs)}"
            )
    captured = capture(model, args, kwargs)
    binder = CallBinder(captured.graph_module.graph, None, args, kwargs)
    floating = next((p.dtype for p in captured.graph_module.parameters() if p.is_floating_point()), None)
    return captured.graph_module, *binder.bind(args, kwargs, floating)


class _Watch(fx.Interpreter):
    """Runs a graph and writes down the forms of some nodes' values."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.seen: dict[fx.Node, TensorForm] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = TensorForm.of(result)
        return result


def _sizes(
    module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: set[fx.Node]
) -> dict[fx.Node, TensorForm]:
    watch = _Watch(module, wanted)
    try:
        # Weights are real tensors; the mode makes fakes of them where an op meets them.
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            leaves = [
                mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x
                for x in pytree.tree_leaves((args, dict(kwargs)))
            ]
            watch.run(*leaves, enable_io_processing=False)
    except Exception as error:  # whatever an op raises for sizes that do not fit, or that it cannot know
        shapes = [list(x.shape) for x in pytree.tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor)]
        raise InputError(
            f"the graph does not run on fake inputs of shapes {shapes} ({first_line(error)[:200]}): give inputs that "
            "it was captured for; where sizes depend on data, measure with torch.profiler instead"
        ) from error
    return watch.seen


def _mask(core: Core) -> Any:
    return argument(core.value, "attn_mask") if core.fused else None


def _call(name: str, core: Core, seen: Mapping[fx.Node, TensorForm]) -> AttentionCall:
    node, mask = core.value, _mask(core)
    query, key, value, out = (seen[n] for n in (core.q, core.k, core.v, node))
    causal, gqa, scale, dropout = False, False, None, 0.0
    if core.fused:
        causal, gqa = bool(argument(node, "is_causal")), bool(argument(node, "enable_gqa"))
        scale, dropout = argument(node, "scale"), float(argument(node, "dropout_p"))
        # Rows of the output, since batch axes of queries and keys may broadcast.
        rows = math.prod(out.shape[:-1])
        flops = 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    else:
        assert core.probabilities is not None
        scores = math.prod(seen[core.score].shape) * _contracted(core.score, core.q, query)
        flops = 2 * (scores + math.prod(out.shape) * _contracted(node, core.probabilities, seen[core.probabilities]))
    return AttentionCall(
        name=node.name,
        module=name,
        fused=core.fused,
        query=query,
        key=key,
        value=value,
        mask=seen[mask] if isinstance(mask, fx.Node) else None,
        causal=causal,
        scale=float(scale) if isinstance(scale, int | float) else None,
        dropout=dropout,
        gqa=gqa,
        flops=flops // 2 if causal else flops,
    )


def _contracted(node: fx.Node, operand: fx.Node, form: TensorForm) -> int:
    """Over how many elements of ``operand`` the contraction ``node`` sums for each element of its result."""
    description = aligned(node)
    assert description is not None
    dims = next(o.dims for o in description.operands if o.node is operand)
    return math.prod(size for size, dim in zip(form.shape, dims, strict=True) if dim is not None and dim < 0)
