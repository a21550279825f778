"""The first attention whose output an engine computes differently: a bisection over engines that show one more value.

An engine is a black box, but the graph that it is built from is not: a copy of the graph that also returns the output
of attention site i is built into an engine of its own, and that output is judged as `sqa_fx.validate` judges any other.
"""

from __future__ import annotations

import copy
import inspect
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sqa_fx.errors import InputError, NoAttentionError
from sqa_fx.module import ConvertedModule
from sqa_fx.passes.capture import capture, clone_graph
from sqa_fx.passes.capture_ways import quiet
from sqa_fx.passes.find import GraphFacts, find_cores
from sqa_fx.passes.locate import Place, named, place
from sqa_fx.runners import OnnxRunner, Runner, module_dtype
from sqa_fx.storage import dynamic_shapes_of
from sqa_fx.validate import InputSet, OutputComparison, validate

Build = Callable[[ExportedProgram], Runner]
"""Makes an engine of a program. The program takes the inputs of the model and returns ``{"outputs": what the model
returns, "site": the output of one attention}``."""


@dataclass(frozen=True)
class AttentionOutput:
    """An attention of a graph: its name as in reports, where it is, and the node that holds its output, whose shape
    is ``[..., query positions, head dim]``."""

    name: str
    at: Place
    node: str


@dataclass(frozen=True)
class Divergence:
    """Where an engine first differs from its graph in float64.

    ``site`` is the attention, None when all of them agree and the outputs do not. ``error`` is the largest absolute
    difference of the site's output (without a site, of the model's), ``tolerance`` what it should have stayed under;
    ``problem`` says it in words. ``agrees_until`` is the attention before, which was seen to agree (None: there is
    none). ``engines`` were built, of ``sites`` attentions. ``notes`` are those of `sqa_fx.validate.ValidationReport`.
    """

    site: str | None
    location: str
    error: float
    tolerance: float
    problem: str
    agrees_until: str | None
    engines: int
    sites: int
    reference_dtype: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The answer as JSON-ready data; numbers that are not finite become null."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        engines = f"{self.engines} engine{'s' * (self.engines != 1)} built for {self.sites} sites"
        if self.site is None:
            return f"the engine first differs after the last site, {self.agrees_until!r}: {self.problem} ({engines})"
        before = f"; {self.agrees_until!r} before it agrees" if self.agrees_until is not None else "; it is the first"
        site = named(self.site, Place(self.location))
        return f"the engine first differs at site {site}: {self.problem}{before} ({engines})"


def first_divergent_site(
    module: ConvertedModule | ExportedProgram,
    build: Build,
    inputs: InputSet,
    *,
    atol: float | None = None,
) -> Divergence | None:
    """The first attention of ``module``, in execution order, whose output differs in the engine that ``build`` makes;
    None when the engine agrees on ``inputs`` (args, kwargs).

    Each engine is compared with the float64 run of the very graph that it was built from, by the rule of
    `sqa_fx.validate.validate`. About log2 of the number of sites are built, on the premise that behind a site that
    differs all others do, too. The answer itself does not rest on it: the site named was seen to differ, and the one
    before it to agree. Attentions in branches that do not feed each other break the premise; then another site that
    differs may come earlier. The extra output can change how an engine fuses the graph, so that it agrees after all.

    Raises InputError when an engine does not run or returns other outputs than its program, NoAttentionError when the
    graph holds no attention, and what ``build`` raises.
    """
    subject = _Subject.of(module, inputs)
    sites = attention_outputs(subject.graph_module)
    if not sites:
        raise NoAttentionError("the graph holds no attention, so there is no site to look for: compare its outputs")
    agrees, differs, engines = -1, len(sites), 0  # in front of the first site is the input, behind the last the output
    found: tuple[OutputComparison, str, tuple[str, ...]] | None = None
    while differs - agrees > 1:
        middle = (agrees + differs) // 2
        engines += 1
        outputs, at_site, dtype, notes = subject.probe(sites[middle], build, atol)
        if engines == 1 and outputs.passed and at_site.passed:
            return None
        if not at_site.passed:
            differs, found = middle, (at_site, dtype, notes)
            continue
        agrees = middle
        if differs == len(sites):
            found = None if outputs.passed else (outputs, dtype, notes)
    if found is None:
        raise InputError(
            f"the engine differs on these inputs with one site as an extra output and agrees with {sites[-1].name!r}: "
            "what it computes depends on what it returns; compare whole outputs with validate"
        )
    comparison, dtype, notes = found
    site = sites[differs] if differs < len(sites) else None
    return Divergence(
        site=site.name if site else None,
        location=site.at.where if site else "",
        error=comparison.max_abs,
        tolerance=comparison.tolerance,
        problem=comparison.problem or "",
        agrees_until=sites[agrees].name if agrees >= 0 else None,
        engines=engines,
        sites=len(sites),
        reference_dtype=dtype,
        notes=notes,
    )


def onnx_engine(program: ExportedProgram) -> Runner:
    """A ``build`` for ONNX Runtime on the CPU; the file is gone once the session holds it. Raises what
    `sqa_fx.exporters.to_onnx.export_onnx` and `sqa_fx.runners.OnnxRunner` do."""
    from sqa_fx.exporters.to_onnx import export_onnx

    with tempfile.TemporaryDirectory(prefix="sqa-fx-") as folder:
        return OnnxRunner(export_onnx(program, Path(folder) / "probe.onnx", check=False).path)


def attention_outputs(module: fx.GraphModule) -> list[AttentionOutput]:
    """The attentions of a captured graph in execution order, under the names that reports give them (a site of several
    attentions has them as "name", "name#2")."""
    facts = GraphFacts(module)
    cores = sorted(find_cores(facts).cores, key=lambda found: facts.order[found[1].value])
    return [AttentionOutput(name, place(core.anchor), core.value.name) for name, core in cores]


# --- engines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """A graph, the example inputs and dynamic shapes that it is exported with, and the inputs to compare on."""

    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any
    inputs: InputSet

    @classmethod
    def of(cls, module: ConvertedModule | ExportedProgram, inputs: InputSet) -> _Subject:
        args, kwargs = tuple(inputs[0]), dict(inputs[1])
        if isinstance(module, ExportedProgram):
            captured = capture(module, *(module.example_inputs or (args, kwargs)))
            names = list(inspect.signature(module.module(check_guards=False).forward).parameters)
            shapes = dynamic_shapes_of(module, names)
            return cls(captured.graph_module, captured.args, captured.kwargs, shapes, (args, kwargs))
        if module.training:
            module = copy.deepcopy(module).eval()
        bound = module._binder.bind(args, kwargs, module_dtype(module))
        examples = (tuple(module.example_args), dict(module.example_kwargs))
        positional, named_ones = pytree.tree_map(_as_now, examples, bound)
        return cls(module.graph_module, positional, named_ones, module.dynamic_shapes, bound)

    def probe(
        self, site: AttentionOutput, build: Build, atol: float | None
    ) -> tuple[OutputComparison, OutputComparison, str, tuple[str, ...]]:
        """The worst comparison of the outputs, that of ``site``, and how the reference was run, on one new engine."""
        shown = _with_output(self.graph_module, site.node)
        with quiet():
            program = torch.export.export(
                shown, self.args, dict(self.kwargs), dynamic_shapes=self.dynamic_shapes, strict=False
            )
        report = validate(shown, [build(program)], [self.inputs], atol=atol)
        *outputs, at_site = report.comparisons
        if at_site.output != "site":
            raise InputError(f"the engine that shows site {site.name!r} cannot be compared: {at_site.problem}")
        worst = next((c for c in outputs if not c.passed), outputs[0])
        return worst, at_site, report.reference_dtype, report.notes


def _as_now(example: Any, value: Any) -> Any:
    """The example input in the dtype and on the device of the one to compare on: the module may have been moved."""
    return example.to(value.device, value.dtype) if isinstance(example, Tensor) else example


def _with_output(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """A copy that shares the parameters of ``module`` and returns ``{"outputs": what it returns, "site": node}``."""
    shown = clone_graph(module)
    node = next(n for n in shown.graph.nodes if n.name == name)
    output = shown.graph.output_node()
    returned = output.args[0]
    assert isinstance(returned, tuple | list)
    output.args = ((*returned, node),)
    codegen: Any = shown.graph._codegen
    spec = pytree.treespec_dict({"outputs": codegen.pytree_info.out_spec, "site": pytree.treespec_leaf()})
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    shown.recompile()
    return shown
