"""``torch.compile(model, backend="sqa_fx", options={"hq": 8, "hkv": 4})``: SQA inside torch.compile.

Dynamo's graph becomes the ATen graph that :func:`sqa_fx.convert` works on, goes through the same passes and the same
proof, and then to the inner compiler (Inductor). The model keeps its own parameters: with gradients on they are cut in
the graph, so that optimizers step on them; with gradients off they are cut once, and again when they change.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import TracingContext

from sqa_fx.compile_options import CompileOptions
from sqa_fx.compiled_plans import CompiledGraph, compiled_graphs, forget, remember, remembered
from sqa_fx.convert_graph import NothingRewritten, convert_graph
from sqa_fx.dynamo_graph import DynamoGraph, trace
from sqa_fx.errors import CaptureError, SqaError
from sqa_fx.live_weights import LiveCall, over_inputs
from sqa_fx.passes.capture import Captured, dynamic_sizes, normalise
from sqa_fx.passes.data_sizes import learn_data_sizes
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.hints import hint, value_of
from sqa_fx.passes.pipeline import Analysis, Timings, find_sites, fit_plan, make_plan
from sqa_fx.passes.site import Refused, Site
from sqa_fx.plan import Plan, SitePlan
from sqa_fx.site_limit import VARIABLE, limited
from sqa_fx.trace_log import log_graph

log = logging.getLogger(__name__)
Compiled = Callable[..., Any]


class Backend:
    """The backend as an object, for ``torch.compile(model, backend=sqa_fx.backend(hq=8, hkv=4), mode=...)``."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.__name__ = "sqa_fx"
        CompileOptions.parse(options, None)

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any], **given: Any) -> Compiled:
        """Compile one of dynamo's graphs."""
        mode, options = given.pop("mode", None), given.pop("options", None) or {}
        return compile_graph(module, inputs, CompileOptions.parse({**self.options, **options}, mode))

    def reset(self) -> None:
        """Forget the plans of compiled models; ``torch._dynamo.reset()`` calls it."""
        forget()


def backend(**options: Any) -> Backend:
    """The backend with ``options`` (see :class:`CompileOptions`). Raises InputError on unknown ones."""
    return Backend(**options)


def sqa_fx_backend(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """What the name "sqa_fx" stands for in torch.compile. Raises InputError on unknown options."""
    return compile_graph(module, inputs, CompileOptions.parse(options, mode))


sqa_fx_backend.reset = forget  # type: ignore[attr-defined]


def compile_graph(module: fx.GraphModule, inputs: Sequence[Any], options: CompileOptions) -> Compiled:
    """Convert the attention of one of dynamo's graphs and compile it.

    A graph without attention goes to the inner compiler as it is, and so does one whose attention cannot be converted,
    unless ``on_refused`` is "raise": then PlanError, CaptureError or VerifyError says why.
    """
    if not _may_hold_attention(module):
        log.debug("graph without attention: compiled as it is")
        return _inner(module, inputs, options)
    gradients = torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in inputs)
    timings = Timings()
    try:
        converted = _convert(module, inputs, options, gradients, timings)
    except (SqaError, Refused) as error:
        if options.on_refused == "raise":
            raise
        log.warning("attention left as it is: %s", error)
        return _inner(module, inputs, options)
    if converted is None:
        return _inner(module, inputs, options)
    graph, plan = converted
    cached = not gradients and not torch.distributed.is_initialized()
    final, weights = timings.timed("weights", lambda: over_inputs(graph, plan, in_graph=not cached))
    log_graph("compiled", final)
    buffers = [attribute(final, w.name) for w in weights]
    # Autocast has become casts in the graph; it must not be applied once more.
    with torch._C._DisableAutocast():
        compiled = _without_autocast(_inner(final, inputs, options))
    return LiveCall(compiled, weights, buffers) if weights else compiled


def _convert(
    module: fx.GraphModule, inputs: Sequence[Any], options: CompileOptions, gradients: bool, timings: Timings
) -> tuple[DynamoGraph, Plan] | None:
    """The converted graph, or None when it holds no attention to convert."""
    try:
        graph = timings.timed("trace", lambda: trace(module, inputs, gradients))
    except CaptureError:
        _specialise_floats(module)
        raise
    normalise(graph.module)
    values = [hint(v) if isinstance(v, torch.SymInt | torch.SymFloat) else v for v in graph.inputs]
    learn_data_sizes(graph.module, values, {})
    analysis = timings.timed("find", lambda: find_sites(graph.module, options.allow_inexact, fixed_caches=True))
    _refuse_carried(analysis)
    for refusal in analysis.refusals:
        log.warning("%s left as it is: %s; to convert: %s", refusal.name, refusal.reason, refusal.advice)
    if analysis.refusals and options.on_refused == "raise":
        analysis.sites.clear()
        analysis.require_sites()
    if not analysis.sites:
        return None
    plans, left = limited(
        timings.timed("plan", lambda: _plans(analysis, options, graph.root())),
        before=sum(not s.identity for g in compiled_graphs() for s in g.plan.sites),
    )
    if left:
        log.warning("left as they are because of %s: %s", VARIABLE, ", ".join(left))
    if not plans or all(p.identity for p in plans.values()):
        log.info("the request leaves every site of this graph as it is")
        return None
    dynamic, static = dynamic_sizes(graph.module)
    captured = Captured(graph.module, tuple(values), {}, None, False, None, dynamic, static)
    outputs = {s.name: _output_weights(analysis, s) for s in analysis.sites}
    parameters = {name: attribute(graph.module, name) for name in graph.names}
    verify = options.verify
    if verify == "auto":
        verify = "float64" if _affordable(analysis) else "native"
        if verify == "native":
            log.info("proved in its own dtype: attention is too large for float64 here (verify=True forces it)")
    try:
        plan, report = convert_graph(captured, analysis, plans, None, verify, timings)
    except NothingRewritten as error:
        if options.on_refused == "raise":
            raise
        log.warning("attention left as it is: %s", error)
        return None
    _guard_identity(graph, options)
    remember(CompiledGraph(plan, report), options.request_key(), outputs, parameters, graph.root())
    for site in report.sites:
        log.info("%s: %d/%d -> %d/%d heads", site.name, site.heads, site.kv_heads, site.hq, site.hkv)
    for refused in report.refused:
        log.warning("%s left as it is: %s; to convert: %s", refused.name, refused.reason, refused.advice)
    return graph, plan


def _may_hold_attention(module: fx.GraphModule) -> bool:
    """False for graphs that need no tracing to know: nothing in them weighs anything."""
    words = ("attention", "softmax", "sigmoid", "relu", "exp", "acos", "softplus", "cdist", "flex")
    return any(
        word in str(getattr(node.target, "__name__", node.target))
        for inner in module.modules()
        if isinstance(inner, fx.GraphModule)
        for node in inner.graph.nodes
        for word in words
    )


def _specialise_floats(module: fx.GraphModule) -> None:
    """Let dynamo trace again with the Python floats among the graph's inputs as constants (guarded), if there are any:
    operators such as dropout need to know them."""
    symbols = []
    for node in module.graph.find_nodes(op="placeholder"):
        memo = getattr(node.meta.get("example_value"), "item_memo", None)
        if memo is not None and node.users and all(user.target == "item" for user in node.users):
            symbols.append(memo.node._expr.name)
    if symbols:
        for symbol in symbols:
            TensorifyState.specialize(symbol)
        raise TensorifyScalarRestartAnalysis


def _refuse_carried(analysis: Analysis) -> None:
    """Refuse sites that would change the shape of an output: the caller of a compiled graph expects the old one."""
    for site in list(analysis.sites):
        if site.carried_outputs:
            _, node = site.carried_outputs[0]
            reason = Refused("an output of the compiled graph carries its heads", node, kind="compiled output")
            analysis.refusals.append(reason.refusal(site.name, site.core.anchor, site.place, site.heads))
            analysis.sites.remove(site)


def _plans(analysis: Analysis, options: CompileOptions, root: nn.Module | None) -> dict[str, SitePlan]:
    given = options.given_plan
    names = {s.name for s in analysis.sites}
    if given is not None:
        return fit_plan(analysis, Plan(tuple(s for s in given.sites if s.name in names)))
    plans = make_plan(analysis, options.hq, options.hkv, options.heads, options.kv_merge, all_patterns=False)
    key = options.request_key()
    known = {
        s.name: remembered(root, s.name, _output_weights(analysis, s), key) for s in analysis.sites if s.name in plans
    }
    before = [replace(plan, name=name) for name, plan in known.items() if plan is not None]
    return {**plans, **fit_plan(analysis, Plan(tuple(before)))}


def _output_weights(analysis: Analysis, site: Site) -> list[Tensor]:
    """What a site is known by from one compilation to the next."""
    return [attribute(analysis.facts.module, use.node.target) for use in site.leaves if use.role == "o"]


# Numbers in the scores of all sites beyond which a proof in float64 would take long beside the compilation.
_PROVABLE = {"cpu": 2**26, "cuda": 2**32}


def _affordable(analysis: Analysis) -> bool:
    total = sum(s.heads * s.q_len * s.kv_len * _batch(s) for s in analysis.sites)
    device = next((p.device.type for p in analysis.facts.module.parameters()), "cpu")
    return total <= _PROVABLE.get(device, _PROVABLE["cpu"])


def _batch(site: Site) -> int:
    elements = math.prod(int(hint(n)) for n in value_of(site.core.value).shape)
    return max(1, elements // max(1, site.heads * site.q_len * site.head_dim))


def _guard_identity(graph: DynamoGraph, options: CompileOptions) -> None:
    """Tie the compiled code to this model where the weights chose the heads: dynamo may run one graph for several
    modules of the same code (layers), and each of them has its own best heads."""
    if (options.heads == "first" and options.given_plan is None) or TracingContext.try_get() is None:
        return
    for root in graph.roots.values():
        install_guard(root.make_guard(GuardBuilder.ID_MATCH))


def _inner(module: fx.GraphModule, inputs: Sequence[Any], options: CompileOptions) -> Compiled:
    """``module`` compiled by the inner compiler."""
    if options.inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = {**(list_mode_options(options.mode) if options.mode else {}), **options.inner_options}
        compiled: Compiled | Any = compile_fx(module, list(inputs), config_patches=patches)
    else:
        inner = torch._dynamo.lookup_backend(options.inner) if isinstance(options.inner, str) else options.inner
        extra: dict[str, Any] = {"mode": options.mode} if options.mode else {}
        if options.inner_options:
            extra["options"] = dict(options.inner_options)
        compiled = inner(module, list(inputs), **extra)
    assert callable(compiled)
    return cast(Compiled, compiled)


def _without_autocast(compiled: Compiled) -> Compiled:
    def call(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return compiled(*args)

    return call
