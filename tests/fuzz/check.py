"""One trial: convert a program, and compare what comes out with two oracles that use no rewriting code."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from plan_arithmetic import load_masked, whole_state
from torch import Tensor, nn

import sqa_fx
from fuzz.program import Program, inputs
from fuzz.reference import build, can_cut_inputs, smaller_inputs
from fuzz.spec import Spec
from sqa_fx.errors import InputError, SqaError, VerifyError

Kind = Literal["ok", "refused", "unproved", "wrong", "crash", "no-op"]
FAILURES = ("unproved", "wrong", "crash", "no-op")
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What a trial found. ``checks`` are the comparisons that were made."""

    kind: Kind
    detail: str = ""
    checks: tuple[str, ...] = field(default=())

    @property
    def failed(self) -> bool:
        """True when the program found a fault."""
        return self.kind in FAILURES

    @property
    def signature(self) -> str:
        """The outcome without the numbers and names that differ from program to program."""
        text = re.sub(r"(site |miss: )?'[^']*'", "_", self.detail)
        text = re.sub(r"\(?(at )?node [\w, ]+\)?", "", text)
        text = re.sub(r"\[[^\]]*\]", "[]", text)
        return f"{self.kind}: {re.sub(r'[0-9][0-9.e+-]*', 'N', text)}"[:300]


class _Wrong(Exception):
    """A comparison failed."""


def tolerance(spec: Spec) -> float:
    """Largest difference over the largest value that rounding explains."""
    if spec.dtype == "float32":
        return 2e-4
    return 1e-5 if spec.softmax == "float32" else 1e-9


def trial(spec: Spec) -> Outcome:
    """Convert the program of ``spec`` as it asks, and compare."""
    program = Program(spec)
    given = inputs(spec)
    with torch.no_grad():
        expected = program(*given[0], **given[1])
    assert bool(expected.isfinite().all()), "the program itself gives infinities"
    before = whole_state(program)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = sqa_fx.convert(
                program,
                hq=spec.hq,
                hkv=spec.hkv,
                heads=spec.choice,  # type: ignore[arg-type]
                kv_merge=spec.merge,  # type: ignore[arg-type]
                args=given[0],
                kwargs=given[1],
                dynamic_shapes="auto" if spec.dynamic else None,
            )
    except VerifyError as error:
        return Outcome("unproved", str(error))
    except SqaError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("crash", f"{type(error).__name__}: {error} at {_place(error)}")
    assert isinstance(converted, sqa_fx.ConvertedModule)
    checks: list[str] = []
    try:
        problem = _compare(spec, program, converted, given, expected, before, checks)
    except _Wrong as error:
        return Outcome("wrong", str(error), tuple(checks))
    except Exception as error:
        return Outcome("crash", f"afterwards {type(error).__name__}: {error} at {_place(error)}", tuple(checks))
    return problem or Outcome("ok", "", tuple(checks))


def _place(error: BaseException) -> str:
    at = error.__traceback__
    place = ""
    while at is not None:
        name = at.tb_frame.f_code.co_filename
        if "/torch/" not in name:
            place = f"{name.rsplit('/', 1)[-1]}:{at.tb_frame.f_code.co_name}"
        at = at.tb_next
    return place


def _compare(
    spec: Spec,
    program: Program,
    converted: sqa_fx.ConvertedModule,
    given: Inputs,
    expected: Tensor,
    before: Mapping[str, Tensor],
    checks: list[str],
) -> Outcome | None:
    after = whole_state(program)
    if after.keys() != before.keys() or any(not torch.equal(after[n], t) for n, t in before.items()):
        raise _Wrong("the user's model was changed")
    report, plan = converted.report, converted.plan.to_json()
    identity = (spec.hq, spec.hkv) == (spec.heads, spec.kv_heads)
    if not plan["sites"] or (not plan["parameters"] and not identity):
        return Outcome("no-op", "convert changed nothing")
    if len(report.sites) + len(report.refused) < spec.layers:
        return Outcome("no-op", f"{len(report.sites)} sites and {len(report.refused)} refusals in {spec.layers} blocks")
    for site in plan["sites"]:
        if (site["heads"], site["kv_heads"]) != (spec.heads, spec.kv_heads):
            raise _Wrong(f"the plan counts other heads: {site['heads']} and {site['kv_heads']}")
        if (site["hq"], site["hkv"]) != (spec.hq, spec.hkv):
            raise _Wrong(f"the plan makes other heads: {site['hq']} and {site['hkv']}")
    fixed = [note for note in report.notes if note.startswith("the rewrite fixed sizes")]
    if fixed:
        raise _Wrong(fixed[0])
    runs = [("example", given)]
    other = inputs(spec, other=True)
    runs.append(("other", other))
    if identity:
        if not torch.equal(_run(converted, given), expected):
            raise _Wrong("identity is not bit-exact")
        checks.append("identity")
    masked = copy.deepcopy(program)
    load_masked(masked, plan)
    _against(spec, masked, converted, runs, checks, "masked")
    if len(plan["sites"]) == spec.layers and can_cut_inputs(spec, plan["sites"]):
        with torch.no_grad():
            reference = build(program, plan["sites"])
        cut = [(name, (run[0], smaller_inputs(spec, plan["sites"][0], run[1]))) for name, run in runs]
        _against(spec, reference, converted, runs, checks, "reference", cut)
    if report.refused:
        return Outcome("refused", f"in part: {report.refused[0].reason}", tuple(checks))
    return None


def _against(
    spec: Spec,
    oracle: nn.Module,
    converted: sqa_fx.ConvertedModule,
    runs: list[tuple[str, Inputs]],
    checks: list[str],
    what: str,
    own: list[tuple[str, Inputs]] | None = None,
) -> None:
    for (name, given), (_, mine) in zip(runs, own or runs, strict=True):
        try:
            actual = _run(converted, given)
        except InputError:
            if name == "example":
                raise
            if _free(converted, runs[0][1], given):
                raise _Wrong("sizes that the report calls free are refused") from None
            continue
        wanted = _run(oracle, mine)
        if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
            raise _Wrong(f"{what} oracle, {name} sizes: {actual.dtype} {list(actual.shape)}")
        gap = float((actual - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
        if not gap <= tolerance(spec):
            raise _Wrong(f"{what} oracle, {name} sizes: relative error {gap:.2g}")
        checks.append(f"{what} {name}")


def _free(converted: sqa_fx.ConvertedModule, example: Inputs, other: Inputs) -> bool:
    """True when the report calls every size free that differs between the two sets of inputs."""
    told = [text.partition("[")[2].rstrip("]").split(", ") for text in converted.report.dynamic]
    named = {text.partition("[")[0]: sizes for text, sizes in zip(converted.report.dynamic, told, strict=True)}
    for name, first, second in zip(
        [n for n in ("x", "context", "mask") if (n == "x" and example[0]) or n in example[1]],
        [*example[0], *example[1].values()],
        [*other[0], *other[1].values()],
        strict=True,
    ):
        for dim, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)):
            if a != b and (name not in named or named[name][dim].isdigit()):
                return False
    return True


def _run(module: nn.Module, given: Inputs) -> Tensor:
    with torch.no_grad():
        return module(*given[0], **given[1])  # type: ignore[no-any-return]
