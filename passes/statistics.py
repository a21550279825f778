"""What head choice, KV merging and repair need to know of a site's activations, summed up over batches.

Sums are kept in float64 and grow with the width of a layer, never with the amount of data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sqa_fx.passes.site_projections import HeadProjection
from sqa_fx.passes.widened import Widened

Flat = list[Any]
"""The inputs of a graph, one for each placeholder."""
Ordered = Callable[[fx.Node, Tensor], Tensor]
"""Rows of a node to the same rows, those of a sample together."""
Loss = Callable[[Sequence[Any]], Tensor]
"""The graph's outputs to a number whose gradient is wanted."""


@dataclass
class Moments:
    """Number, sum and second moments of rows x [n, width]."""

    width: int
    count: float = 0.0
    total: Tensor | None = None
    second: Tensor | None = None

    def add(self, x: Tensor, other: Tensor | None = None) -> None:
        """Add rows; ``other`` [n, more] gives x^T other instead of x^T x."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y = x if other is None else other.to(x)
        total, second = x.sum(0).double(), (x.T @ y).double()
        self.count += x.shape[0]
        self.total = total if self.total is None else self.total + total
        self.second = second if self.second is None else self.second + second

    def __add__(self, other: Moments) -> Moments:
        if self.total is None or other.total is None:
            return self if other.total is None else other
        assert self.second is not None and other.second is not None
        return Moments(self.width, self.count + other.count, self.total + other.total, self.second + other.second)

    def centred(self) -> Tensor:
        """The second moments about the mean, summed over rows."""
        assert self.second is not None and self.total is not None
        return self.second - torch.outer(self.total, self.total) / max(self.count, 1.0)


@dataclass
class SiteStatistics:
    """The activations of one site over all batches.

    ``output`` are the moments of the output projection's input, in the order of its matrix's columns. ``norms`` [heads]
    sums the Euclidean norm of every head's output over tokens; ``taylor`` and ``fisher`` [heads] sum, over samples, the
    magnitude and the square of the head's output times the gradient of the loss with respect to it. ``queries``,
    ``keys`` and ``values`` are the moments of the projections' outputs.
    """

    projection: HeadProjection
    weight: Tensor
    has_bias: bool
    query_projection: HeadProjection | None
    key_projection: HeadProjection | None
    value_projection: HeadProjection | None
    output: Moments
    queries: Moments | None
    keys: Moments | None
    values: Moments | None
    norms: Tensor
    taylor: Tensor
    fisher: Tensor
    samples: int = 0

    def __add__(self, other: SiteStatistics) -> SiteStatistics:
        """The statistics of two sites that share their parameters."""
        return replace(
            self,
            output=self.output + other.output,
            norms=self.norms + other.norms,
            taylor=self.taylor + other.taylor,
            fisher=self.fisher + other.fisher,
            samples=self.samples + other.samples,
        )

    @property
    def moments(self) -> Tensor:
        """The second moments that a refit of the output projection sees: about the mean where it has a bias."""
        assert self.output.second is not None
        return self.output.centred() if self.has_bias else self.output.second


class Watch(Widened):
    """Runs a graph in its own dtype and without dropout, and shows the values of some nodes; stops after the last."""

    def __init__(self, module: fx.GraphModule, seen: Mapping[fx.Node, Callable[[Tensor], Tensor | None]]) -> None:
        super().__init__(module, wide=False)
        self.seen = seen
        self.stops = True
        order = {n: i for i, n in enumerate(module.graph.nodes)}
        self.last = max(seen, key=order.__getitem__) if seen else None

    def run_node(self, n: fx.Node) -> Any:
        """See fx.Interpreter. What a callback gives back takes the value's place."""
        result = super().run_node(n)
        if n in self.seen:
            replaced = self.seen[n](result)
            result = result if replaced is None else replaced
            if n is self.last and self.stops:
                raise Done
        return result

    def show(self, inputs: Flat) -> None:
        """Run as far as the last watched node, without gradients."""
        self.env = {}
        with torch.no_grad():
            try:
                self.run(*inputs, enable_io_processing=False)
            except Done:
                pass
            finally:
                self.env = {}


class Done(Exception):
    """Raised to stop a run whose rest nobody looks at."""


def gradients(
    module: fx.GraphModule, inputs: Flat, activations: Mapping[str, fx.Node], loss: Loss
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each site the value of its activation node and the gradient of ``loss`` of the graph's outputs there."""
    values: dict[str, Tensor] = {}

    def gate(name: str) -> Callable[[Tensor], Tensor]:
        def passed(value: Tensor) -> Tensor:
            # The factor makes it differentiable also where all parameters are frozen.
            one = torch.ones((), dtype=value.dtype, device=value.device, requires_grad=True)
            values[name] = value * one
            return values[name]

        return passed

    run = Watch(module, {node: gate(name) for name, node in activations.items()})
    run.stops = False
    with torch.enable_grad():
        outputs = pytree.tree_leaves(run.run(*inputs, enable_io_processing=False))
        found = torch.autograd.grad(loss(outputs), list(values.values()), allow_unused=True)
    return {
        name: (value.detach(), torch.zeros_like(value) if g is None else g.detach())
        for (name, value), g in zip(values.items(), found, strict=True)
    }


def tokens_first(
    module: fx.GraphModule, rows: Mapping[fx.Node, Callable[[Tensor], Tensor]], inputs: Flat, batch: int
) -> set[fx.Node]:
    """The nodes whose rows run over tokens first and samples then, found out by trial: with the samples of the inputs
    in another order, the rows come in another order. ``rows`` makes a matrix [n, width] of each node's value."""
    if batch < 2 or not rows:
        return set()
    rolled = [v.roll(1, 0) if isinstance(v, Tensor) and v.dim() and v.shape[0] == batch else v for v in inputs]
    plain, other = _fingerprints(module, rows, inputs), _fingerprints(module, rows, rolled)
    found = set()
    for node, a in plain.items():
        if a.shape != other[node].shape or len(a) % batch:
            continue
        by_samples = (a.reshape(batch, -1).roll(1, 0).reshape(-1) - other[node]).abs().sum()
        by_tokens = (a.reshape(-1, batch).roll(1, 1).reshape(-1) - other[node]).abs().sum()
        if 100 * by_tokens < by_samples:
            found.add(node)
    return found


def _fingerprints(
    module: fx.GraphModule, rows: Mapping[fx.Node, Callable[[Tensor], Tensor]], inputs: Flat
) -> dict[fx.Node, Tensor]:
    """A number for every row of every node."""
    found: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node, value: Tensor) -> None:
        x = rows[node](value).double().nan_to_num()
        found[node] = x @ torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype, device=x.device)

    Watch(module, {n: lambda value, n=n: keep(n, value) for n in rows}).show(inputs)  # type: ignore[misc]
    return found


def by_sample(rows: Tensor, batch: int, turned: bool) -> Tensor:
    """Rows [n, width] of ``batch`` samples with those of a sample together; ``turned`` when they run over tokens
    first."""
    if not turned or rows.shape[0] % batch:
        return rows
    return rows.reshape(-1, batch, rows.shape[1]).transpose(0, 1).reshape(rows.shape)


def order_of_rows(
    module: fx.GraphModule, statistics: Mapping[str, SiteStatistics], inputs: Flat, batch: int
) -> set[fx.Node]:
    """`tokens_first` of all nodes that statistics are made of."""
    rows: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
    for own in statistics.values():
        rows[own.projection.made.activation] = own.projection.made.rows_in
        for part in (own.query_projection, own.key_projection, own.value_projection):
            if part is not None:
                rows.setdefault(part.made.node, part.made.rows_out)
    return tokens_first(module, rows, inputs, batch)


def valid_rows(rows: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which of the rows [n, width] are valid tokens, as ``mask`` [batch, tokens] says; None when all are, or when the
    rows are not these tokens."""
    if mask is None or mask.numel() != rows.shape[0]:
        return None
    keep = mask.reshape(-1).to(rows.device) != 0
    return None if bool(keep.all()) else keep


def add_batch(
    module: fx.GraphModule,
    statistics: Mapping[str, SiteStatistics],
    inputs: Flat,
    batch: int,
    mask: Tensor | None,
    loss: Loss | None,
    turned: Collection[fx.Node] = (),
) -> None:
    """Add one batch of ``batch`` samples to the statistics of every site; with ``loss`` its gradients too. ``turned``
    are the nodes whose rows run over tokens first."""

    def ordered(node: fx.Node, rows: Tensor) -> Tensor:
        return by_sample(rows, batch, node in turned)

    watched: dict[fx.Node, list[Callable[[Tensor], None]]] = {}

    def watch(node: fx.Node, call: Callable[[Tensor], None]) -> None:
        watched.setdefault(node, []).append(call)

    for own in statistics.values():
        watch(own.projection.made.activation, _output_rows(own, mask, ordered))
        parts = (own.query_projection, own.queries), (own.key_projection, own.keys), (own.value_projection, own.values)
        for part, moments in parts:
            if part is not None and moments is not None:
                watch(part.made.node, _kv_rows(part, moments, mask, ordered))

    def all_of(calls: list[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
        def each(value: Tensor) -> None:
            for call in calls:
                call(value)

        return each

    Watch(module, {node: all_of(calls) for node, calls in watched.items()}).show(inputs)
    if loss is not None:
        activations = {name: own.projection.made.activation for name, own in statistics.items()}
        for name, (value, slope) in gradients(module, inputs, activations, loss).items():
            _add_gradients(statistics[name], value, slope, batch, ordered)


def _output_rows(own: SiteStatistics, mask: Tensor | None, ordered: Ordered) -> Callable[[Tensor], None]:
    def add(value: Tensor) -> None:
        x = ordered(own.projection.made.activation, own.projection.made.rows_in(value))
        keep = valid_rows(x, mask)
        x = x if keep is None else x[keep]
        own.output.add(x)
        for head, columns in enumerate(own.projection.heads):
            own.norms[head] += x[:, columns.to(x.device)].float().norm(dim=1).sum().double().cpu()

    return add


def _kv_rows(part: HeadProjection, moments: Moments, mask: Tensor | None, ordered: Ordered) -> Callable[[Tensor], None]:
    order = torch.cat(part.heads)

    def add(value: Tensor) -> None:
        y = ordered(part.made.node, part.made.rows_out(value)[:, order.to(value.device)])
        keep = valid_rows(y, mask)
        moments.add(y if keep is None else y[keep])

    return add


def _add_gradients(own: SiteStatistics, value: Tensor, slope: Tensor, batch: int, ordered: Ordered) -> None:
    """Per sample and head the sum of value times gradient. Where the rows are no multiple of the samples, all rows
    count as one sample."""
    made = own.projection.made
    product = ordered(made.activation, made.rows_in(value).double() * made.rows_in(slope).double())
    samples = batch if batch and product.shape[0] % batch == 0 else 1
    each = product.reshape(samples, -1, product.shape[1]).sum(1)
    heads = torch.stack([each[:, c.to(each.device)].sum(1) for c in own.projection.heads], 1)
    own.taylor += heads.abs().sum(0).cpu()
    own.fisher += heads.square().sum(0).cpu()
    own.samples += samples
