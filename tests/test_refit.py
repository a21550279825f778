"""Ridge regression of an output projection from sums, kept where held-out data says that it helps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sqa_fx.passes.refit import GRID, Sums, refit

IN, OUT = 5, 3


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums(x: Tensor, t: Tensor, parts: int = 1) -> Sums:
    found = Sums.zeros(x.shape[1], t.shape[1], torch.device("cpu"))
    for a, b in zip(x.chunk(parts), t.chunk(parts), strict=True):
        found.add(a, b)
    return found


@pytest.mark.parametrize("biased", [False, True])
def test_errors_and_fits_are_those_of_the_rows(biased: bool) -> None:
    x, t, old = draw(0, 40, IN) + 1, draw(1, 40, OUT), draw(2, OUT, IN)
    bias = draw(3, OUT) if biased else None
    found = sums(x, t, parts=3)
    plain = (t - x @ old.T - (0 if bias is None else bias)).square().sum() / 40
    assert found.error(old, bias) == pytest.approx(float(plain), rel=1e-5)
    assert found.spread() == pytest.approx(float((t - t.mean(0)).square().sum() / 40), rel=1e-5)
    weight, new_bias = found.fit(old, biased, 0.1)
    # The normal equations of |t - W x - b|^2 + s |W - W_0|^2, one row of W at a time.
    own = x - x.mean(0) if biased else x
    strength = 0.1 * float((own.T @ own).diagonal().mean())
    wide = torch.cat([own, strength**0.5 * torch.eye(IN, dtype=torch.float64)])
    wanted = torch.cat([t - t.mean(0) if biased else t, strength**0.5 * old.T])
    torch.testing.assert_close(weight, torch.linalg.lstsq(wide, wanted).solution.T, rtol=1e-4, atol=1e-5)
    if biased:
        torch.testing.assert_close(new_bias, (t - x @ weight.T).mean(0), rtol=1e-4, atol=1e-5)
    else:
        assert new_bias is None


def test_a_planted_weight_is_found() -> None:
    x, planted, bias = draw(0, 400, IN), draw(1, OUT, IN), draw(2, OUT)
    t = x @ planted.T + bias
    found = refit(sums(x[:300], t[:300]), sums(x[300:], t[300:]), draw(3, OUT, IN), draw(4, OUT))
    assert found.weight is not None
    assert found.bias is not None
    torch.testing.assert_close(found.weight, planted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.bias, bias, rtol=1e-3, atol=1e-3)
    assert found.ridge == GRID[0]
    assert found.after < 1e-6 < found.before


def test_what_does_not_help_on_held_out_data_is_not_done() -> None:
    """Fewer rows than columns, and targets that are the old weight's and noise: any fit learns the noise."""
    x, old = draw(0, 30, 20), draw(1, OUT, 20)
    t = x @ old.T + draw(2, 30, OUT)
    found = refit(sums(x[:10], t[:10]), sums(x[10:], x[10:] @ old.T), old, None)
    assert found.weight is None
    assert found.bias is None
    assert found.before == found.after == pytest.approx(0, abs=1e-6)


def test_held_out_rows_choose_the_strength() -> None:
    """Few noisy rows ask for a stronger pull to the old weight than many clean ones."""
    old = draw(1, OUT, IN)
    planted = old + 0.1 * draw(2, OUT, IN)

    def ridge(rows: int, noise: float) -> float:
        x, y = draw(3, rows, IN), draw(4, 500, IN)
        t = x @ planted.T + noise * draw(5, rows, OUT)
        found = refit(sums(x, t), sums(y, y @ planted.T), old, None)
        assert found.after <= found.before
        return found.ridge

    assert ridge(8, 0.1) > ridge(2000, 0.01)


def test_the_winner_is_fitted_on_all_rows() -> None:
    x, planted = draw(0, 40, IN), draw(1, OUT, IN)
    t = x @ planted.T + 0.1 * draw(2, 40, OUT)
    old = torch.zeros(OUT, IN, dtype=torch.float64)
    train, held = sums(x[:30], t[:30]), sums(x[30:], t[30:])
    found = refit(train, held, old, None)
    wanted, _ = (train + held).fit(old, False, found.ridge)
    assert found.weight is not None
    assert torch.equal(found.weight, wanted)
    assert found.after == pytest.approx(held.error(train.fit(old, False, found.ridge)[0], None) / held.spread())
