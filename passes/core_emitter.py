"""The attention core on fewer heads: KV heads reach their query heads by enable_gqa, by broadcasting, or repeated."""

from __future__ import annotations

import torch
from torch import fx

from sqa_fx.passes.aten_call import argument, set_argument
from sqa_fx.passes.emitter import Emitter
from sqa_fx.passes.following import CORE
from sqa_fx.passes.hints import shape_of, value_of
from sqa_fx.passes.labels import low, run_length, single, varying
from sqa_fx.passes.layout import DROP
from sqa_fx.passes.site import Core, Refused


class CoreEmitter(Emitter):
    """Makes the new cores of one site."""

    def _core_operand(self, role: str, node: fx.Node) -> fx.Node:
        """``node`` itself, or where heads have cores of their own and this one was merged into another, the operand
        of the head that it was merged into."""
        labels = self.site.labels.get((role, node))
        if labels is None or varying(labels) or bool((self.layout.new_heads(labels, role) != DROP).any()):
            return node
        wanted = self.layout.representative(int(low(labels).reshape(-1)[0]), role)
        for core in self.site.cores:
            other = {"q": core.q, "k": core.k, "v": core.v}[role]
            found = self.site.labels.get((role, other))
            if found is not None and not varying(found) and int(low(found).reshape(-1)[0]) == wanted:
                return other
        raise Refused("merged heads have no core of their own", node, kind="layout")

    def _fused_core(self, core: Core) -> fx.Node:
        node = core.value
        rank = len(shape_of(node))
        own = {r: self._core_operand(r, n) for r, n in (("q", core.q), ("k", core.k), ("v", core.v))}
        q, k, v = (self._reach(r, n) for r, n in own.items())
        sizes = [value_of(t).shape[-3] if value_of(t).dim() >= 4 else None for t in (q, k, v)]
        per_head = self._labelled_dim("q", core.q) == rank - 3 and rank == 4
        gqa = False
        if self.layout.plan.hq < self.layout.plan.hkv:
            q = self._repeat(node, "q", core.q, q)
        elif per_head and sizes[1] == sizes[2]:
            gqa = sizes[0] != sizes[1]
        else:
            k = self._expand_grid(node, "k", core.k, k, q) or self._repeat(node, "k", core.k, k)
            v = self._expand_grid(node, "v", core.v, v, q) or self._repeat(node, "v", core.v, v)
        new = self._copy_core(node, (q, k, v))
        if gqa or argument(node, "enable_gqa", False):
            set_argument(new, "enable_gqa", gqa)
        return new

    def _copy_core(self, node: fx.Node, operands: tuple[fx.Node, fx.Node, fx.Node]) -> fx.Node:
        """The SDPA node on new (q, k, v); its fake value is that of the old one with the new head count.

        Operands go by position: one tensor may serve as key and value, and each takes its own part.
        """
        args = [*operands, *node.args[3:]]
        mask = argument(node, "attn_mask")
        with self.graph.inserting_before(node):
            assert isinstance(node.target, torch._ops.OpOverload)
            new = self.graph.call_function(node.target, tuple(args), dict(node.kwargs))
        if isinstance(mask, fx.Node):
            set_argument(new, "attn_mask", self._reach(CORE, mask))
        new.meta = {k: v for k, v in node.meta.items() if not k.startswith("sqa_")}
        new.meta["val"] = self._scaled(value_of(node), self._shape(CORE, node))
        return new

    def _contraction_core(self, core: Core, node: fx.Node) -> fx.Node:
        plan = self.layout.plan
        if node is core.score:
            pairs = [("q", core.q), ("k", core.k)]
        else:
            assert core.probabilities is not None
            pairs = [(CORE, core.probabilities), ("v", core.v)]
        new = []
        for role, operand in pairs:
            part = self._reach(role, operand if role == CORE else self._core_operand(role, operand))
            wide = self.layout.heads_of(role) if role in self.site.kinds else self.layout.wide
            if role != CORE and wide != self.layout.wide and plan.hq != plan.hkv:
                part = self._repeat(node, role, operand, part)
            new.append(part)
        mapping = {operand: part for (_, operand), part in zip(pairs, new, strict=True)}
        if pairs[0][1] is pairs[1][1]:
            raise Refused("one tensor is both query and key", node)
        return self._copy(node, lambda a: mapping[a] if a in mapping else self._reach(CORE, a), self._shape(CORE, node))

    def _labelled_dim(self, role: str, node: fx.Node) -> int | None:
        labels = self.site.labels.get((role, node))
        dims = varying(labels) if labels is not None else []
        return dims[0] if len(dims) == 1 else None

    def _repeat(self, before: fx.Node, role: str, old: fx.Node, new: fx.Node) -> fx.Node:
        """Repeat the heads of a core operand for the heads that read them, unless broadcasting does it."""
        labels = self.site.labels.get((role, old))
        if labels is None or not bool(single(labels).any()):
            return new
        dims = varying(labels)
        if not dims:
            return new
        if role == "q" and len(dims) == 2 and dims[1] == dims[0] + 1 and self.layout.plan.hq < self.layout.wide:
            return self._repeat_grid(before, dims[0], new)
        if len(dims) != 1:
            if self.site.core.fused:
                raise Refused("heads lie along two dimensions of the attention", old, kind="layout")
            return new
        dim, times = dims[0], self.layout.wide // self.layout.heads_of(role)
        run = run_length(labels.reshape(-1))
        rank, source = len(value_of(new).shape), new
        emit = self._emit
        if run > 1:
            heads = self.layout.heads_of(role)
            if labels.numel() != run * self.site.heads:
                raise Refused("heads are interleaved with other dimensions on both sides", old, kind="layout")
            sizes = [heads, -1]
            new = emit(before, torch.ops.aten.unflatten.int, new, dim, sizes)
        new = emit(before, torch.ops.aten.unsqueeze.default, new, dim + 1)
        wide = [-1] * (rank + 1 + int(run > 1))
        wide[dim + 1] = times
        new = emit(before, torch.ops.aten.expand.default, new, wide)
        repeated = emit(before, torch.ops.aten.flatten.using_ints, new, dim, dim + 1 + int(run > 1))
        if run == 1:
            repeated.meta["sqa_repeat"] = (source, dim)
        return repeated

    def _expand_grid(self, before: fx.Node, role: str, old: fx.Node, new: fx.Node, queries: fx.Node) -> fx.Node | None:
        """KV heads that were expanded to the grid of the query heads, expanded to the smaller one; None elsewhere."""
        labels = self.site.labels.get((role, old))
        dims = varying(labels) if labels is not None else []
        if len(dims) != 2:
            return None
        wanted = [int(value_of(queries).shape[d]) for d in dims]
        sizes = [-1] * len(value_of(new).shape)
        for dim, size in zip(dims, wanted, strict=True):
            if value_of(new).shape[dim] not in (1, size):
                return None
            sizes[dim] = size
        return self._emit(before, torch.ops.aten.expand.default, new, sizes)

    def _repeat_grid(self, before: fx.Node, dim: int, new: fx.Node) -> fx.Node:
        """Queries in a grid [KV heads, query heads of each] at ``dim``, repeated until every KV head has one."""
        new = self._emit(before, torch.ops.aten.flatten.using_ints, new, dim, dim + 1)
        sizes = [-1] * (len(value_of(new).shape) + 1)
        sizes[dim + 1] = self.layout.wide // self.layout.plan.hq
        new = self._emit(before, torch.ops.aten.unsqueeze.default, new, dim + 1)
        new = self._emit(before, torch.ops.aten.expand.default, new, sizes)
        new = self._emit(before, torch.ops.aten.flatten.using_ints, new, dim, dim + 1)
        return self._emit(before, torch.ops.aten.unsqueeze.default, new, dim + 1)
