"""Where torch.export stumbles on something outside of attention: other ways, then submodule by submodule."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import VOCABULARY, FusedAttention, noise, perturb, tokens
from plan_arithmetic import cut, load_masked, whole_state
from torch import Tensor, nn

import sqa_fx
from sqa_fx import ConvertedModule, PartlyConvertedModule
from sqa_fx.errors import CaptureError, InputError, NoAttentionError, PlanError, VerifyError
from sqa_fx.passes import capture_ways
from sqa_fx.passes.capture import capture

WIDTH, HEADS = 30, 6
X = noise(2, 7, WIDTH)


class Experts(nn.Module):
    """A mixture of experts as it is often written: a Python loop over the experts that some token chose."""

    def __init__(self, width: int, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = self.router(flat).softmax(-1).argmax(-1)
        out = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            rows = torch.nonzero(chosen == number).squeeze(1)
            out = out.index_add(0, rows, self.experts[number](flat[rows]))
        return out.view_as(x)


class Attention(nn.Module):
    """Masked multi-head attention with an option and an argument that carries nothing."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0, **unused: Any) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q * scale, k, v, attn_mask=mask)
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH, heads: int = HEADS, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention, self.experts = Attention(width, heads), Experts(width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm(x), mask=mask, kind=None))
        out: Tensor = x + self.experts(x)
        return out


class Mixture(nn.Module):
    """A small language model with experts; torch.export cannot take it, and can take its attention."""

    def __init__(self, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(dropout=dropout) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros(()))

    calls: Tensor

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        mask = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()[None, None]
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return {"logits": self.head(x), "last": x}


def _mixture(**settings: Any) -> Mixture:
    torch.manual_seed(0)
    model = Mixture(**settings)
    perturb(model)
    return model.eval()


def _convert(model: nn.Module, **choices: Any) -> PartlyConvertedModule:
    converted = sqa_fx.convert(model, **{"hq": 4, "hkv": 2, "args": (tokens(2, 7),), **choices})
    assert isinstance(converted, PartlyConvertedModule)
    return converted


@functools.cache
def _converted_once() -> PartlyConvertedModule:
    return _convert(_mixture())


def _shared() -> PartlyConvertedModule:
    """A copy of ``_mixture()`` as most tests convert it."""
    return copy.deepcopy(_converted_once())


def _at(model: nn.Module, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), model)


def _note(report: sqa_fx.Report, words: str) -> str:
    note = next((n for n in report.notes if words in n), "")
    assert note, report.notes
    return note


# -- the whole model, in another way --------------------------------------------------------------------------------


class Stacked(nn.Module):
    """Attention to build on."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = FusedAttention(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x)


class Plain:
    def __init__(self, hidden: Tensor, words: str) -> None:
        self.hidden, self.words = hidden, words


@dataclass
class Data:
    hidden: Tensor
    pooled: Tensor | None = None


class ReturnsPlain(Stacked):
    def forward(self, x: Tensor) -> Plain:
        return Plain(super().forward(x), "of an own class")


class ReturnsData(Stacked):
    def forward(self, x: Tensor) -> Data:
        return Data(super().forward(x))


@pytest.mark.parametrize(("model", "cls"), [(ReturnsPlain(), Plain), (ReturnsData(), Data)])
def test_outputs_of_an_unregistered_class(model: nn.Module, cls: Any, tmp_path: Path) -> None:
    converted = sqa_fx.convert(model.eval(), hq=4, hkv=2, args=(X,))
    assert isinstance(converted, ConvertedModule) and converted.report.dynamic
    assert f"{__name__}.{cls.__qualname__}" in _note(converted.report, "registered with torch's pytree")
    out: Any = converted(X)
    assert type(out) is cls
    load_masked(model, converted.plan.to_json())
    torch.testing.assert_close(out.hidden, model(X).hidden, rtol=0, atol=2e-6)
    assert vars(out).keys() == vars(model(X)).keys() and getattr(out, "words", "") == getattr(model(X), "words", "")
    converted.save(tmp_path / "saved")
    assert torch.equal(sqa_fx.load(tmp_path / "saved")(X).hidden, out.hidden)


class KeyCache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class Caches(Stacked):
    """Returns what it cached, unless told otherwise."""

    def forward(self, x: Tensor, use_cache: bool = True) -> tuple[Tensor, KeyCache] | tuple[Tensor]:
        out = super().forward(x)
        if not use_cache:
            return (out,)
        cache = KeyCache()
        cache.keys.append(x * 2)
        return out, cache


def test_a_cache_that_nobody_asked_for_is_left_out() -> None:
    model = Caches().eval()
    for again in (False, True):  # the second time the cache's class is known to torch
        converted = sqa_fx.convert(model, hq=4, hkv=2, args=(X,))
        note = _note(converted.report, "use_cache=False")
        assert "dynamic shapes" in note and "KV cache, which nobody asked for" in note
        assert len(converted(X)) == 1 and converted.report.dynamic
        with pytest.raises(InputError, match="'use_cache' was False"):
            converted(X, use_cache=True)
        if again:
            break
        asked = sqa_fx.convert(model, hq=4, hkv=2, kwargs={"x": X, "use_cache": True})
        _, cache = asked(X)
        assert isinstance(cache, KeyCache) and torch.equal(cache.keys[0], X * 2)


class SlottedCache:
    __slots__ = ("keys",)

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class KeepsSlots(Stacked):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"hidden": super().forward(x), "past": SlottedCache(x)}


def test_a_cache_that_no_graph_can_return_is_stripped() -> None:
    converted = sqa_fx.convert(KeepsSlots().eval(), hq=4, hkv=2, args=(X,))
    assert "cache left out of the outputs" in _note(converted.report, "captured with")
    out = converted(X)
    assert out["past"] is None and out["hidden"].shape == X.shape


class LooksAtTheType(Stacked):
    """Non-strict export runs this with a tensor subclass; Dynamo knows what it would be."""

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            raise TypeError("plain tensors only")
        out: Tensor = super().forward(x)
        return out


def test_strict_export_where_only_that_works() -> None:
    model = LooksAtTheType().eval()
    converted = sqa_fx.convert(model, hq=4, hkv=2, args=(X,))
    assert isinstance(converted, ConvertedModule)
    note = _note(converted.report, "strict export with dynamic shapes")
    assert "plain tensors only" in note and note in converted.report.table()
    assert [s.name for s in converted.report.sites] == ["attention"]
    load_masked(model, converted.plan.to_json())
    for x in (X, noise(3, 11, WIDTH)):
        torch.testing.assert_close(converted(x), model(x), rtol=0, atol=2e-6)


class NoBackward(Stacked):
    """Refuses to be traced with gradients on, as an operator without a backward pass does."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("this operator does not support backward on CPU")
        out: Tensor = super().forward(x)
        return out


def test_without_gradients_where_an_operator_has_no_backward() -> None:
    converted = sqa_fx.convert(NoBackward().eval(), hq=4, hkv=2, args=(X,))
    assert isinstance(converted, ConvertedModule) and len(converted.report.sites) == 1
    assert "does not support backward" in _note(converted.report, "without gradients")


def test_dynamic_shapes_of_inputs_that_double_star_collects() -> None:
    class Collects(Stacked):
        def forward(self, x: Tensor, **others: Tensor) -> Tensor:
            out: Tensor = super().forward(x + others["bias"])
            return out

    model = Collects().eval()
    converted = sqa_fx.convert(model, hq=4, hkv=2, kwargs={"x": X, "bias": X * 0.1})
    assert len(converted.report.dynamic) == 2 and not converted.report.notes
    longer = noise(3, 11, WIDTH)
    assert converted(longer, bias=longer).shape == longer.shape
    assert "forward" not in vars(model)


def test_tracing_leaves_the_attributes_of_the_model_alone() -> None:
    class Remembers(Stacked):
        def forward(self, x: Tensor) -> Tensor:
            self.count = getattr(self, "count", 0) + 1
            self.seen = x.shape
            if torch.compiler.is_exporting() and not isinstance(x.shape[1], int):
                raise ValueError("fails half-way")
            out: Tensor = super().forward(x)
            return out

    model = Remembers().eval()
    before = dict(vars(model))
    sqa_fx.convert(model, hq=4, hkv=2, args=(X,))
    assert vars(model) == before


def test_specified_shapes_are_never_dropped() -> None:
    with pytest.raises(CaptureError, match=r"torch\.export failed.*what to try"):
        sqa_fx.convert(_mixture(), hq=4, args=(tokens(2, 7),), dynamic_shapes={"input_ids": {0: torch.export.Dim("b")}})


def test_every_failure_is_told_once() -> None:
    with pytest.raises(CaptureError) as error:
        capture(_mixture(), (tokens(2, 7),))
    text = str(error.value)
    assert "dynamic shapes; static shapes" in text and "strict export" in text and text.endswith(capture_ways.TRY)


# -- submodule by submodule -----------------------------------------------------------------------------------------


def test_attention_beside_experts() -> None:
    model, converted = _mixture(), _shared()
    report, plan = converted.report, converted.plan
    names = ["layers.0.attention", "layers.1.attention"]
    assert [s.name for s in report.sites] == [s.name for s in plan.sites] == names
    assert all((s.hq, s.hkv) == (4, 2) and s.proof_error is not None and s.proof_error < 1e-10 for s in report.sites)
    note = _note(report, "converted per submodule: layers.0.attention, layers.1.attention; the rest stays eager")
    assert "torch.export failed" in note and "what to try" not in note
    assert {p.name.rpartition(".")[0] for p in plan.parameters} == {f"{n}.{part}" for n in names for part in "qkvo"}
    assert report.proof is not None and report.proof["precision"] == "float64" and report.proof["shapes"] >= 2
    assert report.proof["eager"]["error"] < 1e-5 and report.proof["eager"]["outputs"] == 2
    assert _note(report, "agrees with the masked original in eager")
    assert report.parameters_after < report.parameters_before == sum(p.numel() for p in model.parameters())
    again = sqa_fx.Report.from_json(report.to_json())
    assert again.to_json() == report.to_json()

    load_masked(model, plan.to_json())
    for ids in (tokens(2, 7), tokens(5, 3), tokens(1, 1)):
        out, expected = converted(ids), model(input_ids=ids)
        assert list(out) == ["logits", "last"]
        torch.testing.assert_close(out["logits"], expected["logits"], rtol=0, atol=1e-5)


def test_names_and_ties_of_the_parameters_are_the_original_ones() -> None:
    model = _mixture()
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
    model, ids = _mixture(layers=1), tokens(2, 7)
    converted = _convert(model, hq=1.0, hkv=1.0)
    assert torch.equal(converted(ids)["logits"], model(ids)["logits"])


def test_the_users_model_is_untouched() -> None:
    model = _mixture(layers=1, dropout=0.1).train()
    before, attributes = whole_state(model), {n: dict(vars(m)) for n, m in model.named_modules()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    random = torch.random.get_rng_state()
    converted = _convert(model)
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
    model, ids = _mixture(layers=1, dropout=0.1).train(), tokens(2, 7)
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
    model, ids = _mixture(), tokens(2, 7)
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
    model, ids = _mixture(), tokens(2, 7)
    one = _convert(model, hq={"layers.1.*": 2}, hkv=None, dynamic_shapes=None)
    assert [(s.hq, s.hkv) for s in one.report.sites] == [(6, 6), (2, 2)]
    assert [s.name for s in one.plan.sites] == ["layers.1.attention"] and one.submodules == ("layers.1.attention",)
    with pytest.raises(PlanError, match=r"'nowhere' matches no site; sites are: layers\.0\.attention"):
        _convert(model, hq={"layers.0.attention": 3, "nowhere": 2}, dynamic_shapes=None)
    with pytest.raises(PlanError, match="no site is named"):
        _convert(model, hq={}, hkv=None, dynamic_shapes=None)
    with pytest.raises(PlanError, match=r"does not have; it has: layers\.0\.attention"):
        sqa_fx.convert(_mixture(layers=1), plan=_shared().plan, args=(ids,))


def test_saving_and_exporting_say_what_is_possible(tmp_path: Path) -> None:
    converted = _shared()
    with pytest.raises(InputError, match=r"nothing was written.*state_dict"):
        converted.save(tmp_path / "saved")
    with pytest.raises(InputError, match="converted per submodule"):
        sqa_fx.export(converted, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_wrong_shapes_and_inputs() -> None:
    static = _convert(_mixture(layers=1), dynamic_shapes=None)
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
    model = _mixture()
    before = whole_state(model)
    report = sqa_fx.inspect(model, hq=4, hkv=2, args=(tokens(2, 7),))
    assert [(s.name, s.hq, s.hkv) for s in report.sites] == [("layers.0.attention", 4, 2), ("layers.1.attention", 4, 2)]
    assert _note(report, "converted per submodule")
    assert all(torch.equal(v, before[k]) for k, v in whole_state(model).items())


def test_without_inputs_it_converts_on_the_first_call() -> None:
    model, ids = _mixture(layers=1), tokens(2, 7)
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
    converted = _convert(model)
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

    converted, ids = _convert(Remembering(layers=1).eval()), tokens(2, 7)
    assert _note(converted.report, "called with use_cache=False")
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
    converted = _convert(model, args=(X,))
    assert _note(converted.report, "not compared in eager, only its submodules were proved: batch norm")
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
    report = sqa_fx.inspect(model, args=(X,))
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

    converted = _convert(Tips(layers=1).eval())
    assert converted.report.proof is not None
    eager = converted.report.proof["eager"]
    assert eager["in_step"] and eager["error"] < 1e-4 < eager["free_running_error"]
    assert _note(converted.report, "given the original's inputs")
