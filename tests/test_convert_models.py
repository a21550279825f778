"""Every model of attention_models: identity is bit-exact, halves are proved, and the user's own module agrees.

Capturing free sizes costs several times as much as capturing fixed ones, so a model has them in one of its tests, for
one implementation of its attention; the other one is halved from a program that the user exported. What both
implementations could do in every test is marked ``slow`` for the other one, and so are models like another one.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from attention_models import BATCH, CASES, LENGTH, OTHER_BATCH, OTHER_LENGTH, RUNS, Inputs, tensors
from plan_arithmetic import cut, load_masked, whole_state
from torch import Tensor, nn

import sqa_fx

warnings.filterwarnings("ignore")


def _run(model: nn.Module, inputs: Inputs, fast_path: bool = False) -> list[Tensor]:
    """The outputs. ``fast_path`` lets torch.nn's layers run their native op, which rounds in another order."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        with torch.no_grad():
            return tensors(model(**inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=0, atol=2e-5 * max(1.0, float(e.abs().max())))


# Like models that stay.
ALIKE = ("llama_mha", "falcon_mha")
# Their sizes are free; those of the rest are where everything runs, and in test_dynamic_sizes.py.
FREE = ("gpt2", "falcon_gqa", "torch_cross_attention", "einsum")
# One implementation a model, by turns, and the other one where there are two.
TURNS, OTHERS = (
    [(name, case.impls[(turn + other) % len(case.impls)]) for turn, (name, case) in enumerate(CASES.items())]
    for other in (0, 1)
)


def _marked(run: tuple[Any, ...], short: bool) -> Any:
    return pytest.param(*run, marks=[] if short and run[0] not in ALIKE else pytest.mark.slow)


@pytest.mark.parametrize(("name", "impl"), [_marked(run, run in TURNS) for run in RUNS])
def test_identity_is_bit_exact(name: str, impl: str) -> None:
    case = CASES[name]
    model, inputs = case.build(impl), case.inputs(BATCH, LENGTH)
    expected = _run(model, inputs)
    converted = sqa_fx.convert(model, hq=1.0, hkv=1.0, kwargs=inputs, dynamic_shapes=None)
    assert len(converted.report.sites) == case.sites
    assert not converted.report.refused
    actual = _run(converted, inputs)
    _close(actual, _run(model, inputs, fast_path=True))
    assert len(actual) == len(expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


HALVES = [
    *(_marked((*run, run[0] in FREE), run in TURNS) for run in RUNS),
    *(_marked((*run, True), False) for run in TURNS if run[0] not in FREE),
]


@pytest.mark.parametrize(("name", "impl", "free"), HALVES)
def test_half_of_the_heads(name: str, impl: str, free: bool) -> None:
    case = CASES[name]
    model, inputs = case.build(impl), case.inputs(BATCH, LENGTH)
    before, training = whole_state(model), model.training
    converted = sqa_fx.convert(model, hq=0.5, hkv=0.25, kwargs=inputs, dynamic_shapes="auto" if free else None)
    report, plan = converted.report, converted.plan.to_json()
    assert len(report.sites) == case.sites
    assert not report.refused
    for site in report.sites:
        assert (site.hq, site.hkv) == (site.heads // 2, site.kv_heads // 4)
        assert (site.kv_heads == site.heads // 2) if case.grouped else (site.kv_heads == site.heads)
    assert report.proof is not None and report.proof["precision"] == "float64"
    assert report.proof["error"] <= 1e-10 and all(site["error"] <= 1e-10 for site in report.proof["sites"])
    assert not any(site["silent"] for site in report.proof["sites"])

    assert model.training == training == converted.training
    assert _same(whole_state(model), before)
    expected = cut(before, plan)
    actual = {name: value.detach() for name, value in converted.named_parameters(remove_duplicate=False)}
    assert set(actual) <= set(expected)
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-7, msg=key)

    load_masked(model, plan)
    _close(_run(converted, inputs), _run(model, inputs))
    assert bool(converted.report.dynamic) == free
    if free:
        others = case.inputs(OTHER_BATCH, OTHER_LENGTH if case.free_length else LENGTH)
        _close(_run(converted, others), _run(model, others))


PROGRAMS = ("gpt2", "llama_gqa", "bert", "falcon_gqa", "swin", "torch_encoder", "torch_cross_attention", "einsum")


@pytest.mark.parametrize(("name", "impl"), [_marked(run, run[0] in PROGRAMS) for run in OTHERS])
def test_as_many_kv_heads_as_query_heads(name: str, impl: str) -> None:
    """hkv half of the KV heads, static, from a program that the user exported."""
    case = CASES[name]
    model, inputs = case.build(impl), case.inputs(BATCH, LENGTH)
    program = torch.export.export(model, (), inputs, strict=False)
    converted = sqa_fx.convert(program, hq=0.5, hkv=0.5)
    assert len(converted.report.sites) == case.sites
    assert not converted.report.refused
    assert all((s.hq, s.hkv) == (s.heads // 2, s.kv_heads // 2) for s in converted.report.sites)
    assert not converted.report.dynamic
    assert converted.report.proof is not None and converted.report.proof["precision"] == "float64"
    assert converted.report.proof["error"] <= 1e-10
    load_masked(model, converted.plan.to_json())
    _close(_run(converted, inputs), _run(model, inputs))
