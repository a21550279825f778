"""A total of attention FLOPs spent on the sites where heads matter most: ``hq="auto:0.5"``.

What a site loses with n heads is what its best refit still misses (see eliminate), times how much the model's output
changes for each part of the site's output that is missing: measured, by letting a batch run with the activations of
that site alone replaced by what half of its heads can tell of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sqa_fx.errors import PlanError
from sqa_fx.passes.eliminate import eliminate
from sqa_fx.passes.site import Site
from sqa_fx.passes.statistics import Flat, SiteStatistics, Watch

PREFIX = "auto:"


def budget_share(request: object) -> float | None:
    """The share of the FLOPs that a request "auto:SHARE" leaves; None for any other request. Raises PlanError for one
    that is no share."""
    if not isinstance(request, str) or not request.startswith(PREFIX):
        return None
    try:
        share = float(request.removeprefix(PREFIX))
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise PlanError(f"hq={request!r}: give the share of the attention FLOPs to spend, as 'auto:0.5'")
    return share


@dataclass(frozen=True)
class Candidate:
    """What a site may be given: allowed numbers of query heads, rising, and the loss of each; ``flops`` of one head."""

    counts: tuple[int, ...]
    losses: tuple[float, ...]
    flops: float


def spend(candidates: Mapping[str, Candidate], share: float) -> dict[str, int]:
    """Query heads for each site: from all heads down, always the step that loses least for the FLOPs it saves, until
    ``share`` of all FLOPs is left. Raises PlanError when no step is left before that."""
    at = {name: len(c.counts) - 1 for name, c in candidates.items()}
    total = sum(c.counts[-1] * c.flops for c in candidates.values())
    left = total
    while left > share * total * (1 + 1e-9):
        best: tuple[float, str, int] | None = None
        for name, c in candidates.items():
            # A step may pass over counts: losses need not rise evenly.
            for lower in reversed(range(at[name])):
                saved = (c.counts[at[name]] - c.counts[lower]) * c.flops
                slope = (c.losses[lower] - c.losses[at[name]]) / saved
                if best is None or slope < best[0]:
                    best = slope, name, lower
        if best is None:
            raise PlanError(
                f"with one query head for each KV head, {left / total:.0%} of the attention FLOPs are left; "
                f"{share:.0%} is less"
            )
        _, name, lower = best
        left -= (candidates[name].counts[at[name]] - candidates[name].counts[lower]) * candidates[name].flops
        at[name] = lower
    return {name: c.counts[at[name]] for name, c in candidates.items()}


def candidate(site: Site, own: SiteStatistics, sensitivity: float) -> Candidate:
    """Every number of heads that keeps groups balanced: multiples of the KV heads, or any where each query head has a
    KV head of its own."""
    weight, heads = own.weight.double(), own.projection.heads
    if site.kv_heads == site.heads:
        errors = eliminate(weight, own.moments, heads, 1).errors
    else:
        spans = [site.group(g) for g in range(site.kv_heads)]
        groups = [list(range(first, last + 1)) for first, last in spans]
        balanced = range(site.kv_heads, site.heads + 1, site.kv_heads)
        errors = {n: eliminate(weight, own.moments, heads, n, groups).error for n in balanced}
    counts = tuple(sorted(errors))
    flops = float(site.q_len * site.kv_len * site.head_dim * len(site.cores))
    return Candidate(counts, tuple(sensitivity * errors[n] for n in counts), flops)


def allot(
    module: fx.GraphModule,
    sites: Sequence[Site],
    statistics: Mapping[str, SiteStatistics],
    share: float,
    inputs: Flat,
) -> dict[str, int]:
    """Query heads for each site with statistics, for ``share`` of their attention FLOPs; ``inputs`` are those of the
    batch on which sensitivity is measured. Raises PlanError when that cannot be."""
    known = [s for s in sites if s.name in statistics]
    measured = sensitivities(module, known, statistics, inputs)
    return spend({s.name: candidate(s, statistics[s.name], measured[s.name]) for s in known}, share)


def sensitivities(
    module: fx.GraphModule, sites: Sequence[Site], statistics: Mapping[str, SiteStatistics], inputs: Flat
) -> dict[str, float]:
    """How much the model's outputs change, relative to their size, for each part of a site's output variance that is
    missing. One run of the graph for each site."""
    plain = _outputs(module, None, None, inputs)
    found = {}
    for site in sites:
        own = statistics[site.name]
        half = max(1, site.heads // 2)
        kept = eliminate(own.weight.double(), own.moments, own.projection.heads, half)
        changed = _outputs(module, own, kept.kept, inputs)
        found[site.name] = _distance(plain, changed) / max(kept.error, 1e-12)
    return found


def _outputs(
    module: fx.GraphModule, own: SiteStatistics | None, kept: Sequence[int] | None, inputs: Flat
) -> list[Tensor]:
    """The graph's floating outputs; with ``own`` after its activations were told from those of its ``kept`` heads."""
    seen = {}
    if own is not None and kept is not None:
        made = own.projection.made
        moments = own.output.centred()
        moments = moments + 1e-6 * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)
        columns = torch.cat([own.projection.heads[h] for h in kept]).to(moments.device)
        assert own.output.total is not None
        mean = own.output.total / own.output.count
        # The best linear guess of all channels from the kept ones, about the mean.
        guess = torch.linalg.solve(moments[columns][:, columns], moments[columns])

        def replaced(value: Tensor) -> Tensor:
            x = made.rows_in(value).double()
            told = (x[:, columns] - mean[columns]) @ guess + mean
            rest = [d for d in range(value.dim()) if d not in made.inner]
            order = [*rest, *made.inner]
            back = [order.index(d) for d in range(value.dim())]
            moved: Tensor = told.reshape([value.shape[d] for d in order]).permute(back).to(value)
            return moved

        seen[made.activation] = replaced
    run = Watch(module, seen)
    run.stops = False
    with torch.no_grad():
        outputs = pytree.tree_leaves(run.run(*inputs, enable_io_processing=False))
    return [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    gap = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    size = sum(float(x.double().square().sum()) for x in a)
    return gap / max(size, 1e-300)
