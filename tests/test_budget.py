"""A budget of attention FLOPs goes where heads matter: hq="auto:0.5"."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sqa_fx
from sqa_fx.errors import InputError, PlanError
from sqa_fx.passes.budget import Candidate, budget_share, spend


class Layer(nn.Module):
    """Attention of ``heads`` heads of 4 on ``kv_heads``, added to the stream with ``scale``."""

    def __init__(self, width: int, heads: int, kv_heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.scale = heads, kv_heads, scale
        self.q, self.o = nn.Linear(width, 4 * heads), nn.Linear(4 * heads, width)
        self.k, self.v = nn.Linear(width, 4 * kv_heads), nn.Linear(width, 4 * kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [batch, length, width]."""
        q = self.q(x).unflatten(-1, (self.heads, 4)).transpose(1, 2)
        k, v = (m(x).unflatten(-1, (self.kv_heads, 4)).transpose(1, 2) for m in (self.k, self.v))
        y = F.scaled_dot_product_attention(3 * q, k, v, enable_gqa=self.heads != self.kv_heads)
        out: Tensor = x + self.scale * self.o(y.transpose(1, 2).flatten(2))
        return out


def model_of(*scales: float, kv_heads: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(24, 8, kv_heads, scale) for scale in scales)).eval()


def batches() -> list[Tensor]:
    return [torch.randn(3, 7, 24) for _ in range(4)]


def test_the_cheapest_steps_go_first() -> None:
    """Worked by hand: b loses 1 per head and a 5 per head, until b's last step costs 9."""
    candidates = {
        "a": Candidate((1, 2, 3, 4), (15.0, 10.0, 5.0, 0.0), 1.0),
        "b": Candidate((1, 2, 3, 4), (11.0, 2.0, 1.0, 0.0), 1.0),
    }
    assert spend(candidates, 0.75) == {"a": 4, "b": 2}
    assert spend(candidates, 0.625) == {"a": 3, "b": 2}


def test_a_step_that_is_dear_alone_may_be_cheap_together() -> None:
    """One head less costs 10, two less cost 10 as well: both go at once."""
    candidates = {"a": Candidate((1, 2, 3), (10.0, 10.0, 0.0), 1.0), "b": Candidate((1, 2, 3), (14.0, 7.0, 0.0), 1.0)}
    assert spend(candidates, 4 / 6) == {"a": 1, "b": 3}


def test_long_sequences_save_more() -> None:
    candidates = {"long": Candidate((1, 2), (2.0, 0.0), 10.0), "short": Candidate((1, 2), (1.0, 0.0), 1.0)}
    assert spend(candidates, 0.6) == {"long": 1, "short": 2}


def test_no_step_is_left() -> None:
    with pytest.raises(PlanError, match="50% of the attention FLOPs are left"):
        spend({"a": Candidate((2, 4), (1.0, 0.0), 1.0)}, 0.25)


@pytest.mark.parametrize("text", ["auto:", "auto:0", "auto:1.5", "auto:half"])
def test_no_share(text: str) -> None:
    with pytest.raises(PlanError, match=r"as 'auto:0\.5'"):
        budget_share(text)


def test_a_layer_that_hardly_matters_gives_its_heads_first() -> None:
    model = model_of(1.0, 0.01)
    converted = sqa_fx.convert(model, hq="auto:0.5", args=(batches()[0],), calibration=batches(), dynamic_shapes=None)
    given = [site.hq for site in converted.report.sites]
    assert sum(given) == 8
    assert given[0] > given[1]
    assert [site.hkv for site in converted.report.sites] == given
    assert converted.report.proof is not None


def test_groups_stay_balanced() -> None:
    model = model_of(1.0, 0.01, kv_heads=2)
    converted = sqa_fx.convert(
        model, hq="auto:0.5", args=(batches()[0],), calibration=batches(), repair=False, dynamic_shapes=None
    )
    assert [(s.hq, s.hkv) for s in converted.report.sites] == [(6, 2), (2, 2)]


def test_what_a_budget_needs() -> None:
    model, x = model_of(1.0), batches()[0]
    with pytest.raises(InputError, match="needs calibration="):
        sqa_fx.convert(model, hq="auto:0.5", args=(x,), dynamic_shapes=None)
    with pytest.raises(InputError, match="leave hkv= out"):
        sqa_fx.convert(model, hq="auto:0.5", hkv=2, args=(x,), calibration=[x], dynamic_shapes=None)
