"""Options of torch.compile(model, backend="sqa_fx"): requests, plans, refusals, limits, caches and logs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from attention_models import converted, noise, perturb
from backend_models import Breaking, assert_close, compile_model, masked, small
from torch import Tensor, nn

import sqa_fx
from sqa_fx.errors import InputError, PlanError, SqaError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_name_is_listed() -> None:
    assert "sqa_fx" in torch.compiler.list_backends()


def test_graphs_without_attention_pass_through() -> None:
    seen: list[torch.fx.GraphModule] = []

    def inner(module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(module)
        return module

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = noise(2, 4)
    assert torch.equal(compile_model(model, inner=inner)(x), model(x))
    assert all(n.op != "call_function" or "aten" not in str(n.target) for n in seen[0].graph.nodes)
    with pytest.raises(InputError, match="nothing was converted yet"):
        sqa_fx.last_plan(model)


class Mixed(nn.Module):
    """Talking heads: refused."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o, self.mix = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (8, 3)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = self.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: Tensor = self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
        return out


def test_refused_attention_is_kept_or_raises(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Mixed(), noise(2, 5, 24)
    with caplog.at_level(logging.WARNING, "sqa_fx"):
        assert_close(compile_model(model)(x), model(x))
    assert "talking heads" in caplog.text and "to convert" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="talking heads") as caught:
        compile_model(model, on_refused="raise")(x)
    assert isinstance(caught.value.__cause__ or caught.value.inner_exception, SqaError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "how many heads"),
        ({"hq": 4, "heds": "first"}, "unknown options.*heds.*known are hq"),
        ({"hq": 4, "on_refused": "warn"}, "on_refused='warn': known are 'keep', 'raise'"),
        ({"hq": 4, "plan": sqa_fx.Plan(())}, "either plan or hq"),
        ({"hq": 4, "verify": "twice"}, "verify='twice'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sqa_fx.backend(**options)


def test_impossible_requests_raise_when_asked() -> None:
    model, x = small(), noise(2, 5, 24)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="hq") as caught:
        compile_model(model, hq=5, hkv=3, on_refused="raise")(x)
    assert isinstance(caught.value.inner_exception, PlanError)


def test_plans_made_ahead_of_time_are_applied() -> None:
    model, x = small(), noise(2, 5, 24)
    ahead = converted(model, hq={"*0*": 2}, hkv={"*0*": 2}, args=(x,), heads="first", dynamic_shapes=None)
    compiled = torch.compile(model, backend=sqa_fx.backend(plan=ahead.plan, inner="eager"))
    with torch.no_grad():
        assert_close(compiled(x), ahead(x))
    assert sqa_fx.last_plan(model).sites == ahead.plan.sites


def test_caches_of_inductor_tell_options_apart(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = noise(2, 5, 24)
    counters = torch._dynamo.utils.counters
    results: list[Tensor] = []
    hits: list[int] = []
    with torch._inductor.config.patch(fx_graph_cache=True), torch._functorch.config.patch(enable_autograd_cache=False):
        for hq in (4, 2, 4):
            torch._dynamo.reset()
            model = small()
            counters.clear()
            with torch.no_grad():
                compiled = compile_model(model, hq=hq, hkv=hq, inner="inductor")
                results.append(compiled(x))
                assert_close(results[-1], masked(model, sqa_fx.last_plan(model))(x))
            hits.append(counters["inductor"]["fxgraph_cache_hit"])
    assert hits == [0, 0, 1]
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


def test_passes_and_graphs_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, x = small(), noise(2, 5, 24)
    with caplog.at_level(logging.DEBUG, "sqa_fx"):
        compile_model(model)(x)
    for text in ("trace: ", "find: ", "plan: ", "rewrite: ", "verify: ", " ms", "graph before:", "graph converted:"):
        assert text in caplog.text
    assert "layers.0: 8/8 -> 4/4 heads" in caplog.text


def test_mixture_of_requests_by_site() -> None:
    model, x = small(), noise(2, 5, 24)
    with torch.no_grad():
        result = compile_model(model, hq={"*1*": 2}, hkv={"*1*": 1})(x)
        plan = sqa_fx.last_plan(model)
        assert [(s.name, s.hq, s.hkv) for s in plan.sites] == [("layers.1", 2, 1)]
        assert_close(result, masked(model, plan)(x))


def test_sites_beyond_the_limit_stay(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, x = small(), noise(2, 5, 24)
    monkeypatch.setenv("SQA_FX_MAX_SITES", "1")
    with torch.no_grad():
        with caplog.at_level(logging.WARNING, "sqa_fx"):
            result = compile_model(model)(x)
        plan = sqa_fx.last_plan(model)
        assert [s.name for s in plan.sites] == ["layers.0"] and "SQA_FX_MAX_SITES: layers.1" in caplog.text
        ahead = converted(model, hq=0.5, hkv=0.5, args=(x,), dynamic_shapes=None)
        assert ahead.plan.sites == plan.sites and any("SQA_FX_MAX_SITES" in note for note in ahead.report.notes)
        assert_close(result, ahead(x))
        broken = perturb(Breaking()).eval()
        torch._dynamo.reset()
        compile_model(broken)(x)
        assert [s.name for s in sqa_fx.last_plan(broken).sites] == ["first"]
    monkeypatch.setenv("SQA_FX_MAX_SITES", "few")
    with pytest.raises(InputError, match="SQA_FX_MAX_SITES='few'"):
        converted(model, hq=0.5, hkv=0.5, args=(x,))
