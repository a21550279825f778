"""torch's own multi-head attention with fewer heads than its width has room for.

``nn.MultiheadAttention`` computes its head size from the width of its query, in code, so that no attribute can give it
fewer heads of the same size. Surgery makes such a module an instance of this subclass, whose parameters have the same
names and whose head counts follow from their shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NarrowMultiheadAttention(nn.MultiheadAttention):
    """The forward pass of nn.MultiheadAttention for weights of ``hq`` query heads and ``hkv`` KV heads: in_proj_weight
    [(hq + 2 * hkv) * head_dim, width], out_proj.weight [width, hq * head_dim], bias_k and bias_v [1, 1, hkv *
    head_dim]. Query head i reads KV head i * hkv // hq."""

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Read by the native fast paths of encoder layers, which these weights do not fit."""
        return False

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def _projections(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Weights and biases of q, k and v."""
        packed = self.in_proj_weight is not None
        query = self.out_proj.weight.shape[1]
        if packed:
            kv = (self.in_proj_weight.shape[0] - query) // 2
            q, k, v = self.in_proj_weight.split([query, kv, kv])
        else:
            q, k, v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            kv = k.shape[0]
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.split([query, kv, kv])
        return (q, k, v), biases

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: query [batch, length, width] (or [length, batch, width], or without a batch).

        Weights are [batch, length, source], averaged over the heads that are there, or [batch, hq, length, source]. A
        3-D ``attn_mask`` has batch * hq rows. Raises RuntimeError for one with the rows of all original heads.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (
            F.linear(x, weight, bias) for x, weight, bias in zip((query, key, value), *self._projections(), strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, query)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
            mask = None if mask is None else F.pad(mask, (0, 1))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            mask = None if mask is None else F.pad(mask, (0, 1))
        q, k, v = (x.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        weights = None
        if need_weights:
            output, weights = self._weighted(q, k, v, mask)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            # As in the original, a causal mask and nothing else is left to the kernel.
            causal = is_causal and key_padding_mask is None and self.bias_k is None and not self.add_zero_attn
            output = F.scaled_dot_product_attention(
                q,
                k,
                v,
                None if causal else mask,
                self.dropout if self.training else 0.0,
                is_causal=causal,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Both masks as one that is added to scores [batch, hq, length, source]."""
        padding = F._canonical_mask(
            mask=key_padding_mask,
            mask_name="key_padding_mask",
            other_type=F._none_or_dtype(attn_mask),
            other_name="attn_mask",
            target_type=query.dtype,
        )
        mask: Tensor | None = F._canonical_mask(
            mask=attn_mask,
            mask_name="attn_mask",
            other_type=None,
            other_name="",
            target_type=query.dtype,
            check_other=False,
        )
        if mask is not None and mask.dim() == 3:
            heads = self.out_proj.weight.shape[1] // self.head_dim
            if mask.shape[0] != query.shape[0] * heads:
                raise RuntimeError(
                    f"attn_mask is {list(mask.shape)}: its first size must be batch * {heads}, the heads that were kept"
                )
            mask = mask.unflatten(0, (-1, heads))
        if padding is None:
            return mask
        padding = padding[:, None, None, :]
        return padding if mask is None else mask + padding

    def _weighted(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output [batch, hq, length, head_dim] and weights [batch, hq, length, source], dropout included."""
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (q * self.head_dim**-0.5) @ k.transpose(2, 3)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        return weights @ v, weights
