"""Eager surgery: the user's own module gets cut weights, and the attributes that its code takes head counts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sqa_fx.api import convert
from sqa_fx.calibration import Loss
from sqa_fx.checkpoint_cut import changed_names
from sqa_fx.deferred import DeferredModule
from sqa_fx.errors import InputError, SurgeryError
from sqa_fx.partly import PartlyConvertedModule
from sqa_fx.passes.capture_ways import DynamicShapes, reason
from sqa_fx.passes.verify import Precision, masked_weights
from sqa_fx.plan import Plan
from sqa_fx.report import Report
from sqa_fx.request import HeadChoice, KvMerge, Repairs, Request
from sqa_fx.surgery_calls import Function, further_calls
from sqa_fx.surgery_candidates import Owners, Variable, owner_groups, variables
from sqa_fx.surgery_classes import narrow_classes, reclassed
from sqa_fx.surgery_commit import commit
from sqa_fx.surgery_layout import arranged_plan, arranged_tensors, orders
from sqa_fx.surgery_proof import Comparison, Converted, SurgeryProof
from sqa_fx.surgery_reads import Reads, recording
from sqa_fx.surgery_record import Resized, Surgery, read
from sqa_fx.surgery_run import Inputs, contents_kept, evaluating, holding
from sqa_fx.surgery_search import Assignment, Found, Trial, changed, search


@dataclass(frozen=True)
class SurgeryReport:
    """What was done in place: the plan, the conversion's own report, the record of changes, and the proof that the
    eager module computes what the converted graph computes."""

    plan: Plan
    layout: Plan
    """The plan with kept heads in the order that the module's own code expects in fused parameters: cutting a
    checkpoint by it gives the module's state dict."""
    report: Report
    surgery: Surgery
    proof: SurgeryProof
    trials: int
    """How many trial runs the search took."""

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return {
            "report": self.report.to_json(),
            "surgery": self.surgery.to_json(),
            "proof": self.proof.to_json(),
            "trials": self.trials,
        }

    def table(self) -> str:
        """The report as text."""
        p = self.proof
        return "\n".join(
            [
                self.report.table(),
                f"in place: {len(self.surgery.parameters)} tensors cut, "
                f"{len(self.surgery.attributes)} attributes changed ({self.trials} trial runs)",
                *(f"  {line}" for line in self.surgery.lines()),
                f"proved against the converted graph in {p.precision}: relative error {p.error:.2e}, tolerance "
                f"{p.tolerance:.0e}, sizes: {', '.join(p.sizes)}"
                + (f"; called: {', '.join(p.calls)}" if p.calls else ""),
            ]
        )

    __str__ = table


def convert_(
    model: nn.Module,
    *,
    hq: Request = None,
    hkv: Request = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    heads: HeadChoice | None = None,
    kv_merge: KvMerge | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    repair: Repairs | None = None,
    dynamic_shapes: DynamicShapes = "auto",
    verify: Precision | bool = True,
    allow_inexact: bool = False,
    also: Sequence[Function] = (),
) -> SurgeryReport:
    """Convert ``model`` in place: it stays the module that it is, with fewer heads.

    The arguments are those of :func:`sqa_fx.convert`, which is called first; ``verify`` is about its proof. The cut
    weights then go into the model's own parameters (the objects stay: ties, hooks, flags), and the attributes that
    its code takes head counts from are searched by value, among those that its forward pass reads: the fewest whose
    change makes the model compute what the converted graph computes. That is proved in eval mode for every output,
    at every size that the graph was proved at and the model takes, in float64 where the model can. A config that others
    hold too is copied for the modules that need other numbers in it. The model is also compared with the masked
    original when it is called with a padding mask and when it generates, where it can, and in the calls of ``also``:
    functions that call the model that they get in ways in which it will be used. Gradients of cut parameters are
    dropped; an optimizer that has state for them must be made anew.

    Raises what convert raises, InputError for parameters that cannot be cut in place (quantised, sharded), and
    SurgeryError when no change of attributes could be proved: head counts that are written into the code, or one number
    that means two things. Whatever is raised, the model is bit for bit as it was before.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.fx.GraphModule):
        raise InputError(f"convert_ changes an nn.Module of Python code in place, not a {type(model).__name__}")
    with evaluating(model):
        with contents_kept(model):
            converted = convert(
                model,
                hq=hq,
                hkv=hkv,
                args=args,
                kwargs=kwargs,
                plan=plan,
                heads=heads,
                kv_merge=kv_merge,
                calibration=calibration,
                loss=loss,
                repair=repair,
                dynamic_shapes=dynamic_shapes,
                verify=verify,
                allow_inexact=allow_inexact,
            )
        if isinstance(converted, DeferredModule):
            raise InputError("convert_ needs example inputs: args= or kwargs=")
        inputs = _example(converted, args, kwargs)
        cut = _cut_tensors(model, converted)
        operation = _prepared(model, converted, inputs, also)
        kinds, flags = narrow_classes(model, cut)
        runs, failed = 0, []
        for order in orders(converted.plan):
            arranged = arranged_tensors(cut, converted.plan, order)
            with holding(model, arranged), reclassed(model, kinds), changed(model, flags):
                found = search(operation.trial, operation.choices, operation.wrong)
            runs = operation.trial.runs
            if found.fault is None:
                break
            failed.append(found)
        else:
            raise _refusal(max(failed, key=lambda f: f.fault.passed if f.fault else 0), operation.choices, runs)
        surgery = Surgery(_resized(converted.plan, cut), (*flags, *found.changes), kinds)
        proof = commit(model, surgery, arranged, operation.comparison)
    layout = arranged_plan(converted.plan, order)
    return SurgeryReport(converted.plan, layout, converted.report, surgery, proof, runs)


def _refusal(found: Found, choices: Sequence[Variable], runs: int) -> SurgeryError:
    """Why nothing could be proved, and what was tried."""
    assert found.fault is not None
    where = f" in {found.fault.where}" if found.fault.where else ""
    changes = "; ".join(c.line() for c in found.changes) if found.changes else "cut weights alone"
    tried = ", ".join(dict.fromkeys(f"{c.pattern}: {c.attribute}={c.old}" for c in (v.becomes(v.old) for v in choices)))
    return SurgeryError(
        f"the model cannot be converted in place; it is as it was. With {changes} it fails{where}: {found.fault.why}. "
        f"Tried in {runs} runs: {tried or 'nothing, since it reads no number that could be a head count'}. Its head "
        "counts may be written into its code, or follow from other sizes; leave it out (a mapping of site patterns) or "
        "let convert() make a module of its own"
    )


@dataclass
class _Operation:
    model: nn.Module
    trial: Trial
    comparison: Comparison
    choices: list[Variable]

    def wrong(self, changes: Assignment) -> str:
        """What the whole proof says against ``changes``, '' for nothing."""
        with changed(self.model, changes):
            proof = self.comparison.prove(self.model)
        return proof if isinstance(proof, str) else ""


def _prepared(model: nn.Module, converted: Converted, inputs: Inputs, also: Sequence[Function]) -> _Operation:
    """Run the masked original and note what it reads and gives; in float64 unless it cannot."""
    plan = converted.plan
    names = [p.name for p in plan.parameters if _held(model, p.name) is not None]
    masked = masked_weights(model, _restricted(plan, names))  # type: ignore[arg-type]
    groups: list[Owners] = owner_groups(model, plan)
    failed: list[str] = []
    for wide in (True, False):
        trial, comparison, reads = Trial(model, groups, inputs, wide), Comparison(converted, wide), Reads()
        trial.unchecked = _unchecked(groups, model, converted)
        try:
            with holding(model, masked):
                with recording(model, reads):
                    trial.learn()
                comparison.add(model, inputs, further_calls(model, inputs, also))
                choices = variables(model, groups, reads, {id(read(model, name)) for name in masked})
            return _Operation(model, trial, comparison, choices)
        except Exception as error:
            failed.append(reason(error))
    raise SurgeryError(f"the model does not run with its weights masked, so nothing can be proved: {failed[-1]}")


def _unchecked(groups: Sequence[Owners], model: nn.Module, converted: Converted) -> frozenset[str]:
    """Attention modules with a site that is not exact: only the graph says what these give."""
    if not any(site.inexact for site in converted.report.sites):
        return frozenset()
    return frozenset(path for group in groups for path in group.paths)


def _example(converted: Converted, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Inputs:
    """The inputs that the converted model was captured with."""
    if isinstance(converted, PartlyConvertedModule):
        return tuple(args), {**(kwargs or {}), **converted.fixed}
    return converted.example_args, dict(converted.example_kwargs)


def _cut_tensors(model: nn.Module, converted: Converted) -> dict[str, Tensor]:
    """The cut values of the model's tensors by name. Raises InputError for one that cannot be cut in place."""
    found: dict[str, Tensor] = {}
    for name in changed_names(converted.plan):
        held, new = _held(model, name), _held(converted, name)
        if held is None or new is None:
            continue  # a constant that the code makes itself: the proof tells whether it makes the right one
        if type(held) not in (Tensor, nn.Parameter, nn.Buffer) or type(held.data) is not Tensor or held.is_quantized:
            raise InputError(
                f"{name} is a {type(held).__name__} (dtype {held.dtype}): quantised and sharded parameters cannot be "
                "cut in place. Convert first, then quantise or shard"
            )
        found[name] = new.detach().to(held)
    return found


def _held(model: nn.Module, name: str) -> Tensor | None:
    try:
        value = read(model, name)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None


def _restricted(plan: Plan, names: Sequence[str]) -> Plan:
    """``plan`` for the tensors that the model has under these names."""
    parameters = tuple(p for p in plan.parameters if p.name in names)
    return Plan(plan.sites, parameters, plan.inputs, plan.rotations, plan.refitted, plan.tensors)


def _resized(plan: Plan, cut: Mapping[str, Tensor]) -> tuple[Resized, ...]:
    return tuple(Resized(p.name, p.axis, p.size) for p in plan.parameters if p.name in cut and p.size[0] != p.size[1])
