"""Weights into heads and out of them, in many layouts; every module knows which entries hold which head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz.axes import Named
from fuzz.spec import HEAD_DIM, HIDDEN, IMAGE, LATENT, LORA, ROTARY_DIM, WIDTH, Spec

Segment = tuple[str, int, int]


@dataclass(frozen=True)
class Cut:
    """Along ``axis`` of a weight lie segments of (role, head, entries)."""

    axis: int
    segments: tuple[Segment, ...]


def head_segments(role: str, heads: int, width: int) -> tuple[Segment, ...]:
    """One segment for each head, in order."""
    return tuple((role, h, width) for h in range(heads))


class WithCuts(nn.Module):
    """A module that knows the heads in its own weights, by parameter name."""

    def __init__(self) -> None:
        super().__init__()
        self.cuts: dict[str, Cut] = {}

    def hold(self, name: str, shape: tuple[int, ...], axis: int, segments: tuple[Segment, ...]) -> nn.Parameter:
        """A new parameter with heads along ``axis``."""
        parameter = nn.Parameter(torch.empty(shape))
        self.register_parameter(name, parameter)
        self.cuts[name] = Cut(axis, segments)
        return parameter


class Project(WithCuts):
    """Features to the rows that ``segments`` describe, as one of the usual kinds of layer."""

    def __init__(self, kind: str, width: int, segments: tuple[Segment, ...], bias: bool) -> None:
        super().__init__()
        self.kind = kind
        rows = sum(s[2] for s in segments)
        names = ["layer"]
        if kind in ("conv1d", "conv2d"):
            layer = nn.Conv1d if kind == "conv1d" else nn.Conv2d
            self.layer: nn.Module = layer(width, rows, 1, bias=bias)
        elif kind == "addmm":
            names = []
            self.weight = self.hold("weight", (width, rows), 1, segments)
            self.bias = self.hold("bias", (rows,), 0, segments) if bias else None
        elif kind in ("low_rank", "low_rank_norm"):
            names = ["up"]
            self.down = nn.Linear(width, LATENT, bias=bias)
            self.middle = nn.RMSNorm(LATENT) if kind == "low_rank_norm" else nn.Identity()
            self.up = nn.Linear(LATENT, rows, bias=bias)
        elif kind == "weight_norm":
            names = []
            self.layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(width, rows, bias=bias))
            for i in (0, 1):
                self.cuts[f"layer.parametrizations.weight.original{i}"] = Cut(0, segments)
            if bias:
                self.cuts["layer.bias"] = Cut(0, segments)
        else:
            self.layer = nn.Linear(width, rows, bias=bias)
        if kind == "lora":
            names.append("up")
            self.down, self.up = nn.Linear(width, LORA, bias=False), nn.Linear(LORA, rows, bias=False)
        for name in names:
            self.cuts[f"{name}.weight"] = Cut(0, segments)
            if bias and not (kind == "lora" and name == "up"):
                self.cuts[f"{name}.bias"] = Cut(0, segments)

    def forward(self, x: Named) -> Named:
        t = x.t
        if self.kind in ("conv1d", "conv2d"):
            first = x.to(x.axes.replace("l", "").replace("f", "") + "fl")
            if self.kind == "conv1d":
                return first.map(self.layer)
            return Named(self.layer(first.t.unflatten(-1, IMAGE)).flatten(-2), first.axes)
        if self.kind == "addmm":
            if self.bias is None:
                return Named(t @ self.weight, x.axes)
            flat = torch.addmm(self.bias, t.reshape(-1, t.shape[-1]), self.weight)
            return Named(flat.view(*t.shape[:-1], -1), x.axes)
        if self.kind in ("low_rank", "low_rank_norm"):
            return x.map(lambda y: self.up(self.middle(self.down(y))))
        if self.kind == "lora":
            return x.map(lambda y: self.layer(y) + self.up(self.down(y)) * 0.5)
        return x.map(self.layer)


class EinsumProject(WithCuts):
    """A weight with a head axis of its own, [features, heads, size]."""

    def __init__(self, role: str, width: int, heads: int, size: int, letter: str, spec: Spec) -> None:
        super().__init__()
        self.letter, self.heads_first = letter, spec.heads_first
        self.weight = self.hold("weight", (width, heads, size), 1, head_segments(role, heads, 1))
        self.bias = self.hold("bias", (heads, size), 0, head_segments(role, heads, 1)) if spec.bias else None

    def forward(self, x: Named) -> Named:
        lead = x.axes.replace("f", "")
        out = lead.replace("l", "hl") if self.heads_first else lead + "h"
        made = Named(torch.einsum(f"{x.axes},fh{self.letter}->{out}{self.letter}", x.t, self.weight), out + self.letter)
        if self.bias is None:
            return made
        bias = Named(self.bias, "h" + self.letter)
        return made.map(lambda t: t + bias.fit(made.axes))


class Heads(nn.Module):
    """Query [.., l, h, d], key [.., m, h, d] and value [.., m, h, e] from one or two sources; axes in any order."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        h, k, d, e, context = spec.heads, spec.kv_heads, HEAD_DIM, spec.value_size, spec.context_width
        qs, ks, vs = head_segments("q", h, d), head_segments("k", k, d), head_segments("v", k, e)

        def project(width: int, segments: tuple[Segment, ...]) -> Project:
            return Project(spec.maker, width, segments, spec.bias)

        if spec.fusion == "einsum":
            self.q: nn.Module = EinsumProject("q", WIDTH, h, d, "d", spec)
            self.k: nn.Module = EinsumProject("k", context, k, d, "d", spec)
            self.v: nn.Module = EinsumProject("v", context, k, e, "e", spec)
        elif spec.fusion in ("cat", "grouped", "3hd", "h3d", "d3h"):
            order = {
                "cat": qs + ks + vs,
                "3hd": qs + ks + vs,
                "h3d": tuple(s for head in zip(qs, ks, vs, strict=False) for s in head),
                "d3h": tuple((r, i, 1) for _ in range(d) for r in "qkv" for i in range(h)),
                "grouped": tuple(
                    s for i in range(k) for s in (*qs[i * spec.group : (i + 1) * spec.group], ks[i], vs[i])
                ),
            }
            self.qkv = project(WIDTH, order[spec.fusion])
        else:
            self.q = project(WIDTH, qs)
            if spec.fusion == "separate":
                self.k, self.v = project(context, ks), project(context, vs)
            elif spec.fusion == "mla":
                kept = head_segments("k", k, d - ROTARY_DIM)
                self.down = nn.Linear(context, LATENT + ROTARY_DIM, bias=spec.bias)
                self.kv = Project(
                    "linear", LATENT, tuple(s for pair in zip(kept, vs, strict=True) for s in pair), spec.bias
                )
            else:
                pairs = tuple(s for pair in zip(ks, vs, strict=True) for s in pair)
                self.kv = project(context, ks + vs if spec.fusion == "kv" else pairs)

    def forward(self, x: Named, context: Named) -> tuple[Named, Named, Named]:
        spec = self.spec
        if spec.fusion == "einsum":
            q, k, v = self.q(x), self.k(context), self.v(context)
        elif spec.fusion in ("cat", "grouped", "3hd", "h3d", "d3h"):
            q, k, v = self._fused(self.qkv(x))
        else:
            q = self._cut(self.q(x), "hd", (spec.heads, HEAD_DIM))
            k, v = self._keys_and_values(context)
        return q, k.named(l="m"), v.named(l="m")

    def _cut(self, y: Named, into: str, sizes: tuple[int, ...]) -> Named:
        return y.cut("f", into, sizes, self.spec.split)

    def _take(self, y: Named, letter: str, count: int) -> list[Named]:
        """The entries of a dimension one by one."""
        at, rest = y.dim(letter), y.axes.replace(letter, "")
        if self.spec.take == "unbind":
            parts = list(y.t.unbind(at))
        elif self.spec.take == "select":
            parts = [y.t.select(at, i) for i in range(count)]
        else:
            parts = [p.squeeze(at) for p in y.t.chunk(count, at)]
        return [Named(p, rest) for p in parts]

    def _split(self, y: Named, letter: str, sizes: list[int]) -> list[Named]:
        at = y.dim(letter)
        if self.spec.take == "select":
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            return [y.map(lambda t, a=a, n=n: t.narrow(at, a, n)) for a, n in zip(starts, sizes, strict=True)]  # type: ignore[misc]
        return [Named(p, y.axes) for p in y.t.split(sizes, dim=at)]

    def _fused(self, y: Named) -> tuple[Named, Named, Named]:
        spec = self.spec
        h, k, d, e = spec.heads, spec.kv_heads, HEAD_DIM, spec.value_size
        if spec.fusion == "cat":
            q, key, v = self._split(y, "f", [h * d, k * d, k * e])
            return self._cut(q, "hd", (h, d)), self._cut(key, "hd", (k, d)), self._cut(v, "he", (k, e))
        if spec.fusion == "grouped":
            q, key, v = self._split(self._cut(y, "htd", (k, spec.group + 2, d)), "t", [spec.group, 1, 1])
            at = q.dim("t")
            key, v = (Named(z.t.squeeze(at), z.axes.replace("t", "")) for z in (key, v))
            return q.join("ht", "h", spec.merge_heads), key, v.named(d="e")
        into = {"3hd": "thd", "h3d": "htd", "d3h": "dth"}[spec.fusion]
        sizes = {"t": 3, "h": h, "d": d}
        q, key, v = self._take(self._cut(y, into, tuple(sizes[c] for c in into)), "t", 3)
        return q, key, v.named(d="e")

    def _keys_and_values(self, context: Named) -> tuple[Named, Named]:
        spec = self.spec
        k, d, e = spec.kv_heads, HEAD_DIM, spec.value_size
        if spec.fusion == "separate":
            return self._cut(self.k(context), "hd", (k, d)), self._cut(self.v(context), "he", (k, e))
        if spec.fusion == "mla":
            latent, shared = self._split(context.map(self.down), "f", [LATENT, ROTARY_DIM])
            own, v = self._split(self._cut(self.kv(latent), "hd", (k, d - ROTARY_DIM + e)), "d", [d - ROTARY_DIM, e])
            common = shared.named(f="d")
            wide = common.fit(own.axes).expand(*(-1 if c != "h" else k for c in own.axes))
            return Named(torch.cat([own.t, wide], own.dim("d")), own.axes), v.named(d="e")
        if spec.fusion == "kv":
            key, v = self._take(self._cut(self.kv(context), "thd", (2, k, d)), "t", 2)
        else:
            key, v = self._split(self._cut(self.kv(context), "hd", (k, d + e)), "d", [d, e])
        return key, v.named(d="e")


class Output(WithCuts):
    """[.., h, e] to features, as one of the usual kinds of layer."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.kind, self.style = spec.output, spec.merge_heads
        h, e = spec.heads, spec.value_size
        flat = head_segments("o", h, e)
        if self.kind.startswith("einsum"):
            shape = (h, e, WIDTH) if self.kind == "einsum_hed" else (WIDTH, h, e)
            self.weight = self.hold("weight", shape, shape.index(h), head_segments("o", h, 1))
            self.bias = nn.Parameter(torch.empty(WIDTH)) if spec.bias else None
        elif self.kind == "addmm":
            self.weight = self.hold("weight", (h * e, WIDTH), 0, flat)
            self.bias = nn.Parameter(torch.empty(WIDTH)) if spec.bias else None
        elif self.kind == "low_rank":
            self.layer: nn.Module = nn.Linear(h * e, LATENT, bias=False)
            self.up = nn.Linear(LATENT, WIDTH, bias=spec.bias)
        elif self.kind == "conv1d":
            self.layer = nn.Conv1d(h * e, WIDTH, 1, bias=spec.bias)
        elif self.kind == "beside_mlp":
            self.hidden = nn.Linear(WIDTH, HIDDEN)
            self.layer = nn.Linear(h * e + HIDDEN, WIDTH, bias=spec.bias)
            flat += (("rest", 0, HIDDEN),)
        else:
            self.layer = nn.Linear(h * e, WIDTH, bias=spec.bias)
        if hasattr(self, "layer"):
            self.cuts["layer.weight"] = Cut(1, flat)

    def forward(self, y: Named, x: Named, gate: Tensor | None) -> Named:
        """``y`` [batch and sequence, h, e], ``x`` the block's input, ``gate`` multiplies the joined features."""
        lead = y.axes[:-2]
        if self.kind.startswith("einsum"):
            if gate is not None:
                y = y.map(lambda t: t * gate.unflatten(-1, t.shape[-2:]))
            letters = "hef" if self.kind == "einsum_hed" else "fhe"
            made = torch.einsum(f"{y.axes},{letters}->{lead}f", y.t, self.weight)
            return Named(made if self.bias is None else made + self.bias, lead + "f")
        flat = y.join("he", "f", self.style)
        if gate is not None:
            flat = flat.map(lambda t: t * gate)
        t = flat.t
        if self.kind == "addmm":
            if self.bias is None:
                return flat.map(lambda z: z.matmul(self.weight))
            made = torch.addmm(self.bias, t.reshape(-1, t.shape[-1]), self.weight)
            return flat.map(lambda z: made.view(*z.shape[:-1], -1))
        if self.kind == "conv1d":
            first = flat.to(lead.replace("l", "") + "fl")
            return first.map(self.layer).to(flat.axes)
        if self.kind == "beside_mlp":
            beside = x.map(lambda z: F.gelu(self.hidden(z)))
            wide = beside.fit(flat.axes).expand(*t.shape[:-1], -1)
            return flat.map(lambda z: self.layer(torch.cat([z, wide], -1)))
        made = self.layer(t)
        return flat.map(lambda z: self.up(made) if self.kind == "low_rank" else made)
