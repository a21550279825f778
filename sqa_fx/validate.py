"""Compare runners with a reference, by the error that the same dtype makes in eager PyTorch anyway."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sqa_fx.errors import InputError
from sqa_fx.flat_program import FlatProgram
from sqa_fx.module import ConvertedModule
from sqa_fx.runners import Runner, module_dtype, named_outputs
from sqa_fx.text_table import text_table

DEFAULT_ATOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Slack on top of eager's own error, which may be exactly 0: a few units of roundoff of a value near 1."""

InputSet = tuple[tuple[Any, ...], Mapping[str, Any]]
"""``(args, kwargs)`` of one call."""

_AT_ONCE = 2**22
"""Elements that are compared at once: in float64 a few of these are small beside the outputs of a large model."""


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
    """Every comparison, how the reference was run, and what the reader must know besides.

    ``labels`` name the input sets; empty when they have numbers only.
    """

    comparisons: tuple[OutputComparison, ...]
    reference_dtype: str
    factor: float
    notes: tuple[str, ...]
    labels: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there was something to compare, and all of it agreed."""
        return bool(self.comparisons) and all(c.passed for c in self.comparisons)

    def label(self, input_set: int) -> str:
        """What the input set of that number is called."""
        return self.labels[input_set] if self.labels else str(input_set)

    def summary(self) -> dict[str, Any]:
        """The verdict as JSON-ready data: ``passed``, ``error`` and ``tolerance`` of the comparison that came nearest
        to its tolerance or went farthest beyond it, ``min_cosine``, ``labels``, ``reference_dtype``, how many
        comparisons were made and failed, and the first ``problem`` (None: all agree)."""
        measured = [c for c in self.comparisons if not math.isnan(c.max_abs)]
        worst = max(measured, key=_closeness, default=None)
        cosines = [c.cosine for c in measured if c.cosine is not None]
        failed = [c for c in self.comparisons if not c.passed]
        content = {
            "passed": self.passed,
            "error": worst.max_abs if worst else None,
            "tolerance": worst.tolerance if worst else None,
            "min_cosine": min(cosines, default=None),
            "labels": list(self.labels),
            "reference_dtype": self.reference_dtype,
            "compared": len(self.comparisons),
            "failed": len(failed),
            "problem": f"{failed[0].output} at input set {self.label(failed[0].input_set)}: {failed[0].problem}"
            if failed
            else None,
        }
        found: dict[str, Any] = _finite(content)
        return found

    def to_json(self) -> str:
        """The report as JSON; numbers that are not finite become null."""
        content = {
            "version": 1,
            "passed": self.passed,
            "reference_dtype": self.reference_dtype,
            "factor": self.factor,
            "notes": list(self.notes),
            "labels": list(self.labels),
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
                self.label(c.input_set),
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


class Reference:
    """A module's outputs on ``input_sets``, in float64 and in eager at any dtype, computed once: for comparing many
    candidates one after the other. The module is copied, not changed."""

    def __init__(self, module: nn.Module, input_sets: Sequence[InputSet]) -> None:
        self.dtype = module_dtype(module)
        self.notes: list[str] = []
        self._module, self._input_sets = _evaluating(module), list(input_sets)
        self.exact, self.computed_in = _exact_outputs(self._module, self.dtype, input_sets, self.notes)
        self._eager: dict[torch.dtype, list[list[Tensor]]] = {}

    def eager(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """The outputs for each input set, computed by the module in ``dtype``."""
        if dtype not in self._eager:
            module = self._module if dtype == self.dtype else copy.deepcopy(self._module).to(dtype)
            sets = [_as_dtype(s, dtype, self.dtype) for s in self._input_sets]
            self._eager[dtype] = [[t for _, t in _call(module, s)] for s in sets]
        return self._eager[dtype]


def validate(
    reference: nn.Module | Reference,
    candidates: Sequence[Runner],
    input_sets: Sequence[InputSet],
    *,
    atol: float | None = None,
    factor: float = 2.0,
    valid_mask: Tensor | Sequence[Tensor] | None = None,
    labels: Sequence[str] | None = None,
) -> ValidationReport:
    """Compare each candidate with ``reference`` run in float64, on each ``(args, kwargs)`` of ``input_sets``.

    An output passes when its largest error is at most ``factor`` times that of the reference run eagerly in the
    candidate's own dtype, plus ``atol`` (by default ``DEFAULT_ATOL`` of that dtype): the rule of flash-attention's
    tests. ``valid_mask`` is bool ``[batch, seq]``, one for all input sets or one for each: of outputs that start with
    these axes, only what it marks is compared, since padding may hold anything. ``reference`` is copied, not changed;
    it runs on its own device, and outputs are compared in host memory, wherever they are. A `Reference`, made of the
    same input sets, saves computing it again. ``labels`` name the input sets in the report. A candidate that raises on
    an input set has failed there, and the others are still compared.

    Raises InputError when there is nothing to compare, no output starts with the axes of a mask, or the labels are not
    one for each input set.
    """
    if not candidates or not input_sets:
        raise InputError(f"nothing to compare: {len(candidates)} candidates and {len(input_sets)} input sets")
    if labels is not None and len(labels) != len(input_sets):
        raise InputError(f"{len(labels)} labels for {len(input_sets)} input sets; give one for each")
    masks = _masks(valid_mask, len(input_sets))
    if not isinstance(reference, Reference):
        reference = Reference(reference, input_sets)
    own, exact = reference.dtype, reference.exact
    for index, mask in enumerate(masks):
        if mask is not None and not any(t.shape[:2] == mask.shape for _, t in exact[index]):
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in exact[index])
            raise InputError(
                f"valid_mask {index} is {list(mask.shape)}, and no output of that input set starts so: {shapes}; give "
                "bool [batch, seq], one mask per input set"
            )
    comparisons: list[OutputComparison] = []
    for candidate in candidates:
        dtype = candidate.dtype
        eager = reference.eager(dtype)
        slack = DEFAULT_ATOL.get(dtype, DEFAULT_ATOL[torch.float32]) if atol is None else atol
        for index, inputs in enumerate(input_sets):
            args, kwargs = _as_dtype(inputs, dtype, own)
            try:
                got = candidate.run(args, kwargs)
            except Exception as error:  # whatever an engine raises, at one shape maybe: it has failed there
                comparisons.append(_no_comparison(candidate, index, "all", f"does not run: {_first_line(error)}"))
                continue
            expected = exact[index]
            if len(got) != len(expected):
                problem = f"{len(got)} outputs instead of {len(expected)} ({', '.join(n for n, _ in expected)})"
                comparisons.append(_no_comparison(candidate, index, "all", problem))
                continue
            for (name, want), have, baseline in zip(expected, got, eager[index], strict=True):
                comparisons.append(_compare(candidate, index, name, have, want, baseline, masks[index], factor, slack))
    notes = tuple(reference.notes)
    return ValidationReport(tuple(comparisons), reference.computed_in, factor, notes, tuple(labels or ()))


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
        if isinstance(module, ConvertedModule | FlatProgram):
            # Their graphs hold casts to the dtype that they were captured in, which .double() would leave alone.
            outputs = [_call(module, s, module.widened) for s in input_sets]
        else:
            upcast = copy.deepcopy(module).double()
            outputs = [_call(upcast, _as_dtype(s, torch.float64, None)) for s in input_sets]
    except InputError:
        raise
    except Exception as e:  # a cast to a fixed dtype in the model surfaces as whatever operator meets it first
        own_name = _name(own)
        notes.append(
            f"the reference cannot run in float64 ({_first_line(e)}); it was "
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


def _call(module: nn.Module, inputs: InputSet, function: Callable[..., Any] | None = None) -> list[tuple[str, Tensor]]:
    """The outputs of ``module`` (or of its ``function``) in host memory, since all are kept until the end; inputs are
    moved to where the module is."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)

    def moved(x: Any) -> Any:
        return x.to(device) if device is not None and isinstance(x, Tensor) else x

    args, kwargs = pytree.tree_map(moved, (tuple(inputs[0]), dict(inputs[1])))
    with torch.no_grad():
        return [
            (name, tensor.to("cpu", copy=True)) for name, tensor in named_outputs((function or module)(*args, **kwargs))
        ]


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
    have, want, baseline = (t.detach().cpu() for t in (have, want, baseline))
    if mask is not None and want.shape[:2] == mask.shape:
        have, want, baseline = (t[mask.cpu()] for t in (have, want, baseline))
    top1 = _top1(have, want) if not exact_type else None
    have, want, baseline = (_real(t).reshape(-1) for t in (have, want, baseline))
    found = _Differences()
    for start in range(0, want.numel(), _AT_ONCE):
        found.add(*(t[start : start + _AT_ONCE].double() for t in (have, want, baseline)))
    tolerance = 0.0 if exact_type else factor * found.eager_max_abs + atol

    problem: str | None = None
    if found.mismatch:
        problem = f"{found.mismatch} NaN or Inf on one side only"
    elif want.numel() and not found.usable:
        problem = "nothing finite to compare"
    elif found.max_abs > tolerance:
        problem = f"error {found.max_abs:.3g} > {tolerance:.3g}"
    never = found.mismatch or (exact_type and found.max_abs)
    return OutputComparison(
        candidate=candidate.name,
        input_set=index,
        output=name,
        dtype=_name(have.dtype),
        compared=want.numel(),
        max_abs=found.max_abs,
        max_rel=found.max_rel,
        eager_max_abs=found.eager_max_abs,
        tolerance=tolerance,
        minimum_atol=None if never else max(0.0, found.max_abs - factor * found.eager_max_abs),
        cosine=None if exact_type else found.cosine,
        top1=top1,
        nonfinite=found.nonfinite,
        nonfinite_mismatch=found.mismatch,
        problem=problem,
        passed=problem is None,
    )


@dataclass
class _Differences:
    """What two outputs differ by, added up piece by piece; ``usable`` counts the elements that are finite on both
    sides."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    eager_max_abs: float = 0.0
    nonfinite: int = 0
    mismatch: int = 0
    usable: int = 0
    dot: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)

    def add(self, x: Tensor, y: Tensor, z: Tensor) -> None:
        """One more piece of the candidate ``x``, the reference ``y`` and the eager baseline ``z``, float64 ``[n]``."""
        usable = x.isfinite() & y.isfinite()
        self.nonfinite += int((~x.isfinite()).sum())
        self.mismatch += int((~usable & ~((x == y) | (x.isnan() & y.isnan()))).sum())
        self.eager_max_abs = max(self.eager_max_abs, _largest((z - y)[z.isfinite() & y.isfinite()].abs_()))
        x, y = x[usable], y[usable]
        self.usable += x.numel()
        self.dot += float(x @ y)
        self.squares = (self.squares[0] + float(x @ x), self.squares[1] + float(y @ y))
        error = x.sub_(y).abs_()
        self.max_abs = max(self.max_abs, _largest(error))
        self.max_rel = max(self.max_rel, _largest(error.div_(y.abs_().clamp_(min=torch.finfo(torch.float32).tiny))))

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between the two; None where one of them is zero."""
        norms = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        return self.dot / norms if norms > 0 else None


def _largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


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


def _closeness(c: OutputComparison) -> float:
    """The error in tolerances; infinite where no tolerance would do."""
    if c.nonfinite_mismatch or (c.tolerance == 0 and c.max_abs > 0):
        return math.inf
    return c.max_abs / c.tolerance if c.tolerance else 0.0


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


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
