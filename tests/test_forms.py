"""Less common forms of attention: found, counted, converted, proved, and compared in eager with masked weights.

Every third form is captured with free sizes, for the first of its requests, and the rest with fixed ones. What is left
out is marked ``slow``, and so are the second request, which leaves one KV head, for all but every fourth form, and a
form's own head counts for every other one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from forms import COUNTS, FORMS, HEADS, WIDTH
from plan_arithmetic import load_masked, whole_state
from torch import nn

import sqa_fx
from sqa_fx.errors import PlanError

LENGTH = 9


def _inputs(length: int = LENGTH, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


def _model(name: str) -> nn.Module:
    torch.manual_seed(3)
    return FORMS[name]().double().eval()


def _requests(name: str) -> list[tuple[int, int]]:
    heads, kv_heads = COUNTS.get(name, (HEADS, HEADS))
    requests = [(heads // 2, max(1, kv_heads // 2))] if heads > 3 else [(2, 2)]
    requests += [(heads // 3, 1)] if kv_heads > 1 and name != "ListOfHeads" else []
    return requests


def _cases() -> Iterator[Any]:
    for number, name in enumerate(FORMS):
        for turn, request in enumerate(_requests(name)):
            free = not turn and number % 3 == 0
            yield pytest.param(name, *request, free, marks=[pytest.mark.slow] if turn and number % 4 else [])
            if not turn and not free:
                yield pytest.param(name, *request, True, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "hq", "hkv", "free"), _cases())
def test_converted_as_the_masked_original(name: str, hq: int, hkv: int, free: bool) -> None:
    model, x = _model(name), _inputs()
    before = whole_state(model)
    try:
        converted = sqa_fx.convert(model, hq=hq, hkv=hkv, args=(x,), dynamic_shapes="auto" if free else None)
    except PlanError as error:
        # The one thing that cannot be done: queries and keys behind grouped convolutions can be selected, not merged.
        assert name == "GroupedConvolutions" and hkv < hq and "selected here but not merged" in str(error)
        return
    assert isinstance(converted, sqa_fx.ConvertedModule)
    (site,) = converted.report.sites
    assert (site.heads, site.kv_heads) == COUNTS.get(name, (HEADS, HEADS))
    assert (site.hq, site.hkv) == (hq, hkv) and not converted.report.refused and not site.inexact
    assert all(torch.equal(value, before[key]) for key, value in whole_state(model).items())
    oracle = copy.deepcopy(model)
    load_masked(oracle, converted.plan.to_json())
    lengths = [LENGTH] if name == "ProjectedPositions" or not free else [LENGTH, LENGTH + 4]
    for length in lengths:
        y = _inputs(length, 3 if free and "static" not in converted.report.table() else 2)
        torch.testing.assert_close(converted(y), oracle(y), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (i % 2)) for i, n in enumerate(FORMS)])
def test_own_head_counts_change_no_bit(name: str) -> None:
    model, x = _model(name), _inputs()
    heads, kv_heads = COUNTS.get(name, (HEADS, HEADS))
    same = sqa_fx.convert(model, hq=heads, hkv=kv_heads, args=(x,), dynamic_shapes=None)
    assert torch.equal(same(x), model(x))


@pytest.mark.parametrize("name", ["NormOverHeads", "Differential", "TwoSources", "Loop", "GroupNorm"])
def test_gradients_reach_the_cut_weights(name: str) -> None:
    converted = sqa_fx.convert(_model(name), hq=0.5, hkv=0.5, args=(_inputs(),), dynamic_shapes=None).train()
    converted(_inputs()).square().mean().backward()
    named = dict(converted.named_parameters())
    assert named and all(p.grad is not None for p in named.values()), [n for n, p in named.items() if p.grad is None]


def test_heads_with_parameters_of_their_own_are_dropped_with_them() -> None:
    model = _model("ListOfHeads")
    converted = sqa_fx.convert(model, hq=3, hkv=3, heads={"*": [0, 2, 5]}, args=(_inputs(),), dynamic_shapes=None)
    assert isinstance(converted, sqa_fx.ConvertedModule)
    assert {name.split(".")[1] for name, _ in converted.named_parameters() if name.startswith("each.")} == {
        "0",
        "2",
        "5",
    }
    with pytest.raises(PlanError, match="can be dropped but not merged"):
        sqa_fx.convert(model, hq=3, hkv=1, args=(_inputs(),), dynamic_shapes=None)


def test_norm_over_all_heads_keeps_its_projection() -> None:
    converted = sqa_fx.convert(
        _model("NormOverHeads"), hq=2, hkv=1, heads={"*": [0, 5]}, args=(_inputs(),), dynamic_shapes=None
    )
    assert isinstance(converted, sqa_fx.ConvertedModule)
    sizes = {p.name: p.size for p in converted.plan.parameters}
    assert "q.weight" not in sizes, "the query projection stays whole: the norm runs over all of it"
    assert sizes["k.weight"] == (15, 15) and sizes["v.weight"] == (15, 5) and sizes["o.weight"] == (30, 10)
    assert any("k.weight keeps its size" in note for note in converted.report.notes)


def test_attentions_of_one_site_are_counted() -> None:
    assert sqa_fx.inspect(_model("TwoSources"), args=(_inputs(),), dynamic_shapes=None).sites[0].attentions == 2
    assert sqa_fx.inspect(_model("Loop"), args=(_inputs(),), dynamic_shapes=None).sites[0].attentions == HEADS
