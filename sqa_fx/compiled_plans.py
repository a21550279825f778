"""The heads that compiled models keep: chosen once for each weight, so that recompilation never chooses others."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sqa_fx.errors import InputError
from sqa_fx.plan import ParameterPlan, Plan, SitePlan
from sqa_fx.report import Report


@dataclass
class CompiledGraph:
    """One graph that the backend converted."""

    plan: Plan
    report: Report


@dataclass
class _Memory:
    chosen: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """By output projection weight: request key -> site plan."""
    cut: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """By parameter: its cut in the last compilation."""
    sites: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """By output projection weight: the site plan of the last compilation."""
    modules: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], SitePlan]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    """By compiled module: (request key, site name) -> site plan. It outlives the module's parameters."""
    graphs: list[CompiledGraph] = field(default_factory=list)


_memory = _Memory()


def remembered(root: nn.Module | None, name: str, weights: Iterable[Tensor], key: str) -> SitePlan | None:
    """The plan that was made before under the same request for site ``name`` of the compiled module ``root``, or for
    the site with these output projection weights."""
    if root is not None and (key, name) in _memory.modules.get(root, {}):
        return _memory.modules[root][key, name]
    for weight in weights:
        found = _memory.chosen.get(weight, {}).get(key)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def remember(
    graph: CompiledGraph,
    key: str,
    outputs: Mapping[str, Iterable[Tensor]],
    parameters: Mapping[str, Tensor],
    root: nn.Module | None,
) -> None:
    """Keep what was done to one graph. ``outputs`` are the output projection weights of each site."""
    _memory.graphs.append(graph)
    for site in graph.plan.sites:
        if root is not None:
            _memory.modules.setdefault(root, {})[key, site.name] = site
        for weight in outputs[site.name]:
            _memory.chosen.setdefault(weight, {})[key] = site
            _memory.sites[weight] = site
    for entry in graph.plan.parameters:
        if entry.name in parameters:
            _memory.cut[parameters[entry.name]] = entry


def forget() -> None:
    """Forget all plans; ``torch._dynamo.reset()`` calls it."""
    for table in (_memory.chosen, _memory.cut, _memory.sites, _memory.modules, _memory.graphs):
        table.clear()


def compiled_graphs() -> list[CompiledGraph]:
    """Every graph that the torch.compile backend converted since the start or the last ``torch._dynamo.reset()``."""
    return list(_memory.graphs)


def last_plan(model: nn.Module | None = None) -> Plan:
    """The plan that compilations with ``backend="sqa_fx"`` carried out, as :func:`sqa_fx.convert` takes it.

    ``model`` picks the plan of one model (compiled or not): the heads that its own weights keep. Without it, the plan
    of everything compiled since the start or the last ``torch._dynamo.reset()``, where sites of the same name are taken
    from the last graph. Raises InputError when nothing was converted yet, because compilation happens on the first
    call.
    """
    sites: dict[str, SitePlan] = {}
    parameters: dict[str, ParameterPlan] = {}
    if model is None:
        for graph in _memory.graphs:
            sites.update({s.name: s for s in graph.plan.sites})
            parameters.update({p.name: p for p in graph.plan.parameters})
    else:
        model = getattr(model, "_orig_mod", model)
        for name, parameter in model.named_parameters():
            if parameter in _memory.sites:
                site = _memory.sites[parameter]
                sites[site.name] = site
            if parameter in _memory.cut:
                parameters[name] = replace(_memory.cut[parameter], name=name)
    if not sites:
        raise InputError("nothing was converted yet: call the compiled model first (it compiles on the first call)")
    return Plan(tuple(sites.values()), tuple(parameters.values()))
