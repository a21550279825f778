"""Attention a few query rows at a time: no fused kernel computes in float64, and whole scores may not fit memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers in the scores that are computed at once.
_AT_ONCE = 2**26


def in_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention of q [..., query rows, head dim] with k and v, no dropout, in bounded memory."""
    assert dropout_p == 0.0
    rows, columns = q.shape[-2], k.shape[-2]
    step = max(1, _AT_ONCE // max(1, q.shape[:-2].numel() * columns))
    if step >= rows:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    parts = []
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        mask = attn_mask
        if mask is not None and mask.shape[-2] == rows:
            mask = mask[..., start:stop, :]
        if is_causal:
            places = torch.arange(start, stop, device=q.device)
            mask = torch.arange(columns, device=q.device) <= places[:, None]
        part = q[..., start:stop, :]
        parts.append(F.scaled_dot_product_attention(part, k, v, mask, scale=scale, enable_gqa=enable_gqa))
    return torch.cat(parts, -2)
