"""convert_: the eager module itself with fewer heads, proved; what cannot be is refused and bit for bit as it was."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from plan_arithmetic import load_masked
from surgery_models import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    Config,
    FromConfig,
    Literal,
    PerHead,
    Plain,
    Remembering,
    Scaled,
    TwoMeanings,
    inputs,
    state,
)
from torch import Tensor, nn

import sqa_fx
from sqa_fx.errors import InputError, SurgeryError
from sqa_fx.surgery_proof import Comparison


def _masked(model: nn.Module, plan: sqa_fx.Plan) -> nn.Module:
    oracle = copy.deepcopy(model)
    load_masked(oracle, plan.to_json())
    return oracle


def _agree(model: nn.Module, oracle: nn.Module, *args: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(*args), oracle(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "changed"), [(Plain, {"heads", "inner"}), (PerHead, {"sizes[0]"})])
def test_the_module_itself_has_fewer_heads(kind: type[nn.Module], changed: set[str]) -> None:
    model: Any = nn.Sequential(kind(), kind()).eval()
    original, x = copy.deepcopy(model), inputs()
    objects = {name: id(p) for name, p in model.named_parameters()}
    report = sqa_fx.convert_(model, hq=3, hkv=3, args=(x,))
    _agree(model, _masked(original, report.plan), x)
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert {c.attribute for c in report.surgery.attributes} == changed
    assert report.proof.precision == "float64" and len(report.proof.sizes) >= 2
    assert "in place" in report.table() and json.dumps(report.to_json())


def test_layers_of_torch_follow() -> None:
    model = Plain().eval()
    sqa_fx.convert_(model, hq=2, hkv=2, args=(inputs(),), dynamic_shapes=None)
    assert (model.q.out_features, model.q.in_features, model.o.in_features) == (2 * HEAD_DIM, WIDTH, 2 * HEAD_DIM)


@pytest.mark.parametrize("kind", [Literal, TwoMeanings])
def test_what_cannot_be_is_refused_and_unchanged(kind: type[nn.Module]) -> None:
    model = kind().train()
    before = state(model)
    with pytest.raises(SurgeryError, match=r"as it was(.|\n)*Tried in \d+ runs"):
        sqa_fx.convert_(model, hq=3, hkv=3, args=(inputs(),), dynamic_shapes=None)
    assert state(model) == before


def test_an_interrupt_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Plain().train()
    model.register_forward_hook(lambda module, given, output: None)
    before = state(model)
    prove, calls = Comparison.prove, 0

    def interrupted(self: Comparison, model: nn.Module) -> Any:
        nonlocal calls
        calls += 1
        if calls == wanted:
            raise KeyboardInterrupt
        return prove(self, model)

    monkeypatch.setattr(Comparison, "prove", interrupted)
    for wanted in (1, 2):  # in the search, and when everything was in its place for good
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            sqa_fx.convert_(model, hq=3, hkv=3, args=(inputs(),), dynamic_shapes=None)
        assert calls == wanted and state(model) == before


def test_a_shared_config_is_copied_for_those_that_need_it() -> None:
    config = Config()
    model: Any = nn.Sequential(FromConfig(config), Scaled(config), FromConfig(config)).eval()
    original, x = copy.deepcopy(model), inputs()
    report = sqa_fx.convert_(model, hq=3, hkv=3, args=(x,), dynamic_shapes=None)
    _agree(model, _masked(original, report.plan), x)
    assert config.heads == HEADS and model[1].config is config
    assert model[0].config is model[2].config and model[0].config.heads == 3


def test_what_the_model_remembers_of_other_weights_is_forgotten() -> None:
    model, x = Remembering().eval(), inputs()
    original = copy.deepcopy(model)
    report = sqa_fx.convert_(model, hq=3, hkv=3, args=(x,), dynamic_shapes=None)
    assert not model.known
    _agree(model, _masked(original, report.plan), x)


def test_layers_with_different_heads() -> None:
    model: Any = nn.Sequential(Plain(), Plain(), Plain()).eval()
    original, x = copy.deepcopy(model), inputs()
    report = sqa_fx.convert_(model, hq={"0": 3, "2": 1}, args=(x,), dynamic_shapes=None)
    _agree(model, _masked(original, report.plan), x)
    assert [m.heads for m in model] == [3, HEADS, 1]


def test_a_record_makes_a_stock_model_take_the_weights() -> None:
    model: Any = nn.Sequential(Plain(), PerHead()).eval()
    x = inputs()
    report = sqa_fx.convert_(model, hq=3, hkv=3, args=(x,), dynamic_shapes=None)
    record = sqa_fx.Surgery.from_json(json.loads(json.dumps(report.surgery.to_json())))
    assert record == report.surgery
    stock: Any = nn.Sequential(Plain(), PerHead()).eval()
    record.apply(stock)
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(stock(x), model(x))
    before = state(stock)
    with pytest.raises(InputError, match="operated on already"):
        record.apply(stock)
    assert state(stock) == before
    with torch.device("meta"):
        empty: Any = nn.Sequential(Plain(), PerHead())
    record.apply(empty)
    assert empty[0].q.weight.shape == (3 * HEAD_DIM, WIDTH)


@pytest.mark.parametrize("data", [{}, {"format": "sqa-fx-surgery", "version": 1, "parameters": [{"name": "a"}]}])
def test_damaged_records_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        sqa_fx.Surgery.from_json(data)


def test_a_cut_checkpoint_is_the_state_dict() -> None:
    from sqa_fx.passes.parameters import cut_tensor

    model, x = PerHead().eval(), inputs()
    original = copy.deepcopy(model)
    report = sqa_fx.convert_(model, hq=3, hkv=3, args=(x,), dynamic_shapes=None)
    cuts = {p.name: p for p in report.layout.parameters}
    for name, tensor in original.state_dict().items():
        wanted = cut_tensor(tensor, cuts[name]) if name in cuts else tensor
        assert torch.equal(model.state_dict()[name], wanted)


def test_ties_flags_and_hooks_stay() -> None:
    model: Any = nn.Sequential(Plain(), Plain()).train()
    model[1].q.weight = model[0].q.weight
    model[1].q.bias = model[0].q.bias
    model[0].k.weight.requires_grad_(False)
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, given, output: seen.append(output))
    model[0].v.weight.register_hook(lambda grad: grad * 0)
    sqa_fx.convert_(model, hq=3, hkv=3, heads="first", args=(inputs(),), dynamic_shapes=None)
    assert model[1].q.weight is model[0].q.weight and not model[0].k.weight.requires_grad
    assert model.training and model[1].training
    seen.clear()
    model(inputs()).sum().backward()
    assert len(seen) == 1 and model[0].v.weight.grad is not None and not model[0].v.weight.grad.any()


def test_weight_norm_is_cut_where_it_is_parametrized() -> None:
    model = Plain().eval()
    torch.nn.utils.parametrizations.weight_norm(model.q)
    original, x = copy.deepcopy(model), inputs()
    report = sqa_fx.convert_(model, hq=3, hkv=3, args=(x,), dynamic_shapes=None)
    _agree(model, _masked(original, report.plan), x)


class _Packed(nn.Parameter):
    """As quantising libraries have them: a kind of parameter of their own."""


def test_parameters_of_other_kinds_are_refused() -> None:
    model = Plain().eval()
    model.q.weight = _Packed(model.q.weight.detach())
    before = state(model)
    with pytest.raises(InputError, match="quantised and sharded"):
        sqa_fx.convert_(model, hq=3, hkv=3, args=(inputs(),), dynamic_shapes=None)
    assert state(model) == before


class _LowRank(nn.Module):
    """A low-rank update beside a frozen layer, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features]."""
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def test_it_trains_and_takes_low_rank_updates() -> None:
    model, x = Plain().train(), inputs()
    sqa_fx.convert_(model, hq=3, hkv=3, args=(x,), dynamic_shapes=None)
    model.q, model.o = _LowRank(model.q), _LowRank(model.o)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_call_that_the_user_names_is_proved_too() -> None:
    model, x = Plain().eval(), inputs()
    report = sqa_fx.convert_(model, hq=3, hkv=3, args=(x,), also=[lambda m: m(x[:, :2])], dynamic_shapes=None)
    assert report.proof.calls == ("also[0]",)


def test_no_inputs_and_no_module() -> None:
    with pytest.raises(InputError, match="example inputs"):
        sqa_fx.convert_(Plain().eval(), hq=3, dynamic_shapes=None)
    with pytest.raises(InputError, match="Python code"):
        sqa_fx.convert_(torch.fx.symbolic_trace(nn.Linear(2, 2)), hq=3, dynamic_shapes=None)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_of_torch_becomes_a_narrow_subclass(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 17, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()
    original, x = copy.deepcopy(model), inputs()
    report = sqa_fx.convert_(model, hq=4, hkv=2, args=(x,), dynamic_shapes=None)
    oracle = _masked(original, report.plan)
    _agree(model, oracle, x)
    padding = torch.zeros(x.shape[:2] if batch_first else x.shape[1::-1], dtype=torch.bool)
    padding[0, -2:] = True
    valid = ~padding if batch_first else ~padding.T
    with torch.no_grad():  # torch's own fast path, which writes zeros where it is padded
        torch.testing.assert_close(
            model(x, src_key_padding_mask=padding)[valid],
            oracle(x, src_key_padding_mask=padding)[valid],
            rtol=1e-4,
            atol=1e-5,
        )
    stock = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()
    sqa_fx.Surgery.from_json(report.surgery.to_json()).apply(stock)
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(stock(x), model(x))


@pytest.mark.parametrize("options", [{"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 11, "vdim": 13}])
def test_attention_of_torch_on_its_own(options: dict[str, Any]) -> None:
    model = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    original, x = copy.deepcopy(model), inputs()
    args = (x, torch.randn(5, 7, options.get("kdim", WIDTH)), torch.randn(5, 7, options.get("vdim", WIDTH)))
    report = sqa_fx.convert_(model, hq=3, hkv=3, args=args, dynamic_shapes=None)
    oracle = _masked(original, report.plan)
    causal = torch.ones(3, 5, dtype=torch.bool).triu(1)
    with torch.no_grad():
        for extra in ({}, {"attn_mask": causal}, {"need_weights": False, "attn_mask": causal}):
            torch.testing.assert_close(model(*args, **extra)[0], oracle(*args, **extra)[0], rtol=1e-4, atol=1e-5)
