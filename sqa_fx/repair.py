"""Closed-form repair: after heads were dropped, values and output projections are fitted to what all heads computed.

Sites are repaired in order, each on what the already repaired ones before it give. The target of a site is the
original's output, plus what the residual stream has lost so far: original residual minus converted residual, where the
output is added to one. The output projection alone is fitted first, and then the values with it (see
passes/refit_values), where these are a projection of the site's own; on held-out data the best of these and of the
old weights wins. Nothing is trained, and no gradients are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx
from tqdm import tqdm

from sqa_fx.calibration import Batch, Spool
from sqa_fx.passes.cut_nodes import Holders
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.projection import Projection, bias_of, projection, read_elsewhere, weight_of
from sqa_fx.passes.refit import Refit, Sums, refit
from sqa_fx.passes.refit_values import refit_values
from sqa_fx.passes.residual import Junction, junction
from sqa_fx.passes.site import Site
from sqa_fx.passes.statistics import SiteStatistics, Watch, by_sample, tokens_first, valid_rows
from sqa_fx.passes.value_path import ValuePath, value_path
from sqa_fx.plan import Plan
from sqa_fx.progress import hidden

HELD_OUT = 4
"""Every so many samples one is held out."""


@dataclass
class Repair:
    """What was fitted again: new tensors by parameter, the errors by site, and why sites were left as they are."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sites: dict[str, Refit] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def repair(
    original: fx.GraphModule,
    converted: fx.GraphModule,
    plan: Plan,
    outputs: Mapping[str, tuple[str, str]],
    spool: Spool,
    before: Mapping[str, tuple[Site, SiteStatistics]],
) -> Repair:
    """Fit the projections of ``converted`` again, in place.

    ``outputs`` names, for each site, the node that makes its output in the two graphs. ``before`` holds what the sites
    of the original looked like; the values of those that are not in it stay as they are.
    """
    result = Repair()
    left = {n.name: n for n in original.graph.nodes}
    right = {n.name: n for n in converted.graph.nodes}
    order = {n.name: i for i, n in enumerate(original.graph.nodes)}
    names = sorted(outputs, key=lambda s: order[outputs[s][0]])
    turned = _tokens_first(original, [left[outputs[s][0]] for s in names], spool)
    for site in tqdm(names, desc="repair", unit="site", disable=hidden(), leave=False):
        first, after = left[outputs[site][0]], right[outputs[site][1]]
        made, was = projection(converted, after), projection(original, first)
        if made is None or was is None:
            result.notes.append(f"site {site!r} is not repaired: its output projection is not one matrix")
            continue
        why = read_elsewhere(converted, made) or _not_alone(made, plan)
        if why:
            result.notes.append(f"site {site!r} is not repaired: {why}")
            continue
        path = value_path(original, converted, plan, *before[site], made) if site in before else None
        fit = _Fit(converted, made, path if isinstance(path, ValuePath) else None)
        fit.read(original, was, _residuals(first, right), spool, was.activation in turned)
        why = path if isinstance(path, str) else fit.not_linear
        if why:
            result.notes.append(f"the values of site {site!r} are not repaired: {why}")
        if not fit.sums[1].count:
            result.notes.append(f"site {site!r} is not repaired: no sample is left to hold out (one in {HELD_OUT} is)")
            continue
        result.sites[site] = fit.put(result)
    return result


def _not_alone(made: Projection, plan: Plan) -> str:
    """Why an output projection cannot be changed as a whole; '' when it can."""
    cut = next((p for p in plan.parameters if p.name == made.weight), None)
    if cut is not None and any(b.role not in ("o", "rest") or len(b.sources) > 1 for b in cut.blocks):
        return f"parameter {made.weight} holds other projections too"
    return ""


def _residuals(before: fx.Node, right: Mapping[str, fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """What is added to the site's output in the two graphs; None where nothing is, or where it cannot be told."""
    found: Junction | None = junction(before)
    if found is None or found.node.name not in right:
        return None
    same = right[found.node.name]
    position = found.node.args.index(found.other)
    other = same.args[position]
    return (found.other, other) if isinstance(other, fx.Node) else None


class _Fit:
    """The fit of one site of ``module`` whose output projection is ``made``; of its values too where there is a
    ``path`` from them, and what lies on it is linear in them."""

    def __init__(self, module: fx.GraphModule, made: Projection, path: ValuePath | None) -> None:
        self.module, self.made, self.path = module, made, path
        self.weight = weight_of(module, made).double()
        bias = bias_of(module, made)
        self.bias = None if bias is None else bias.double()
        out, width = self.weight.shape
        device = self.weight.device
        self.sums = (Sums.zeros(width, out, device), Sums.zeros(width, out, device))
        self.maps = None if path is None else path.maps(self.weight)
        self.features: tuple[Sums, Sums] | None = None
        self.not_linear = ""

    def read(
        self,
        original: fx.GraphModule,
        was: Projection,
        residuals: tuple[fx.Node, fx.Node] | None,
        spool: Spool,
        turned: bool,
    ) -> None:
        """Sum up all batches. ``turned``: the site's rows run over tokens first."""
        sample = 0
        for batch in spool:
            wanted = [was.node, *([residuals[0]] if residuals else [])]
            given = [self.made.activation, *([residuals[1]] if residuals else [])]
            given += self.path.wanted if self.path is not None else ()
            targets, inputs = _values(original, wanted, batch), _values(self.module, given, batch)
            t = was.rows_out(targets[was.node]).double()
            if residuals is not None:
                lost = targets[residuals[0]].double() - inputs[residuals[1]].double()
                t = t + was.rows_out(lost.reshape(targets[was.node].shape))

            def rows_of(value: Tensor, batch: Batch = batch) -> Tensor:
                return by_sample(self.made.rows_in(value), batch.samples, turned)

            x, t = rows_of(inputs[self.made.activation]), by_sample(t, batch.samples, turned)
            groups = (torch.arange(x.shape[0]) * _parts(x, batch)) // x.shape[0] + sample
            sample += _parts(x, batch)
            held = ((groups % HELD_OUT) == HELD_OUT - 1).to(x.device)
            keep = valid_rows(x, batch.mask)
            keep = torch.ones_like(held) if keep is None else keep
            z = self._features(x, inputs, rows_of)
            for number, rows in enumerate((~held & keep, held & keep)):
                if bool(rows.any()):
                    self.sums[number].add(x[rows], t[rows])
                    if z is not None and self.features is not None:
                        self.features[number].add(z[rows].flatten(1), t[rows])

    def _features(
        self, x: Tensor, inputs: Mapping[fx.Node, Tensor], rows_of: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        if self.path is None or self.maps is None:
            return None
        z = self.path.features(inputs, rows_of)
        if self.features is None:
            if not self.path.holds(z, inputs, rows_of, self.maps, x):
                why = "what lies between them and the output projection is not linear in them"
                self.path, self.not_linear = None, why
                return None
            width, out = z[0].numel(), len(self.weight)
            self.features = (Sums.zeros(width, out, z.device), Sums.zeros(width, out, z.device))
        return z

    def put(self, result: Repair) -> Refit:
        """Give the projections the weights that win on the held-out rows."""
        found = refit(*self.sums, self.weight, self.bias)
        both = None
        if self.path is not None and self.maps is not None and self.features is not None:
            both = refit_values(*self.features, self.maps, self.bias, self.path.reads, found)
        if both is not None and self.path is not None:
            maps, found = both
            _put(self.module, self.path.made, *self.path.fitted(maps), result)
            assert found.weight is not None
            weight = self.weight.clone()
            weight[:, self.path.columns.flatten().to(weight.device)] = found.weight
            found = replace(found, weight=weight)
        if found.weight is not None:
            _put(self.module, self.made, found.weight, found.bias, result)
        return found


def _tokens_first(module: fx.GraphModule, outputs: list[fx.Node], spool: Spool) -> set[fx.Node]:
    """The inputs of the output projections whose rows run over tokens first."""
    rows = {p.activation: p.rows_in for node in outputs if (p := projection(module, node)) is not None}
    batch = next((b for b in spool if b.samples > 1), None)
    return set() if batch is None else tokens_first(module, rows, batch.inputs, batch.samples)


def _parts(x: Tensor, batch: Batch) -> int:
    """In how many parts the rows are split: samples, or eighths of a single one."""
    return batch.samples if batch.samples > 1 and x.shape[0] % batch.samples == 0 else min(8, x.shape[0])


def _values(module: fx.GraphModule, nodes: list[fx.Node], batch: Batch) -> dict[fx.Node, Tensor]:
    found: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node, value: Tensor) -> None:
        found[node] = value

    Watch(module, {n: lambda value, n=n: keep(n, value) for n in nodes}).show(batch.inputs)  # type: ignore[misc]
    return found


def _put(module: fx.GraphModule, made: Projection, weight: Tensor, bias: Tensor | None, result: Repair) -> None:
    """Give a projection its new weight and bias; the tensors that were there stay as they are for others."""
    new = {made.weight: made.parameter(attribute(module, made.weight), weight)}
    if made.bias is not None and made.bias_index is not None and bias is not None:
        old = attribute(module, made.bias)
        flat = old.detach().clone().reshape(-1)
        flat[made.bias_index.to(flat.device)] = bias.to(flat)
        new[made.bias] = flat.reshape(old.shape)
    holders = Holders(module)
    for name, tensor in new.items():
        holders.put(attribute(module, name), tensor)
        result.tensors[f"refitted/{name}"] = tensor.detach().cpu()
