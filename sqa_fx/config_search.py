"""Find the fields of a config that say SQA: a few changes under which the stock class has the shapes of the cut
weights.

Nothing is known of architectures. Every whole number in the config that equals a quantity which heads decide (query
heads, KV heads, their ratio, heads times head size) may become what that quantity is after the cut, and every field
without a value that the class reads may get such a quantity (a head size of its own, say). Sets of such changes are
tried on the meta device, small ones first; those with the names and shapes of the cut state dict are candidates for a
proof.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sqa_fx.checkpoint_model import tied_names
from sqa_fx.errors import PlanError
from sqa_fx.module_names import kind_of
from sqa_fx.plan import Plan
from sqa_fx.stock_model import FieldPath, Stock, with_values

Shapes = dict[str, tuple[int, ...]]
MOST_BUILDS = 1500
"""Models that are built on the meta device in one search: some milliseconds each."""
_MOST_CHANGES = 6


@dataclass(frozen=True)
class Heads:
    """Sites of a plan that are cut alike."""

    heads: int
    kv_heads: int
    hq: int
    hkv: int
    head_dim: int

    def quantities(self) -> dict[str, tuple[int, int]]:
        """What heads decide: before and after the cut, by name."""
        found = {}
        for name, quantity in _QUANTITIES.items():
            before = quantity(self.heads, self.kv_heads, self.head_dim)
            after = quantity(self.hq, self.hkv, self.head_dim)
            if before is not None and after is not None:
                found[name] = (before, after)
        return found


_QUANTITIES: dict[str, Callable[[int, int, int], int | None]] = {
    "query heads": lambda h, k, d: h,
    "KV heads": lambda h, k, d: k,
    "query heads per KV head": lambda h, k, d: h // k if h % k == 0 else None,
    "head size": lambda h, k, d: d,
    "query width": lambda h, k, d: h * d,
    "KV width": lambda h, k, d: k * d,
    "width of q, k and v": lambda h, k, d: (h + 2 * k) * d,
}


@dataclass(frozen=True)
class Change:
    """A field of the config, and its new value: a quantity of the sites in one group."""

    path: FieldPath
    value: int
    meanings: tuple[tuple[int, str], ...]
    """(group, quantity): what the value is."""

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}={self.value}"

    def elsewhere(self, groups: Sequence[Heads]) -> list[Change]:
        """The same change for another config of the same class, whose sites are ``groups``: one for each meaning."""
        values = dict.fromkeys(groups[g].quantities()[name][1] for g, name in self.meanings)
        return [Change(self.path, value, self.meanings) for value in values]


@dataclass
class Search:
    """Changes of the config of ``stock`` under which its state dict has the shapes ``wanted``."""

    stock: Stock
    groups: Sequence[Heads]
    wanted: Shapes
    builds: int = 0
    nearest: str | None = None
    """What the set of changes that came nearest leaves to be desired."""
    _known: dict[frozenset[tuple[FieldPath, int]], Shapes | None] = field(default_factory=dict)
    _distance: tuple[int, bool] | None = None

    def shapes(self, changes: Sequence[Change]) -> Shapes | None:
        """Names and shapes under ``changes``; None where the class does not take them."""
        key = frozenset((c.path, c.value) for c in changes)
        if key not in self._known:
            self.builds += 1
            try:
                self._known[key] = shapes_of(
                    self.stock.bare(with_values(self.stock.fields, [(c.path, c.value) for c in changes]))
                )
            except Exception:  # whatever it raises, this is no config of the class
                self._known[key] = None
        return self._known[key]

    def fits(self, changes: Sequence[Change]) -> bool:
        """True when names and shapes are those of the cut weights."""
        found = self.shapes(changes)
        if found is None:
            return False
        wrong = [n for n in self.wanted.keys() | found.keys() if found.get(n) != self.wanted.get(n)]
        far = (len(wrong), not changes)
        if wrong and (self._distance is None or far < self._distance):
            self._distance, name = far, min(wrong)
            made, want = found.get(name), self.wanted.get(name)
            self.nearest = (
                f"with {', '.join(map(str, changes)) or 'the config as it is'}, {len(wrong)} tensors differ, such as "
                f"{name}: {'absent' if made is None else list(made)} instead of "
                f"{'absent' if want is None else list(want)}"
            )
        return not wrong

    def candidates(self) -> Iterator[tuple[Change, ...]]:
        """Sets of changes that fit, small ones first."""
        if self.fits(()):
            yield ()
            return
        changes = self._viable()
        for size in range(1, min(_MOST_CHANGES, len(changes)) + 1):
            for chosen in itertools.combinations(changes, size):
                if len({c.path for c in chosen}) < size:
                    continue
                if self.builds >= MOST_BUILDS:
                    return
                if self.fits(chosen):
                    yield chosen

    def _viable(self) -> list[Change]:
        """The changes to combine, those first that reshape what must be reshaped. Left out is what renames tensors or
        reshapes others, alone and with a head size of its own."""
        base = self.shapes(())
        if base is None:
            return []
        pinned = self._unset(base)
        pins = [c for c in pinned if self.shapes((c,)) == base]
        must = {name for name, shape in self.wanted.items() if base.get(name) != shape}
        ranked: list[tuple[int, Change]] = []
        for change in (*self._set(), *pinned):
            rank: int | None = None
            for with_it in ((), *((p,) for p in pins if p.path != change.path)):
                found = self.shapes((change, *with_it))
                if found is None:
                    # It may only be right together with another one (heads that KV heads must divide).
                    own = 1
                elif found.keys() != base.keys() or any(found[n] != base[n] for n in base if n not in must):
                    continue
                else:
                    own = 0 if any(found[n] != base[n] for n in must) or change in pins else 2
                rank = own if rank is None else min(rank, own)
            if rank is not None:
                ranked.append((rank, change))
        return [change for _, change in sorted(ranked, key=lambda entry: entry[0])]

    def _set(self) -> list[Change]:
        """Changes of fields that have a value."""
        found: dict[tuple[FieldPath, int], list[tuple[int, str]]] = {}
        for path, value in self.stock.integer_fields():
            for g, group in enumerate(self.groups):
                for name, (before, after) in group.quantities().items():
                    if value == before != after:
                        found.setdefault((path, after), []).append((g, name))
        return [Change(path, value, tuple(meanings)) for (path, value), meanings in found.items()]

    def _unset(self, base: Shapes) -> list[Change]:
        """Values for fields that have none and decide on shapes."""
        found: list[Change] = []
        for path in self.stock.unset_fields():
            values: dict[int, list[tuple[int, str]]] = {}
            for g, group in enumerate(self.groups):
                for name, (_, after) in group.quantities().items():
                    values.setdefault(after, []).append((g, name))
            own = [Change(path, value, tuple(meanings)) for value, meanings in values.items()]
            probes = [*own, *(Change(path, 2 * c.value, ()) for c in own[:1])]
            made = [self.shapes((c,)) for c in probes]
            if any(m is not None and m != base for m in made):
                found.extend(c for c, m in zip(own, made, strict=False) if m is not None)
        return found


def shapes_of(model: nn.Module) -> Shapes:
    """Name and shape of everything in the state dict."""
    return {name: tuple(held.shape) for name, held in model.state_dict().items()}


def cut_shapes(bare: nn.Module, plan: Plan) -> Shapes:
    """The shapes that the state dict of ``bare`` has after the cut. Raises PlanError when the plan does not fit it."""
    shapes, tied = shapes_of(bare), tied_names(bare)
    for parameter in plan.parameters:
        if parameter.name not in tied and any(b.role in ("q", "k", "v", "o") for b in parameter.blocks):
            raise PlanError(f"{type(bare).__name__} has no {parameter.name}: the plan was made for another model")
        for name in tied.get(parameter.name, ()):
            shape = shapes[name]
            if parameter.axis >= len(shape) or shape[parameter.axis] != parameter.size[0]:
                raise PlanError(
                    f"{name} has shape {list(shape)}, the plan expects {parameter.size[0]} entries along axis "
                    f"{parameter.axis}: it was made for another model"
                )
            shapes[name] = (*shape[: parameter.axis], parameter.size[1], *shape[parameter.axis + 1 :])
    return shapes


def head_groups(plan: Plan) -> list[Heads]:
    """The different kinds of sites in a plan, in order."""
    return list(dict.fromkeys(Heads(s.heads, s.kv_heads, s.hq, s.hkv, s.head_dim) for s in plan.sites))


def unevenness(plan: Plan) -> str | None:
    """What makes layers of one kind differ after the cut, so that one field cannot say it; None when they are alike."""
    kinds: dict[tuple[str, int, int], set[tuple[int, int]]] = {}
    for site in plan.sites:
        kinds.setdefault((kind_of(site.name), site.heads, site.kv_heads), set()).add((site.hq, site.hkv))
    for (kind, heads, kv), found in kinds.items():
        if len(found) > 1:
            said = ", ".join(f"{hq}/{hkv}" for hq, hkv in sorted(found))
            return f"layers of one kind keep different numbers of heads ({kind}: {heads}/{kv} -> {said})"
    return None


def fields_of(changes: Sequence[Change]) -> dict[str, Any]:
    """The changes as JSON-ready data: dotted path to value."""
    return {".".join(c.path): c.value for c in changes}
