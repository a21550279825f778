"""Where torch.export takes no way at all: the submodules with attention are converted, and the rest stays eager."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import noise, tokens
from mixture_models import HEADS, WIDTH, Attention, Experts, KeyCache, Mixture, X, mixture, note_with
from plan_arithmetic import cut, load_masked, whole_state
from torch import Tensor, nn

import sqa_fx
from sqa_fx import PartlyConvertedModule
from sqa_fx.errors import CaptureError, InputError, NoAttentionError, PlanError, VerifyError


def _convert(model: nn.Module, **choices: Any) -> PartlyConvertedModule:
    converted = sqa_fx.convert(model, **{"hq": 4, "hkv": 2, "args": (tokens(2, 7),), **choices})
    assert isinstance(converted, PartlyConvertedModule)
    return converted


@functools.cache
def _converted_once() -> PartlyConvertedModule:
    return _convert(mixture())


def _shared() -> PartlyConvertedModule:
    """A copy of ``mixture()`` as most tests convert it."""
    return copy.deepcopy(_converted_once())


def _at(model: nn.Module, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), model)


def test_attention_beside_experts() -> None:
    model, converted = mixture(), _shared()
    report, plan = converted.report, converted.plan
    names = ["layers.0.attention", "layers.1.attention"]
    assert [s.name for s in report.sites] == [s.name for s in plan.sites] == names
    assert all((s.hq, s.hkv) == (4, 2) and s.proof_error is not None and s.proof_error < 1e-10 for s in report.sites)
    note = note_with(report, "converted per submodule: layers.0.attention, layers.1.attention; the rest stays eager")
    assert "torch.export failed" in note and "what to try" not in note
    assert {p.name.rpartition(".")[0] for p in plan.parameters} == {f"{n}.{part}" for n in names for part in "qkvo"}
    assert report.proof is not None and report.proof["precision"] == "float64" and report.proof["shapes"] >= 2
    assert report.proof["eager"]["error"] < 1e-5 and report.proof["eager"]["outputs"] == 2
    assert note_with(report, "agrees with the masked original in eager")
    assert report.parameters_after < report.parameters_before == sum(p.numel() for p in model.parameters())
    again = sqa_fx.Report.from_json(report.to_json())
    assert again.to_json() == report.to_json()

    load_masked(model, plan.to_json())
    for ids in (tokens(2, 7), tokens(5, 3), tokens(1, 1)):
        out, expected = converted(ids), model(input_ids=ids)
        assert list(out) == ["logits", "last"]
        torch.testing.assert_close(out["logits"], expected["logits"], rtol=0, atol=1e-5)


def test_names_and_ties_of_the_parameters_are_the_original_ones() -> None:
    model = mixture()
    state = whole_state(model)
    converted = _converted_once()
    assert list(converted.state_dict()) == list(model.state_dict())
    expected = cut(state, converted.plan.to_json())
    held = whole_state(converted)
    assert held.keys() == expected.keys()
    assert all(torch.allclose(held[name], expected[name]) for name in expected)
    assert _at(converted, "head.weight") is _at(converted, "embedding.weight")
    assert isinstance(converted.eager, Mixture) and _at(converted.eager, "layers.0.attention.heads") == HEADS


def test_nothing_changes_for_the_identity() -> None:
    model, ids = mixture(layers=1), tokens(2, 7)
    converted = _convert(model, hq=1.0, hkv=1.0, dynamic_shapes=None)
    assert torch.equal(converted(ids)["logits"], model(ids)["logits"])


def test_the_users_model_is_untouched() -> None:
    model = mixture(layers=1, dropout=0.1).train()
    before, attributes = whole_state(model), {n: dict(vars(m)) for n, m in model.named_modules()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    random = torch.random.get_rng_state()
    converted = _convert(model, dynamic_shapes=None)
    assert torch.equal(random, torch.random.get_rng_state())
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in whole_state(model).items())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys() and module.training
    assert float(_at(converted, "calls")) == 0


def test_it_trains() -> None:
    model, ids = mixture(layers=1, dropout=0.1).train(), tokens(2, 7)
    converted = _convert(model, dynamic_shapes=None)
    assert converted.training and all(m.training for m in converted.modules())
    optimizer = torch.optim.Adam(converted.parameters(), lr=0.01)
    before = whole_state(converted)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(converted(ids)["logits"].flatten(0, 1), ids.roll(1, 1).flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    held = dict(converted.named_parameters())
    for parameter in converted.plan.parameters:
        own = held[parameter.name]
        assert own.shape[parameter.axis] == parameter.size[1] and own.grad is not None
        # What a key's bias adds is the same for every key, and softmax does not see it.
        assert parameter.name.endswith("k.bias") or bool(own.grad.abs().max() > 0)
        assert parameter.name.endswith("k.bias") or not torch.equal(own, before[parameter.name])
    converted.eval()
    assert not any(m.training for m in converted.modules())
    assert torch.equal(converted(ids)["logits"], converted(ids)["logits"])


def test_copies_are_independent_and_cast() -> None:
    converted, ids = _shared(), tokens(2, 7)
    twin = copy.deepcopy(converted)
    expected = converted(ids)["logits"]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert torch.equal(converted(ids)["logits"], expected)
    assert not torch.equal(twin(ids)["logits"], expected)
    assert twin.plan == converted.plan and _at(twin, "head.weight") is _at(twin, "embedding.weight")
    for path in converted.submodules:
        part, own = _at(twin.eager, path), _at(_converted_once().eager, path)
        assert vars(part).keys() == vars(own).keys()  # what the code around reads of a submodule
    wide = copy.deepcopy(converted).double()
    torch.testing.assert_close(wide(ids)["logits"].float(), expected, rtol=0, atol=1e-5)


def test_weights_and_plan_bring_it_back(tmp_path: Path) -> None:
    model, ids = mixture(), tokens(2, 7)
    converted = _shared()
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(0.01)
    converted.plan.save(tmp_path / "plan.json")
    again = sqa_fx.convert(model, plan=sqa_fx.Plan.load(tmp_path / "plan.json"), args=(ids,), dynamic_shapes=None)
    assert isinstance(again, PartlyConvertedModule) and again.plan == converted.plan
    again.load_state_dict(converted.state_dict())
    assert torch.equal(again(ids)["logits"], converted(ids)["logits"])


def test_plans_and_patterns_are_those_of_the_whole() -> None:
    model, ids = mixture(), tokens(2, 7)
    one = _convert(model, hq={"layers.1.*": 2}, hkv=None, dynamic_shapes=None)
    assert [(s.hq, s.hkv) for s in one.report.sites] == [(6, 6), (2, 2)]
    assert [s.name for s in one.plan.sites] == ["layers.1.attention"] and one.submodules == ("layers.1.attention",)
    with pytest.raises(PlanError, match=r"'nowhere' matches no site; sites are: layers\.0\.attention"):
        _convert(model, hq={"layers.0.attention": 3, "nowhere": 2}, dynamic_shapes=None)
    with pytest.raises(PlanError, match="no site is named"):
        _convert(model, hq={}, hkv=None, dynamic_shapes=None)
    with pytest.raises(PlanError, match=r"does not have; it has: layers\.0\.attention"):
        sqa_fx.convert(mixture(layers=1), plan=_shared().plan, args=(ids,), dynamic_shapes=None)


def test_saving_and_exporting_say_what_is_possible(tmp_path: Path) -> None:
    converted = _shared()
    with pytest.raises(InputError, match=r"nothing was written.*state_dict"):
        converted.save(tmp_path / "saved")
    with pytest.raises(InputError, match="converted per submodule"):
        sqa_fx.export(converted, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_wrong_shapes_and_inputs() -> None:
    static = _convert(mixture(layers=1), dynamic_shapes=None)
    assert len(static.report.static) == 2 and not static.report.dynamic
    static(tokens(2, 7))
    with pytest.raises(InputError, match=r"'x' must have shape \[2, 7, 30\].*got \[3, 7, 30\]"):
        static(tokens(3, 7))
    dynamic = _shared()
    with pytest.raises(TypeError):
        dynamic(tokens(2, 7), tokens(2, 7))
    with pytest.raises(InputError, match="dtype"):
        _at(dynamic, "layers.0.attention")(X.double(), mask=None)


def test_inspect_takes_the_same_way() -> None:
    model = mixture()
    before = whole_state(model)
    report = sqa_fx.inspect(model, hq=4, hkv=2, args=(tokens(2, 7),), dynamic_shapes=None)
    assert [(s.name, s.hq, s.hkv) for s in report.sites] == [("layers.0.attention", 4, 2), ("layers.1.attention", 4, 2)]
    assert note_with(report, "converted per submodule")
    assert all(torch.equal(v, before[k]) for k, v in whole_state(model).items())


def test_without_inputs_it_converts_on_the_first_call() -> None:
    model, ids = mixture(layers=1), tokens(2, 7)
    deferred = sqa_fx.convert(model, hq=4, hkv=2)
    out = deferred(ids)["logits"]
    load_masked(model, deferred.plan.to_json())
    torch.testing.assert_close(out, model(ids)["logits"], rtol=0, atol=1e-5)


class Shared(nn.Module):
    """One attention that is called twice, at other lengths; the second time with another option if asked."""

    def __init__(self, scales: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.attention, self.experts, self.scales = Attention(WIDTH, HEADS), Experts(WIDTH), scales
        self.same = self.attention

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.experts(x), scale=self.scales[0])
        half = x[:, ::2]
        out: Tensor = self.same(half, scale=self.scales[1])
        return out


def test_one_submodule_called_at_other_sizes() -> None:
    model = Shared().eval()
    converted = _convert(model, args=(X,))
    assert [s.name for s in converted.report.sites] == ["attention"]
    assert converted.report.proof is not None and converted.report.proof["shapes"] >= 4
    assert converted.eager.same is converted.eager.attention
    load_masked(model, converted.plan.to_json())
    for x in (X, noise(3, 12, WIDTH)):
        torch.testing.assert_close(converted(x), model(x), rtol=0, atol=2e-6)


def test_one_submodule_called_with_other_options_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"attention: .*one graph does not serve all of its 2 calls.*'scale' was 1"):
        _convert(Shared((1.0, 0.5)).eval(), args=(X,))


def test_a_parameter_that_others_read_is_not_cut() -> None:
    class Tied(Mixture):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(WIDTH, WIDTH)
            self.extra.weight = _at(self, "layers.0.attention.v.weight")

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            out = super().forward(input_ids)
            return {**out, "extra": self.extra(out["last"])}

    model = Tied().eval()
    converted = _convert(model, dynamic_shapes=None)
    assert [s.name for s in converted.report.sites] == ["layers.1.attention"]
    refusal = converted.report.refused[0]
    assert refusal.name == "layers.0.attention" and "v.weight is also extra.weight" in refusal.reason
    assert _at(converted, "extra.weight") is _at(converted, "layers.0.attention.v.weight")


def test_a_cache_beside_experts_is_turned_off() -> None:
    class Remembering(Mixture):
        def forward(self, input_ids: Tensor, use_cache: bool = True) -> Any:
            out = super().forward(input_ids)
            if use_cache:
                cache = KeyCache()
                cache.keys.append(out["last"])
                return out["last"], cache
            return out["last"]

    converted, ids = _convert(Remembering(layers=1).eval(), dynamic_shapes=None), tokens(2, 7)
    assert note_with(converted.report, "called with use_cache=False")
    assert isinstance(converted(ids), Tensor) and torch.equal(converted(ids, False), converted(ids, use_cache=False))
    for args, kwargs in (((ids, True), {}), ((ids,), {"use_cache": True})):
        with pytest.raises(InputError, match="'use_cache' was False"):
            converted(*args, **kwargs)


def test_batch_norm_in_training_mode() -> None:
    """It cannot be switched to eval mode for the comparison of the whole; the report says so."""

    class Normed(Attention):
        def __init__(self) -> None:
            super().__init__(WIDTH, HEADS)
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor, **others: Any) -> Tensor:
            out: Tensor = self.norm(super().forward(x).transpose(1, 2)).transpose(1, 2)
            return out

    model = nn.Sequential(Normed(), Experts(WIDTH)).train()
    before = whole_state(model)
    converted = _convert(model, args=(X,), dynamic_shapes=None)
    assert note_with(converted.report, "not compared in eager, only its submodules were proved: batch norm")
    assert converted.training and all(m.training for m in converted.modules())
    assert all(torch.equal(v, before[k]) for k, v in whole_state(model).items())
    converted(X).sum().backward()


def test_no_submodule_with_attention_can_be_exported() -> None:
    class Odd(Attention):
        def forward(self, x: Tensor, **others: Any) -> Tensor:
            return super().forward(x if float(x.sum()) > 0 else -x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Odd(WIDTH, HEADS)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            return out

    with pytest.raises(CaptureError, match=r"torch\.export failed.*inner: its module cannot be exported.*what to try"):
        sqa_fx.convert(Model().eval(), hq=4, args=(X,))
    with pytest.raises(CaptureError, match="none of its submodules computes attention"):
        sqa_fx.convert(nn.Sequential(Experts(WIDTH)).eval(), hq=4, args=(X,))


def test_the_nearest_miss_of_a_submodule() -> None:
    class Talking(Attention):
        """Mixes the heads' scores."""

        def forward(self, x: Tensor, **others: Any) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            scores = torch.einsum("bhqk,hg->bgqk", q @ k.transpose(-2, -1), torch.ones(HEADS, HEADS))
            out: Tensor = self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            return out

    model = nn.Sequential(Talking(WIDTH, HEADS), Experts(WIDTH)).eval()
    report = sqa_fx.inspect(model, args=(X,), dynamic_shapes=None)
    assert not report.sites and [r.name for r in report.refused] == ["0"]
    with pytest.raises(NoAttentionError, match=r"nearest miss: '0'.*exported alone, because torch\.export failed"):
        _convert(model, args=(X,), dynamic_shapes=None)


def test_code_around_that_depends_on_all_heads_is_caught() -> None:
    """The proof of a submodule cannot know what the eager code does with its outputs; the check of the whole does."""

    class Peeks(Attention):
        def forward(self, x: Tensor, **others: Any) -> Any:
            q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            weights = (q @ k.transpose(-2, -1)).softmax(-1)
            return self.o((weights @ v).transpose(1, 2).flatten(2)), weights

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.experts = Peeks(WIDTH, HEADS), Experts(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            out, weights = self.inner(x)
            result: Tensor = self.experts(out) * weights.sum((1, 2, 3))[:, None, None]
            return result

    with pytest.raises(VerifyError, match="differ"):
        _convert(Model().eval(), args=(X,), dynamic_shapes=None)


def test_a_router_that_rounding_tips_is_compared_step_by_step() -> None:
    """A step function of the attention's output makes nothing of a rounding error, or everything."""

    class Tips(Mixture):
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            x = self.embedding(input_ids)
            x = self.layers[0](x)
            return {"tipped": (x * 2.0**40).sin()}

    converted = _convert(Tips(layers=1).eval(), dynamic_shapes=None)
    assert converted.report.proof is not None
    eager = converted.report.proof["eager"]
    assert eager["in_step"] and eager["error"] < 1e-4 < eager["free_running_error"]
    assert note_with(converted.report, "given the original's inputs")
