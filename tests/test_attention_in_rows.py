"""Attention a few rows at a time is attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import noise

from sqa_fx.passes import attention_in_rows


@pytest.mark.parametrize("form", ["plain", "causal", "mask", "one mask row", "gqa", "scale"])
def test_rows_are_those_of_sdpa(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_in_rows, "_AT_ONCE", 2 * 4 * 11 * 3)
    q, k, v = noise(2, 4, 7, 5).double(), noise(2, 4, 11, 5).double(), noise(2, 4, 11, 6).double()
    mask = {"mask": noise(2, 1, 7, 11) > 0.5, "one mask row": noise(2, 1, 1, 11).double()}.get(form)
    options: dict[str, Any] = {
        "attn_mask": mask,
        "is_causal": form == "causal",
        "scale": 0.3 if form == "scale" else None,
    }
    if form == "gqa":
        k, v, options["enable_gqa"] = k[:, :2], v[:, :2], True
    calls: list[int] = []
    original = F.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(query.shape[-2])
        return original(query, *args, **kwargs)

    expected = original(q, k, v, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(attention_in_rows.in_rows(q, k, v, **options), expected)
    assert calls == [3, 3, 1]
