"""Capture: dynamic and static shapes, what may be captured, the native fast path, and calls that do not fit."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import CASES, FusedAttention, Stack, tensors, tokens
from plan_arithmetic import load_masked, whole_state
from torch import Tensor, nn

import sqa_fx
from sqa_fx.errors import CaptureError, InputError
from sqa_fx.passes.capture import capture


def _stack() -> Stack:
    torch.manual_seed(1)
    return Stack([FusedAttention(30, 6)], 30).eval()


def test_batch_and_sequence_are_dynamic() -> None:
    model = _stack()
    converted = sqa_fx.convert(model, hq=4, hkv=2, args=(tokens(2, 7),))
    assert len(converted.report.dynamic) == 1 and not converted.report.static
    assert converted.report.dynamic[0].startswith("input_ids[")
    load_masked(model, converted.plan.to_json())
    for batch, length in ((2, 7), (1, 7), (2, 1), (1, 1), (5, 23)):
        ids = tokens(batch, length)
        torch.testing.assert_close(converted(ids), model(ids), rtol=0, atol=2e-6)


def test_static_when_asked() -> None:
    converted = sqa_fx.convert(_stack(), hq=4, hkv=2, args=(tokens(2, 7),), dynamic_shapes=None)
    assert converted.report.static == ("input_ids[2, 7]",) and not converted.report.dynamic
    converted(tokens(2, 7))
    with pytest.raises(InputError, match=r"'input_ids' must have shape \[2, 7\].*got \[3, 7\]"):
        converted(tokens(3, 7))


def test_own_dynamic_shapes() -> None:
    shapes = {"input_ids": {0: torch.export.Dim("rows", min=1, max=64)}}
    converted = sqa_fx.convert(_stack(), hq=4, hkv=2, args=(tokens(2, 7),), dynamic_shapes=shapes)
    assert converted(tokens(5, 7)).shape == (5, 7, 30)
    with pytest.raises(InputError, match="input_ids"):
        converted(tokens(2, 8))


def test_own_dynamic_shapes_that_cannot_be() -> None:
    class Fixed(Stack):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids) + torch.ones(7, 1)

    model = Fixed([FusedAttention(30, 6)], 30).eval()
    with pytest.raises(CaptureError, match=r"torch\.export failed"):
        sqa_fx.convert(
            model, hq=4, hkv=2, args=(tokens(2, 7),), dynamic_shapes={"input_ids": {1: torch.export.Dim("length")}}
        )


def test_sizes_that_the_model_fixes_are_reported() -> None:
    class Fixed(Stack):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids) + torch.ones(7, 1)

    converted = sqa_fx.convert(Fixed([FusedAttention(30, 6)], 30).eval(), hq=4, hkv=2, args=(tokens(2, 7),))
    assert converted.report.dynamic and converted.report.dynamic[0].endswith(", 7]")
    assert converted(tokens(3, 7)).shape == (3, 7, 30)
    with pytest.raises(InputError, match=r"7\].*got \[2, 8\]"):
        converted(tokens(2, 8))


def test_falls_back_to_static_with_the_reason() -> None:
    class Unrolled(Stack):
        """Python reads the length as a number, which a free one does not have."""

        def forward(self, input_ids: Tensor) -> Tensor:
            x = super().forward(input_ids)
            length: object = input_ids.shape[1]
            if torch.compiler.is_exporting() and isinstance(length, torch.SymInt):
                raise ValueError("this model wants to know its length")
            return x

    converted = sqa_fx.convert(Unrolled([FusedAttention(30, 6)], 30).eval(), hq=4, hkv=2, args=(tokens(2, 7),))
    assert not converted.report.dynamic and converted.report.static == ("input_ids[2, 7]",)
    note = next(n for n in converted.report.notes if "static" in n)
    assert "wants to know its length" in note
    assert note in str(converted.report)


def test_a_batch_of_one_is_static() -> None:
    converted = sqa_fx.convert(_stack(), hq=4, hkv=2, args=(tokens(1, 7),))
    assert converted(tokens(1, 9)).shape == (1, 9, 30)
    with pytest.raises(InputError, match="batch and length above 1"):
        converted(tokens(2, 7))


def test_exported_program() -> None:
    model, ids = _stack(), tokens(2, 7)
    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(model, (ids,), dynamic_shapes=({**auto},), strict=False)
    text = str(program.graph)
    converted = sqa_fx.convert(program, hq=4, hkv=2)
    assert str(program.graph) == text
    assert len(converted.report.sites) == 1 and converted.report.dynamic
    direct = sqa_fx.convert(model, hq=4, hkv=2, args=(ids,))
    assert converted.plan.sites == direct.plan.sites
    for batch, length in ((2, 7), (3, 11)):
        x = tokens(batch, length)
        assert torch.equal(converted(x), direct(x))
    assert torch.equal(program.module()(ids), model(ids))


def test_training_ir_program() -> None:
    """A program that was decomposed by hand (the empty table) is taken too."""
    model, ids = _stack(), tokens(2, 7)
    program = torch.export.export(model, (ids,), strict=False).run_decompositions({})
    converted = sqa_fx.convert(program, hq=4, hkv=2)
    load_masked(model, converted.plan.to_json())
    torch.testing.assert_close(converted(ids), model(ids), rtol=0, atol=2e-6)


def test_graph_module() -> None:
    model, ids = _stack(), tokens(2, 7)
    for graph_module in (
        torch.fx.symbolic_trace(_Traceable().eval()),
        torch.export.export(_Traceable().eval(), (_X,)).module(),
    ):
        converted = sqa_fx.convert(graph_module, hq=4, hkv=2, args=(_X,), dynamic_shapes=None)
        assert len(converted.report.sites) == 1
        load_masked(graph_module, converted.plan.to_json())
        torch.testing.assert_close(converted(_X), graph_module(_X), rtol=0, atol=2e-6)
    unlifted = capture(model, (ids,)).graph_module
    assert len(sqa_fx.convert(unlifted, hq=4, hkv=2, args=(ids,)).report.sites) == 1


class _Traceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(30, 30) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (6, 5)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


_X = torch.randn(2, 7, 30, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("frozen", "no_grad", "padding"),  # every pair of values occurs
    [(False, False, False), (True, False, True), (False, True, True), (True, True, False)],
)
def test_the_native_fast_path_does_not_hide_attention(frozen: bool, no_grad: bool, padding: bool) -> None:
    """nn.TransformerEncoder in eval, without gradients: torch would run one native op for a whole layer."""
    layer = nn.TransformerEncoderLayer(80, 8, 52, batch_first=True, norm_first=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 2).eval().requires_grad_(not frozen)
    x = torch.randn(2, 7, 80)
    kwargs: dict[str, Any] = {"src": x}
    if padding:
        mask = torch.zeros(2, 7, dtype=torch.bool)
        mask[1, 5:] = True
        kwargs["src_key_padding_mask"] = mask
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad() if no_grad else torch.enable_grad():
        grad = torch.is_grad_enabled()
        converted = sqa_fx.convert(model, hq=4, hkv=2, kwargs=kwargs, dynamic_shapes=None)
        assert torch.is_grad_enabled() == grad
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert len(converted.report.sites) == 2 and not converted.report.refused
    assert all(p.requires_grad != frozen for p in converted.parameters())
    load_masked(model, converted.plan.to_json())
    with torch.enable_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = model(**kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    valid = torch.ones(2, 7, dtype=torch.bool) if not padding else ~kwargs["src_key_padding_mask"]
    torch.testing.assert_close(converted(**kwargs)[valid], expected[valid], rtol=0, atol=1e-5)


def test_the_users_model_is_not_modified() -> None:
    case = CASES["bert"]
    model, inputs = case.build("sdpa"), case.inputs(2, 7)
    state, modes = whole_state(model), [m.training for m in model.modules()]
    versions = [p._version for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    outputs = tensors(model(**inputs))
    converted = sqa_fx.convert(model, hq=6, hkv=3, kwargs=inputs, dynamic_shapes=None)
    for parameter in converted.parameters():
        with torch.no_grad():
            parameter.zero_()
    assert all(torch.equal(v, state[k]) for k, v in whole_state(model).items())
    assert [m.training for m in model.modules()] == modes
    assert [p._version for p in model.parameters()] == versions
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(a, b) for a, b in zip(tensors(model(**inputs)), outputs, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_example_inputs_are_not_modified() -> None:
    class Writes(_Traceable):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(1.5)
            return super().forward(x)

    x = _X.clone()
    try:
        converted = sqa_fx.convert(Writes().eval(), hq=4, hkv=2, args=(x,), dynamic_shapes=None)
    except sqa_fx.SqaError:
        return  # a model that writes to its inputs may be refused, in words
    assert torch.equal(x, _X)
    torch.testing.assert_close(converted(_X.clone()), converted(_X.clone()))


def test_in_place_ops_inside_the_region() -> None:
    class InPlace(_Traceable):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (6, 5)).transpose(1, 2) for f in (self.q, self.k, self.v))
            q.mul_(0.3)
            scores = q @ k.transpose(-2, -1)
            scores.add_(torch.arange(x.shape[1]) * 0.1)
            v[..., 0].add_(1.0)
            out: Tensor = self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            return out

    model = InPlace().eval()
    expected = model(_X)
    assert torch.equal(sqa_fx.convert(model, hq=1.0, hkv=1.0, args=(_X,), dynamic_shapes=None)(_X), expected)
    converted = sqa_fx.convert(model, hq=4, hkv=2, args=(_X,), dynamic_shapes=None)
    load_masked(model, converted.plan.to_json())
    torch.testing.assert_close(converted(_X), model(_X), rtol=0, atol=2e-6)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Traceable()

    def forward(
        self, x: Tensor, scale: float = 2.0, *, bias: Tensor | None = None, extra: Tensor | None = None
    ) -> Tensor:
        y: Tensor = self.inner(x) * scale
        y = y if bias is None else y + bias
        return y if extra is None else y * extra


@functools.cache
def _two() -> sqa_fx.ConvertedModule:
    converted = sqa_fx.convert(TwoInputs().eval(), hq=4, hkv=2, args=(_X,), kwargs={"bias": torch.ones(2, 7, 30)})
    assert isinstance(converted, sqa_fx.ConvertedModule)
    return converted


def test_calls_of_the_original_signature() -> None:
    converted, bias = _two(), torch.ones(2, 7, 30)
    expected = converted(_X, bias=bias)
    assert torch.equal(converted(x=_X, bias=bias), expected)
    assert torch.equal(converted(_X, 2.0, bias=bias), expected)
    assert torch.equal(converted(bias=bias, x=_X, extra=None), expected)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((), {"bias": torch.ones(2, 7, 30)}, "signature|missing"),
        ((_X,), {}, "'bias' is missing"),
        ((_X,), {"bias": None}, "bias"),
        (
            (_X.double(),),
            {"bias": torch.ones(2, 7, 30)},
            r"'x' must have dtype torch.float32; got torch.float64 of shape \(2, 7, 30\)",
        ),
        ((_X[0],), {"bias": torch.ones(2, 7, 30)}, r"'x' must have shape \[.*30\].*got \[7, 30\]"),
        ((_X[..., :29],), {"bias": torch.ones(2, 7, 30)}, r"'x' must have shape .*30\].*got \[2, 7, 29\]"),
        (
            (_X,),
            {"bias": torch.ones(2, 7, 30), "extra": torch.ones(1)},
            "'extra' was not there when the model was captured",
        ),
        ((_X,), {"bias": torch.ones(2, 7, 30), "other": 3}, "signature"),
        ((_X, 2.0, 3.0), {"bias": torch.ones(2, 7, 30)}, "signature"),
        ((_X, 3.0), {"bias": torch.ones(2, 7, 30)}, "scale"),
        (([1, 2],), {"bias": torch.ones(2, 7, 30)}, "tensor|form"),
        ((None,), {"bias": torch.ones(2, 7, 30)}, "tensor|form"),
    ],
)
def test_calls_that_do_not_fit(args: tuple[Any, ...], kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        _two()(*args, **kwargs)


def test_inputs_that_disagree_are_not_computed() -> None:
    """Both inputs fit by themselves; their sizes differ from each other."""
    with pytest.raises((InputError, RuntimeError)):
        _two()(_X, bias=torch.ones(2, 9, 30))


def test_example_inputs_that_do_not_fit_the_forward() -> None:
    with pytest.raises(sqa_fx.SqaError, match=r"forward|signature"):
        sqa_fx.convert(TwoInputs().eval(), hq=4, args=(_X, 2.0, _X, _X), dynamic_shapes=None)
    with pytest.raises(sqa_fx.SqaError):
        sqa_fx.convert(TwoInputs().eval(), hq=4, args=(_X[..., :9],), dynamic_shapes=None)


def test_without_inputs_it_converts_on_the_first_call() -> None:
    model = TwoInputs().eval()
    deferred = sqa_fx.convert(model, hq=4, hkv=2)
    with pytest.raises(InputError, match="first call"):
        _ = deferred.plan
    first = deferred(_X)
    assert len(deferred.plan.sites) == 1
    load_masked(model, deferred.plan.to_json())
    torch.testing.assert_close(first, model(_X), rtol=0, atol=2e-6)


def test_half_precision_models() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = _Traceable().eval().to(dtype)
        x = _X.to(dtype)
        converted = sqa_fx.convert(model, hq=4, hkv=2, args=(x,), dynamic_shapes=None)
        assert converted.report.proof is not None and converted.report.proof["precision"] == "float64"
        assert converted.report.proof["error"] <= 1e-10
        assert converted(x).dtype == dtype
        native = sqa_fx.convert(model, hq=4, hkv=2, args=(x,), verify="native", dynamic_shapes=None)
        assert native.report.proof is not None and native.report.proof["precision"] == str(dtype).removeprefix("torch.")
