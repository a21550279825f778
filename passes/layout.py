"""From labels and a plan to new sizes: which entries of a tensor stay, under which new head number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqa_fx.passes.hints import shape_of
from sqa_fx.passes.labels import EMPTY, Labels, high, low, varying
from sqa_fx.passes.site import LeafUse, Refused, Site
from sqa_fx.plan import HeadBlock, SitePlan, from_ranges, to_ranges

DROP, REST = -1, -2


@dataclass(frozen=True)
class NewShape:
    """The shape of a tensor after dropping heads: sizes at the example inputs, and, where the heads lie along single
    dimensions, which entries of each dimension stay (None when two dimensions form a KV x group grid)."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    kept: dict[int, Tensor] | None
    grid: tuple[int, ...] = ()

    def changes(self, dim: int) -> bool:
        """True when entries go, or may go, along ``dim``."""
        return dim in (self.kept if self.kept is not None else self.grid)


def head_entries(site: Site, use: LeafUse, member: tuple[int, int]) -> list[int]:
    """The entries of a parameter's head axis that belong to the canonical heads from ``member[0]`` to ``member[1]``."""
    first, last = low(use.labels), high(use.labels)
    inside = (first >= member[0]) & (last <= member[1]) & (use.labels != EMPTY)
    if site.kinds[use.role] == "kv" and member[0] != member[1] and bool((first == last)[inside].any()):
        inside = inside & (first == member[0])
    return torch.nonzero(inside).reshape(-1).tolist()


class Layout:
    """Head arithmetic of one site under one plan (canonical numbers inside)."""

    def __init__(self, site: Site, plan: SitePlan) -> None:
        self.site, self.plan = site, plan
        canonical = {model: c for c, model in enumerate(site.model_heads)}
        kv_number = {model: g for g, model in enumerate(site.model_kv_heads)}
        self.kept = [canonical[h] for h in plan.query_heads]
        self.query_groups = [[canonical[h] for h in group] for group in plan.query_groups]
        self.kv_groups = [[kv_number[g] for g in group] for group in plan.kv_groups]
        self.wide = len(self.kept)
        self.kv = torch.tensor(site.kv_of)
        self._core = self._table({c: i for i, c in enumerate(self.kept)})
        self._query = self._table({group[0]: i for i, group in enumerate(self.query_groups)})
        first = {site.group(group[0])[0]: j for j, group in enumerate(self.kv_groups)}
        self._kv_single = self._table(first)
        alive = torch.full((site.kv_heads,), DROP)
        for j, group in enumerate(self.kv_groups):
            alive[group[0]] = j
        self._kv_whole = alive

    def _table(self, entries: dict[int, int]) -> Tensor:
        table = torch.full((self.site.heads,), DROP)
        for head, number in entries.items():
            table[head] = number
        return table

    def heads_of(self, role: str) -> int:
        """How many heads tensors of ``role`` have in the result."""
        if role == "q":
            return self.plan.hq
        return self.plan.hkv if self.site.kinds[role] == "kv" else self.wide

    def new_heads(self, labels: Labels, role: str) -> Tensor:
        """The new head of each element: DROP when the element goes, REST when it stays but belongs to no single head.

        Repeated copies of one KV head are kept once: KV tensors hold every new KV head a single time up to the core.
        """
        first, last = low(labels), high(labels)
        limit = self.site.heads - 1
        a, b = first.clamp(max=limit), last.clamp(min=0)
        one = first == last
        rest = torch.full_like(first, REST)
        if self.site.kinds[role] == "kv":
            same = self.kv[a] == self.kv[b]
            found = torch.where(one, self._kv_single[a], torch.where(same, self._kv_whole[self.kv[a]], rest))
        else:
            found = torch.where(one, (self._query if role == "q" else self._core)[a], rest)
        return torch.where(labels == EMPTY, torch.full_like(first, DROP), found)

    def new_shape(self, node: fx.Node, role: str) -> NewShape:
        """The shape of ``node`` (labelled under ``role``) in the result. Raises Refused when heads form no clean
        axis."""
        labels = self.site.labels[role, node]
        shape = shape_of(node)
        if not varying(labels):
            return NewShape(shape, shape, {})
        numbers = self.new_heads(labels, role)
        stays = numbers != DROP
        kept: dict[int, Tensor] = {}
        outer = torch.ones((1,) * stays.dim(), dtype=torch.bool)
        for dim in varying(labels):
            others = [d for d in range(stays.dim()) if d != dim and stays.size(d) > 1]
            along = stays.any(dim=others, keepdim=True) if others else stays
            outer = outer & along
            kept[dim] = along.reshape(-1)
        sizes = list(shape)
        if bool((outer == stays).all()):
            for dim, along in kept.items():
                sizes[dim] = int(along.sum())
            grouped = self.site.kv_heads < self.site.heads and self.site.kinds[role] != "kv" and len(kept) == 2
            order = numbers.expand(stays.shape)[stays]
            if grouped and not bool((order[order >= 0].diff() >= 0).all()):
                raise Refused("the heads of each KV head lie apart in a grid here", node, kind="layout")
            merged = self.merges("kv") and self.site.kinds[role] != "kv" and len(kept) == 2
            if not merged or self.site.kv_heads == self.site.heads:
                return NewShape(shape, tuple(sizes), kept)
        return self._grid(node, role, labels, shape)

    def _grid(self, node: fx.Node, role: str, labels: Labels, shape: tuple[int, ...]) -> NewShape:
        """Heads spread over two dimensions, [KV heads, heads of each] or [blocks, heads of a block]."""
        dims = varying(labels)
        sizes = list(shape)
        if len(dims) == 2:
            grid = labels.reshape(labels.size(dims[0]), labels.size(dims[1]))
            empty = grid == EMPTY
            if bool(((low(grid) == high(grid)) | empty).all()):
                rows, columns = (~empty).any(1), (~empty).any(0)
                inner = grid[rows][:, columns]
                kv = self.kv[low(inner).clamp(max=self.site.heads - 1)]
                if self.site.kv_heads < self.site.heads:
                    if inner.numel() == self.site.heads and bool((inner != EMPTY).all() and (kv == kv[:, :1]).all()):
                        across = min(self.plan.hkv, self.heads_of(role))
                        sizes[dims[0]], sizes[dims[1]] = across, self.heads_of(role) // across
                        return NewShape(shape, tuple(sizes), None, tuple(dims))
                else:
                    per_head = self._block_rows(low(grid), empty)
                    if per_head:
                        sizes[dims[0]], sizes[dims[1]] = self.heads_of(role), per_head
                        return NewShape(shape, tuple(sizes), None, tuple(dims))
        raise Refused(
            f"the kept heads do not form a regular axis here (along dimensions {dims} of {list(shape)})",
            node,
            kind="layout",
        )

    def _block_rows(self, grid: Tensor, empty: Tensor) -> int:
        """Entries of one head along a row when every head lies in one row, in order, as often as any other; else 0.

        Then one row per head holds the same entries in the same order, whatever the block structure was.
        """
        flat = grid[~empty]
        rows = torch.arange(grid.size(0))[:, None].expand_as(grid)[~empty]
        counts = torch.bincount(flat, minlength=self.site.heads)
        if (
            len(counts) != self.site.heads
            or not bool((counts == counts[0]).all())
            or not bool((flat.diff() >= 0).all())
        ):
            return 0
        first = torch.full((self.site.heads,), -1).scatter_reduce(0, flat, rows, "amax", include_self=False)
        return int(counts[0]) if bool((first[flat] == rows).all()) else 0

    def kept_entries(self, labels: Labels, role: str) -> list[int]:
        """The original entries along a labelled axis ([entries]) that stay, in the order of the result."""
        use = LeafUse(next(iter(self.site.labels))[1], role, 0, labels)
        index: dict[int, int] = {}
        for block in self.blocks(use):
            index.update(zip(from_ranges(block.to), from_ranges(block.sources[0]), strict=True))
        return [index[i] for i in range(len(index))]

    def blocks(self, use: LeafUse) -> list[HeadBlock]:
        """How the entries of a parameter's head axis make the new ones (positions start at 0)."""
        numbers = self.new_heads(use.labels, use.role).tolist()
        entries = [e for e, number in enumerate(numbers) if number != DROP]
        order: dict[int, int] = {}
        for e in entries:
            if numbers[e] >= 0:
                order.setdefault(numbers[e], len(order))
        slots: dict[int, list[int]] = {}
        for position, e in enumerate(entries):
            number = numbers[e]
            # Heads keep the places of the axis but stand in plan order: the r-th head that appears makes room for
            # head r.
            slots.setdefault(order[number] if number >= 0 else REST, []).append(position)
        result = []
        for head, positions in sorted(slots.items()):
            to = to_ranges(positions)
            if head == REST:
                own = to_ranges([entries[p] for p in positions])
                result.append(HeadBlock("rest", -1, to, (own,), (own,)))
                continue
            members = [to_ranges(self._entries(use, m)) for m in self._members(use.role, head)]
            averaged = members[:1] if self.plan.kv_merge == "select" and use.role != "q" else members
            result.append(HeadBlock(use.role, head, to, tuple(averaged), tuple(members)))
        return result

    def merges(self, role: str) -> bool:
        """True when some new head of ``role`` ("kv": some new KV head) stands for several original ones."""
        kind = "kv" if role == "kv" else self.site.kinds[role]
        groups = self.kv_groups if kind == "kv" else self.query_groups if role == "q" else []
        return any(len(g) > 1 for g in groups)

    def representative(self, head: int, role: str) -> int:
        """The original head (of KV heads: the first that reads it) that stands for ``head`` under ``role``."""
        if self.site.kinds[role] == "kv":
            group = next((g for g in self.kv_groups if self.site.kv_of[head] in g), None)
            return self.site.group(group[0])[0] if group is not None else -1
        return next((g[0] for g in self.query_groups if head in g), -1)

    def check_whole(self, use: LeafUse) -> None:
        """Raise Refused when the plan merges a head that has a parameter of its own."""
        head = int(low(use.labels).reshape(-1)[0])
        groups = self.kv_groups if self.site.kinds[use.role] == "kv" else self.query_groups if use.role == "q" else []
        number = self.site.kv_of[head] if self.site.kinds[use.role] == "kv" else head
        if any(len(g) > 1 and number in g for g in groups):
            raise Refused(
                f"parameter {use.node.target} belongs to one head alone, so that heads can be dropped but not merged",
                use.node,
                kind="layout",
            )

    def _members(self, role: str, head: int) -> list[tuple[int, int]]:
        """The original head intervals that new head ``head`` of ``role`` stands for."""
        if self.site.kinds[role] == "kv":
            return [self.site.group(g) for g in self.kv_groups[head]]
        group = self.query_groups[head] if role == "q" else [self.kept[head]]
        return [(c, c) for c in group]

    def _entries(self, use: LeafUse, member: tuple[int, int]) -> list[int]:
        return head_entries(self.site, use, member)

    def dropped(self, use: LeafUse) -> list[int]:
        """The entries of a parameter that belong to heads which are gone."""
        stay = {i for member in self._all_members(use.role) for i in self._entries(use, member)}
        gone = (use.labels != EMPTY) & (self.new_heads(use.labels, use.role) != REST)
        return [i for i in torch.nonzero(gone).reshape(-1).tolist() if i not in stay]

    def _all_members(self, role: str) -> list[tuple[int, int]]:
        return [m for head in range(self.heads_of(role)) for m in self._members(role, head)]
