"""The converted model written by hand: the same program built at the smaller numbers of heads, its weights cut here.

Only the sites of a plan are read (which heads stay, which are merged); where each head lies in each weight is what the
program itself knows of its layout. No code of the package takes part.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fuzz.program import Program
from fuzz.projections import Cut, WithCuts
from fuzz.spec import SQUARE, Spec

Groups = dict[str, list[list[int]]]


def groups(spec: Spec, site: Mapping[str, Any]) -> Groups:
    """For each role and new head: the original heads whose mean it is. Heads stand in the order of the new model."""
    hq, hkv, kept = site["hq"], site["hkv"], site["query_heads"]
    wide, share = len(kept), len(kept) // hkv
    order = [j * share + r for r in range(share) for j in range(hkv)] if spec.tiled else list(range(wide))
    merged = [list(g[:1] if site["kv_merge"] == "select" else g) for g in site["kv_groups"]]
    return {
        "q": [list(site["query_groups"][i * hq // wide]) for i in order],
        "h": [[kept[i]] for i in order],
        "o": [[kept[i]] for i in order],
        "k": merged,
        "v": merged,
    }


def smaller(spec: Spec, site: Mapping[str, Any]) -> Spec:
    """The program at the smaller numbers of heads."""
    heads, kv_heads = len(site["query_heads"]), site["hkv"]
    changes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads}
    if heads != kv_heads and spec.expansion == "none":
        changes["expansion"] = "repeat_interleave"
    if heads != kv_heads and spec.fusion in SQUARE:
        changes["fusion"] = "cat"
    return replace(spec, **changes)


def cut(old: Tensor, before: Cut, after: Cut, chosen: Groups) -> Tensor:
    """The entries of ``before`` that make ``after``: for every segment the mean over the original heads."""
    axis = before.axis % old.dim()
    assert axis == after.axis % old.dim()
    place = {entry: i for i, entry in enumerate(entries(before))}
    assert len(place) == old.shape[axis], (len(place), old.shape, axis)
    result = []
    for role, head, number in entries(after):
        members = chosen[role][head] if role in chosen else [head]
        result.append([place[role, member, number] for member in members])
    count = math.lcm(*(len(sources) for sources in result))
    same = torch.tensor([sources * (count // len(sources)) for sources in result])
    if count == 1:
        return old.index_select(axis, same.reshape(-1))
    parts = [old.index_select(axis, column) for column in same.T]
    return torch.stack(parts).double().mean(0).to(old.dtype)


def entries(cut: Cut) -> list[tuple[str, int, int]]:
    """(role, head, number within the head) of every entry along the axis."""
    seen: Counter[tuple[str, int]] = Counter()
    found = []
    for role, head, width in cut.segments:
        for _ in range(width):
            found.append((role, head, seen[role, head]))
            seen[role, head] += 1
    return found


def build(program: Program, sites: Sequence[Mapping[str, Any]]) -> Program:
    """The reference of ``program`` under a plan with one site for each block."""
    spec = program.spec
    result = Program(smaller(spec, sites[0]))
    old, new = program.state_dict(), result.state_dict()
    assert old.keys() == new.keys(), sorted(old.keys() ^ new.keys())
    for name in new:
        chosen = groups(spec, sites[int(name.split(".")[1])]) if name.startswith("blocks.") else {}
        before, after = find_cut(program, name), find_cut(result, name)
        assert (before is None) == (after is None), name
        value = old[name] if before is None or after is None else cut(old[name], before, after, chosen)
        assert value.shape == new[name].shape, (name, value.shape, new[name].shape)
        new[name].copy_(value)
    return result


def find_cut(program: Program, name: str) -> Cut | None:
    """The heads in weight ``name``, as the module that owns it knows them."""
    parts = name.split(".")
    for i in range(len(parts)):
        owner = program.get_submodule(".".join(parts[:i])) if _is_module(program, parts[:i]) else None
        if isinstance(owner, WithCuts):
            found = owner.cuts.get(".".join(parts[i:]))
            if found is not None:
                return found
    return None


def _is_module(program: Program, path: Sequence[str]) -> bool:
    try:
        program.get_submodule(".".join(path))
    except AttributeError:
        return False
    return True


def smaller_inputs(spec: Spec, site: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword inputs of the reference: a mask with a head axis keeps the heads that stay."""
    result = dict(kwargs)
    if spec.mask == "heads":
        result["mask"] = kwargs["mask"][:, [group[0] for group in groups(spec, site)["h"]]]
    return result


def can_cut_inputs(spec: Spec, sites: Sequence[Mapping[str, Any]]) -> bool:
    """False when blocks that keep different heads read one mask with a head axis."""
    return spec.mask != "heads" or all(site["query_heads"] == sites[0]["query_heads"] for site in sites)
