"""Where a whole model cannot be exported: find its largest submodules with attention that can, each by itself."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from sqa_fx.calls import CallBinder
from sqa_fx.errors import CaptureError, InputError, PlanError, SqaError
from sqa_fx.passes.capture import Captured, capture
from sqa_fx.passes.capture_ways import TRY, DynamicShapes, cache_is_optional, free_dimensions, fresh, reason
from sqa_fx.passes.graph import module_path
from sqa_fx.passes.hints import value_of
from sqa_fx.passes.pipeline import Analysis, find_sites, fit_plan, make_plan
from sqa_fx.passes.record import Call, Recording, other_sizes, record
from sqa_fx.passes.site import Refusal
from sqa_fx.plan import ParameterPlan, Plan, SitePlan
from sqa_fx.request import HeadChoice, Request, check_patterns, matches


@dataclass
class Part:
    """One submodule that was exported alone: its path and module, its graph and sites, and how it was called."""

    path: str
    module: nn.Module
    captured: Captured
    analysis: Analysis
    calls: list[Call]
    """Recorded calls that the graph serves, beside the one that it was captured with; one for each set of sizes."""


@dataclass
class Parts:
    """A copy of the model (``twin``), its exportable submodules with attention, and what could not be exported."""

    twin: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fixed: dict[str, Any]
    """What is passed to every call beside the caller's inputs."""
    why: str
    """Why the whole model was not converted at once."""
    parts: list[Part] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def site_names(self) -> list[str]:
        """The names of all sites, in order."""
        return [site.name for part in self.parts for site in part.analysis.sites]

    def story(self, paths: Sequence[str]) -> str:
        """What was done and why, as a note of the report."""
        if not paths:
            tried = ", ".join(part.path for part in self.parts)
            return f"exported per submodule, without a site to convert: {tried}; because {_short(self.why)}"
        return f"converted per submodule: {', '.join(paths)}; the rest stays eager, because {_short(self.why)}"


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:297]}..."


def find_parts(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: DynamicShapes,
    why: str,
    allow_inexact: bool = False,
) -> Parts:
    """Search ``model`` top-down for the largest submodules that bear attention and can be exported alone.

    One eager call of a copy of the model shows how its submodules are called; a second one, at other sizes, shows which
    dimensions change. Raises CaptureError with ``why`` when the model cannot be copied or run.
    """
    args, kwargs = tuple(args), dict(kwargs)
    fixed = {"use_cache": False} if cache_is_optional(model, args, kwargs) else {}
    kwargs.update(fixed)
    try:
        twin = copy.deepcopy(model)
        recording = record(twin, *fresh((args, kwargs)))
    except Exception as error:
        raise CaptureError(
            f"{why}; its submodules cannot be exported one by one either, because a copy of the model does not run: "
            f"{reason(error)}; {TRY}"
        ) from error
    found = Parts(twin, args, kwargs, fixed, why)
    if fixed:
        found.notes.append("called with use_cache=False: a KV cache would enter the submodules as an input")
    other = None
    if dynamic_shapes is not None:
        other = _record_other_sizes(twin, args, kwargs)
        if other is None:
            found.notes.append(
                "the model does not run at other batch or sequence sizes, so which sizes of its submodules' inputs "
                "are free was guessed from their shapes"
            )
    if twin in recording.attention:
        own = "the forward of the model itself computes it, and the whole cannot be exported"
        found.refusals.append(Refusal(type(model).__name__, own))
    search = _Search(found, recording, other, dynamic_shapes is not None, allow_inexact)
    for name, child in twin.named_children():
        search.visit(name, child)
    _refuse_shared_parameters(found)
    return found


def _record_other_sizes(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording | None:
    for inputs in other_sizes(args, kwargs):
        try:
            return record(twin, *fresh(inputs))
        except Exception:
            continue  # the model cannot take these sizes; the caller reports it when it can take none
    return None


class _Search:
    def __init__(
        self, found: Parts, recording: Recording, other: Recording | None, dynamic: bool, allow_inexact: bool
    ) -> None:
        self.found, self.recording, self.other, self.dynamic = found, recording, other, dynamic
        self.allow_inexact = allow_inexact
        self.visited: set[nn.Module] = set()
        self.failed: dict[Any, str] = {}

    def visit(self, path: str, module: nn.Module) -> None:
        if module in self.visited or not any(m in self.recording.attention for m in module.modules()):
            return
        self.visited.add(module)
        calls = self.recording.calls.get(module, [])
        part: Part | None = None
        why = "it is not called as a module"
        if any(call.tensors() for call in calls):
            kind = _kind(module, calls)
            # A layer like one that could not be exported is not tried again: its parts are.
            why = self.failed.get(kind, "")
            if not why:
                try:
                    part = self._export(path, module, calls)
                except SqaError as error:
                    why = self.failed[kind] = str(error).removesuffix(f"; {TRY}")
        if part is not None and not depends_on_data(part.captured.graph_module, part.analysis):
            self._keep(part)
            return
        before = len(self.found.parts)
        for name, child in module.named_children():
            self.visit(f"{path}.{name}", child)
        if part is not None and len(self.found.parts) == before:
            self._keep(part)
        elif part is None and module in self.recording.attention:
            self.found.refusals.append(Refusal(path, f"its module cannot be exported alone: {why}"))

    def _keep(self, part: Part) -> None:
        if part.analysis.sites or part.analysis.refusals:
            self.found.parts.append(part)

    def _export(self, path: str, module: nn.Module, calls: list[Call]) -> Part:
        others = self.other.calls.get(module, []) if self.other is not None else []
        free = [_free(calls, others, call, self.other is not None) for call in calls]
        # A size of one would be fixed by export: a call without one is the better example.
        best = min(range(len(calls)), key=lambda i: sum(calls[i].tensors()[t].size(d) == 1 for t, d in free[i]))
        call = calls[best]
        dims: dict[int, list[int]] = {}
        for position, dim in free[best]:
            dims.setdefault(id(call.tensors()[position]), []).append(dim)
        captured = capture(
            module,
            call.args,
            call.kwargs,
            "auto" if self.dynamic else None,
            free=lambda tensor: dims.get(id(tensor), []),
        )
        analysis = find_sites(captured.graph_module, self.allow_inexact, fixed_caches=True)
        _rename(path, captured.graph_module, analysis)
        return Part(path, module, captured, analysis, _served(captured, calls, others))


def _kind(module: nn.Module, calls: list[Call]) -> Any:
    """Equal for modules of the same build that are called alike."""
    build = tuple((name, type(m)) for name, m in module.named_modules())
    state = tuple((name, tuple(t.shape)) for name, t in (*module.named_parameters(), *module.named_buffers()))
    return build, state, tuple(_sizes(call) for call in calls)


def _sizes(call: Call) -> str:
    """The shapes and plain values of a call, as text that is equal for like calls."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    texts = [f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, Tensor)
             else repr(leaf) if isinstance(leaf, int | float | bool | str | None)
             else str(type(leaf)) for leaf in leaves]  # fmt: skip
    return f"{spec} {texts}"


def _free(calls: list[Call], others: list[Call], call: Call, known: bool) -> list[tuple[int, int]]:
    """(tensor, dimension) of ``call`` whose size differs between calls, or between runs at other sizes."""
    found: set[tuple[int, int]] = set()
    pairs = list(itertools.combinations(calls, 2))
    if known and len(calls) == len(others):
        pairs += zip(calls, others, strict=True)
    for a, b in pairs:
        left, right = a.tensors(), b.tensors()
        if [t.dim() for t in left] == [t.dim() for t in right] == [t.dim() for t in call.tensors()]:
            found |= {(i, d) for i, t in enumerate(left) for d in range(t.dim()) if t.size(d) != right[i].size(d)}
    if not known or len(calls) != len(others):
        found |= {(i, d) for i, t in enumerate(call.tensors()) for d in free_dimensions(t)}
    return sorted(found)


def _served(captured: Captured, calls: list[Call], others: list[Call]) -> list[Call]:
    """The recorded calls that the graph serves, laid out as it takes them, one for each set of sizes.

    Raises CaptureError when one graph does not serve every call of the run.
    """
    binder = CallBinder(captured.graph_module.graph, captured.signature, captured.args, captured.kwargs)
    served: dict[str, Call] = {}
    own = _sizes(Call(captured.args, captured.kwargs))
    for call in (*calls, *others):
        try:
            bound = Call(*binder.bind(call.args, call.kwargs))
        except InputError as error:
            if any(call is one for one in calls):
                raise CaptureError(f"one graph does not serve all of its {len(calls)} calls: {error}") from error
            continue  # sizes that this submodule fixes: the report lists them as static
        served.setdefault(_sizes(bound), bound)
    served.pop(own, None)
    return list(served.values())


def depends_on_data(module: fx.GraphModule, analysis: Analysis) -> bool:
    """True when no site of a graph could be converted and the graph has sizes that only running it would tell."""
    if analysis.sites or not analysis.refusals:
        return False
    sizes = (
        size
        for node in module.graph.nodes
        for value in pytree.tree_leaves(value_of(node))
        for size in (value.shape if isinstance(value, Tensor) else (value,))
    )
    return any(isinstance(size, torch.SymInt) and size.node.hint is None for size in sizes)


def _rename(path: str, module: fx.GraphModule, analysis: Analysis) -> None:
    """Names as in the whole model: under the submodule's path, and that path itself for what its own code computes."""
    own = {node.name for node in module.graph.nodes if not module_path(node)}
    count = 0

    def full(name: str) -> str:
        nonlocal count
        if name.partition("#")[0] not in own:
            return f"{path}.{name}"
        count += 1
        return path if count == 1 else f"{path}#{count}"

    for site in analysis.sites:
        site.name = full(site.name)
    analysis.refusals[:] = [replace(r, name=full(r.name)) for r in analysis.refusals]


def _refuse_shared_parameters(found: Parts) -> None:
    """A site is refused when cutting its parameters would take them away from code outside of its submodule."""
    for part in found.parts:
        inside = set(part.module.modules())
        outside = {
            id(tensor): f"{name}.{own}".lstrip(".")
            for name, module in found.twin.named_modules()
            if module not in inside
            for own, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        held = dict((*part.module.named_parameters(remove_duplicate=False), *part.module.named_buffers()))
        for site in list(part.analysis.sites):
            names = [str(use.node.target) for use in site.leaves]
            shared = next((n for n in names if n in held and id(held[n]) in outside), None)
            if shared is not None:
                part.analysis.sites.remove(site)
                other = outside[id(held[shared])]
                why = f"its parameter {shared} is also {other}, outside of the submodule that was exported"
                part.analysis.refusals.append(Refusal(site.name, why))


def plan_parts(
    found: Parts, given: Plan | None, hq: Request, hkv: Request, heads: HeadChoice, kv_merge: str
) -> list[dict[str, SitePlan]]:
    """The plans of each part, from a request or from a plan that was made before, as for a whole model."""
    names = found.site_names
    if given is not None:
        for entry in given.sites:
            if entry.name not in names:
                raise PlanError(
                    f"the plan names site {entry.name!r}, which this model does not have; it has: {', '.join(names)}"
                )
        return [fit_plan(part.analysis, Plan(tuple(s for s in given.sites if _has(part, s.name))))
                for part in found.parts]  # fmt: skip
    check_patterns(hq, names, "hq")
    check_patterns(hkv, names, "hkv")
    return [
        make_plan(part.analysis, _narrowed(hq, part), _narrowed(hkv, part), heads, kv_merge) for part in found.parts
    ]


def _has(part: Part, name: str) -> bool:
    return any(site.name == name for site in part.analysis.sites)


def _narrowed(request: Request, part: Part) -> Request:
    """The patterns of a request that name a site of ``part``."""
    if not isinstance(request, Mapping):
        return request
    names = [site.name for site in part.analysis.sites]
    return {pattern: value for pattern, value in request.items() if any(matches(pattern, n) for n in names)}


def whole_plan(plans: Sequence[tuple[str, Plan]]) -> Plan:
    """One plan of the whole model from the plans of submodules by path; parameter names get their path."""
    sites = tuple(site for _, plan in plans for site in plan.sites)
    parameters: list[ParameterPlan] = [
        replace(parameter, name=f"{path}.{parameter.name}") for path, plan in plans for parameter in plan.parameters
    ]
    return Plan(sites, tuple(parameters))
