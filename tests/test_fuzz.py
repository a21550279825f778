"""A bounded run of the fuzzer (``make fuzz`` runs thousands), and tests of the fuzzer itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from fuzz.campaign import shrink
from fuzz.check import Outcome, trial
from fuzz.program import Program, inputs
from fuzz.reference import build
from fuzz.spec import Spec, generate, random_spec, weight
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sqa_fx.passes import cut_nodes, parameters, resize, rewrite
from sqa_fx.plan import from_ranges, to_ranges

PROGRAMS = 10


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Valid programs; hypothesis shrinks each axis towards its plainest option."""

    def choose(name: str, options: Sequence[Any]) -> Any:
        return draw(st.sampled_from(list(options)))

    return generate(choose)


@settings(
    max_examples=PROGRAMS,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(specs())
def test_random_programs_convert_right_or_are_refused(spec: Spec) -> None:
    outcome = trial(spec)
    assert not outcome.failed, f"{outcome.kind}: {outcome.detail}\n{spec.line()}"


PLAIN = [
    Spec(heads=4, kv_heads=4, hq=2, hkv=2),
    Spec(heads=6, kv_heads=3, hq=4, hkv=2, expansion="repeat_interleave", core="matmul", scores="bhlm"),
    Spec(heads=8, kv_heads=4, hq=2, hkv=2, expansion="tiled", core="einsum", scores="blhm", heads_first=False),
]


@pytest.mark.parametrize("spec", PLAIN, ids=str)
def test_plain_programs_pass_every_check(spec: Spec) -> None:
    names = ("masked example", "masked other", "reference example", "reference other")
    assert trial(spec) == Outcome("ok", "", names)


def test_identity_is_checked_bit_for_bit() -> None:
    assert "identity" in trial(Spec(hq=2, hkv=2)).checks


def test_every_program_runs_in_eager_and_its_specification_is_json() -> None:
    for seed in range(100):
        spec = random_spec(seed)
        assert Spec(**json.loads(json.dumps(asdict(spec)))) == spec
        assert eval(spec.line()) == spec
        for other in (False, True):
            given_args, given_kwargs = inputs(spec, other)
            with torch.no_grad():
                assert bool(Program(spec)(*given_args, **given_kwargs).isfinite().all()), spec.line()


def test_reference_that_keeps_every_head_is_the_program() -> None:
    """With the identity plan the hand-cut reference holds the program's own weights, head order included."""
    for seed in range(100):
        spec = random_spec(seed)
        each = [[h] for h in range(spec.heads)]
        kv = [[g] for g in range(spec.kv_heads)]
        order = [h for g in range(spec.kv_heads) for h in range(spec.heads) if _reads(spec, h) == g]
        site = {
            "hq": spec.heads,
            "hkv": spec.kv_heads,
            "query_heads": order,
            "query_groups": [each[h] for h in order],
            "kv_groups": kv,
            "kv_merge": "mean",
        }
        program = Program(spec)
        with torch.no_grad():
            reference = build(program, [site] * spec.layers)
        assert all(torch.equal(a, b) for a, b in zip(program.parameters(), reference.parameters(), strict=True))


def _reads(spec: Spec, head: int) -> int:
    return head % spec.kv_heads if spec.tiled else head // spec.group


# -- wrong rewrites must be caught, with and without the package's own proof ------------------------------------------


def _swap_first_blocks(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    """Cut parameters with the first two heads of ``role`` in each other's place."""
    right = parameters.cut_tensor

    def wrong(tensor: torch.Tensor, plan: Any) -> torch.Tensor:
        made = right(tensor, plan)
        blocks = [b for b in plan.blocks if b.role == role]
        if len(blocks) < 2:
            return made
        first, second = (torch.tensor(from_ranges(b.to)) for b in blocks[:2])
        swapped = made.clone()
        swapped.index_copy_(plan.axis, first, made.index_select(plan.axis, second))
        swapped.index_copy_(plan.axis, second, made.index_select(plan.axis, first))
        return swapped

    monkeypatch.setattr(cut_nodes, "cut_tensor", wrong)


def _without_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    import sqa_fx
    from sqa_fx import api

    whole = api.convert
    monkeypatch.setattr(sqa_fx, "convert", lambda *a, **k: whole(*a, **{**k, "verify": False}))


SWAPPED = [  # each program and each role
    pytest.param(spec, role, id=f"{spec}-{role}", marks=[] if i == j else pytest.mark.slow)
    for i, spec in enumerate(PLAIN)
    for j, role in enumerate(("q", "v", "o"))
]


@pytest.mark.parametrize(("spec", "role"), SWAPPED)
def test_swapped_heads_are_caught(spec: Spec, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _swap_first_blocks(monkeypatch, role)
    spec = replace(spec, dynamic=False)
    assert trial(spec).kind == "unproved"
    _without_proof(monkeypatch)
    outcome = trial(spec)
    assert outcome.kind == "wrong" and "masked" in outcome.detail


def test_plan_that_names_other_entries_than_its_heads_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masked oracle follows the plan's entries, the reference only its heads: together they catch a false plan."""
    right = rewrite.plan_parameters

    def wrong(*arguments: Any) -> Any:
        cuts, refused = right(*arguments)
        for cut in cuts.values():
            for i, block in enumerate(cut.blocks):
                if block.role in ("q", "k", "v", "o"):
                    moved = tuple(_later(r) for r in block.sources)
                    cut.blocks[i] = type(block)(block.role, block.head, block.to, moved, moved)
            kept = {e for b in cut.blocks for r in b.sources for e in from_ranges(r)}
            cut.dropped = set(range(cut.size)) - kept
        return cuts, refused

    def _later(ranges: Any) -> Any:
        return to_ranges([e + 10 for e in from_ranges(ranges)])

    monkeypatch.setattr(rewrite, "plan_parameters", wrong)
    outcome = trial(Spec(heads=4, kv_heads=4, hq=2, hkv=2))
    assert outcome.kind == "wrong" and outcome.detail.startswith("reference"), outcome


def test_example_size_left_in_the_graph_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_proof(monkeypatch)
    right = resize.Resizer.scaled

    def wrong(self: resize.Resizer, size: Any, old: int, new: int) -> Any:
        return new if isinstance(size, torch.fx.Node) else right(self, size, old, new)

    monkeypatch.setattr(resize.Resizer, "scaled", wrong)
    outcome = trial(PLAIN[0])
    assert outcome.kind == "wrong" and "fixed sizes" in outcome.detail, outcome


def test_foreign_exceptions_are_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise KeyError("nothing here")

    monkeypatch.setattr(rewrite, "plan_parameters", broken)
    outcome = trial(Spec())
    assert outcome.kind == "crash" and "KeyError" in outcome.detail


def test_failures_are_shrunk_to_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    _swap_first_blocks(monkeypatch, "q")
    spec = Spec(heads=6, kv_heads=6, hq=3, hkv=3, residual=True, norm="rms", dynamic=False)
    found = shrink(spec, trial(spec).signature, seconds=60)
    assert weight(found) < weight(spec) and not found.residual and found.norm == "none"
