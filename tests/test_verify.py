"""The oracle notices a rewrite that is wrong, names the site, and is not fooled by silent ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sqa_fx
from sqa_fx.errors import VerifyError
from sqa_fx.passes.capture import capture, clone_graph
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.pipeline import Timings, find_sites, make_plan, run_passes
from sqa_fx.passes.verify import Comparison, Precision, verify
from sqa_fx.plan import Plan

HEADS, HEAD_DIM, WIDTH = 6, 5, 30


class Block(nn.Module):
    """Self-attention of 6 heads of 5 with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        out: Tensor = nn.functional.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return x + y


def _broken(parameter: str, precision: Precision = "float64") -> None:
    model = nn.Sequential(Block(), Block()).eval()
    captured = capture(model, (torch.randn(3, 7, WIDTH),), dynamic_shapes=None)
    original = clone_graph(captured.graph_module)
    analysis = find_sites(captured.graph_module)
    plans = make_plan(analysis, 4, 2, "weights", "mean")
    done = run_passes(analysis, plans, Timings())
    with torch.no_grad():
        attribute(captured.graph_module, parameter)[0] += 0.1 if precision == "native" else 0.01
    plan = Plan(tuple(plans.values()), done.parameters)
    comparison = Comparison(original, captured.graph_module, plan, done.outputs, done.carried)
    verify(comparison, captured.args, captured.kwargs, precision)


@pytest.mark.parametrize("parameter", ["1.q.weight", "1.k.bias", "1.v.weight", "1.o.weight"])
def test_a_wrong_parameter_is_found_and_the_site_named(parameter: str) -> None:
    # A key bias shifts all scores of a query alike, which softmax forgets: it is the one that must not be found.
    if parameter == "1.k.bias":
        _broken(parameter)
        return
    with pytest.raises(VerifyError, match="first at site '1'"):
        _broken(parameter)


def test_the_first_of_two_wrong_sites_is_named() -> None:
    with pytest.raises(VerifyError, match="first at site '0'"):
        _broken("0.v.weight")


def test_other_sizes_are_proved() -> None:
    report = sqa_fx.convert(Block().eval(), hq=4, hkv=2, args=(torch.randn(3, 7, WIDTH),)).report
    assert report.proof is not None
    assert report.proof["shapes"] == 5
    assert report.proof["sizes"] == ["longer", "batch 1", "length 1", "batch 1, length 1"]
    assert report.proof["precision"] == "float64"


def test_a_silent_site_is_reported() -> None:
    model = Block().eval()
    with torch.no_grad():
        model.o.weight.zero_()
        model.o.bias.zero_()
    report = sqa_fx.convert(model, hq=4, hkv=2, args=(torch.randn(3, 7, WIDTH),), dynamic_shapes=None).report
    assert any("zeros" in note for note in report.notes)


def test_native_precision() -> None:
    model = Block().to(torch.bfloat16).eval()
    x = torch.randn(3, 7, WIDTH, dtype=torch.bfloat16)
    report = sqa_fx.convert(model, hq=4, hkv=2, args=(x,), verify="native", dynamic_shapes=None).report
    assert report.proof is not None
    assert report.proof["precision"] == "bfloat16"


def test_wrong_parameters_are_found_in_the_graphs_own_dtype() -> None:
    with pytest.raises(VerifyError, match="first at site '1'"):
        _broken("1.v.weight", "native")
    _broken("1.k.bias", "native")
