"""Which attributes may say how many heads there are, and what they could become: by value, never by name.

The modules whose parameters a site is cut in have a smallest common parent, the *owner*: the attention module. Owners
of one class with the same head counts form a group and change together. Whatever whole number the forward pass reads in
an owner (or around it) that equals a quantity of its sites, H, K, H / K, H * D and the like, may be that quantity.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sqa_fx.module_names import has_module
from sqa_fx.plan import ParameterPlan, Plan, SitePlan
from sqa_fx.surgery_reads import Reads, numbers
from sqa_fx.surgery_record import AttributeChange, Path, value_at

_CORE = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Owners:
    """Attention modules that change together: ``sizes`` are the values that a quantity of theirs takes instead."""

    paths: tuple[str, ...]
    sizes: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Variable:
    """A number at ``path`` of ``modules``, what it is now, and what it could become; ``group`` is the position of the
    owners that it lies in, None outside of all."""

    modules: tuple[str, ...]
    path: Path
    old: int
    options: tuple[int, ...]
    group: int | None

    def becomes(self, new: int) -> AttributeChange:
        """The change of this number."""
        return AttributeChange(self.modules, self.path, self.old, new)


def owner_groups(model: nn.Module, plan: Plan) -> list[Owners]:
    """The owners of every site that changes, grouped by class and head counts."""
    groups: dict[object, dict[str, None]] = {}
    sizes: dict[object, dict[int, dict[int, None]]] = {}
    for site in plan.sites:
        own = [p for p in plan.parameters if site.name in p.sites]
        if site.identity or not own:
            continue
        path = owner_path(model, site, own)
        found = quantities(site, own)
        key = (type(model.get_submodule(path)), site.heads, site.kv_heads, site.hq, site.hkv, site.head_dim)
        groups.setdefault(key, {})[path] = None
        for old, new in found:
            sizes.setdefault(key, {}).setdefault(old, {})[new] = None
    return [
        Owners(tuple(paths), {old: tuple(new) for old, new in sizes.get(key, {}).items()})
        for key, paths in groups.items()
    ]


def owner_path(model: nn.Module, site: SitePlan, parameters: Sequence[ParameterPlan]) -> str:
    """The path of the smallest module that holds the projections of ``site`` and computes its attention."""
    core = [p for p in parameters if any(b.role in _CORE for b in p.blocks)] or list(parameters)
    holders = {p.name.rpartition(".")[0] for p in core}
    parts = [path.split(".") if path else [] for path in holders]
    name = site.name.partition("#")[0]
    if name and has_module(model, name):
        parts.append(name.split("."))
    common: list[str] = []
    for steps in zip(*parts, strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    # One projection alone computes no attention; nor does a list of modules.
    if len(holders) == 1 and ".".join(common) in holders and common and not _has_children(model, common):
        roles = {b.role for p in core for b in p.blocks if p.name.rpartition(".")[0] in holders}
        if not set(_CORE) <= roles:
            common.pop()
    while common and isinstance(model.get_submodule(".".join(common)), nn.ModuleList | nn.ModuleDict):
        common.pop()
    return ".".join(common)


def _has_children(model: nn.Module, path: Sequence[str]) -> bool:
    return any(True for _ in model.get_submodule(".".join(path)).children())


def quantities(site: SitePlan, parameters: Sequence[ParameterPlan]) -> list[tuple[int, int]]:
    """(now, then) of everything that follows from the head counts of ``site`` and changes with them."""
    h, k, q, v = site.heads, site.kv_heads, site.hq, site.hkv
    counts = [(h, q), (k, v), (h + k, q + v), (h + 2 * k, q + 2 * v), (2 * k, 2 * v), (2 * h, 2 * q), (3 * h, 3 * q)]
    widths = {1, site.head_dim}
    found = []
    for parameter in parameters:
        now, then = parameter.size
        found.append((now, then))
        for a, b in ((h, q), (k, v)):
            if now % a == 0 and then % b == 0 and now // a == then // b:
                widths.add(now // a)
    found += [(a * w, b * w) for w in sorted(widths) for a, b in counts]
    if h % k == 0 and q % v == 0:
        found += [(h // k, q // v), (h // k + 1, q // v + 1), (h // k + 2, q // v + 2)]
    return [(a, b) for a, b in dict.fromkeys(found) if a != b]


def variables(model: nn.Module, groups: Sequence[Owners], reads: Reads, cut: Collection[int]) -> list[Variable]:
    """Everything that was read and may be a quantity of a group, those inside of owners first. ``cut`` are the ids of
    the tensors that are cut."""

    def fixed(module: nn.Module) -> bool:
        # The numbers of torch's own layers follow from their weights, or are geometry.
        own = list(module.parameters(recurse=False))
        return bool(own) and type(module).__module__.startswith("torch.nn.") and not any(id(p) in cut for p in own)

    found: list[Variable] = []
    inside: set[int] = set()
    for position, group in enumerate(groups):
        wanted: dict[tuple[str, Path], int] = {}
        members = [model.get_submodule(path) for path in group.paths]
        for owner in members:
            for inner, module in owner.named_modules(remove_duplicate=False):
                inside.add(id(module))
                if fixed(module):
                    continue
                for where, number in numbers(module, reads):
                    if number in group.sizes:
                        wanted.setdefault((inner, where), number)
        for (inner, where), number in wanted.items():
            held = tuple(
                _joined(path, inner)
                for path, owner in zip(group.paths, members, strict=True)
                if _holds(owner, inner, where, number)
            )
            found.append(Variable(held, where, number, group.sizes[number], position))
    sizes: dict[int, dict[int, None]] = {}
    for group in groups:
        for old, new in group.sizes.items():
            sizes.setdefault(old, {}).update(dict.fromkeys(new))
    around: dict[tuple[type, Path, int], list[str]] = {}
    for path, module in model.named_modules():
        if id(module) not in inside and not fixed(module):
            for where, number in numbers(module, reads):
                if number in sizes and number != 1:
                    around.setdefault((type(module), where, number), []).append(path)
    for (_, where, number), paths in around.items():
        found.append(Variable(tuple(paths), where, number, tuple(sizes[number]), None))
    return found


def _joined(path: str, inner: str) -> str:
    return f"{path}.{inner}".strip(".")


def _holds(owner: nn.Module, inner: str, where: Path, number: int) -> bool:
    try:
        return type(value := value_at(owner.get_submodule(inner), where)) is int and bool(value == number)
    except (AttributeError, LookupError, TypeError):
        return False
