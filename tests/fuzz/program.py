"""The model that a specification stands for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz.axes import Named
from fuzz.projections import Heads, Output, Project, WithCuts, head_segments
from fuzz.scores import Scores, random_mask
from fuzz.spec import (
    BATCH,
    CONTEXT,
    CONTEXT_WIDTH,
    HEAD_DIM,
    IMAGE,
    LENGTH,
    LONGEST,
    MEMORY,
    OTHER_BATCH,
    OTHER_CONTEXT,
    OTHER_LENGTH,
    QUERIES,
    ROTARY_DIM,
    WIDTH,
    WINDOWS,
    Spec,
)


class Attention(WithCuts):
    """One attention block, from features to features."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        h, k, e = spec.heads, spec.kv_heads, spec.value_size
        self.make = Heads(spec)
        self.attend = Scores(spec)
        self.out = Output(spec)
        if spec.norm in ("rms", "layer"):
            kind = nn.RMSNorm if spec.norm == "rms" else nn.LayerNorm
            self.q_norm, self.k_norm = kind(HEAD_DIM), kind(HEAD_DIM)
        elif spec.norm == "rms_heads":
            self.q_scale = self.hold("q_scale", (h, HEAD_DIM), 0, head_segments("q", h, 1))
            self.k_scale = self.hold("k_scale", (k, HEAD_DIM), 0, head_segments("k", k, 1))
        elif spec.norm == "l2":
            self.temperature = self.hold("temperature", (h,), 0, head_segments("q", h, 1))
        if spec.rotary != "none":
            count = ROTARY_DIM if spec.rotary == "partial" else HEAD_DIM
            speed = 1000.0 ** (-torch.arange(0, count, 2) / count)
            self.register_buffer("angles", torch.arange(LONGEST)[:, None] * speed)
        if spec.rows in ("bias_kv", "memory"):
            lead = (MEMORY,) if spec.rows == "memory" else ()
            self.more_k = self.hold("more_k", (*lead, k, HEAD_DIM), len(lead), head_segments("k", k, 1))
            self.more_v = self.hold("more_v", (*lead, k, e), len(lead), head_segments("v", k, 1))
        if spec.value_gate:
            self.value_gate = Project("linear", spec.context_width, head_segments("v", k, 1), True)
        if spec.gate == "heads":
            self.gate: nn.Module = Project("linear", WIDTH, head_segments("h", h, 1), True)
        elif spec.gate == "features":
            self.gate = Project("linear", WIDTH, head_segments("h", h, e), True)
        elif spec.gate == "scale":
            self.scale = self.hold("scale", (h,), 0, head_segments("h", h, 1))
        elif spec.gate == "norm":
            self.out_norm = nn.RMSNorm(e)

    angles: Tensor

    def _normed(self, t: Named, part: str) -> Named:
        kind = self.spec.norm
        if kind in ("rms", "layer"):
            return t.map(self.get_submodule(f"{part}_norm"))
        if kind == "rms_heads":
            scale = Named(self.get_parameter(f"{part}_scale"), "hd").fit(t.axes)
            return t.map(lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale)
        if kind in ("l2", "l2_scores"):
            t = t.map(lambda x: F.normalize(x, dim=-1))
            if kind == "l2" and part == "q":
                hot = Named(self.temperature.exp(), "h").fit(t.axes)
                t = t.map(lambda x: x * hot)
        return t

    def _rotated(self, t: Named, length: str) -> Named:
        kind = self.spec.rotary
        if kind == "none":
            return t
        angles = self.angles[: t.size(length)]
        if kind == "complex":
            turn = Named(torch.polar(torch.ones_like(angles), angles), length + "d").fit(t.axes)
            pairs = torch.view_as_complex(t.t.contiguous().view(*t.t.shape[:-1], -1, 2))
            return t.map(lambda x: torch.view_as_real(pairs * turn).flatten(-2))
        if kind == "interleaved":
            cos, sin = (
                Named(a.repeat_interleave(2, -1), length + "d").fit(t.axes) for a in (angles.cos(), angles.sin())
            )
            return t.map(lambda x: x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin)
        cos, sin = (Named(torch.cat([a, a], -1), length + "d").fit(t.axes) for a in (angles.cos(), angles.sin()))

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        if kind == "half":
            return t.map(turned)
        return t.map(lambda x: torch.cat([turned(x[..., :ROTARY_DIM]), x[..., ROTARY_DIM:]], -1))

    def _appended(self, t: Named, part: str, batch: int) -> tuple[Named, int]:
        """More keys or values after the others."""
        rows = self.spec.rows
        if rows == "none":
            return t, 0
        count = MEMORY if rows == "memory" else 1
        sizes = {"b": batch, "m": count}
        shape = [sizes.get(c, t.size(c)) for c in t.axes]
        if rows == "zero":
            more = torch.zeros(shape, dtype=t.t.dtype)
        else:
            letters = ("m" if rows == "memory" else "") + "h" + t.axes[-1]
            more = Named(self.get_parameter(f"more_{part}"), letters).fit(t.axes).expand(shape)
        return t.map(lambda x: torch.cat([x, more], t.dim("m"))), count

    def _expanded(self, t: Named) -> Named:
        """Keys or values once for each query head."""
        kind, group, at = self.spec.expansion, self.spec.group, t.dim("h")
        if kind == "repeat_interleave":
            return t.map(lambda x: x.repeat_interleave(group, dim=at))
        if kind == "expand":
            wide = t.t.unsqueeze(at + 1)
            sizes = [-1] * wide.dim()
            sizes[at + 1] = group
            axes = t.axes.replace("h", "hg")
            return Named(wide.expand(sizes), axes).join("hg", "h", self.spec.merge_heads)
        if kind == "tiled":
            return t.map(lambda x: x.repeat(*(group if i == at else 1 for i in range(x.dim()))))
        if kind == "tiled_cat":
            return t.map(lambda x: torch.cat([x] * group, at))
        if kind == "headless":
            return Named(t.t.squeeze(at), t.axes.replace("h", ""))
        return t

    def forward(self, x: Named, context: Named, mask: Tensor | None) -> Named:
        spec = self.spec
        q, k, v = self.make(x, context)
        lead = x.axes.replace("f", "")
        order = (lead.replace("l", "") + "hl" if spec.heads_first else lead + "h") + "d"
        wide = order if "b" in order else ("b" + order if spec.batch_first or spec.heads_first else "lb" + order[1:])
        wide = wide.replace("l", "m")
        q, k, v = q.to(order), k.to(wide), v.to(wide.replace("d", "e"))
        q, k = self._normed(q, "q"), self._normed(k, "k")
        q, k = self._rotated(q, "l"), self._rotated(k, "m")
        if spec.value_gate:
            opened = self.value_gate(context).named(l="m", f="h").map(torch.sigmoid).fit(v.axes)
            v = v.map(lambda t: t * opened)
        batch = context.size("b")
        (k, extra), (v, _) = self._appended(k, "k", batch), self._appended(v, "v", batch)
        y = self.attend(q, self._expanded(k), self._expanded(v), mask, extra)
        return self._projected(y, x)

    def _projected(self, y: Named, x: Named) -> Named:
        spec = self.spec
        lead = "bl" if spec.batch_first else "lb"
        if spec.grid:
            y = y.to(lead + ("gk" if spec.tiled else "kg") + "e").join("gk" if spec.tiled else "kg", "h")
        features: Tensor | None = None
        if spec.gate == "norm":
            y = y.to(y.axes.replace("e", "") + "e").map(self.out_norm)
        elif spec.gate == "scale":
            scale = Named(self.scale, "h").fit(y.axes)
            y = y.map(lambda t: t * scale)
        elif spec.gate == "heads":
            opened = self.gate(x).named(f="h").map(torch.sigmoid).fit(y.axes)
            y = y.map(lambda t: t * opened)
        elif spec.gate == "features":
            features = self.gate(x).map(torch.sigmoid).fit(lead + "f")
        return self.out(y.to(lead + "he"), x, features)  # type: ignore[no-any-return]


class Program(nn.Module):
    """The whole model. Inputs: ``x`` (none for learned queries), ``context`` (none for self-attention), ``mask``."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        blocks = [Attention(spec)]
        for _ in range(spec.layers - 1):
            blocks.append(blocks[0] if spec.tied else Attention(spec))
        self.blocks = nn.ModuleList(blocks)
        if spec.source.startswith("queries"):
            self.queries = nn.Parameter(torch.empty(QUERIES, WIDTH))
        generator = torch.Generator().manual_seed(spec.seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                scale = max(p.shape[-1], p.shape[0]) ** -0.5 if p.dim() > 1 else 0.5
                if "more_" in name or "table" in name or "embedding" in name or "queries" in name:
                    scale = 1.0
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale * 1.5)
        self.to(getattr(torch, spec.dtype)).eval()

    def forward(self, x: Tensor | None = None, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        spec = self.spec
        letters = "blf" if spec.batch_first else "lbf"
        keys = None if context is None else Named(context, letters)
        if spec.source == "self":
            assert x is not None
            if spec.windows:
                return self._windowed(x, mask)
            here = Named(x, letters)
        elif spec.source == "cross":
            assert x is not None
            here = Named(x, letters)
        else:
            here = Named(self.queries, "lf")
            if spec.source == "queries":
                assert keys is not None
                t = here.fit(letters)
                here = Named(t.expand(*(keys.size("b") if c == "b" else -1 for c in letters)), letters)
        return self._run(here, keys, mask).t

    def _windowed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        cut = x.view(batch, WINDOWS, length // WINDOWS, width).flatten(0, 1)
        return self._run(Named(cut, "blf"), None, mask).t.reshape(batch, length, -1)

    def _run(self, here: Named, keys: Named | None, mask: Tensor | None) -> Named:
        for block in self.blocks:
            made = block(here, here if keys is None else keys, mask)
            if self.spec.residual:
                made = Named(here.fit(made.axes) + made.t, made.axes)
            here = made
        return here


def inputs(spec: Spec, other: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs at the example sizes, or at ``other`` ones where the program's sizes are free."""
    generator = torch.Generator().manual_seed(1000 * spec.seed + 7 + other)
    dtype = getattr(torch, spec.dtype)
    batch = OTHER_BATCH if other else BATCH
    queries = OTHER_LENGTH if other else LENGTH
    if spec.maker == "conv2d":
        queries = IMAGE[0] * IMAGE[1]
    if spec.mask == "window":
        queries = LENGTH
    keys = queries
    if spec.source != "self":
        keys = OTHER_CONTEXT if other else CONTEXT
    if spec.source.startswith("queries"):
        queries = QUERIES

    def noise(length: int, width: int) -> Tensor:
        shape = (batch, length, width) if spec.batch_first else (length, batch, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if not spec.source.startswith("queries"):
        args = (noise(queries * (WINDOWS if spec.windows else 1), WIDTH),)
    if spec.source != "self":
        kwargs["context"] = noise(keys, CONTEXT_WIDTH)
    shapes = {
        "key": (batch, keys),
        "pair": (queries, keys),
        "full": (batch, queries, keys),
        "heads": (batch, spec.heads, queries, keys),
    }
    if spec.mask in shapes:
        kwargs["mask"] = random_mask(shapes[spec.mask], generator)
    return args, kwargs
