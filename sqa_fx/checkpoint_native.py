"""How a converted checkpoint loads: natively, with another config, or with sqa_fx.from_pretrained; its weights are not
needed to tell.

Fields are searched on the meta device with the shapes of the whole model. What they mean is proved on a small sibling:
a config of the same class with fewer layers, a smaller vocabulary and so on, random weights, and the same heads.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqa_fx.api import convert
from sqa_fx.checkpoint_journal import write_durably
from sqa_fx.checkpoint_run import Finish
from sqa_fx.config_search import Change, Heads, Search, cut_shapes, fields_of, head_groups, unevenness
from sqa_fx.errors import InputError, MissingError, PlanError, SqaError, VerifyError, first_line
from sqa_fx.inputs import example_inputs
from sqa_fx.module import ConvertedModule
from sqa_fx.module_names import kind_of
from sqa_fx.native import MOST_PROOFS, filled, no_fields
from sqa_fx.native_proof import input_sets, prove_native, tokens_agree
from sqa_fx.operated import find_surgery, operated
from sqa_fx.partly import PartlyConvertedModule
from sqa_fx.plan import Plan
from sqa_fx.pretrained import own_bytes
from sqa_fx.sibling import same_sites, small_siblings
from sqa_fx.stock_model import Stock, auto_class, plain_fields, stock_of_config, with_values
from sqa_fx.storage import META
from sqa_fx.surgery_elsewhere import surgery_elsewhere
from sqa_fx.surgery_record import Surgery

NATIVE = "sqa_fx_native.json"
"""In a directory that loads natively: the fields that changed, and what was proved."""


@dataclass(frozen=True)
class Verdict:
    """How a checkpoint loads after a plan was carried out."""

    cls: str
    auto: str
    """What loads it; "" where that is not a class of transformers."""
    fields: Mapping[str, int] = field(default_factory=dict)
    """The fields of the config that change, by dotted path."""
    config: Mapping[str, Any] | None = None
    """The new content of config.json; None where it does not load natively."""
    why: str = ""
    """Why it does not load natively; "" where it does."""
    proved: str = ""
    surgery: Mapping[str, Any] | None = None

    @property
    def native(self) -> bool:
        """True when a stock class loads it."""
        return self.config is not None


def judge(checkpoint: Path, plan: Plan) -> Verdict:
    """How the checkpoint with the config in ``checkpoint`` loads after ``plan``. Reasons are told, not raised."""
    try:
        stock = stock_of_config(checkpoint)
        bare = stock.bare()
        wanted = cut_shapes(bare, plan)
    except (InputError, MissingError, PlanError) as error:
        return Verdict("", "", why=first_line(error))
    except Exception as error:  # transformers raises many kinds; each means that the config is at fault
        return Verdict("", "", why=f"its config cannot be built: {first_line(error)}")
    name, groups = stock.name, head_groups(plan)
    search = Search(stock, groups, wanted)
    reasons: list[str] = []
    uneven = unevenness(plan)
    if uneven is not None:
        reasons.append(f"{uneven}, and a field of the config holds for all of them")
    for number, sibling in enumerate(_converted_siblings(stock, plan, reasons)):
        if uneven is None:
            found = _native(sibling, search, reasons)
            if found is not None:
                fields, proved = fields_of(found[0]), found[1]
                try:
                    raw = json.loads((checkpoint / "config.json").read_bytes())
                    config = native_config(raw, stock, fields)
                    return Verdict(name, auto_class(stock).__name__, fields, config, proved=proved)
                except VerifyError as error:
                    reasons.insert(0, first_line(error))
        made, said = _operated(sibling, stock, bare, plan, wanted)
        if made is not None:
            return Verdict(name, "", why=reasons[0], proved=said, surgery=made)
        reasons.append(said)
        if number:
            break
    return Verdict(name, "", why="; ".join(dict.fromkeys(reasons)) or "no small sibling could be made")


@dataclass(frozen=True)
class _Sibling:
    stock: Stock
    converted: ConvertedModule | PartlyConvertedModule
    groups: Sequence[Heads]
    """Those of the full plan, with the head sizes of the sibling."""
    inputs: Any

    @property
    def size(self) -> str:
        """What a reader should know of it."""
        count = sum(t.numel() for t in self.converted.state_dict().values())
        return f"a sibling of {count / 1e6:.2f}M parameters with random weights"


def _converted_siblings(stock: Stock, plan: Plan, reasons: list[str]) -> Iterator[_Sibling]:
    """Siblings that were converted as ``plan`` says, and proved; what went wrong goes to ``reasons``."""
    for small in small_siblings(stock, plan):
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = small.build()
                converted = _convert_alike(model, plan)
        except Exception as error:  # a config that builds and does not run
            reasons.append(f"a small sibling of the model cannot be converted: {first_line(error)}")
            continue
        if not same_sites(plan, converted.plan.sites):
            reasons.append("a small sibling of the model has other sites")
            continue
        by_kind = {kind_of(s.name): s for s in converted.plan.sites}
        like = {Heads(s.heads, s.kv_heads, s.hq, s.hkv, s.head_dim): by_kind[kind_of(s.name)] for s in plan.sites[::-1]}
        groups = [Heads(s.heads, s.kv_heads, s.hq, s.hkv, s.head_dim) for s in (like[g] for g in head_groups(plan))]
        inputs = (
            (converted.example_args, converted.example_kwargs)
            if isinstance(converted, ConvertedModule)
            else example_inputs(model)
        )
        yield _Sibling(small, converted, groups, inputs)


def _convert_alike(model: nn.Module, plan: Plan) -> ConvertedModule | PartlyConvertedModule:
    """Convert the sibling with the heads that the plan keeps, by kind of site."""
    kinds = {kind_of(site.name): site for site in reversed(plan.sites)}
    request: dict[str, Any] = {
        "hq": {kind: s.hq for kind, s in kinds.items()},
        "hkv": {kind: s.hkv for kind, s in kinds.items()},
    }
    heads = {kind: list(s.query_heads) for kind, s in kinds.items()}
    try:
        made = convert(model, **request, heads=heads)
    except PlanError:  # chosen with data, in an order of its own
        made = convert(model, **request)
    assert isinstance(made, ConvertedModule | PartlyConvertedModule)
    return made


def _native(sibling: _Sibling, full: Search, reasons: list[str]) -> tuple[tuple[Change, ...], str] | None:
    """Changes that give the sibling and the full model their shapes and are proved on the sibling."""
    plan, reference = sibling.converted.plan, sibling.converted
    search = Search(sibling.stock, sibling.groups, cut_shapes(sibling.stock.bare(), plan))
    sets = input_sets(reference, sibling.inputs)
    state = reference.state_dict()
    failures: list[str] = []
    for changes in search.candidates():
        fitting = next(
            (own for own in itertools.product(*(c.elsewhere(full.groups) for c in changes)) if full.fits(own)), None
        )
        if fitting is None:
            continue
        said = ", ".join(map(str, fitting))
        try:
            fields = with_values(sibling.stock.fields, [(c.path, c.value) for c in changes])
            model = filled(sibling.stock, fields, state, torch.float32)
            proof = prove_native(reference, model, plan, sets)
            tokens = tokens_agree(reference, model, sibling.inputs)
            proved = (
                f"{said}: names and shapes of the whole model, and on {sibling.size} outputs equal at "
                f"{len(proof.sizes)} sizes within {proof.tolerance:g} (relative, {proof.precision}); {tokens}"
            )
            return fitting, proved
        except SqaError as error:
            failures.append(f"with {said} the shapes are right, but {first_line(error)}")
        if len(failures) == MOST_PROOFS:
            break
    reasons.insert(0, failures[0] if failures else no_fields(sibling.stock, search))
    return None


def _operated(
    sibling: _Sibling, stock: Stock, bare: nn.Module, plan: Plan, wanted: Mapping[str, tuple[int, ...]]
) -> tuple[Mapping[str, Any] | None, str]:
    """A record of surgery for the full model, proved on the sibling, and what was proved; or None and why not."""
    record = find_surgery(sibling.stock, sibling.converted.plan, sibling.inputs)
    if isinstance(record, str):
        return None, f"surgery on the stock class fails: {record}"
    reference = sibling.converted
    sets = input_sets(reference, sibling.inputs)
    made = operated(sibling.stock, record, reference, reference.plan, reference.state_dict(), sets, ("plan",))
    if isinstance(made, str):
        return None, f"surgery on the stock class fails: {made}"
    try:
        full = surgery_elsewhere(record, sibling.stock.bare(), sibling.groups, bare, head_groups(plan), plan)
        twin = stock.bare()
        full.apply(twin)
    except SqaError as error:
        return None, f"surgery on a small sibling does not carry over: {first_line(error)}"
    if {name: tuple(t.shape) for name, t in twin.state_dict().items()} != dict(wanted):
        return None, "surgery on a small sibling does not carry over: shapes differ"
    said = (
        f"names and shapes of the whole model, and on {sibling.size} outputs equal at {len(made.proof.sizes)} sizes "
        f"within {made.proof.tolerance:g} (relative, {made.proof.precision})"
    )
    return full.to_json(), said


# --- what is written -------------------------------------------------------------------------------------------------


Judging = Callable[[Path, Plan], AbstractContextManager[Callable[[], Verdict]]]
"""Entered before shards are written; what it gives waits for what :func:`judge` says."""


def judging_when_asked(checkpoint: Path, plan: Plan) -> AbstractContextManager[Callable[[], Verdict]]:
    """Judges in this process, and only when asked: beside the shards, it would need its memory on top of theirs."""
    return nullcontext(lambda: judge(checkpoint, plan))


def loading_finish(checkpoint: Path, judging: Judging = judging_when_asked) -> Finish:
    """For ``finish=`` of a conversion: writes the config that says SQA, or sqa_fx.json with why there is none."""

    @contextmanager
    def finish(plan: Plan) -> Iterator[Callable[[Path], None]]:
        with judging(checkpoint, plan) as verdict:
            yield lambda folder: _write_verdict(folder, plan, verdict())

    return finish


def _write_verdict(folder: Path, plan: Plan, verdict: Verdict) -> None:
    if verdict.config is not None:
        write_durably(folder / "config.json", (json.dumps(verdict.config, indent=2) + "\n").encode())
        said = {"loads_with": verdict.auto, "fields": dict(verdict.fields), "proved": verdict.proved}
        write_durably(folder / NATIVE, (json.dumps(said, indent=1) + "\n").encode())
        return
    surgery = None if verdict.surgery is None else Surgery.from_json(verdict.surgery)
    content = own_bytes(verdict.cls, verdict.why, surgery, plan.to_json(), {"proved": verdict.proved})
    write_durably(folder / META, content)


def native_config(raw: Mapping[str, Any], stock: Stock, fields: Mapping[str, int]) -> dict[str, Any]:
    """The content of config.json with ``fields`` changed, such that everything else that the class makes of it stays as
    it was: what used to follow from a field that changes is written down. Raises VerifyError where that fails."""
    changes = [(tuple(name.split(".")), value) for name, value in fields.items()]
    wanted = with_values(stock.fields, changes)
    values: list[tuple[tuple[str, ...], Any]] = list(changes)
    for _ in range(3):
        made = with_values(_opened(raw, [path for path, _ in values]), values)
        left = _differences(wanted, plain_fields(stock.config(made)), ())
        if not left:
            return made
        values = [*changes, *left]
    raise VerifyError(f"{stock.config_class.__name__} does not keep the fields that it is given")


def _opened(raw: Mapping[str, Any], paths: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """A copy of ``raw`` in which every nested config on the way to ``paths`` is there."""
    made: dict[str, Any] = json.loads(json.dumps(raw))
    for path in paths:
        inner = made
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
    return made


def _differences(
    wanted: Mapping[str, Any], got: Mapping[str, Any], path: tuple[str, ...]
) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, value in wanted.items():
        have = got.get(name)
        if isinstance(value, Mapping) and isinstance(have, Mapping):
            found.extend(_differences(value, have, (*path, name)))
        elif value != have:
            found.append(((*path, name), value))
    return found


def loading_notes(folder: Path) -> list[str]:
    """How the converted checkpoint in ``folder`` loads, as its own files say."""
    if (folder / NATIVE).is_file():
        data = json.loads((folder / NATIVE).read_bytes())
        return [f"loads natively, with {data['loads_with']}", f"proved: {data['proved']}"]
    if (folder / META).is_file():
        data = json.loads((folder / META).read_bytes())
        if data["surgery"] is None:
            return [f"config.json is a copy, and nothing loads the result: {data['why']}"]
        return [
            "needs sqa_fx.from_pretrained",
            f"not native: {data['why']}",
            f"proved: {data['proof']['proved']}",
        ]
    return []
