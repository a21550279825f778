"""FLOPs of attention at given sizes, from fused and decomposed attention, and the tensors that it is timed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import CASES, FusedAttention, Stack
from attention_models import converted as convert_now
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sqa_fx
from sqa_fx.attention_flops import AttentionCall, TensorForm, attention_calls, attention_flops
from sqa_fx.attention_time import measure_attention, sdpa_alone, time_attention
from sqa_fx.errors import InputError


class Plain(nn.Module):
    """q, k, v are inputs [batch, heads, length, head dim]."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)


class Written(nn.Module):
    """The same attention as a softmax between two products."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * 0.3).softmax(-1) @ v


def qkv(heads: int = 6, kv_heads: int = 6, q_len: int = 5, kv_len: int = 7, v_dim: int = 3) -> tuple[Tensor, ...]:
    return (
        torch.randn(2, heads, q_len, 3),
        torch.randn(2, kv_heads, kv_len, 3),
        torch.randn(2, kv_heads, kv_len, v_dim),
    )


def one_call(module: nn.Module, args: tuple[Tensor, ...]) -> AttentionCall:
    [call] = attention_calls(torch.export.export(module, args), (args, {}))
    return call


def test_formula() -> None:
    call = one_call(Plain(), qkv())
    assert call.flops == 4 * 2 * 6 * 5 * 7 * 3
    assert (call.query_heads, call.fused, call.causal, call.gqa, call.mask) == (6, True, False, False, None)


def test_causal_counts_half_and_a_mask_in_full() -> None:
    full = 4 * 2 * 6 * 5 * 7 * 3
    causal = one_call(Plain(is_causal=True), qkv())
    assert (causal.flops, causal.causal) == (full // 2, True)
    mask = torch.ones(5, 7, dtype=torch.bool).tril()
    masked = one_call(Plain(attn_mask=mask), qkv())
    assert masked.flops == full
    assert masked.mask is not None and masked.mask.shape == (5, 7) and masked.mask.dtype == torch.bool


def test_grouped_heads_and_wide_values() -> None:
    grouped = one_call(Plain(enable_gqa=True, scale=0.5), qkv(heads=6, kv_heads=2, v_dim=4))
    assert grouped.flops == 2 * 2 * 6 * 5 * 7 * (3 + 4)
    assert (grouped.gqa, grouped.scale, grouped.key.shape) == (True, 0.5, (2, 2, 7, 3))


@pytest.mark.parametrize("v_dim", [3, 4])
def test_written_out_attention_counts_as_torch_counts_its_products(v_dim: int) -> None:
    args = qkv(v_dim=v_dim)
    with FlopCounterMode(display=False) as counter:
        Written()(*args)
    call = one_call(Written(), args)
    assert call.flops == counter.get_total_flops() == 2 * 2 * 6 * 5 * 7 * (3 + v_dim)
    assert call.fused is False and call.query_heads is None


@pytest.mark.parametrize("impl", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_sizes_are_those_of_the_inputs(impl: str) -> None:
    case = CASES["bert"]
    converted = convert_now(case.build(impl), hq=0.5, hkv=0.5, kwargs=case.inputs(2, 7))
    assert attention_flops(converted, ((), case.inputs(2, 7))) == converted.report.flops_after
    layers, heads, head_dim = 1, converted.report.sites[0].hq, converted.report.sites[0].head_dim
    assert attention_flops(converted, ((), case.inputs(3, 11))) == 4 * 3 * layers * heads * 11 * 11 * head_dim
    assert [c.module for c in attention_calls(converted, ((), case.inputs(3, 11)))] == [
        s.name for s in converted.report.sites
    ]


def test_exported_baseline_and_saved_conversion(tmp_path: Path) -> None:
    model = Stack([FusedAttention(30, 6)], 30).eval()
    ids = torch.randint(0, 30, (2, 7))
    converted = convert_now(model, hq=2, hkv=2, args=(ids,))
    exported = torch.export.export(model, (ids,))
    assert attention_flops(exported, ((ids,), {})) == converted.report.flops_before // 2  # it is causal
    converted.save(tmp_path / "saved")
    longer = torch.randint(0, 30, (3, 11))
    loaded = sqa_fx.load(tmp_path / "saved")
    assert attention_flops(loaded, ((longer,), {})) == attention_flops(converted, ((longer,), {}))


def test_keywords_of_an_exported_program_in_any_order() -> None:
    q, k, v = qkv()
    exported = torch.export.export(Plain(), (q,), {"k": k, "v": v})
    assert attention_flops(exported, ((q,), {"v": v, "k": k})) == 4 * 2 * 6 * 5 * 7 * 3
    with pytest.raises(InputError, match="positional"):
        attention_flops(exported, ((q, k, v), {}))


def test_what_cannot_be_counted() -> None:
    q, k, v = qkv()
    with pytest.raises(InputError, match=r"torch\.export\.export"):
        attention_flops(Plain(), ((q, k, v), {}))  # type: ignore[arg-type]
    exported = torch.export.export(Plain(), (q, k, v))
    with pytest.raises(InputError, match="must have shape"):
        attention_flops(exported, ((q[:1], k[:1], v[:1]), {}))


# --- the same attention alone ----------------------------------------------------------------------------------------


def test_alone_it_has_the_form_of_the_graphs_own() -> None:
    class Fused(nn.Module):
        """q, k, v are parts of one tensor [batch, length, 3 * heads * head dim]: strided views of it."""

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (6, 3)).transpose(1, 2) for t in x.chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    args = (torch.randn(2, 5, 54),)
    call = one_call(Fused(), args)
    assert call.query == TensorForm((2, 6, 5, 3), (270, 3, 54, 1), torch.float32, torch.device("cpu"))
    got = sdpa_alone(call)()
    assert got.shape == (2, 6, 5, 3) and bool(got.isfinite().all())
    assert got.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_alone_with_an_expanded_mask(dtype: torch.dtype) -> None:
    mask = torch.zeros(2, 1, 1, 7).to(dtype).expand(2, 1, 5, 7)
    call = one_call(Plain(), qkv())
    form = TensorForm.of(mask)
    assert form.strides[2] == 0
    unmasked, masked = sdpa_alone(call)(), sdpa_alone(AttentionCall(**{**call.__dict__, "mask": form}))()
    torch.testing.assert_close(masked, unmasked)  # same random tensors, and the mask hides nothing


def test_calls_of_one_form_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sqa_fx import attention_time

    durations = iter([2.0] * 10 + [3.0, 5.0, 4.0] + [7.0] * 10 + [6.0] * 3)
    bursts: list[int] = []

    def burst(call: Any, calls: int, events: bool) -> float:
        call()
        bursts.append(calls)
        return next(durations)

    monkeypatch.setattr(attention_time, "time_burst", burst)
    one, other = one_call(Plain(), qkv()), one_call(Plain(is_causal=True), qkv())
    again = AttentionCall(**{**one.__dict__, "name": "later", "module": "layer.1"})
    assert time_attention([one, again, other], 3) == [4.0, 4.0, 6.0]
    assert bursts == [1] * 10 + [5] * 3 + [1] * 10 + [2] * 3  # 10 ms at 2 and at 7 ms a call


def test_time_of_a_whole_graph() -> None:
    args = qkv()
    assert measure_attention(torch.export.export(Plain(), args), (args, {}), 2, max_warmup=1) > 0
    with pytest.raises(InputError, match="not one op to time"):
        measure_attention(torch.export.export(Written(), args), (args, {}))
    with pytest.raises(InputError, match="iterations"):
        time_attention([], 0)
