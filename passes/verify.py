"""Verify: the original graph with masked weights must compute what the rewritten graph computes.

The oracle side runs the original graph unedited. Only weights differ, and they come from the plan as data: columns of
the output projection that belong to dropped heads are zero, and the weights of merged heads are replaced by what the
merged head got. No rewriting code is involved, so agreement validates the rewrite on the user's own model and inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from sqa_fx.errors import PlanError, VerifyError
from sqa_fx.passes.aten_call import op_name
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.locate import named, place
from sqa_fx.passes.other_sizes import other_inputs
from sqa_fx.passes.parameters import cut_tensor, mean
from sqa_fx.passes.rotation import turned_weights
from sqa_fx.passes.widened import Widened
from sqa_fx.plan import ParameterPlan, Plan, from_ranges

Precision = Literal["float64", "native"]
# Largest |difference| over the largest |value| that still counts as equal: both sides round differently, nothing more.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class OriginalFails(Exception):
    """The original graph itself does not run: in float64, or at other sizes."""


@dataclass(frozen=True)
class SiteProof:
    """How far one site's output is from the oracle's, relative to the largest value there."""

    name: str
    error: float
    silent: bool
    exact: bool = True
    """False for a site that was converted with allow_inexact: its error is reported, not judged."""


@dataclass(frozen=True)
class Proof:
    """The result of the comparison; ``tolerance`` is what ``error`` (relative) had to stay under."""

    precision: str
    tolerance: float
    error: float
    sites: tuple[SiteProof, ...] = ()
    shapes: int = 1
    """At how many sets of input sizes the graphs were compared."""
    sizes: tuple[str, ...] = ()
    """What these sets were, besides the example inputs."""
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The proof as JSON-ready data."""
        return {
            "precision": self.precision,
            "tolerance": self.tolerance,
            "error": self.error,
            "shapes": self.shapes,
            "sizes": list(self.sizes),
            "sites": [{"name": s.name, "error": s.error, "silent": s.silent, "exact": s.exact} for s in self.sites],
            "notes": list(self.notes),
        }


def worst(first: Proof | None, second: Proof) -> Proof:
    """Two proofs of the same graphs on other inputs as one; a site is silent only where it was in both."""
    if first is None:
        return second
    sites = tuple(
        replace(a, error=max(a.error, b.error), silent=a.silent and b.silent)
        for a, b in zip(first.sites, second.sites, strict=True)
    )
    return replace(
        max(first, second, key=lambda proof: proof.tolerance),
        error=max(first.error, second.error),
        sites=sites,
        shapes=first.shapes + second.shapes,
        sizes=tuple(dict.fromkeys((*first.sizes, *second.sizes))),
        notes=tuple(dict.fromkeys((*first.notes, *second.notes))),
    )


def masked_weights(module: fx.GraphModule, plan: Plan) -> dict[str, Tensor]:
    """The oracle's weights by parameter name: heads turned as the plan says, dropped output columns zero, merged heads
    replaced by their merge, and refitted weights where the plan has them."""
    found = turned_weights(module, plan.rotations, plan.tensors)
    for p in plan.parameters:
        found[p.name] = masked_tensor(found.get(p.name, attribute(module, p.name).detach()), p)
    cuts = {p.name: p for p in plan.parameters}
    for name in plan.refitted:
        new = refitted_tensor(plan, name).to(attribute(module, name))
        found[name] = _in_original_places(found[name], new, cuts[name]) if name in cuts else new
    return found


def refitted_tensor(plan: Plan, name: str) -> Tensor:
    """The new value of a refitted parameter. Raises PlanError when the plan came without its tensors."""
    key = f"refitted/{name}"
    if key not in plan.tensors:
        raise PlanError(
            f"the plan refits {name}, but its tensors are not here: keep the .safetensors file beside the plan"
        )
    return plan.tensors[key]


def _in_original_places(masked: Tensor, new: Tensor, parameter: ParameterPlan) -> Tensor:
    """``new`` (cut) spread over the entries of the original parameter that it stands for, those of all merged heads.
    The others stay as they are (columns of an output projection that were dropped are zero)."""
    spread = masked.clone()
    for block in parameter.blocks:
        to = torch.tensor(from_ranges(block.to), device=new.device)
        own = new.index_select(parameter.axis, to).to(spread)
        for ranges in block.sources if block.role == "o" else block.replaces:
            spread.index_copy_(parameter.axis, torch.tensor(from_ranges(ranges), device=spread.device), own)
    return spread


def masked_tensor(old: Tensor, parameter: ParameterPlan) -> Tensor:
    """One of the oracle's weights from the original one."""
    new = old.clone()
    for block in parameter.blocks:
        if len(block.replaces) > 1:
            merged = mean([_entries(old, parameter.axis, s) for s in block.sources])
            for ranges in block.replaces:
                new.index_copy_(parameter.axis, torch.tensor(from_ranges(ranges), device=old.device), merged)
    if any(block.role == "o" for block in parameter.blocks) and parameter.dropped:
        new.index_fill_(parameter.axis, torch.tensor(from_ranges(parameter.dropped), device=old.device), 0)
    return new


def _entries(tensor: Tensor, axis: int, ranges: Sequence[str]) -> Tensor:
    return tensor.index_select(axis, torch.tensor(from_ranges(ranges), device=tensor.device))


class MaskedRun(Widened):
    """Runs a graph with other weights, in float64 if asked; keeps the values of ``watched`` nodes."""

    def __init__(self, module: fx.GraphModule, weights: Mapping[str, Tensor], wide: bool, watched: set[str]) -> None:
        super().__init__(module, wide)
        self.weights, self.watched = weights, watched
        self.seen: dict[str, Tensor] = {}
        self.written: dict[str, Tensor] = {}
        self.replaced: Mapping[str, Tensor] = {}
        self.narrowed: Mapping[str, tuple[str, int, Sequence[int]]] = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """See fx.Interpreter."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n.name in self.narrowed:
            operand, dim, entries = self.narrowed[n.name]
            whole = next(v for k, v in self.env.items() if k.name == operand)
            part = whole.index_select(dim, torch.tensor(entries, device=whole.device))
            args, kwargs = pytree.tree_map(lambda v: part if v is whole else v, (args, kwargs))
        return args, kwargs

    def run_node(self, n: fx.Node) -> Any:
        """See fx.Interpreter."""
        result = super().run_node(n)
        if n.name in self.watched and isinstance(result, Tensor):
            self.seen[n.name] = result
        if _is_write(n):
            self.written[str(n.args[0].target)] = result  # type: ignore[union-attr]
        return self.replaced.get(n.name, result)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """See fx.Interpreter."""
        if str(target) not in self.weights:
            return super().get_attr(target, args, kwargs)
        return self.widened(self.weights[str(target)])


def verify(
    comparison: Comparison, args: Sequence[Any], kwargs: Mapping[str, Any], precision: Precision = "float64"
) -> Proof:
    """Compare the rewritten graph with the original one under masked weights, at the example sizes and at others.

    Raises VerifyError naming the first site that differs. In float64 both graphs run upcast, so that rounding cannot
    hide or fake a difference; a graph that cannot (an op without float64) runs in its own dtype, and the proof says so.
    Behind a site in ``comparison.inexact`` the rewritten graph goes on with the oracle's value, so that everything
    after it is still proved.
    """
    inputs = pytree.tree_leaves((tuple(args), dict(kwargs)), is_leaf=lambda x: x is None)
    notes: list[str] = []
    if precision == "float64":
        try:
            scales: dict[Any, float] = {}
            proof = comparison.run(inputs, True, notes, scales)
            return _prove_other_sizes(comparison, proof, inputs, scales)
        except OriginalFails as error:
            notes.append(f"the graph does not run in float64 ({error}), so its own dtype was used")
    try:
        return comparison.run(inputs, False, notes)
    except OriginalFails as error:
        raise VerifyError(f"the original graph does not run on the example inputs: {error}") from error


def _prove_other_sizes(comparison: Comparison, proof: Proof, inputs: Sequence[Any], scales: dict[Any, float]) -> Proof:
    """Prove again at other sizes, so that nothing can hang on those of the example. Where the original itself does not
    run at a set of sizes (an image of one pixel), the proof says so."""
    left_out = []
    for name, forms in other_inputs(comparison.original.graph, inputs):
        for form in forms:
            try:
                second = comparison.run(form, True, [], scales)
            except OriginalFails:
                continue
            except VerifyError as error:
                raise VerifyError(f"at other input sizes ({name}): {error}") from error
            proof = worst(proof, replace(second, sizes=(name,)))
            break
        else:
            left_out.append(name)
    if left_out:
        note = f"the original does not run at other input sizes ({'; '.join(left_out)}), so these were not compared"
        proof = replace(proof, notes=(*proof.notes, note))
    return proof


def _is_write(node: fx.Node) -> bool:
    """True for a ``copy_`` into a buffer or an input of the model."""
    target = node.args[0] if node.args else None
    return op_name(node) == "copy_" and isinstance(target, fx.Node) and target.op in ("get_attr", "placeholder")


@dataclass(frozen=True)
class Inexact:
    """What cannot agree with the oracle, because the user allowed it: sites with the reason, and positions of outputs
    that such a site makes directly."""

    sites: Mapping[str, str] = field(default_factory=dict)
    outputs: frozenset[int] = frozenset()
    narrowed: Mapping[str, tuple[str, int, Sequence[int]]] = field(default_factory=dict)
    """Reductions over heads that only become outputs (averaged attention weights): node, operand, dimension, entries.
    The oracle takes them over the kept heads too."""


@dataclass(frozen=True)
class Comparison:
    """An original graph and its rewritten form, and what corresponds to what.

    ``outputs`` maps each site to the nodes that make its output in the two graphs. ``carried`` tells, for each graph
    output that carries heads, the dimension and the original entries that stay; ``plan.inputs`` tells it of inputs.
    """

    original: fx.GraphModule
    rewritten: fx.GraphModule
    plan: Plan
    outputs: Mapping[str, tuple[str, str]]
    carried: Mapping[int, tuple[int, list[int]]]
    inexact: Inexact = field(default_factory=Inexact)

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights that differ from the graphs' own: the masked ones, and for both graphs random contents of the
        caches that are buffers of the model (zeros would prove nothing)."""
        masked = masked_weights(self.original, self.plan)
        written = {str(n.args[0].target) for n in self.original.graph.nodes if _is_write(n)}
        filled: dict[str, Tensor] = {}
        for entry in self.plan.parameters:
            held = attribute(self.original, entry.name)
            if entry.name in written and held.is_floating_point():
                content = torch.randn(held.shape, generator=torch.Generator().manual_seed(0)).to(held)
                masked[entry.name], filled[entry.name] = masked_tensor(content, entry), cut_tensor(content, entry)
        return masked, filled

    def run(self, inputs: Sequence[Any], wide: bool, notes: list[str], scales: dict[Any, float] | None = None) -> Proof:
        """Compare at one set of inputs. Raises VerifyError when the graphs differ, OriginalFails when there is nothing
        to compare with.

        ``scales`` collects the largest value of every output. At other sizes what is far below it (a norm over one
        entry) is rounding, and is judged against a thousandth of it.
        """
        known = dict(scales or {})

        def apart(name: Any, expected: Tensor, actual: Tensor) -> float:
            if scales is not None and name not in known:
                scales[name] = _largest(expected)
            return distance(expected, actual, known.get(name, 0.0) * 1e-3)

        masked, filled = self.weights()
        left = MaskedRun(self.original, masked, wide, {a for a, _ in self.outputs.values()})
        left.narrowed = self.inexact.narrowed
        right = MaskedRun(self.rewritten, filled, wide, {b for _, b in self.outputs.values()})
        whole, smaller = self.caches(inputs)
        with torch.no_grad():
            state = torch.random.get_rng_state()
            try:
                expected = pytree.tree_leaves(left.run(*_fresh(whole), enable_io_processing=False))
            except Exception as failure:  # whatever it is, it is the model's own affair
                raise OriginalFails((str(failure).splitlines() or [type(failure).__name__])[0][:160]) from failure
            torch.random.set_rng_state(state)
            # In the graph's own dtype rounding would add up: every site is judged on the oracle's inputs.
            given = self.inexact.sites if wide else self.outputs
            right.replaced = {self.outputs[s][1]: left.seen[self.outputs[s][0]] for s in given if s in self.outputs}
            try:
                actual = pytree.tree_leaves(right.run(*_fresh(smaller), enable_io_processing=False))
            except (RuntimeError, TypeError, IndexError) as failure:
                raise VerifyError(f"the rewritten graph does not run: {str(failure).splitlines()[0]}") from failure
        dtypes = [t.dtype for t in expected if isinstance(t, Tensor) and t.is_floating_point()]
        lowest = max(dtypes, key=lambda d: TOLERANCE.get(d, 0.0)) if dtypes else torch.float64
        tolerance = TOLERANCE.get(lowest, 1e-10)
        precision = "float64" if wide else str(lowest).removeprefix("torch.")
        proofs = []
        for site, (a, b) in self.outputs.items():
            if a not in left.seen or b not in right.seen:
                raise VerifyError(f"site {site!r} left no output to compare")
            silent = not bool(left.seen[a].abs().max() > 0)
            error = apart(site, left.seen[a], right.seen[b])
            proofs.append(SiteProof(site, error, silent, site not in self.inexact.sites))
        self._judge_sites(proofs, tolerance, precision)
        worst = 0.0
        for position, (e, r) in enumerate(zip(expected, actual, strict=True)):
            if isinstance(e, Tensor) and position not in self.inexact.outputs:
                if position in self.carried:
                    dim, entries = self.carried[position]
                    e = e.index_select(dim, torch.tensor(entries, device=e.device))
                worst = max(worst, apart(position, e, r))
        cuts = {p.name: p for p in (*self.plan.parameters, *self.plan.inputs)}
        for name, e in left.written.items():
            r = right.written.get(name)
            cut = cut_tensor(e, cuts[name]) if name in cuts else e
            worst = max(worst, apart(("written", name), cut, r) if r is not None else float("inf"))
        if not worst <= tolerance:
            raise VerifyError(
                "every site agrees with the masked original, but the outputs (or what is written into caches) differ: "
                f"relative error {worst:.3g}, tolerance {tolerance:.3g}"
            )
        silent_sites = [p.name for p in proofs if p.silent]
        if silent_sites:
            names = ", ".join(silent_sites)
            notes.append(f"these sites gave zeros on the example inputs, which proves nothing about them: {names}")
        notes.extend(
            f"site {p.name!r} is inexact, as allowed: {self.inexact.sites[p.name]}; its output differs from the masked "
            f"original by {p.error:.2g} (relative)"
            for p in proofs
            if not p.exact
        )
        return Proof(precision, tolerance, worst, tuple(proofs), notes=tuple(notes))

    def caches(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The inputs for both graphs: in caches, the oracle's merged heads are equal, and the rewritten graph gets
        them once."""
        plans = {p.name: p for p in self.plan.inputs}
        names = [str(n.target) for n in self.original.graph.find_nodes(op="placeholder")]
        whole, smaller = list(inputs), list(inputs)
        for i, name in enumerate(names):
            if name in plans:
                whole[i] = masked_tensor(inputs[i].detach(), plans[name])
                smaller[i] = cut_tensor(whole[i], plans[name])
        return whole, smaller

    def _judge_sites(self, proofs: Sequence[SiteProof], tolerance: float, precision: str) -> None:
        bad = next((p for p in proofs if p.exact and not p.error <= tolerance), None)
        if bad is not None:
            output = next(n for n in self.original.graph.nodes if n.name == self.outputs[bad.name][0])
            raise VerifyError(
                "the rewritten graph differs from the masked original, first at site "
                f"{named(bad.name, place(output))}: relative error {bad.error:.3g}, tolerance {tolerance:.3g} "
                f"({precision}). The model was not converted; please report the site, and leave it out with a mapping "
                "of site patterns"
            )


def _fresh(inputs: Sequence[Any]) -> list[Any]:
    return [v.detach().clone() if isinstance(v, Tensor) else v for v in inputs]


def _largest(values: Tensor) -> float:
    """The largest magnitude among finite ones."""
    if not (values.is_floating_point() or values.is_complex()):
        return 0.0
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def distance(expected: Tensor, actual: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest expected magnitude (or ``floor``, if that is larger); infinite for other
    shapes, or NaN on one side only."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if bool((expected == actual).all()) else float("inf")
    nan, inf = expected.isnan(), expected.isinf()
    if bool((nan != actual.isnan()).any()) or bool((expected[inf] != actual[inf]).any()):
        return float("inf")
    finite = ~(nan | inf)
    if not bool(finite.any()):
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected[finite].to(wide), actual[finite].to(wide)
    gap = float((a - b).abs().max())
    scale = max(float(a.abs().max()), floor)
    return gap / scale if scale > 0 else (0.0 if gap == 0 else float("inf"))
