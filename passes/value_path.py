"""From the values of a converted site to the input of its output projection, with attention as it is.

Whatever lies between (attention in any form, transposes, views) is linear in the values and treats every head alike, so
running it with other values in place tells what a head would put out if it had these. That is checked, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqa_fx.passes.graph import attribute
from sqa_fx.passes.projection import Projection, bias_of, read_elsewhere, readers, weight_of
from sqa_fx.passes.refit_values import Maps
from sqa_fx.passes.site import Site
from sqa_fx.passes.site_projections import HeadProjection
from sqa_fx.passes.statistics import SiteStatistics
from sqa_fx.passes.widened import Widened
from sqa_fx.plan import Plan, from_ranges

WIDEST = 8192
"""Query heads times the original's value channels: the width of the features, whose second moments are summed."""
MOST_ON_CPU = 2e10
"""Outputs times the square of that width, where the fit would run on a CPU: about half a minute for a site."""
_ERROR = {torch.float16: 3e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True, eq=False)
class ValuePath:
    """``made`` is the projection of the values in the converted graph; ``rows`` [kv_heads, head_dim] are the rows of
    its matrix that each KV head has, ``columns`` [query_heads, head_dim] those of the output projection's input,
    ``reads`` [query_heads] the KV head of each query head. ``weight`` [channels, in] and ``bias`` are the original's,
    KV head after KV head. ``between`` runs what lies on the way."""

    module: fx.GraphModule
    made: Projection
    rows: Tensor
    columns: Tensor
    reads: Tensor
    weight: Tensor
    bias: Tensor | None
    between: _Between

    def maps(self, output: Tensor) -> Maps:
        """O and T of the converted graph as it is; ``output`` [out, in] is the output projection's matrix."""
        own = weight_of(self.module, self.made).double()
        original = self.weight.double()
        bias = bias_of(self.module, self.made)
        if bias is not None and self.bias is not None:
            own = torch.cat([own, bias.double()[:, None]], 1)
            original = torch.cat([original, self.bias.double()[:, None]], 1)
        values = own[self.rows.to(own.device)] @ torch.linalg.pinv(original)
        return Maps(output[:, self.columns.to(output.device)], values)

    def features(self, values: Mapping[fx.Node, Any], rows_of: Callable[[Tensor], Tensor]) -> Tensor:
        """All z_i [n, query_heads, channels], from the values of the nodes ``wanted``; ``rows_of`` makes the rows
        [n, in] of the output projection's input."""
        own = self._original(values)
        heads, size = self.rows.shape
        each = [own[:, start : start + size].repeat(1, heads) for start in range(0, own.size(1), size)]
        columns = self.columns.to(own.device)
        return torch.cat([rows_of(self._through(values, given))[:, columns] for given in each], 2)

    def _original(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """The original's values [n, channels] of the hidden states here."""
        x = self.made.rows_in(values[self.made.activation])
        return x @ self.weight.to(x).T + (0 if self.bias is None else self.bias.to(x))

    def _through(self, values: Mapping[fx.Node, Any], given: Tensor) -> Tensor:
        """The output projection's input for other values [n, kv_heads * head_dim] of the KV heads."""
        rows = self.made.rows_out(values[self.made.node]).clone()
        rows[:, self.rows.flatten().to(rows.device)] = given
        return self.between.end({**values, self.made.node: self.made.value(rows, values[self.made.node])})

    @property
    def wanted(self) -> tuple[fx.Node, ...]:
        """The nodes whose values `features` wants."""
        return (self.made.node, self.made.activation, *self.between.given)

    def holds(
        self,
        features: Tensor,
        values: Mapping[fx.Node, Any],
        rows_of: Callable[[Tensor], Tensor],
        maps: Maps,
        inputs: Tensor,
    ) -> bool:
        """Whether the output projection's input is what the maps make of the features: its rows ``inputs`` [n, in] for
        the ``maps`` of the graph, and those that random maps give."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(maps.values.shape, generator=generator, dtype=torch.float64).to(maps.values.device)
        given = torch.einsum("nc,gec->nge", self._original(values).double(), drawn).flatten(1)
        mixed = rows_of(self._through(values, given.to(values[self.made.node])))
        return self._same(features, inputs, maps.values) and self._same(features, mixed, drawn)

    def _same(self, features: Tensor, inputs: Tensor, values: Tensor) -> bool:
        made = torch.einsum("nic,iec->nie", features.double(), values[self.reads])
        wanted = inputs.double()[:, self.columns.to(inputs.device)]
        return bool((made - wanted).norm() <= _ERROR.get(inputs.dtype, 1e-3) * wanted.norm())

    def fitted(self, maps: Maps) -> tuple[Tensor, Tensor | None]:
        """The projection's new matrix and bias."""
        own = weight_of(self.module, self.made).double().clone()
        rows = self.rows.to(own.device)
        own[rows] = maps.values @ self.weight.double()
        bias = bias_of(self.module, self.made)
        if bias is not None and self.bias is not None:
            bias = bias.double().clone()
            bias[rows] = maps.values @ self.bias.double()
        return own, bias


class _Between(Widened):
    """Runs the ``nodes`` that lie between ``start`` and ``end``, which read ``given`` besides. There are none where
    ``end`` does not depend on ``start``."""

    def __init__(self, module: fx.GraphModule, start: fx.Node, end: fx.Node) -> None:
        super().__init__(module, wide=False)
        after = _closure(start, lambda n: n.users)
        before = _closure(end, lambda n: n.all_input_nodes) | {end}
        self.nodes = [n for n in module.graph.nodes if n in after and n in before]
        inside = {start, *self.nodes}
        self.given = tuple(dict.fromkeys(i for n in self.nodes for i in n.all_input_nodes if i not in inside))

    def end(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """The value of the last node for ``values`` of the first and of those that are given."""
        self.env = dict(values)
        with torch.no_grad():
            for node in self.nodes:
                self.env[node] = self.run_node(node)
        result = self.env[self.nodes[-1]]
        self.env = {}
        assert isinstance(result, Tensor)
        return result


def value_path(
    original: fx.GraphModule,
    converted: fx.GraphModule,
    plan: Plan,
    site: Site,
    before: SiteStatistics,
    output: Projection,
) -> ValuePath | str:
    """The way from the values of a site to ``output``, its output projection in the converted graph; or why there is
    none. ``before`` are the site's projections in the original graph."""
    values = before.value_projection
    sizes = plan.site(site.name)
    if values is None or sizes is None:
        return "its values are not one matrix"
    if sizes.hq % sizes.hkv:
        return f"{sizes.hq} query heads do not share {sizes.hkv} KV heads evenly"
    width = sizes.hq * sum(len(h) for h in values.heads)
    if width > WIDEST:
        return f"{sizes.hq} query heads with the original's value channels are {width} features (at most {WIDEST})"
    if output.index.size(0) * width**2 > MOST_ON_CPU and attribute(converted, output.weight).device.type == "cpu":
        return f"{width} features take too long on a CPU; with model and data on a GPU they are fitted"
    leaves = [n for n in converted.graph.find_nodes(op="get_attr") if str(n.target) == values.made.weight]
    made = [p for leaf in leaves for p in readers(converted, leaf)]
    if len(made) != 1:
        return f"parameter {values.made.weight} is read in several places"
    if why := read_elsewhere(converted, made[0]):
        return why
    rows = _lines(converted, made[0], plan, "v", values, site.model_kv_heads)
    columns = _lines(converted, output, plan, "o", before.projection, site.model_heads)
    if rows is None or columns is None or len(rows) != sizes.hkv or len(columns) != sizes.hq:
        return "its heads do not lie apart in the projections"
    between = _Between(converted, made[0].node, output.activation)
    if not between.nodes or _reaches_output(made[0].node, output.node):
        return "its values are read beside the attention"
    reads = torch.arange(sizes.hq) * sizes.hkv // sizes.hq
    order = torch.cat(list(values.heads))
    weight = weight_of(original, values.made)
    bias = bias_of(original, values.made)
    return ValuePath(
        module=converted,
        made=made[0],
        rows=rows,
        columns=columns,
        reads=reads.to(weight.device),
        weight=weight[order.to(weight.device)],
        bias=None if bias is None else bias[order.to(bias.device)],
        between=between,
    )


def _lines(
    module: fx.GraphModule, made: Projection, plan: Plan, role: str, before: HeadProjection, model_heads: Sequence[int]
) -> Tensor | None:
    """The rows ("v") or columns ("o") of the matrix that each head of the result has, in their order: [heads, size]."""
    cuts = [p for p in plan.parameters if p.name == made.weight]
    if not cuts:
        number = {model: c for c, model in enumerate(model_heads)}
        return torch.stack([before.heads[number[m]] for m in sorted(number)])
    blocks = [b for b in cuts[0].blocks if b.role == role]
    if len(cuts) > 1 or not blocks:
        return None
    line = made.line(tuple(attribute(module, made.weight).shape), cuts[0].axis, columns=role == "o")
    if line is None:
        return None
    heads: dict[int, list[Tensor]] = {}
    for block in blocks:
        heads.setdefault(block.head, []).extend(torch.nonzero(line == e).flatten() for e in from_ranges(block.to))
    found = [torch.cat(heads[h]) for h in sorted(heads)]
    return torch.stack(found) if len({f.numel() for f in found}) == 1 else None


def _reaches_output(start: fx.Node, without: fx.Node) -> bool:
    """Whether what the graph returns depends on ``start`` in other ways than through ``without``."""
    return any(n.op == "output" for n in _closure(start, lambda n: () if n is without else n.users))


def _closure(start: fx.Node, following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [start]
    while stack:
        for node in following(stack.pop()):
            if node not in found:
                found.add(node)
                stack.append(node)
    return found
