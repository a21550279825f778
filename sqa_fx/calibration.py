"""Calibration: stream the user's batches through the captured graph once, and sum up what they say of every site."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from tqdm import tqdm

from sqa_fx.batches import as_call, labels_last
from sqa_fx.calls import CallBinder
from sqa_fx.errors import InputError
from sqa_fx.passes.capture import Captured
from sqa_fx.passes.evidence import Evidence, allow_rotations, begin
from sqa_fx.passes.pipeline import Analysis
from sqa_fx.passes.statistics import Flat, add_batch, order_of_rows
from sqa_fx.progress import hidden

Loss = Callable[[Any, Any], Tensor]
"""(the model's outputs, the batch) to a number."""


@dataclass(frozen=True)
class Batch:
    """One batch as the graph takes it: ``inputs`` for its placeholders, the number of samples, and the mask [batch,
    tokens] of valid tokens, if the batch has one."""

    inputs: Flat
    samples: int
    mask: Tensor | None


class Spool:
    """Batches that were read once from the user's data, kept on disk, so that memory does not grow with them.

    It is iterated as often as needed, and removed with the context.
    """

    def __init__(self, captured: Captured) -> None:
        self._binder = CallBinder(captured.graph_module.graph, captured.signature, captured.args, captured.kwargs)
        self._leaves = pytree.tree_leaves((captured.args, captured.kwargs))
        self._folder = tempfile.TemporaryDirectory(prefix="sqa-fx-calibration-")
        self.count = 0
        self.unread_mask = False
        """Whether a batch marks padding in a mask that the graph does not take."""

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, batch: Any) -> Batch:
        """Keep a batch. Raises InputError when it does not fit the graph."""
        args, kwargs = as_call(batch)
        mask = kwargs.get("attention_mask")
        known = self._binder.captured_names()
        if known is not None:
            # What only a loss wants (labels) is no input of the graph.
            args = args[:-1] if labels_last(args, len(known)) else args
            if isinstance(mask, Tensor) and "attention_mask" not in known and not bool(mask.all()):
                self.unread_mask = True
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        try:
            leaves = pytree.tree_leaves(self._binder.bind(args, kwargs))
        except InputError as error:
            raise InputError(f"calibration batch {self.count}: {error}") from error
        tensors = [
            leaf.detach().to(like.device) if isinstance(like, Tensor) else None
            for leaf, like in zip(leaves, self._leaves, strict=True)
        ]
        first = next((t for t in tensors if t is not None and t.dim()), None)
        samples = 1 if first is None else int(first.shape[0])
        valid = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        torch.save([samples, valid, *tensors], Path(self._folder.name) / f"{self.count}.pt")
        self.count += 1
        return self._batch(samples, valid, tensors)

    def _batch(self, samples: int, mask: Tensor | None, tensors: Sequence[Tensor | None]) -> Batch:
        pairs = zip(tensors, self._leaves, strict=True)
        return Batch([like if own is None else own for own, like in pairs], samples, mask)

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.count):
            samples, mask, *tensors = torch.load(Path(self._folder.name) / f"{number}.pt", weights_only=True)
            yield self._batch(samples, mask, tensors)


def check_data(data: object) -> None:
    """Raise InputError unless ``data`` looks like batches."""
    if isinstance(data, Tensor | Mapping) or not isinstance(data, Iterable):
        raise InputError(
            f"calibration= takes an iterable of batches, not a {type(data).__name__}; put a single batch in a list"
        )


def read(data: Iterable[Any], spool: Spool, each: Callable[[Batch, Any], None]) -> None:
    """Read all of ``data`` once. Raises InputError when there is none, or when a batch does not fit."""
    for batch in tqdm(data, desc="calibrate", unit="batch", disable=hidden(), leave=False):
        each(spool.add(batch), batch)
    if not spool.count:
        raise InputError("calibration= gave no batches (an iterator that was used up already?)")


def calibrate(
    captured: Captured,
    analysis: Analysis,
    data: Iterable[Any],
    spool: Spool,
    gradients: bool,
    rotations: bool,
    loss: Loss | None = None,
) -> Evidence:
    """Sum up the activations of every site over ``data``; with ``gradients`` those of ``loss`` (default: the model's
    own uncertainty, see own_loss) too; with ``rotations`` find out which ones the sites allow."""
    module = captured.graph_module
    statistics = begin(module, analysis.sites)
    if not statistics:
        raise InputError(
            "calibration data says nothing of this model: no site has an output projection that is one matrix over all "
            "heads; convert it without calibration="
        )
    generator = torch.Generator().manual_seed(0)

    turned: set[fx.Node] | None = None

    def add(batch: Batch, given: Any) -> None:
        nonlocal turned
        if turned is None and batch.samples > 1:
            turned = order_of_rows(module, statistics, batch.inputs, batch.samples)
        wanted = None
        if gradients:

            def wanted(outputs: Sequence[Any]) -> Tensor:
                tree = _unflatten(module, outputs)
                return own_loss(tree, generator) if loss is None else loss(tree, given)

        add_batch(module, statistics, batch.inputs, batch.samples, batch.mask, wanted, turned or ())

    read(data, spool, add)
    if spool.unread_mask:
        analysis.notes.append(
            "calibration batches mark padding in an attention_mask, which is not among the example inputs: padding is "
            "not counted, but attention saw it"
        )
    evidence = Evidence(statistics)
    if rotations:
        inputs = pytree.tree_leaves((captured.args, captured.kwargs))
        allow_rotations(module, analysis.sites, evidence, inputs)
    return evidence


def _unflatten(module: fx.GraphModule, outputs: Sequence[Any]) -> Any:
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    return pytree.tree_unflatten(list(outputs), info.out_spec)


def own_loss(outputs: Any, generator: torch.Generator) -> Tensor:
    """A loss without labels whose squared gradients are the Fisher information of the model's own distribution:
    logits against labels drawn from them, other outputs as the mean of a Gaussian."""
    logits = getattr(outputs, "logits", None)
    if logits is None and isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    if isinstance(logits, Tensor):
        flat = logits.reshape(-1, logits.shape[-1]).float()
        drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).reshape(-1)
        return F.cross_entropy(flat, drawn.to(flat.device), reduction="sum") / logits.shape[0]
    output = next(t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point())
    noise = torch.randn(output.shape, generator=generator).to(output)
    return (output * noise).float().sum() / output.shape[0]
