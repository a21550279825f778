"""Options of the torch.compile backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from sqa_fx.errors import InputError, PlanError
from sqa_fx.passes.budget import PREFIX
from sqa_fx.passes.verify import Precision
from sqa_fx.plan import Plan
from sqa_fx.request import WITHOUT_DATA, HeadChoice, HeadScore, KvMerge, Request


@dataclass(frozen=True)
class CompileOptions:
    """What ``torch.compile(model, backend="sqa_fx", options={...})`` takes.

    ``hq``, ``hkv``, ``heads``, ``kv_merge``, ``plan`` (a Plan, or the path of one) and ``allow_inexact`` mean what they
    mean to :func:`sqa_fx.convert`; what needs calibration data is for that, since the backend only cuts. ``verify`` is
    True, "native", False, or "auto": prove in float64 where the attention is small enough for that beside a
    compilation, and in the graph's own dtype elsewhere. ``on_refused`` says what happens to attention that cannot be
    converted: "keep" leaves it as it is and logs a warning, "raise" raises. ``inner`` compiles the converted graph: the
    name of a backend, or a callable; ``mode`` and ``inner_options`` go to it (torch.compile itself takes either
    ``mode=`` or ``options=``).
    """

    hq: Request = None
    hkv: Request = None
    heads: HeadChoice = "weights"
    kv_merge: KvMerge = "mean"
    plan: Plan | str | None = None
    verify: bool | Precision | Literal["auto"] = "auto"
    on_refused: Literal["keep", "raise"] = "keep"
    allow_inexact: bool = False
    inner: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    inner_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.plan is None and self.hq is None and self.hkv is None:
            raise InputError("say how many heads to keep: options={'hq': ..., 'hkv': ...}, or {'plan': ...}")
        if self.plan is not None and not (self.hq is None and self.hkv is None):
            raise InputError("a plan holds its own hq and hkv: pass either plan or hq and hkv")
        _one_of("verify", self.verify, (True, False, "float64", "native", "auto"))
        _one_of("on_refused", self.on_refused, ("keep", "raise"))
        _one_of("kv_merge", self.kv_merge, get_args(KvMerge))
        if isinstance(self.heads, str):
            _one_of("heads", self.heads, get_args(HeadScore))
        self._refuse_data()

    def _refuse_data(self) -> None:
        """Raise PlanError for what cutting in the graph cannot do: it has no calibration data."""
        asked = {"heads": (self.heads, WITHOUT_DATA), "kv_merge": (self.kv_merge, ("mean", "select"))}
        for name, (value, known) in asked.items():
            if isinstance(value, str) and value not in known:
                raise PlanError(
                    f"{name}={value!r} needs calibration data, which backend 'sqa_fx' does not take: make the module "
                    "with convert() and compile that"
                )
        if isinstance(self.hq, str) and self.hq.startswith(PREFIX):
            raise PlanError(
                f"hq={self.hq!r} needs calibration data, which backend 'sqa_fx' does not take: make the module "
                "with convert() and compile that"
            )
        plan = self.given_plan
        if plan is not None and (plan.rotations or plan.refitted):
            raise PlanError(
                "the plan turns or refits weights, which backend 'sqa_fx' does not do: apply it with convert() and "
                "compile the result"
            )

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> CompileOptions:
        """The options of one ``torch.compile`` call. Raises InputError on unknown names and values."""
        given = dict(options or {})
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise InputError(
                f"unknown options {unknown} of backend 'sqa_fx'; known are {', '.join(known)}; options of the inner "
                "compiler go into inner_options={...}"
            )
        if mode is not None:
            given.setdefault("mode", mode)
        return cls(**given)

    @property
    def given_plan(self) -> Plan | None:
        """The plan to apply, read from its file where a path was given."""
        return Plan.load(self.plan) if isinstance(self.plan, str) else self.plan

    def request_key(self) -> str:
        """What decides which heads are kept, besides the weights."""
        return repr((self.hq, self.hkv, self.heads, self.kv_merge, self.given_plan))


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if not any(value is k or (isinstance(k, str) and value == k) for k in known):
        raise InputError(f"{name}={value!r}: known are {', '.join(map(repr, known))}")
