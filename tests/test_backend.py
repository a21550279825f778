"""torch.compile(model, backend="sqa_fx"): what ahead-of-time conversion computes, in all that torch.compile does."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import CASES, FusedAttention, converted, noise, perturb, tensors, tokens
from backend_models import HALF, Blocks, Breaking, assert_close, compile_model, masked, small
from plan_arithmetic import cut, load_masked
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch.utils.checkpoint import checkpoint

import sqa_fx

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _loss(outputs: Any) -> Tensor:
    return sum(
        ((t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).square().mean() for t in tensors(outputs) if
         t.is_floating_point()), torch.zeros(())
    )  # fmt: skip


# Compiling with Inductor takes a minute, and it sees the same kinds of graph as aot_eager does; it always runs in
# test_caches_of_inductor_tell_options_apart.
INNER = [
    *((name, "aot_eager") for name in ("gpt2", "llama_gqa", "bert", "vit", "torch_encoder")),
    *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in ("llama_gqa", "torch_encoder")),
]


@pytest.mark.parametrize(("name", "inner"), INNER)
def test_numbers_and_gradients_are_those_of_convert(name: str, inner: str) -> None:
    case = CASES[name]
    model = perturb(case.build("sdpa" if "sdpa" in case.impls else case.impls[0])).eval()
    for layers in ("transformer.h", "model.layers"):  # one is enough
        if any(path == layers for path, _ in model.named_modules()):
            del model.get_submodule(layers)[1:]  # type: ignore[operator]
    inputs = case.inputs(2, 7)
    compiled = compile_model(model, hq=0.5, hkv=0.25, inner=inner)
    outputs = compiled(**inputs)
    plan = sqa_fx.last_plan(model)
    ahead = converted(model, plan=plan, kwargs=inputs, dynamic_shapes=None)
    assert len(plan.sites) == 1 and ahead.plan.same_cuts(plan)
    assert_close(outputs, ahead(**inputs))
    _loss(outputs).backward()
    _loss(ahead(**inputs)).backward()
    own = {n: p.grad for n, p in model.named_parameters()}
    twin = dict(ahead.named_parameters())
    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    smaller = cut(state, {"parameters": [p for p in plan.to_json()["parameters"] if p["name"] in state]})
    for name_, parameter in twin.items():
        if parameter.grad is None:
            continue
        (expected,) = torch.autograd.grad(smaller[name_], state[name_], parameter.grad, retain_graph=True)
        gradient = own[name_]
        assert gradient is not None and gradient.shape == model.get_parameter(name_).shape
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_fifty_training_steps_give_the_same_losses() -> None:
    torch.manual_seed(0)
    model = CASES["nano"].build("sdpa").train()
    ids = CASES["nano"].inputs(2, 7)
    compiled = compile_model(model, inner="aot_eager")
    compiled(**ids)
    ahead = converted(model, plan=sqa_fx.last_plan(model), kwargs=ids, dynamic_shapes=None)
    losses: list[list[float]] = []
    for module, parameters in ((compiled, model.parameters()), (ahead, ahead.parameters())):
        optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            loss = _loss(module(**ids))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.5 * losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-6)


def test_changed_weights_are_never_stale() -> None:
    model, x = small(), noise(2, 5, 24)
    compiled = compile_model(model)
    with torch.no_grad():
        compiled(x)
        plan = sqa_fx.last_plan(model)
        for change in (
            lambda p: p.mul_(1.5),
            lambda p: p.set_(p.clone() * 0.5),
            lambda p: setattr(p, "data", p.data.flip(0)),
        ):
            for parameter in model.parameters():
                change(parameter)
            assert_close(compiled(x), masked(model, plan)(x))
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
        assert_close(compiled(x), masked(model, plan)(x))
        fresh = {k: nn.Parameter(v * 2) for k, v in model.state_dict().items()}
        model.load_state_dict(fresh, assign=True)
        changed = compiled(x)
    assert_close(changed, masked(model, plan)(x))
    with torch.inference_mode():
        assert_close(compiled(x), changed)


def test_training_and_inference_keep_the_same_heads() -> None:
    """Graphs are compiled anew for gradients, modes and shapes, while the weights move: the heads stay."""
    model = small()
    compiled = compile_model(model, inner="aot_eager")
    _loss(compiled(noise(2, 5, 24))).backward()
    first = sqa_fx.last_plan(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for length in (5, 7, 11):
            x = noise(2, length, 24)
            assert_close(compiled(x), masked(model, first)(x), 1e-4)
    assert sqa_fx.last_plan(model).sites == first.sites
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(noise(2, 5, 24))
    assert sqa_fx.last_plan(model).sites != first.sites


def test_new_shapes_and_dynamic_shapes() -> None:
    model = small()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend="sqa_fx", dynamic=True, options={**HALF, "inner": counter})
    with torch.no_grad():
        compiled(noise(2, 5, 24))
        oracle = masked(model, sqa_fx.last_plan(model))
        for batch, length in ((2, 13), (3, 7), (5, 97)):
            x = noise(batch, length, 24)
            assert_close(compiled(x), oracle(x))
        assert counter.frame_count == 1
        for batch, length in ((1, 5), (2, 1), (1, 1)):
            x = noise(batch, length, 24)
            assert_close(compiled(x), oracle(x))


def test_graph_breaks() -> None:
    torch.manual_seed(0)
    model, x = perturb(Breaking()).eval(), noise(2, 5, 24)
    compiled = compile_model(model)
    with torch.no_grad():
        result = compiled(x)
        plan = sqa_fx.last_plan(model)
        assert [(s.name, s.heads, s.hq) for s in plan.sites] == [("first", 8, 4), ("second", 4, 2)]
        assert len(sqa_fx.compiled_graphs()) == 2
        assert_close(result, converted(model, plan=plan, args=(x,), dynamic_shapes=None)(x))


def test_blocks_compiled_one_by_one_keep_heads_of_their_own() -> None:
    """Dynamo would run one graph for all blocks of the same code."""
    model, x = small(), noise(2, 5, 24)
    expected = copy.deepcopy(model)
    for layer in model.layers:
        layer.compile(backend="sqa_fx", options=HALF)
    with torch.no_grad():
        result = model(x)
        plans = [sqa_fx.last_plan(layer) for layer in model.layers]
        for layer, plan in zip(expected.layers, plans, strict=True):
            load_masked(layer, plan.to_json())
        assert_close(result, expected(x))
    assert plans[0].sites[0].query_heads != plans[1].sites[0].query_heads


class Autocasting(nn.Module):
    """Attention under autocast of its own, behind a norm that must stay in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(24), FusedAttention(24, 8)
        self.mix = nn.Parameter(torch.randn(24, 24))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.norm(x.float() @ self.mix)
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = self.attention(x)
        return y.float() + x


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_autocast(outside: bool, inner: str) -> None:
    torch.manual_seed(0)
    model, x = Autocasting(), noise(2, 5, 24)
    compiled = compile_model(model, inner=inner)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        result = compiled(x)
        oracle = masked(model, sqa_fx.last_plan(model))
        expected = oracle(x)
    assert result.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
    # The part in float32 is exact: bfloat16 there would be off by a hundred times as much.
    torch.testing.assert_close(result.mean(), expected.mean(), rtol=1e-3, atol=1e-3)
    result.square().sum().backward()
    expected.square().sum().backward()
    gradient, reference = model.mix.grad, oracle.get_parameter("mix").grad
    assert gradient is not None and reference is not None
    torch.testing.assert_close(gradient, reference, rtol=5e-2, atol=5e-2 * float(reference.abs().max()))


class Checkpointed(Blocks):
    """Blocks that are computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return x


def test_activation_checkpointing() -> None:
    torch.manual_seed(0)
    model, x = perturb(Checkpointed()), noise(2, 5, 24)
    saved: list[list[str]] = []

    def recomputed(module: torch.fx.GraphModule, inputs: Any) -> Any:
        saved.append([n.name for n in module.graph.nodes if n.meta.get("recompute") is not None])
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    compiled = compile_model(model, inner=recomputed)
    result = compiled(x)
    plan = sqa_fx.last_plan(model)
    assert len(plan.sites) == 2
    oracle = masked(model, plan)
    expected = oracle(x)
    assert_close(result, expected)
    assert any("attention" in name for name in saved[0]), "nothing is marked to be computed again"
    _loss(result).backward()
    _loss(expected).backward()
    kept = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        if not any(p.name == name for p in plan.parameters):
            torch.testing.assert_close(parameter.grad, kept[name].grad, rtol=1e-4, atol=1e-6)


class Counting(nn.Module):
    """Writes to a buffer, drops out with a rate that dynamo may make an input, and freezes a branch."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.frozen, self.rate = FusedAttention(24, 8), nn.Linear(24, 24), 0.25
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[0]
        with torch.no_grad():
            scale = self.frozen(x)
        x = F.dropout(x, self.rate, self.training) + scale
        x = x.clone()
        x[:, 0] = 0
        out: Tensor = self.attention(x)
        return out


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_buffers_in_place_writes_and_parts_without_gradients(dynamic: bool) -> None:
    torch.manual_seed(0)
    model, x = Counting().train(), noise(2, 5, 24)
    compiled = torch.compile(
        model, backend="sqa_fx", dynamic=dynamic, options={"hq": 4, "hkv": 4, "inner": "aot_eager"}
    )
    result = compiled(x)
    assert len(sqa_fx.last_plan(model).sites) == 1
    _loss(result).backward()
    assert model.seen.item() == 2
    assert model.frozen.weight.grad is None
    assert model.get_parameter("attention.c_attn.weight").grad is not None
    model.eval()
    oracle = masked(model, sqa_fx.last_plan(model))
    assert_close(compiled(x), oracle(x))
    assert model.seen.item() == 4


class Normalised(nn.Module):
    """Attention behind a normalisation that keeps running statistics: it writes to them without saying so."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.BatchNorm1d(24), FusedAttention(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(self.norm(x.flatten(0, 1)).view_as(x))
        return out


def test_running_statistics_are_kept() -> None:
    torch.manual_seed(0)
    model, x = Normalised().train(), 3 + noise(2, 5, 24)
    eager = copy.deepcopy(model)
    compiled = compile_model(model, inner="aot_eager")
    for _ in range(2):
        compiled(x), eager(x)
    assert len(sqa_fx.last_plan(model).sites) == 1
    torch.testing.assert_close(model.norm.running_mean, eager.norm.running_mean)
    torch.testing.assert_close(model.norm.running_var, eager.norm.running_var)
    assert int(model.norm.num_batches_tracked or 0) == 2


def test_only_graphs_that_write_are_made_functional(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = aot_export_module

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr("sqa_fx.dynamo_graph.aot_export_module", counted)
    compile_model(small())(noise(2, 5, 24))
    assert not made
    compile_model(Counting().eval())(noise(2, 5, 24))
    assert len(made) == 1


class Doubled(torch.autograd.Function):
    """Its backward is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 7


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = FusedAttention(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Doubled.apply(self.attention(x))  # type: ignore[no-untyped-call]
        return out


def test_backward_functions_written_by_hand_are_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = WithFunction(), noise(2, 5, 24)
    twin = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, "sqa_fx"):
        compile_model(model, inner="aot_eager")(x).sum().backward()
    assert "autograd.Function" in caplog.text
    twin(x).sum().backward()
    name = "attention.c_proj.weight"
    torch.testing.assert_close(model.get_parameter(name).grad, twin.get_parameter(name).grad)
    torch._dynamo.reset()
    with torch.no_grad():
        result = compile_model(model)(x)
        assert_close(result, masked(model, sqa_fx.last_plan(model))(x))


def test_tokens_of_a_language_model_under_dynamic_shapes() -> None:
    case = CASES["llama_gqa"]
    model = perturb(case.build("sdpa")).eval()
    layers: Any = model.get_submodule("model.layers")
    del layers[1:]  # one is enough, and each form of call is compiled
    compiled = torch.compile(model, backend="sqa_fx", dynamic=True, options=HALF)
    with torch.no_grad():
        first = compiled(input_ids=tokens(2, 7), use_cache=False)
        oracle = masked(model, sqa_fx.last_plan(model))
        assert_close(first.logits, oracle(input_ids=tokens(2, 7), use_cache=False).logits)
        for batch, length in ((2, 11), (1, 13)):
            ids = tokens(batch, length)
            assert_close(compiled(input_ids=ids, use_cache=False).logits, oracle(input_ids=ids, use_cache=False).logits)
