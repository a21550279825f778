"""The proof of surgery: the changed eager module against the converted graph, output by output, at several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from sqa_fx.flat_program import widened_outputs
from sqa_fx.module import ConvertedModule
from sqa_fx.partly import PartlyConvertedModule
from sqa_fx.passes.capture_ways import fresh, reason
from sqa_fx.passes.eager_widened import EagerWidened, widened
from sqa_fx.passes.other_sizes import other_inputs
from sqa_fx.passes.record import other_sizes, undisturbed
from sqa_fx.passes.verify import distance
from sqa_fx.surgery_calls import FurtherCall
from sqa_fx.surgery_run import Inputs, farthest, output_tensors, run, run_as, tolerance_of

Converted = ConvertedModule | PartlyConvertedModule


@dataclass(frozen=True)
class SurgeryProof:
    """The largest relative error over all outputs and sizes, and what it had to stay under."""

    precision: str
    tolerance: float
    error: float
    outputs: int
    """Tensors that were compared."""
    sizes: tuple[str, ...]
    calls: tuple[str, ...] = ()
    """Other ways of calling the model in which it was compared with the masked original."""

    def to_json(self) -> dict[str, Any]:
        """The proof as JSON-ready data."""
        return {
            "precision": self.precision,
            "tolerance": self.tolerance,
            "error": self.error,
            "outputs": self.outputs,
            "sizes": list(self.sizes),
            "calls": list(self.calls),
        }


@dataclass(frozen=True)
class _Case:
    label: str
    inputs: Inputs
    expected: Any


@dataclass(frozen=True)
class _Further:
    call: FurtherCall
    expected: list[Tensor]


class Comparison:
    """What the converted graph gives at the example sizes and at others, for comparing eager modules with."""

    def __init__(self, converted: Converted, wide: bool) -> None:
        self.converted, self.wide = converted, wide
        self.cases: list[_Case] = []
        self.further: list[_Further] = []

    def add(self, model: nn.Module, inputs: Inputs, further: Sequence[FurtherCall] = ()) -> None:
        """Take up the example inputs and those at other sizes that ``model`` (with its masked weights) runs at, and
        the ``further`` calls.

        Raises whatever the converted graph raises at the example inputs, and the model in a call that is required.
        """
        self.cases.append(_Case("example", inputs, self._outputs(inputs)))
        for label, forms in self._others(inputs):
            for form in forms:
                try:
                    run(model, form, EagerWidened(self.wide))
                    self.cases.append(_Case(label, form, self._outputs(form)))
                except Exception:  # sizes that the model itself, or a graph of it, does not take
                    continue
                break

        for call in further:
            try:
                outputs = output_tensors(run_as(model, call.function, EagerWidened(self.wide)))
            except Exception:
                if call.required:
                    raise
                continue  # the model cannot be called so
            self.further.append(_Further(call, [t.detach().clone() for t in outputs]))

    def _others(self, inputs: Inputs) -> Iterator[tuple[str, list[Inputs]]]:
        if isinstance(self.converted, PartlyConvertedModule):
            for position, form in enumerate(other_sizes(*inputs)):
                yield ("longer", "shorter", "larger batch")[position], [form]
            return
        leaves, spec = pytree.tree_flatten(inputs, is_leaf=lambda value: value is None)
        graph = self.converted.graph_module.graph
        if len(leaves) != len(graph.find_nodes(op="placeholder")):
            return
        for label, forms in other_inputs(graph, leaves):
            yield label, [pytree.tree_unflatten(form, spec) for form in forms]

    def _outputs(self, inputs: Inputs) -> Any:
        args, kwargs = fresh(inputs)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            if isinstance(self.converted, ConvertedModule):
                if self.wide:
                    return widened_outputs(self.converted.graph_module, pytree.tree_leaves((args, kwargs)))
                return self.converted(*args, **kwargs)
            if self.wide:
                args, kwargs = pytree.tree_map(widened, (args, kwargs))
            with undisturbed(self.converted.eager), EagerWidened(self.wide):
                return self.converted(*args, **kwargs)

    def prove(self, model: nn.Module) -> SurgeryProof | str:
        """Compare ``model`` as it is now; a text says what differs."""
        worst, outputs, allowed = 0.0, 0, 0.0
        for case in self.cases:
            try:
                made = run(model, case.inputs, EagerWidened(self.wide))
            except Exception as error:
                return f"it does not run at {case.label} sizes: {reason(error)}"
            pairs = _pairs(case.expected, made)
            if isinstance(pairs, str):
                return f"{pairs} ({case.label} sizes)"
            allowed = max(allowed, tolerance_of([e for e, _ in pairs]))
            for expected, actual in pairs:
                apart = distance(expected, actual.to(expected.dtype))
                if not apart <= allowed:
                    return (
                        f"an output differs from the converted graph's at {case.label} sizes: relative error "
                        f"{apart:.1e}, tolerance {allowed:.0e}"
                    )
                worst = max(worst, apart)
            outputs += len(pairs)
        for entry in self.further:
            try:
                made = run_as(model, entry.call.function, EagerWidened(self.wide))
            except Exception as error:
                return f"it does not run as {entry.call.label}: {reason(error)}"
            apart, limit = farthest(entry.expected, output_tensors(made)), tolerance_of(entry.expected)
            if not apart <= limit:
                return f"called as {entry.call.label}, it differs from the masked original: relative error {apart:.1e}"
            worst, allowed = max(worst, apart), max(allowed, limit)
        if not outputs:
            return "the model has no output that could be compared"
        precision = "float64" if self.wide else "the model's own dtype"
        sizes, calls = (case.label for case in self.cases), (entry.call.label for entry in self.further)
        return SurgeryProof(precision, allowed, worst, outputs, tuple(sizes), tuple(calls))


def _pairs(expected: Any, actual: Any) -> list[tuple[Tensor, Tensor]] | str:
    """The tensors of both, side by side; what the graph left out (a cache that nobody asked for) does not count."""
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        missing = [name for name in expected if name not in actual]
        if missing:
            return f"the output {missing[0]!r} is missing"
        actual = {name: actual[name] for name in expected}
        expected = dict(expected)
    wanted, got = output_tensors(expected), output_tensors(actual)
    if len(wanted) != len(got):
        return f"{len(got)} output tensors instead of {len(wanted)}"
    return list(zip(wanted, got, strict=True))
