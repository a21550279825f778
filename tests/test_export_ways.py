"""Where torch.export stumbles on something outside of attention: other ways to capture the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_models import FusedAttention, noise, tokens
from mixture_models import HEADS, WIDTH, KeyCache, X, mixture, note_with
from plan_arithmetic import load_masked
from torch import Tensor, nn

import sqa_fx
from sqa_fx import ConvertedModule
from sqa_fx.errors import CaptureError, InputError
from sqa_fx.passes import capture_ways
from sqa_fx.passes.capture import capture


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
    assert f"{__name__}.{cls.__qualname__}" in note_with(converted.report, "registered with torch's pytree")
    out: Any = converted(X)
    assert type(out) is cls
    load_masked(model, converted.plan.to_json())
    torch.testing.assert_close(out.hidden, model(X).hidden, rtol=0, atol=2e-6)
    assert vars(out).keys() == vars(model(X)).keys() and getattr(out, "words", "") == getattr(model(X), "words", "")
    converted.save(tmp_path / "saved")
    assert torch.equal(sqa_fx.load(tmp_path / "saved")(X).hidden, out.hidden)


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
        note = note_with(converted.report, "use_cache=False")
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
    assert "cache left out of the outputs" in note_with(converted.report, "captured with")
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
    note = note_with(converted.report, "strict export with dynamic shapes")
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
    assert "does not support backward" in note_with(converted.report, "without gradients")


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
        sqa_fx.convert(mixture(), hq=4, args=(tokens(2, 7),), dynamic_shapes={"input_ids": {0: torch.export.Dim("b")}})


def test_every_failure_is_told_once() -> None:
    with pytest.raises(CaptureError) as error:
        capture(mixture(), (tokens(2, 7),))
    text = str(error.value)
    assert "dynamic shapes; static shapes" in text and "strict export" in text and text.endswith(capture_ways.TRY)
