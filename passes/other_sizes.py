"""Other input sizes at which a graph with free sizes is proved: longer, batch 1, length 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqa_fx.passes.evaluate import size_at, size_hints
from sqa_fx.passes.hints import hint, is_free, value_of


def other_inputs(graph: fx.Graph, inputs: Sequence[Any]) -> Iterator[tuple[str, list[list[Any]]]]:
    """Named sets of inputs at other sizes than the example's, made by repeating or leaving out entries.

    Every free size becomes the next prime ("longer"); the leading ones become 1 ("batch 1"), all others ("length 1"),
    or both. Sizes that are equal in the example stay equal. Each set comes in one or two forms, of which the first
    that the original takes counts: in the second one, free sizes that equal a fixed one stay with it. Nothing when no
    size is free.
    """
    known = size_hints(graph)
    first = _leading(graph)
    longer = {symbol: _next_prime(size) for symbol, size in known.items()}
    batch = {symbol: 1 for symbol in known if symbol in first}
    length = {symbol: 1 for symbol in known if symbol not in first}
    wanted = {"longer": longer, "batch 1": {**longer, **batch}, "length 1": {**known, **length}}
    if batch and length:
        wanted["batch 1, length 1"] = {**batch, **length}
    fixed = _fixed_sizes(graph)
    seen = [known]
    for name, sizes in wanted.items():
        forms = []
        for form in (sizes, {s: known[s] if known[s] in fixed else size for s, size in sizes.items()}):
            if form not in seen:
                seen.append(form)
                forms.append(_resized_inputs(graph, inputs, form))
        if forms:
            yield name, [form for form in forms if form is not None]


def _fixed_sizes(graph: fx.Graph) -> set[int]:
    """The sizes of inputs that are not free."""
    values = [value_of(node) for node in graph.find_nodes(op="placeholder")]
    sizes = [size for v in values if isinstance(v, Tensor) for size in v.shape if not is_free(size)]
    return {int(hint(size)) for size in sizes} - {0, 1}


def _leading(graph: fx.Graph) -> set[Any]:
    """The symbols that are the first size of an input."""
    found = set()
    for node in graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, Tensor) and value.dim() > 1 and is_free(value.shape[0]):
            size: Any = value.shape[0]
            found.add(size.node.expr)
    return found


def _next_prime(number: int) -> int:
    candidate = max(2, number + 1)
    while any(candidate % divisor == 0 for divisor in range(2, int(candidate**0.5) + 1)):
        candidate += 1
    return candidate


def _resized_inputs(graph: fx.Graph, inputs: Sequence[Any], sizes: Mapping[Any, int]) -> list[Any] | None:
    """The inputs at ``sizes``, rows repeated for more; None where a size that follows from them is none."""
    result = []
    holders = graph.find_nodes(op="placeholder")
    for holder, given in zip(holders, inputs, strict=True):
        value = value_of(holder)
        if isinstance(given, Tensor) and isinstance(value, Tensor):
            for dim, size in enumerate(value.shape):
                if type(size) is not int:
                    wanted = size_at(size, sizes)
                    if wanted <= 0 or given.shape[dim] == 0:
                        return None
                    given = _resized(given, dim, wanted)
        elif isinstance(value, torch.SymInt):
            given = size_at(value, sizes)
        result.append(given)
    return result


def _resized(given: Tensor, dim: int, wanted: int) -> Tensor:
    """``given`` with ``wanted`` entries along ``dim``: repeated ones, moved a little where they are plain numbers,
    since exact ties make a choice (top-k) a matter of rounding."""
    rows = torch.arange(wanted, device=given.device) % given.shape[dim]
    result = given.index_select(dim, rows)
    extra = wanted - given.shape[dim]
    values = given.unique()
    if extra > 0 and len(values) > 2 and bool(given.isfinite().all()):
        new = result.narrow(dim, given.shape[dim], extra)
        random = torch.Generator().manual_seed(0)
        if given.is_floating_point():
            new.add_(torch.randn(new.shape, generator=random).to(new) * given.std() * 0.1)
        else:
            new.copy_(values[torch.randint(len(values), new.shape, generator=random).to(values.device)])
    return result
