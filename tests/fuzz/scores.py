"""From query, key and value to the mixed values: masks, biases and the attention itself, in many spellings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz.axes import Named
from fuzz.projections import Cut, WithCuts, head_segments
from fuzz.spec import HEAD_DIM, LENGTH, LONGEST, WINDOWS, Spec

NEGATIVE = -1e4


class Scores(WithCuts):
    """Everything that acts on scores, and the two contractions around it."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        each = head_segments("h", spec.heads, 1)
        if spec.norm == "l2_scores":
            self.temperature = self.hold("temperature", (spec.heads,), 0, each)
        if spec.sink:
            self.sink = self.hold("sink", (spec.heads,), 0, each)
        if spec.position == "table":
            self.table = self.hold("table", (spec.heads, 2 * LONGEST - 1), 0, each)
        elif spec.position == "embedding":
            self.embedding = nn.Embedding(2 * LONGEST - 1, spec.heads)
            self.cuts["embedding.weight"] = Cut(1, each)
        elif spec.position == "alibi":
            self.register_buffer("slopes", 0.5 ** torch.arange(1.0, spec.heads + 1))
            self.cuts["slopes"] = Cut(0, each)
        elif spec.position == "shaw":
            self.relative = nn.Parameter(torch.empty(2 * LONGEST - 1, HEAD_DIM))
        generator = torch.Generator().manual_seed(spec.seed + 1)
        if spec.mask == "heads_buffer":
            self.register_buffer("allowed", random_mask((spec.heads, LONGEST, LONGEST), generator))
            self.cuts["allowed"] = Cut(0, each)
        elif spec.mask == "pair_buffer":
            self.register_buffer("allowed", random_mask((LONGEST, LONGEST), generator))
        elif spec.mask == "window":
            self.register_buffer("allowed", random_mask((WINDOWS, LENGTH, LENGTH), generator))
        self.dropout = nn.Dropout(0.3) if spec.dropout else nn.Identity()

    allowed: Tensor
    slopes: Tensor

    # -- biases and masks ----------------------------------------------------------------------------------------

    def _keep(self, queries: int, keys: int, given: Tensor | None, extra: int) -> Named | None:
        """Which keys each query may see; ``extra`` keys that were appended are always seen."""
        spec = self.spec
        if spec.mask == "none":
            return None
        if spec.mask == "causal":
            keep = Named(torch.ones(queries, keys - extra, dtype=torch.bool).tril(), "lm")
        elif spec.mask == "heads_buffer":
            keep = Named(self.allowed[:, :queries, : keys - extra], "hlm")
        elif spec.mask == "pair_buffer":
            keep = Named(self.allowed[:queries, : keys - extra], "lm")
        elif spec.mask == "window":
            keep = Named(self.allowed, "wlm")
        else:
            assert given is not None
            keep = Named(given, {"key": "bm", "pair": "lm", "full": "blm", "heads": "bhlm"}[spec.mask])
        return keep.map(lambda t: F.pad(t, (0, extra), value=True)) if extra else keep

    def _position(self, q: Named, queries: int, keys: int) -> Named | None:
        spec = self.spec
        if spec.position == "none":
            return None
        away = torch.arange(queries)[:, None] - torch.arange(keys)[None]
        if spec.position == "alibi":
            return Named(self.slopes[:, None, None] * -away.abs(), "hlm")
        index = away + LONGEST - 1
        if spec.position == "table":
            return Named(self.table[:, index], "hlm")
        if spec.position == "embedding":
            return Named(self.embedding(index), "lmh")
        out = q.axes.replace("d", "m")
        return Named(torch.einsum(f"{q.axes},lmd->{out}", q.t, self.relative[index]), out)

    def _grid(self, t: Named) -> Named:
        spec = self.spec
        if not spec.grid or "h" not in t.axes:
            return t
        if spec.tiled:
            return t.cut("h", "gk", (spec.group, spec.kv_heads))
        return t.cut("h", "kg", (spec.kv_heads, spec.group))

    def _spread(self, t: Named, axes: str, batch: int, short: bool = False) -> Tensor:
        """``t`` so that it broadcasts over a tensor with ``axes``."""
        t = self._grid(t)
        if "n" not in axes:
            return t.fit(axes, short)
        if not set("bh") & set(t.axes):
            return t.fit(axes)
        wide = t.fit(axes.replace("n", "bh"))
        at = axes.index("n")
        sizes = [-1] * wide.dim()
        sizes[at : at + 2] = [batch, self.spec.heads]
        return wide.expand(sizes).flatten(at, at + 1)

    # -- scaled_dot_product_attention ----------------------------------------------------------------------------

    def _fused(self, q: Named, k: Named, v: Named, given: Tensor | None, extra: int) -> Named:
        spec = self.spec
        batch, queries, keys = k.size("b"), q.size("l"), k.size("m")
        if "b" not in q.axes:
            q = Named(q.t.unsqueeze(0).expand(batch, *(-1 for _ in q.axes)), "b" + q.axes)
        lead = "bh"
        if spec.grid:
            lead = "bgk" if spec.tiled else "bkg"
            q, k, v = self._grid(q), k.named(h="k"), v.named(h="k")
        if spec.core == "sdpa3":
            lead, (q, k, v) = "n", (self._fold(z) for z in (q, k, v))
        position, keep = self._position(q, queries, keys), self._keep(queries, keys, given, extra)
        whole = lead + "lm"
        mask: Tensor | None = None
        flag = spec.mask_form == "flag"
        if keep is not None and not flag:
            mask = self._spread(keep, whole, batch, spec.mask_short)
            if spec.mask_form == "add" or position is not None:
                mask = (1.0 - mask.to(q.t.dtype)) * NEGATIVE
        if position is not None:
            bias = self._spread(position, whole, batch)
            mask = bias if mask is None else bias + mask
        made = F.scaled_dot_product_attention(
            q.fit(lead + "ld"), k.fit(lead + "md"), v.fit(lead + "me"),
            attn_mask=mask, is_causal=flag, enable_gqa=spec.expansion == "enable_gqa",
            **({"scale": 0.4} if spec.scale == "argument" else {}),
        )  # fmt: skip
        return self._unfold(Named(made, lead + "le"), batch)

    def _fold(self, t: Named) -> Named:
        """Batch and heads as one dimension."""
        if t.axes[1:3] == "bh":
            return t.join("bh", "n", "reshape").to("n" + t.axes[0] + t.axes[3])
        return t.to("bh" + "".join(c for c in t.axes if c not in "bh")).join("bh", "n", self.spec.merge_heads)

    def _unfold(self, t: Named, batch: int) -> Named:
        if "n" not in t.axes:
            return t
        if not self.spec.batch_first:
            t = t.to("lne")
        return t.cut("n", "bh", (batch, self.spec.heads), self.spec.split)

    # -- attention spelled out -----------------------------------------------------------------------------------

    def _contract(self, a: Named, b: Named, inner: str, out: str, swap: bool) -> Named:
        if self.spec.core == "einsum":
            first, second = (b, a) if swap else (a, b)
            return Named(torch.einsum(f"{first.axes},{second.axes}->{out}", first.t, second.t), out)
        lead, x, y = out[:-2], out[-2], out[-1]
        if swap:
            x, y = y, x
        left, right = (a, b) if x in a.axes else (b, a)
        call = torch.matmul if self.spec.core == "matmul" else torch.bmm
        made = Named(call(left.fit(lead + x + inner), right.fit(lead + inner + y)), lead + x + y)
        return made.to(out)

    def _scores(self, q: Named, k: Named, bias: Named | None, batch: int) -> tuple[Named, bool]:
        """Scaled scores, and whether the bias is in them already."""
        spec = self.spec
        size = math.sqrt(HEAD_DIM)
        if spec.scale in ("query", "both"):
            q = q.map(lambda t: t * (1 / size if spec.scale == "query" else size**-0.5))
        if spec.scale in ("key", "both"):
            k = k.map(lambda t: t / (size if spec.scale == "key" else size**0.5))
        if spec.core == "baddbmm":
            alpha = 1 / size if spec.scale in ("after", "divide") else 1.0
            left, right = q.fit("nld"), k.fit("ndm")
            if bias is None:
                empty = torch.empty(left.shape[0], left.shape[1], right.shape[2], dtype=left.dtype)
                return Named(torch.baddbmm(empty, left, right, beta=0, alpha=alpha), "nlm"), False
            wide = self._spread(bias, "nlm", batch)
            return Named(torch.baddbmm(wide, left, right, beta=1, alpha=alpha), "nlm"), True
        made = self._contract(q, k, "d", spec.scores, spec.swap_scores)
        if spec.scale == "after":
            made = made.map(lambda t: t * HEAD_DIM**-0.5)
        elif spec.scale == "divide":
            made = made.map(lambda t: t / size)
        return made, False

    def _masked(self, s: Named, keep: Named, batch: int) -> Named:
        spec = self.spec
        if spec.mask == "window":
            sizes = (batch // WINDOWS, WINDOWS)
            if s.axes == "nlm":
                s = s.cut("n", "bh", (batch, spec.heads))
            folded = s.cut("b", "bw", sizes)
            done = self._hide(folded.t, keep.fit(folded.axes))
            made = Named(done, folded.axes).join("bw", "b")
            return made.join("bh", "n") if spec.scores == "nlm" else made
        return s.map(lambda t: self._hide(t, self._spread(keep, s.axes, batch, spec.mask_short)))

    def _hide(self, t: Tensor, keep: Tensor) -> Tensor:
        form = self.spec.mask_form
        if form == "add":
            return t + (1.0 - keep.to(t.dtype)) * NEGATIVE
        if form == "add_inf":
            return t + torch.zeros(keep.shape, dtype=t.dtype).masked_fill(~keep, -math.inf)
        if form == "where":
            return torch.where(keep, t, torch.finfo(t.dtype).min)
        return t.masked_fill(~keep, -math.inf)

    def _softmax(self, t: Tensor, dim: int) -> Tensor:
        kind = self.spec.softmax
        if kind == "float32":
            return F.softmax(t, dim=dim, dtype=torch.float32).to(t.dtype)
        if kind == "log_exp":
            return F.log_softmax(t, dim=dim).exp()
        if kind == "manual":
            e = (t - t.amax(dim, keepdim=True)).exp()
            return e / e.sum(dim, keepdim=True)
        if kind == "sigmoid":
            return t.sigmoid()
        if kind == "top_k":
            least = t.topk(4, dim=dim).values.amin(dim, keepdim=True)
            t = t.masked_fill(t < least, -math.inf)
        return t.softmax(dim)

    def _spelled(self, q: Named, k: Named, v: Named, given: Tensor | None, extra: int) -> Named:
        spec = self.spec
        batch, queries, keys = k.size("b"), q.size("l"), k.size("m")
        if spec.grid:
            q, k, v = self._grid(q), k.named(h="k"), v.named(h="k")
        if spec.folded:
            if "b" not in q.axes:
                q = Named(q.t.unsqueeze(0).expand(batch, *(-1 for _ in q.axes)), "b" + q.axes)
            position = self._position(q, queries, keys)
            q, k, v = self._fold(q), self._fold(k), self._fold(v)
        else:
            position = self._position(q, queries, keys)
        s, biased = self._scores(q, k, position, batch)
        if spec.norm == "l2_scores":
            s = s.map(lambda t: t * self._spread(Named(self.temperature.exp(), "h"), s.axes, batch))
        if position is not None and not biased:
            s = s.map(lambda t: t + self._spread(position, s.axes, batch))
        if spec.softcap:
            s = s.map(lambda t: 3.0 * torch.tanh(t / 3.0))
        keep = self._keep(queries, keys, given, extra)
        if keep is not None:
            s = self._masked(s, keep, batch)
        at = s.dim("m")
        if spec.sink:
            whole = self._spread(Named(self.sink, "h"), s.axes, batch)
            wide = whole.expand(*(1 if c == "m" else n for c, n in zip(s.axes, s.t.shape, strict=True)))
            s = s.map(lambda t: torch.cat([t, wide], at))
        dim = -1 if at == len(s.axes) - 1 else at
        p = s.map(lambda t: self._softmax(t, dim))
        if spec.sink:
            p = p.map(lambda t: t.narrow(at, 0, keys))
        p = p.map(self.dropout)
        if spec.core == "einsum":
            out = p.axes.replace("m", "") + "e" if spec.heads_first else self._natural(p.axes)
        else:
            out = p.axes[:-2] + "le"
        return self._unfold(self._contract(p, v, "m", out, spec.swap_values), batch)

    def _natural(self, axes: str) -> str:
        """Output axes with the heads last, in the order of the model's input."""
        heads = "".join(c for c in axes if c in "hkg")
        return ("bl" if self.spec.batch_first else "lb") + heads + "e"

    def forward(self, q: Named, k: Named, v: Named, given: Tensor | None, extra: int) -> Named:
        """Mixed values with axes b, l, h (or k and g) and e in some order."""
        if self.spec.decomposed:
            return self._spelled(q, k, v, given, extra)
        return self._fused(q, k, v, given, extra)


def random_mask(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """True for about two keys of three; the first key is always seen."""
    keep = torch.rand(shape, generator=generator) > 0.35
    keep[..., 0] = True
    return keep
