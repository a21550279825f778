"""Closed-form repair: after heads were dropped, every output projection is fitted again to what the original computed.

Sites are repaired in order, each on what the already repaired ones before it give. The target of a site is the
original's output, plus what the residual stream has lost so far: original residual minus converted residual, where the
output is added to one. Nothing is trained, and no gradients are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from tqdm import tqdm

from sqa_fx.calibration import Batch, Spool
from sqa_fx.passes.cut_nodes import Holders
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.projection import Projection, bias_of, projection, readers
from sqa_fx.passes.refit import Refit, Sums, refit
from sqa_fx.passes.residual import Junction, junction
from sqa_fx.passes.statistics import Watch, by_sample, tokens_first, valid_rows
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
) -> Repair:
    """Fit the output projections of ``converted`` again, in place.

    ``outputs`` names, for each site, the node that makes its output in the two graphs.
    """
    result = Repair()
    left = {n.name: n for n in original.graph.nodes}
    right = {n.name: n for n in converted.graph.nodes}
    order = {n.name: i for i, n in enumerate(original.graph.nodes)}
    names = sorted(outputs, key=lambda s: order[outputs[s][0]])
    turned = _tokens_first(original, [left[outputs[s][0]] for s in names], spool)
    for site in tqdm(names, desc="repair", unit="site", disable=hidden(), leave=False):
        before, after = left[outputs[site][0]], right[outputs[site][1]]
        made, was = projection(converted, after), projection(original, before)
        if made is None or was is None:
            result.notes.append(f"site {site!r} is not repaired: its output projection is not one matrix")
            continue
        why = _shared(converted, made, plan)
        if why:
            result.notes.append(f"site {site!r} is not repaired: {why}")
            continue
        found = _fit(original, converted, was, made, _residuals(before, right), spool, was.activation in turned)
        if found is None:
            result.notes.append(f"site {site!r} is not repaired: no sample is left to hold out (one in {HELD_OUT} is)")
            continue
        result.sites[site] = found
        if found.weight is not None:
            _put(converted, made, found, result)
    return result


def _shared(module: fx.GraphModule, made: Projection, plan: Plan) -> str:
    """Why the parameters of a projection cannot be changed: something else reads them; '' when nothing does."""
    for name in (made.weight, made.bias):
        nodes = [n for n in module.graph.find_nodes(op="get_attr") if str(n.target) == name]
        if any(len(n.users) != 1 for n in nodes) or len(nodes) > 1:
            return f"parameter {name} is read in several places"
    node = next(n for n in module.graph.find_nodes(op="get_attr") if str(n.target) == made.weight)
    if len(readers(module, node)) != 1:
        return f"parameter {made.weight} is read in several places"
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


def _fit(
    original: fx.GraphModule,
    converted: fx.GraphModule,
    was: Projection,
    made: Projection,
    residuals: tuple[fx.Node, fx.Node] | None,
    spool: Spool,
    turned: bool,
) -> Refit | None:
    """The fit of one site; None without any data to hold out. ``turned``: its rows run over tokens first."""
    weight = made.matrix(torch.as_tensor(attribute(converted, made.weight)).detach()).double()
    bias = bias_of(converted, made)
    sums = [Sums.zeros(weight.size(1), weight.size(0), weight.device) for _ in range(2)]
    sample = 0
    for batch in spool:
        wanted = [was.node, *([residuals[0]] if residuals else [])]
        given = [made.activation, *([residuals[1]] if residuals else [])]
        targets, inputs = _values(original, wanted, batch), _values(converted, given, batch)
        t = was.rows_out(targets[was.node]).double()
        if residuals is not None:
            lost = targets[residuals[0]].double() - inputs[residuals[1]].double()
            t = t + was.rows_out(lost.reshape(targets[was.node].shape))
        x = by_sample(made.rows_in(inputs[made.activation]), batch.samples, turned)
        t = by_sample(t, batch.samples, turned)
        groups = (torch.arange(x.shape[0]) * _parts(x, batch)) // x.shape[0] + sample
        sample += _parts(x, batch)
        keep = valid_rows(x, batch.mask)
        held = ((groups % HELD_OUT) == HELD_OUT - 1).to(x.device)
        for own, rows in zip(sums, (~held, held), strict=True):
            rows = rows if keep is None else rows & keep
            if bool(rows.any()):
                own.add(x[rows], t[rows])
    if not sums[1].count:
        return None
    return refit(sums[0], sums[1], weight, None if bias is None else bias.double())


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


def _put(module: fx.GraphModule, made: Projection, found: Refit, result: Repair) -> None:
    """Give the projection its new weight and bias; the tensors that were there stay as they are for others."""
    assert found.weight is not None
    held = attribute(module, made.weight)
    new = {made.weight: made.parameter(held, found.weight)}
    if made.bias is not None and made.bias_index is not None and found.bias is not None:
        old = attribute(module, made.bias)
        flat = old.detach().clone().reshape(-1)
        flat[made.bias_index.to(flat.device)] = found.bias.to(flat)
        new[made.bias] = flat.reshape(old.shape)
    holders = Holders(module)
    for name, tensor in new.items():
        holders.put(attribute(module, name), tensor)
        result.tensors[f"refitted/{name}"] = tensor.detach().cpu()
