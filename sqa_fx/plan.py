"""The plan: which heads are kept, which KV heads are merged, and how every touched parameter is cut. Data only, JSON.

Schema (version 1)::

    {"format": "sqa-fx-plan", "version": 1,
     "sites": [
       {"name": "encoder.layer.0.attention", "heads": 12, "kv_heads": 12, "hq": 6, "hkv": 3, "head_dim": 32,
        "query_heads": [0, 2, 5, 6, 9, 11],               # the original head behind each head of the result
        "query_groups": [[0], [2], [5], [6], [9], [11]],  # original query heads averaged into each new one
        "kv_groups": [[0, 2], [5, 6], [9, 11]],           # original KV heads merged into each new one
        "heads_by": "weights", "kv_merge": "mean"}],
     "parameters": [
       {"name": "encoder.layer.0.attention.query.weight", "axis": 0, "size": [384, 192], "sites": [...],
        "blocks": [{"role": "q", "head": 0, "to": ["0:32"], "from": [["0:32"]], "replaces": [["0:32"]]}, ...],
        "dropped": ["32:64", ...]}],
     "inputs": [...],                                     # caches among the inputs, cut in the same way
     "rotations": [{"parameter": "...", "axis": 0, "entries": ["0:32"], "matrix": "rotation/.../v/0"}, ...],
     "refitted": ["encoder.layer.0.attention.output.dense.weight", ...],
     "tensors": {"file": "plan.safetensors", "sha256": "..."}}

Head numbers are the model's own (order along the head axis of its attention). Query head ``i`` of the result reads KV
head ``i * hkv // hq`` (for hq < hkv, KV head ``j`` is read by query head ``j * hq // hkv``).

A parameter is cut along ``axis`` from ``size[0]`` to ``size[1]`` entries: for every block, entries ``to`` of the
result are the mean over the ranges in ``from`` of the original, in that order (``a:b`` or ``a:b:step``, as Python
slices). Blocks together fill the result exactly. ``replaces`` are the original entries of every head that the new one
stands for (more than ``from`` when one KV head is selected out of several). ``dropped`` are the original entries of
heads that are gone. Roles: ``q``, ``k``, ``v``, ``o``, ``side:*`` (an operand with a head axis), ``rest`` (entries
that belong to no head).

With calibration data there may be two more steps, whose numbers lie in a safetensors file beside the JSON. Before the
cut, ``rotations`` replace the ``entries`` e along ``axis`` of a parameter by R^T e, with R [n, n] the tensor
``matrix``: changes of basis of heads and of what reads them, after which KV heads can be averaged. After the cut,
parameters in ``refitted`` are replaced by the tensors ``refitted/NAME``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sqa_fx.errors import InputError, MissingError, PlanError
from sqa_fx.whole_file import write_whole

FORMAT = "sqa-fx-plan"
VERSION = 1
Ranges = tuple[str, ...]


def to_ranges(indices: Sequence[int]) -> Ranges:
    """``[0, 1, 2, 8, 10, 12]`` as ``("0:3", "8:13:2")``: slices that give exactly these indices in order."""
    ranges: list[str] = []
    start = 0
    while start < len(indices):
        stop = start + 1
        step = indices[stop] - indices[start] if stop < len(indices) else 1
        while step > 0 and stop < len(indices) and indices[stop] - indices[stop - 1] == step:
            stop += 1
        if stop - start == 1 or step <= 0:
            step, stop = 1, start + 1
        last = indices[stop - 1] + 1
        ranges.append(f"{indices[start]}:{last}" + (f":{step}" if step != 1 else ""))
        start = stop
    return tuple(ranges)


def from_ranges(ranges: Sequence[str]) -> list[int]:
    """The indices that :func:`to_ranges` encoded. Raises PlanError on malformed text."""
    indices: list[int] = []
    for text in ranges:
        try:
            numbers = [int(part) for part in text.split(":")]
            if not 2 <= len(numbers) <= 3 or numbers[0] < 0:
                raise ValueError(text)
            indices.extend(range(*numbers))
        except (ValueError, AttributeError) as error:
            raise PlanError(f"range {text!r} in the plan is not start:stop or start:stop:step") from error
    return indices


@dataclass(frozen=True)
class HeadBlock:
    """Entries ``to`` of a new parameter: the mean of entries ``sources`` of the old one, standing for ``replaces``."""

    role: str
    head: int
    to: Ranges
    sources: tuple[Ranges, ...]
    replaces: tuple[Ranges, ...]


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter is cut along ``axis``."""

    name: str
    axis: int
    size: tuple[int, int]
    sites: tuple[str, ...]
    blocks: tuple[HeadBlock, ...]
    dropped: Ranges = ()

    @property
    def masks(self) -> bool:
        """True when masking changes the original parameter: heads are merged, or an output projection loses some."""
        merges = any(len(block.replaces) > 1 for block in self.blocks)
        return merges or (bool(self.dropped) and any(block.role == "o" for block in self.blocks))


@dataclass(frozen=True)
class SitePlan:
    """The heads of one site: ``heads``/``kv_heads`` of the original become ``hq``/``hkv``."""

    name: str
    heads: int
    kv_heads: int
    hq: int
    hkv: int
    head_dim: int
    query_heads: tuple[int, ...]
    query_groups: tuple[tuple[int, ...], ...]
    kv_groups: tuple[tuple[int, ...], ...]
    heads_by: str = "weights"
    kv_merge: str = "mean"

    @property
    def identity(self) -> bool:
        """True when nothing is dropped or merged."""
        return self.hq == self.heads and self.hkv == self.kv_heads


@dataclass(frozen=True)
class Rotation:
    """A change of basis of one head: ``entries`` e along ``axis`` of ``parameter`` become R^T e before the cut, with R
    the tensor ``matrix`` of the plan."""

    parameter: str
    axis: int
    entries: Ranges
    matrix: str


@dataclass(frozen=True)
class Plan:
    """A whole conversion as data; see the module's docstring for the JSON schema."""

    sites: tuple[SitePlan, ...]
    parameters: tuple[ParameterPlan, ...] = field(default=())
    inputs: tuple[ParameterPlan, ...] = field(default=())
    """Inputs of the graph that hold keys or values (caches), by the graph's name for them."""
    rotations: tuple[Rotation, ...] = field(default=())
    refitted: tuple[str, ...] = field(default=())
    """Parameters that get new values after the cut, from calibration data."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """What ``rotations`` and ``refitted`` name; empty for a plan that was made without data."""

    def site(self, name: str) -> SitePlan | None:
        """The plan of site ``name``, or None."""
        return next((s for s in self.sites if s.name == name), None)

    def same_cuts(self, other: Plan) -> bool:
        """True when both plans cut the same parameters in the same way, in whatever order."""
        return {p.name: p for p in self.parameters} == {p.name: p for p in other.parameters}

    def covers(self, other: Plan, read: Collection[str]) -> bool:
        """True when this plan cuts every parameter that ``other`` cuts in the same way, and none besides of those that
        a graph ``read``s: another graph of the same model (a decoding step) may read fewer parameters."""
        mine, cuts = ({p.name: p for p in plan.parameters} for plan in (self, other))
        return all(mine.get(name) == cut for name, cut in cuts.items()) and not (set(mine) - set(cuts)) & set(read)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        sites = [json.loads(json.dumps(asdict(s))) for s in self.sites]
        cuts = {name: [_cut_json(p) for p in own] for name, own in self._cuts().items()}
        rotations = [{**asdict(r), "entries": list(r.entries)} for r in self.rotations]
        data_driven = {"rotations": rotations, "refitted": list(self.refitted)}
        return {
            "format": FORMAT,
            "version": VERSION,
            "sites": sites,
            **cuts,
            **{name: entries for name, entries in data_driven.items() if entries},
        }

    def _cuts(self) -> dict[str, tuple[ParameterPlan, ...]]:
        return {"parameters": self.parameters, **({"inputs": self.inputs} if self.inputs else {})}

    @staticmethod
    def from_json(data: Any) -> Plan:
        """The plan that :meth:`to_json` wrote. Raises PlanError on anything else, naming what is wrong."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise PlanError(f"this is no sqa-fx plan: its 'format' is not {FORMAT!r}")
        if data.get("version") != VERSION:
            raise PlanError(f"plan version {data.get('version')!r} is not known; this release reads version {VERSION}")
        try:
            sites = tuple(_site(entry) for entry in data["sites"])
            parameters = tuple(_parameter(entry) for entry in data["parameters"])
            inputs = tuple(_parameter(entry) for entry in data.get("inputs", ()))
            rotations = tuple(_rotation(entry) for entry in data.get("rotations", ()))
            refitted = tuple(str(name) for name in data.get("refitted", ()))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the plan is incomplete or damaged: {type(error).__name__}: {error}") from error
        return Plan(sites, parameters, inputs, rotations, refitted)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the plan as JSON, and its tensors, if it has any, as safetensors beside it. Raises InputError when a
        file exists (unless ``overwrite``) or cannot be written."""
        target = Path(path)
        beside = target.with_suffix(".safetensors")
        for file in (target, *([beside] if self.tensors else [])):
            if file.exists() and not overwrite:
                raise InputError(f"{file} exists; choose another path or pass overwrite=True")
        data = self.to_json()
        if self.tensors:
            content = self.tensor_bytes()
            data["tensors"] = {"file": beside.name, "sha256": hashlib.sha256(content).hexdigest()}
            write_whole(beside, content, overwrite=overwrite)
        write_whole(target, json.dumps(data, indent=1).encode(), overwrite=overwrite)

    def tensor_bytes(self) -> bytes:
        """The tensors as the content of a safetensors file."""
        # Tensors may share memory, which safetensors refuses: each is written as its own.
        return bytes(save_tensors({name: t.detach().cpu().contiguous().clone() for name, t in self.tensors.items()}))

    def with_tensors(self, content: bytes) -> Plan:
        """The plan with the tensors that :meth:`tensor_bytes` wrote."""
        return replace(self, tensors=dict(load_tensors(content)))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan. Raises MissingError when a file of it is missing, PlanError when one is truncated or foreign."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise MissingError(f"no plan at {path}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} cannot be read as a plan: {error}") from error
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{path} is not JSON (truncated?): {error}") from error
        plan = Plan.from_json(data)
        return plan.with_tensors(_tensors(Path(path), data["tensors"])) if "tensors" in data else plan


def _tensors(path: Path, entry: Any) -> bytes:
    """The file with the tensors of the plan at ``path``."""
    if not isinstance(entry, Mapping) or not {"file", "sha256"} <= entry.keys():
        raise PlanError(f"{path} does not say which file holds its tensors")
    beside = path.parent / Path(str(entry["file"])).name
    if not beside.is_file():
        raise MissingError(f"the plan {path} needs {beside.name} beside it, which is not there")
    content = beside.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise PlanError(f"{beside} is not the file that {path} was written with: its SHA-256 differs")
    return content


def _cut_json(cut: ParameterPlan) -> dict[str, Any]:
    blocks = [
        {
            "role": b.role,
            "head": b.head,
            "to": list(b.to),
            "from": [list(s) for s in b.sources],
            "replaces": [list(s) for s in b.replaces],
        }
        for b in cut.blocks
    ]
    return {"name": cut.name, "axis": cut.axis, "size": list(cut.size), "sites": list(cut.sites), "blocks": blocks,
            "dropped": list(cut.dropped)}  # fmt: skip


def _ints(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{values!r} is not a list of whole numbers")
    return tuple(values)


def _site(entry: Mapping[str, Any]) -> SitePlan:
    numbers = {k: entry[k] for k in ("heads", "kv_heads", "hq", "hkv", "head_dim")}
    _ints(list(numbers.values()))
    site = SitePlan(
        name=str(entry["name"]),
        **numbers,
        query_heads=_ints(entry["query_heads"]),
        query_groups=tuple(_ints(g) for g in entry["query_groups"]),
        kv_groups=tuple(_ints(g) for g in entry["kv_groups"]),
        heads_by=str(entry.get("heads_by", "explicit")),
        kv_merge=str(entry.get("kv_merge", "mean")),
    )
    if len(site.query_groups) != site.hq or len(site.kv_groups) != site.hkv:
        raise ValueError(f"site {site.name}: hq={site.hq}, hkv={site.hkv} do not match its head groups")
    return site


def _rotation(entry: Mapping[str, Any]) -> Rotation:
    return Rotation(str(entry["parameter"]), int(entry["axis"]), tuple(entry["entries"]), str(entry["matrix"]))


def _parameter(entry: Mapping[str, Any]) -> ParameterPlan:
    blocks = tuple(
        HeadBlock(
            str(b["role"]),
            int(b["head"]),
            tuple(b["to"]),
            tuple(tuple(s) for s in b["from"]),
            tuple(tuple(s) for s in b["replaces"]),
        )
        for b in entry["blocks"]
    )
    for block in blocks:
        width = len(from_ranges(block.to))
        if not block.sources or any(len(from_ranges(s)) != width for s in (*block.sources, *block.replaces)):
            raise ValueError(f"parameter {entry['name']}: block {block.role} {block.head} does not match its sources")
    size = _ints(entry["size"])
    filled = sorted(i for b in blocks for i in from_ranges(b.to))
    named = [i for b in blocks for r in (*b.sources, *b.replaces) for i in from_ranges(r)]
    named += from_ranges(entry["dropped"])
    if len(size) == 2 and any(i >= size[0] for i in named):
        raise ValueError(f"parameter {entry['name']}: its ranges reach beyond its {size[0]} entries")
    if len(size) != 2 or filled != list(range(size[1])):
        raise ValueError(f"parameter {entry['name']}: its blocks do not fill {size[-1]} entries exactly")
    return ParameterPlan(
        str(entry["name"]),
        int(entry["axis"]),
        (size[0], size[1]),
        tuple(entry["sites"]),
        blocks,
        tuple(entry["dropped"]),
    )
