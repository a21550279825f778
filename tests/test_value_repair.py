"""Closed-form repair of values: heads that stay take on values of heads that went, where this is possible at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sqa_fx
from sqa_fx import Plan
from sqa_fx.errors import InputError
from sqa_fx.passes import value_path
from sqa_fx.passes.refit import Refit, Sums, refit
from sqa_fx.passes.refit_values import Maps, refit_values

WIDTH, SIZE, HEADS, TOKENS = 24, 4, 6, 9


class Attention(nn.Module):
    """One layer; ``form`` says how its projections are written, or what is done to its values besides."""

    def __init__(self, form: str = "separate", heads: int = HEADS, kv_heads: int = HEADS, bias: bool = True) -> None:
        super().__init__()
        self.form, self.heads, self.kv_heads = form, heads, kv_heads
        sizes = SIZE * heads, SIZE * kv_heads, SIZE * kv_heads
        if form == "fused":
            self.qkv = nn.Linear(WIDTH, sum(sizes), bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, size, bias=bias) for size in sizes)
        self.o = nn.Linear(SIZE * heads, WIDTH, bias=bias)
        self.gain = nn.Parameter(torch.rand(SIZE) + 0.5)
        self.aside = nn.Linear(SIZE * kv_heads, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [batch, heads, tokens, head_dim]."""
        if self.form == "fused":
            found = self.qkv(x).unflatten(-1, (-1, SIZE)).transpose(1, 2)
            q, k, v = found.split((self.heads, self.kv_heads, self.kv_heads), 1)
        else:
            k = self.k(x)
            v = k if self.form == "tied" else self.v(x)
            q, k, v = (y.unflatten(-1, (-1, SIZE)).transpose(1, 2) for y in (self.q(x), k, v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [batch, tokens, width]."""
        q, k, v = self.parts(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        if self.form == "normed":
            y = y * (y.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * self.gain
        out: Tensor = x + self.o(y.transpose(1, 2).flatten(2))
        return out + self.aside(self.v(x)) if self.form == "aside" else out


def made(*args: Any, **kwargs: Any) -> Attention:
    torch.manual_seed(0)
    model = Attention(*args, **kwargs).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("q.", "k.")):
                weight.mul_(2)
    return model


@torch.no_grad()
def double(model: Attention) -> None:
    """Let heads 3, 4 and 5 look where 0, 1 and 2 do; the values of every head have rank 2."""
    half = SIZE * HEADS // 2
    for part in (model.q, model.k):
        for tensor in (part.weight, part.bias):
            tensor[half:] = tensor[:half]
    for head in range(HEADS):
        model.v.weight[SIZE * head + 2 : SIZE * (head + 1)] = 0


def data(batches: int = 12, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, TOKENS, WIDTH, generator=generator) for _ in range(batches)]


@torch.no_grad()
def error(converted: nn.Module, model: nn.Module) -> float:
    """Relative to what the layer adds."""
    fresh = data(4, seed=9)
    apart = sum(float((converted(x) - model(x)).square().sum()) for x in fresh)
    return apart / sum(float((model(x) - x).square().sum()) for x in fresh)


def convert(model: nn.Module, **how: Any) -> Any:
    return sqa_fx.convert(model, args=(data()[0],), calibration=data(), **{"hq": 3, "dynamic_shapes": None, **how})


def notes(converted: Any) -> list[str]:
    return [n for n in converted.report.notes if n.startswith("the values of site")]


def test_one_head_takes_on_the_values_of_two_that_look_at_the_same() -> None:
    model = made()
    double(model)
    whole, outputs = convert(model), convert(model, repair="outputs")
    assert error(outputs, model) > 0.1
    assert error(whole, model) < 1e-3
    assert {"v.weight", "v.bias"} <= set(whole.plan.refitted)
    assert set(outputs.plan.refitted) == {"o.weight", "o.bias"}
    assert whole.report.proof["error"] < 1e-9
    assert not notes(whole)


REQUESTS: list[tuple[tuple[int, int], dict[str, Any]]] = [
    ((6, 6), {"hkv": 3}), ((6, 3), {"hkv": 3}), ((6, 6), {"hkv": 1}), ((6, 2), {"hq": 4, "hkv": 2}),
]  # fmt: skip
# Every pair of values occurs; the rest is marked slow.
CASES = [
    pytest.param(form, bias, *request, marks=[] if (i + j + k) % 2 == 0 else pytest.mark.slow)
    for i, form in enumerate(("separate", "fused"))
    for j, bias in enumerate((True, False))
    for k, request in enumerate(REQUESTS)
]


@pytest.mark.parametrize(("form", "bias", "heads", "how"), CASES)
def test_better_than_outputs_alone(form: str, bias: bool, heads: tuple[int, int], how: dict[str, Any]) -> None:
    """However projections are written, and with as many KV heads as before: less is lost, and the oracle agrees."""
    model = made(form, *heads, bias=bias)
    whole, outputs = convert(model, **how), convert(model, **how, repair="outputs", verify=False)
    assert not notes(whole)
    assert ("qkv.weight" if form == "fused" else "v.weight") in whole.plan.refitted
    assert error(whole, model) < error(outputs, model)
    assert whole.report.proof["error"] < 1e-9


def test_merged_by_selection() -> None:
    """The oracle gives all heads of a group the fitted values of the one that stays."""
    converted = convert(made(), hkv=1, kv_merge="select")
    assert "v.weight" in converted.plan.refitted
    assert converted.report.proof["error"] < 1e-9


def test_plan_holds_the_values(tmp_path: Path) -> None:
    model = made("fused")
    converted = convert(model, hkv=3)
    converted.plan.save(tmp_path / "plan.json")
    again = sqa_fx.convert(model, args=(data()[0],), plan=Plan.load(tmp_path / "plan.json"), dynamic_shapes=None)
    x = data(1, seed=4)[0]
    assert torch.equal(again(x), converted(x))


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("normed", "what lies between them and the output projection is not linear in them"),
        ("tied", "its values are not one matrix|not linear in them|read in several places"),
        ("aside", "read beside the attention|read in several places"),
    ],
)
def test_values_stay_where_they_cannot_be_told_apart(form: str, why: str) -> None:
    model = made(form)
    whole, outputs = convert(model, allow_inexact=True), convert(model, repair="outputs", allow_inexact=True)
    found = notes(whole)
    assert len(found) == 1
    assert any(reason in found[0] for reason in why.split("|"))
    x = data(1, seed=4)[0]
    assert torch.equal(whole(x), outputs(x))


def test_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_path, "WIDEST", 71)
    [note] = notes(convert(made()))
    assert "are 72 features (at most 71)" in note


def test_too_much_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_path, "MOST_ON_CPU", WIDTH * 72**2 - 1)
    [note] = notes(convert(made()))
    assert "72 features take too long on a CPU" in note


def test_unknown_kind_of_repair() -> None:
    with pytest.raises(InputError, match="repair='values': known are True, False and 'outputs'"):
        convert(made(), repair="values")


# --- the regression -------------------------------------------------------------------------------------------------


def sums(z: Tensor, t: Tensor) -> Sums:
    found = Sums.zeros(z[0].numel(), t.size(1), torch.device("cpu"))
    found.add(z.flatten(1), t)
    return found


def problem(noise: float, rows: int) -> tuple[Sums, Sums, Maps, Tensor]:
    """4 query heads on 2 KV heads of 3 channels, out of 8; the targets are those of other maps, and noise."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    reads = torch.tensor([0, 0, 1, 1])
    true, old = (Maps(random(6, 4, 3), random(2, 3, 8)) for _ in range(2))
    z = random(rows, 4, 8)
    t = z.flatten(1) @ true.whole(reads).T + 2 + noise * random(rows, 6)
    kept = rows * 3 // 4
    return sums(z[:kept], t[:kept]), sums(z[kept:], t[kept:]), old, reads


def outputs_alone(train: Sums, held: Sums, old: Maps, reads: Tensor) -> Refit:
    size = old.values.size(1)
    blocks = torch.block_diag(*old.values[reads])

    def through(own: Sums) -> Sums:
        return Sums(blocks @ own.xx @ blocks.T, own.tx @ blocks.T, blocks @ own.x, own.t, own.tt, own.count)

    assert blocks.size(0) == size * len(reads)
    return refit(through(train), through(held), old.outputs.flatten(1), torch.zeros(6, dtype=torch.float64))


def test_regression_finds_other_values() -> None:
    train, held, old, reads = problem(0.0, 4000)
    alone = outputs_alone(train, held, old, reads)
    found = refit_values(train, held, old, torch.zeros(6, dtype=torch.float64), reads, alone)
    assert found is not None
    maps, fit = found
    assert fit.after < 0.3 * alone.after
    # What is reported is what the maps do.
    assert fit.bias is not None
    again = held.error(maps.whole(reads), fit.bias) / held.spread()
    assert again == pytest.approx(fit.after, rel=0.2)


def test_regression_declines_where_nothing_is_gained() -> None:
    """With noise alone as the target, held-out rows are fitted best by the old weights or by outputs alone."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(60, 4, 8, generator=generator, dtype=torch.float64)
    t = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    old = Maps(torch.zeros(6, 4, 3, dtype=torch.float64), torch.randn(2, 3, 8, generator=generator).double())
    best = Refit(None, None, 0.0, 1.0, 1.0)
    train, held = sums(z[:40], t[:40]), sums(z[40:], t[40:])
    assert refit_values(train, held, old, torch.zeros(6, dtype=torch.float64), torch.tensor([0, 0, 1, 1]), best) is None
