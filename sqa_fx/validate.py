"""Compare runners with a reference, by the error that the same dtype makes in eager PyTorch anyway."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sqa_fx.errors import InputError
from sqa_fx.runners import Runner, module_dtype, named_outputs
from sqa_fx.text_table import text_table

DEFAULT_ATOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Slack on top of eager's own error, which may be exactly 0: a few units of roundoff of a value near 1."""

InputSet = tuple[tuple[Any, ...], Mapping[str, Any]]
"""``(args, kwargs)`` of one call."""


@dataclass(frozen=True)
class OutputComparison:
    """One output of one candidate on one input set.

    Errors are largest absolute differences from the reference; ``minimum_atol`` is the smallest ``atol`` that passes,
    None where none would. ``nonfinite`` counts NaN and Inf of the candidate, ``nonfinite_mismatch`` those (of either
    side) that the other side does not have in the same place. ``top1`` is the share of rows with the same argmax.
    """

    candidate: str
    input_set: int
    output: str
    dtype: str
    compared: int
    max_abs: float
    max_rel: float
    eager_max_abs: float
    tolerance: float
    minimum_atol: float | None
    cosine: float | None
    top1: float | None
    nonfinite: int
    nonfinite_mismatch: int
    problem: str | None
    passed: bool


@dataclass(frozen=True)
class ValidationReport:
    """Every comparison, how the reference was run, and what the reader must know besides."""

    comparisons: tuple[OutputComparison, ...]
    reference_dtype: str
    factor: float
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether there was something to compare, and all of it agreed."""
        return bool(self.comparisons) and all(c.passed for c in self.comparisons)

    def to_json(self) -> str:
        """The report as JSON; numbers that are not finite become null."""
        content = {
            "version": 1,
            "passed": self.passed,
            "reference_dtype": self.reference_dtype,
            "factor": self.factor,
            "notes": list(self.notes),
            "comparisons": [asdict(c) for c in self.comparisons],
        }
        return json.dumps(_finite(content), indent=2, allow_nan=False)

    def table(self) -> str:
        """The report as aligned text, notes last."""
        head = ["candidate", "set", "output", "dtype", "max abs", "max rel", "eager", "tolerance", "min atol"]
        head += ["cosine", "top-1", "NaN/Inf", "result"]
        rows = [
            [
                c.candidate,
                str(c.input_set),
                c.output,
                c.dtype,
                *(_number(x) for x in (c.max_abs, c.max_rel, c.eager_max_abs, c.tolerance, c.minimum_atol)),
                "-" if c.cosine is None else f"{c.cosine:.6f}",
                "-" if c.top1 is None else f"{c.top1:.1%}",
                str(c.nonfinite),
                "ok" if c.passed else f"FAILED: {c.problem}",
            ]
            for c in self.comparisons
        ]
        verdict = "passed" if self.passed else "FAILED"
        summary = f"{verdict}: error <= {self.factor:g} x eager + atol, against the reference in {self.reference_dtype}"
        return "\n".join([text_table(head, rows), summary, *(f"note: {note}" for note in self.notes)])


def validate(
    reference: nn.Module,
    candidates: Sequence[Runner],
    input_sets: Sequence[InputSet],
    *,
    atol: float | None = None,
    factor: float = 2.0,
    valid_mask: Tensor | Sequence[Tensor] | None = None,
) -> ValidationReport:
    """Compare each candidate with ``reference`` run in float64, on each ``(args, kwargs)`` of ``input_sets``.

    An output passes when its largest error is at most ``factor`` times that of the reference run eagerly in the
    candidate's own dtype, plus ``atol`` (by default ``DEFAULT_ATOL`` of that dtype): the rule of flash-attention's
    tests. ``valid_mask`` is bool ``[batch, seq]``, one for all input sets or one for each: of outputs that start with
    these axes, only what it marks is compared, since padding may hold anything. ``reference`` is copied, not changed.

    Raises InputError when there is nothing to compare, or no output starts with the axes of a mask.
    """
    if not candidates or not input_sets:
        raise InputError(f"nothing to compare: {len(candidates)} candidates and {len(input_sets)} input sets")
    masks = _masks(valid_mask, len(input_sets))
    notes: list[str] = []
    own = module_dtype(reference)
    base = _evaluating(reference)
    exact, reference_dtype = _exact_outputs(base, own, input_sets, notes)
    for index, mask in enumerate(masks):
        if mask is not None and not any(t.shape[:2] == mask.shape for _, t in exact[index]):
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in exact[index])
            raise InputError(
                f"valid_mask {index} is {list(mask.shape)}, and no output of that input set starts so: {shapes}; give "
                "bool [batch, seq], one mask per input set"
            )
    eager: dict[torch.dtype, list[list[Tensor]]] = {}
    comparisons: list[OutputComparison] = []
    for candidate in candidates:
        dtype = candidate.dtype
        if dtype not in eager:
            module = base if dtype == own else copy.deepcopy(base).to(dtype)
            eager[dtype] = [[t for _, t in _call(module, _as_dtype(s, dtype, own))] for s in input_sets]
        slack = DEFAULT_ATOL.get(dtype, DEFAULT_ATOL[torch.float32]) if atol is None else atol
        for index, inputs in enumerate(input_sets):
            args, kwargs = _as_dtype(inputs, dtype, own)
            got = candidate.run(args, kwargs)
            expected = exact[index]
            if len(got) != len(expected):
                problem = f"{len(got)} outputs instead of {len(expected)} ({', '.join(n for n, _ in expected)})"
                comparisons.append(_no_comparison(candidate, index, "all", problem))
                continue
            for (name, want), have, baseline in zip(expected, got, eager[dtype][index], strict=True):
                comparisons.append(_compare(candidate, index, name, have, want, baseline, masks[index], factor, slack))
    return ValidationReport(tuple(comparisons), reference_dtype, factor, tuple(notes))


# --- running the reference -------------------------------------------------------------------------------------------


def _evaluating(module: nn.Module) -> nn.Module:
    """The module in evaluation mode; a copy when that changes it."""
    if not module.training:
        return module
    module = copy.deepcopy(module)
    try:
        return module.eval()
    except NotImplementedError:  # modules that torch.export made have one mode only
        return module


def _exact_outputs(
    module: nn.Module, own: torch.dtype, input_sets: Sequence[InputSet], notes: list[str]
) -> tuple[list[list[tuple[str, Tensor]]], str]:
    """The reference's outputs on every input set, in float64 if it can, and how they were computed."""
    try:
        upcast = copy.deepcopy(module).double()
        outputs = [_call(upcast, _as_dtype(s, torch.float64, None)) for s in input_sets]
    except InputError:
        raise
    except Exception as e:  # a cast to a fixed dtype in the model surfaces as whatever operator meets it first
        own_name = _name(own)
        notes.append(
            f"the reference cannot run in float64 ({type(e).__name__}: {str(e).strip().splitlines()[0][:200]}); it was "
            f"run in {own_name}, so that eager has no error of its own and the tolerance is atol alone"
        )
        return [_call(module, s) for s in input_sets], own_name
    low = {
        f"{name} ({_name(t.dtype)})"
        for output in outputs
        for name, t in output
        if t.is_floating_point() and t.dtype != torch.float64
    }
    if low:
        notes.append(f"the reference casts to a fixed dtype on the way to {', '.join(sorted(low))}: no float64 there")
    return outputs, "float64"


def _call(module: nn.Module, inputs: InputSet) -> list[tuple[str, Tensor]]:
    args, kwargs = inputs
    with torch.no_grad():
        return [(name, tensor.clone()) for name, tensor in named_outputs(module(*args, **kwargs))]


def _as_dtype(inputs: InputSet, dtype: torch.dtype, own: torch.dtype | None) -> InputSet:
    """The inputs with floating point tensors as ``dtype``; untouched where that is the model's ``own``."""
    if dtype == own:
        return inputs

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    args, kwargs = inputs
    return pytree.tree_map(cast, tuple(args)), pytree.tree_map(cast, dict(kwargs))


def _masks(valid_mask: Tensor | Sequence[Tensor] | None, count: int) -> list[Tensor | None]:
    if valid_mask is None:
        return [None] * count
    masks = [valid_mask] * count if isinstance(valid_mask, Tensor) else list(valid_mask)
    if len(masks) != count:
        raise InputError(f"valid_mask holds {len(masks)} masks for {count} input sets; give one, or one for each")
    for mask in masks:
        if mask.dtype != torch.bool or mask.dim() != 2 or not mask.any():
            raise InputError(
                f"valid_mask must be bool [batch, seq] with something valid in it, but is {mask.dtype} "
                f"{list(mask.shape)} with {int(mask.sum())} set"
            )
    return list(masks)


# --- comparing -------------------------------------------------------------------------------------------------------


def _compare(
    candidate: Runner,
    index: int,
    name: str,
    have: Tensor,
    want: Tensor,
    baseline: Tensor,
    mask: Tensor | None,
    factor: float,
    atol: float,
) -> OutputComparison:
    if have.shape != want.shape:
        return _no_comparison(candidate, index, name, f"shape {list(have.shape)} instead of {list(want.shape)}")
    exact_type = not (want.is_floating_point() or want.is_complex())
    if mask is not None and want.shape[:2] == mask.shape:
        have, want, baseline = (x.cpu()[mask.cpu()] for x in (have, want, baseline))
    x, y, z = (_real(t.detach().cpu()).double() for t in (have, want, baseline))
    top1 = _top1(x, y) if not exact_type else None

    nonfinite = int((~x.isfinite()).sum())
    same = (x == y) | (x.isnan() & y.isnan())
    usable = x.isfinite() & y.isfinite()
    mismatch = int((~usable & ~same).sum())
    error = (x - y).abs()[usable]
    max_abs = float(error.max()) if error.numel() else 0.0
    scale = y.abs()[usable]
    relative = (error / scale.clamp(min=torch.finfo(torch.float32).tiny))[error > 0]
    eager_error = (z - y).abs()[z.isfinite() & y.isfinite()]
    eager_max = float(eager_error.max()) if eager_error.numel() else 0.0
    tolerance = 0.0 if exact_type else factor * eager_max + atol

    problem: str | None = None
    if mismatch:
        problem = f"{mismatch} NaN or Inf on one side only"
    elif x.numel() and not usable.any():
        problem = "nothing finite to compare"
    elif max_abs > tolerance:
        problem = f"error {max_abs:.3g} > {tolerance:.3g}"
    return OutputComparison(
        candidate=candidate.name,
        input_set=index,
        output=name,
        dtype=_name(have.dtype),
        compared=x.numel(),
        max_abs=max_abs,
        max_rel=float(relative.max()) if relative.numel() else 0.0,
        eager_max_abs=eager_max,
        tolerance=tolerance,
        minimum_atol=None if mismatch or (exact_type and max_abs) else max(0.0, max_abs - factor * eager_max),
        cosine=None if exact_type or not usable.any() else _cosine(x[usable], y[usable]),
        top1=top1,
        nonfinite=nonfinite,
        nonfinite_mismatch=mismatch,
        problem=problem,
        passed=problem is None,
    )


def _no_comparison(candidate: Runner, index: int, name: str, problem: str) -> OutputComparison:
    nan = math.nan
    return OutputComparison(
        candidate=candidate.name,
        input_set=index,
        output=name,
        dtype=_name(candidate.dtype),
        compared=0,
        max_abs=nan,
        max_rel=nan,
        eager_max_abs=nan,
        tolerance=nan,
        minimum_atol=None,
        cosine=None,
        top1=None,
        nonfinite=0,
        nonfinite_mismatch=0,
        problem=problem,
        passed=False,
    )


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _top1(x: Tensor, y: Tensor) -> float | None:
    """The share of rows ``[..., classes]`` whose largest class agrees."""
    if x.dim() == 0 or x.shape[-1] < 2 or not x.numel():
        return None
    return float((x.argmax(-1) == y.argmax(-1)).double().mean())


def _cosine(x: Tensor, y: Tensor) -> float | None:
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms > 0 else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value
