"""The graph that is recorded from dynamo's is the one that make_fx traces, and make_fx traces what is not recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import CASES, FusedAttention, noise
from backend_models import HALF, Blocks
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import sqa_fx
from sqa_fx import dynamo_graph
from sqa_fx.dynamo_trace import KEPT_META, Recorder, record

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Autocasting(nn.Module):
    """One weight used twice under autocast, beside a part in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = FusedAttention(24, 8), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.linear(self.linear(x)) + self.attention(x)
            with torch.autocast("cpu", enabled=False):
                return x.float() @ self.linear.weight


class Checkpointed(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return x


class PartlyFrozen(nn.Module):
    """A part without gradients, an output that is an input, sizes made of nothing, and several results of one op."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.frozen = FusedAttention(24, 8), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            scale, shift = self.frozen(x).chunk(2, -1)
        ramp = torch.arange(24, dtype=torch.float32).mul(0.1)
        zeros = torch.zeros(24, dtype=torch.float64)
        values, indices = (x + ramp).topk(2, -1)
        variance, mean = torch.var_mean(x, -1, correction=0)
        y = F.dropout(self.attention(x), 0.1) + torch.cat([shift, scale], -1) + zeros.to(x.dtype)
        return y.contiguous(), x, values + variance[..., None], indices, mean.detach().tanh()


class Encoder(nn.Module):
    """A ViT: patches, a class token, torch's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 24, 4, 4), nn.Parameter(torch.zeros(1, 1, 24))
        layer = nn.TransformerEncoderLayer(24, 8, 32, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        out: Tensor = self.encoder(x)[:, 0]
        return out


RECORDED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gpt2": (lambda: CASES["gpt2"].build("sdpa"), CASES["gpt2"].inputs(2, 7)),
    "written out": (lambda: FusedAttention(24, 8, fused=False), {"x": noise(2, 5, 24)}),
    "llama": (lambda: CASES["llama_gqa"].build("sdpa"), CASES["llama_gqa"].inputs(2, 7)),
    "encoder": (Encoder, {"image": noise(2, 3, 16, 16)}),
    "autocast": (Autocasting, {"x": noise(2, 5, 24)}),
    "checkpoint": (Checkpointed, {"x": noise(2, 5, 24)}),
    "partly frozen": (PartlyFrozen, {"x": noise(2, 5, 24)}),
}


def _told(node: fx.Node, checkpoints: dict[int, int]) -> dict[str, Any]:
    """What a node tells, with checkpoints numbered from 0."""
    told = {key: node.meta[key] for key in KEPT_META if key in node.meta}
    if "ac_graph_id" in told:
        told["ac_graph_id"] = checkpoints.setdefault(told["ac_graph_id"], len(checkpoints))
    return told


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        layout = value.shape, value.stride(), value.storage_offset(), value.untyped_storage().nbytes()
        return type(value), layout, value.dtype, value.device, value.requires_grad
    # Lists of tensors come as tuples from the cache of fake tensors.
    return [_value(v) for v in value] if isinstance(value, tuple | list) else (type(value), value)


def _described(graph: fx.Graph) -> list[tuple[Any, ...]]:
    checkpoints: dict[int, int] = {}
    return [
        (n.op, n.name, n.target, str(n.args), str(n.kwargs), _value(n.meta.get("val")), _told(n, checkpoints))
        for n in graph.nodes
    ]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_as_traced(name: str, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[list[tuple[Any, ...]]] = []
    traced: list[list[tuple[Any, ...]]] = []

    def both(run: Callable[[Recorder | None], Any], inputs: Any, mode: Any, whole: Any) -> fx.Graph:
        traced.append(_described(make_fx(lambda *_: run(None), tracing_mode="real")(*inputs).graph))
        graph = record(run, inputs, mode, whole)
        recorded.append(_described(graph))
        return graph

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        dynamo_graph.trace(module, inputs, gradients)
        return module.forward

    monkeypatch.setattr("sqa_fx.dynamo_graph.record", both)
    build, inputs = RECORDED[name]
    with torch.set_grad_enabled(gradients):
        torch.compile(build().train(), backend=backend)(**inputs)
    assert traced
    for ours, theirs in zip(recorded, traced, strict=True):
        for described, expected in zip(ours, theirs, strict=True):
            assert described == expected


class Constant(nn.Module):
    """A tensor of Python numbers, under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = FusedAttention(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.attention(x * torch.tensor([0.5])) * 2  # type: ignore[no-any-return]


class Mapped(Constant):
    """A function mapped over positions by a transform."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(torch.vmap(lambda row: row * row.sum(), 1, 1)(x))  # type: ignore[no-any-return]


class Conditional(Constant):
    """An operator that calls functions."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y * 2, (x,))
        return self.attention(x)  # type: ignore[no-any-return]


@torch.library.custom_op("sqa_fx_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(Constant):
    def forward(self, x: Tensor) -> Tensor:
        return self.attention(doubled(x))  # type: ignore[no-any-return]


class Chosen(Constant):
    """Sizes that depend on data."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) + x.flatten()[x.flatten() > 0].sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("model", [Constant, Mapped, Conditional, Custom, Chosen, Blocks])
def test_left_to_make_fx(model: type[nn.Module], dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Any] = []

    def counted(run: Any, **options: Any) -> Any:
        traced.append(run)
        return make_fx(run, **options)

    monkeypatch.setattr("sqa_fx.dynamo_graph.make_fx", counted)
    built, x = model(), noise(2, 5, 24)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        backend = sqa_fx.backend(**HALF, on_refused="raise")
        result = torch.compile(built, backend=backend, dynamic=dynamic)(x)
    assert len(traced) == (model is not Blocks or dynamic)
    assert result.shape == x.shape
    assert not torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()


class Writing(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 0].fill_(1)
        out: Tensor = super().forward(x + y)
        return out


def test_graphs_that_write_are_not_traced_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("traced although the graph is to be made functional")

    monkeypatch.setattr("sqa_fx.dynamo_graph.make_fx", never)
    model, x = Writing().eval(), noise(2, 5, 24)
    with torch.no_grad():
        result = torch.compile(model, backend=sqa_fx.backend(**HALF, on_refused="raise"))(x)
    assert result.shape == x.shape and sqa_fx.last_plan(model).sites
