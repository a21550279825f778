"""How good a converted model is: its own measures and its agreement with the original, over batches of data."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqa_fx.batches import as_call
from sqa_fx.errors import InputError
from sqa_fx.heal_data import Data, batches_of
from sqa_fx.heal_devices import OneDevice
from sqa_fx.model_calls import both_outputs, inputs_for, labels_in, on_device, valid_positions
from sqa_fx.moved import copied_to
from sqa_fx.text_table import text_table

Kind = Literal["auto", "lm", "embedding", "classification"]
IGNORED = -100
"""The label of what is not to be counted, as in torch.nn.functional.cross_entropy."""


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`: measures of ``student`` and ``teacher`` by name, and those ``between`` them.

    ``samples`` counts rows, ``positions`` what was counted (tokens of an "lm", rows of the others). ``notes`` say what
    the reader must know.
    """

    kind: str
    samples: int
    positions: int
    student: Mapping[str, float] = field(default_factory=dict)
    teacher: Mapping[str, float] = field(default_factory=dict)
    between: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The evaluation as JSON; numbers that are not finite become null."""
        data = {"version": 1, **asdict(self)}
        for part in ("student", "teacher", "between"):
            data[part] = {k: v if math.isfinite(v) else None for k, v in data[part].items()}
        return json.dumps(data, indent=2, allow_nan=False)

    def table(self) -> str:
        """The evaluation as aligned text."""
        rows = [[name, f"{self.teacher[name]:.6g}", f"{value:.6g}", "-"] for name, value in self.student.items()]
        rows += [[name, "-", "-", f"{value:.6g}"] for name, value in self.between.items()]
        lines = [text_table([self.kind, "teacher", "student", "between them"], rows)]
        lines.append(f"{self.samples} rows, {self.positions} positions counted")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    __str__ = table


def evaluate(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    *,
    kind: Kind = "auto",
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    pairs: int = 2048,
) -> Evaluation:
    """Compare ``student`` with the ``teacher`` that it was converted from, on batches as for `sqa_fx.heal`.

    - "lm", logits ``[batch, sequence, vocabulary]``: mean next-token cross-entropy (nats) and perplexity of both on
      ``input_ids`` (of an encoder with a decoder, ``decoder_input_ids``), and the share of positions with the same
      most likely token.
    - "embedding": mean cosine of the embeddings, and Spearman's rank correlation of the cosine similarities of all
      pairs of rows, of the first ``pairs`` rows (memory and time grow with their square). ``[batch, sequence, width]``
      is averaged over the valid positions first; other outputs are taken by row.
    - "classification", logits ``[batch, classes]``: accuracy of both where the batch has ``labels`` ``[batch]`` (in a
      tuple, a last entry that is one more than the model takes), and the share of rows with the same class.
    - "auto": by the first batch: logits of three axes are "lm", of two "classification"; labels of one axis mean
      "classification", too; anything else is "embedding".

    Only positions count that the batch's ``attention_mask`` leaves in. Both models run in eval mode, on ``device``
    ("auto": the accelerator if there is one) and are put back; ``precision`` "bf16" is autocast.

    Raises InputError for no data, outputs that do not fit each other or the kind, and rows too few for pairs;
    MissingError for a device that is not there.
    """
    if kind not in ("auto", "lm", "embedding", "classification"):
        raise InputError(f"kind is {kind!r}: give 'auto', 'lm', 'embedding' or 'classification'")
    if precision not in ("fp32", "bf16"):
        raise InputError(f"precision is {precision!r}: give 'fp32' or 'bf16'")
    target = OneDevice(device).device
    meter: _Meter | None = None
    with _in_eval(student, target) as own, _in_eval(teacher, target) as original, torch.no_grad():
        for batch in batches_of(data):
            moved = on_device(batch, target)
            with torch.autocast(target.type, torch.bfloat16, enabled=precision == "bf16"):
                outputs = [_call(own, moved), _call(original, moved)]
            name, found, wanted = both_outputs(*outputs)
            labels = labels_in(original, moved)
            if meter is None:
                meter = _METERS[_kind_of(name, found, labels) if kind == "auto" else kind](pairs)
            meter.add(found.float(), wanted.float(), moved, labels)
    if meter is None:
        raise InputError("the data holds no batches: there is nothing to evaluate on")
    return meter.result()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors ``[n]``; equal values share the mean of their ranks. NaN where one of
    them is constant."""
    ranks = [_ranks(x.double()) for x in (a, b)]
    centred = [r - r.mean() for r in ranks]
    lengths = [float(c.square().sum().sqrt()) for c in centred]
    return float((centred[0] * centred[1]).sum()) / (lengths[0] * lengths[1]) if all(lengths) else float("nan")


def _ranks(values: Tensor) -> Tensor:
    _, where, counts = torch.unique(values, return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return middle[where]


# --- meters: what is summed, batch by batch --------------------------------------------------------------------------


class _Meter(Protocol):
    def add(self, student: Tensor, teacher: Tensor, batch: Any, labels: Tensor | None) -> None: ...

    def result(self) -> Evaluation: ...


class _LanguageModel:
    """Next-token losses of logits ``[batch, sequence, vocabulary]``."""

    def __init__(self, pairs: int) -> None:
        self.rows = self.positions = self.predicted = self.agreed = 0
        self.losses = [0.0, 0.0]

    def add(self, student: Tensor, teacher: Tensor, batch: Any, labels: Tensor | None) -> None:
        """Count one batch."""
        args, kwargs = as_call(batch)
        ids = kwargs.get("decoder_input_ids", kwargs.get("input_ids", args[0] if args else None))
        if student.dim() != 3 or not isinstance(ids, Tensor) or ids.shape != student.shape[:2]:
            raise InputError(
                f"kind 'lm' needs logits [batch, sequence, vocabulary] for token ids [batch, sequence], but the output "
                f"is {list(student.shape)} for {list(ids.shape) if isinstance(ids, Tensor) else 'no input_ids'}"
            )
        mask = valid_positions(batch, ids.shape)
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        follows = valid[:, :-1] & valid[:, 1:]
        for index, logits in enumerate((student, teacher)):
            loss = F.cross_entropy(logits[:, :-1][follows], ids[:, 1:][follows], reduction="sum")
            self.losses[index] += float(loss)
        self.rows += ids.shape[0]
        self.positions += int(valid.sum())
        self.predicted += int(follows.sum())
        self.agreed += int((student.argmax(-1) == teacher.argmax(-1))[valid].sum())

    def result(self) -> Evaluation:
        """The means."""
        if not self.predicted:
            raise InputError("no token follows another one: rows need two valid tokens for a next-token loss")
        own, wanted = ({"loss": loss, "perplexity": _exp(loss)} for loss in (s / self.predicted for s in self.losses))
        between = {"top-1 agreement": self.agreed / self.positions}
        return Evaluation("lm", self.rows, self.positions, own, wanted, between)


class _Embedding:
    """Embeddings by row."""

    def __init__(self, pairs: int) -> None:
        self.pairs, self.rows, self.cosines = pairs, 0, 0.0
        self.kept: list[tuple[Tensor, Tensor]] = []

    def add(self, student: Tensor, teacher: Tensor, batch: Any, labels: Tensor | None) -> None:
        """Count one batch."""
        own, wanted = _pooled(student, batch), _pooled(teacher, batch)
        self.cosines += float(F.cosine_similarity(own, wanted, dim=-1).sum())
        room = max(0, self.pairs - self.rows)
        if room:
            self.kept.append((own[:room].cpu(), wanted[:room].cpu()))
        self.rows += own.shape[0]

    def result(self) -> Evaluation:
        """The means, and the correlation over pairs."""
        sides = [F.normalize(torch.cat(side), dim=-1) for side in zip(*self.kept, strict=True)]
        count = sides[0].shape[0]
        between = {"mean cosine": self.cosines / self.rows}
        notes = []
        if count >= 3:
            above = torch.triu_indices(count, count, 1)
            similar = [(side @ side.T)[above[0], above[1]] for side in sides]
            between["rank correlation of similarities"] = rank_correlation(*similar)
        else:
            notes.append("a rank correlation needs 3 rows or more")
        if count < self.rows:
            notes.append(f"the rank correlation is over the pairs of the first {count} rows")
        return Evaluation("embedding", self.rows, self.rows, {}, {}, between, tuple(notes))


class _Classification:
    """Classes by row of logits ``[batch, classes]``."""

    def __init__(self, pairs: int) -> None:
        self.rows = self.agreed = self.labelled = 0
        self.correct = [0, 0]

    def add(self, student: Tensor, teacher: Tensor, batch: Any, labels: Tensor | None) -> None:
        """Count one batch."""
        if student.dim() != 2:
            raise InputError(
                f"kind 'classification' needs logits [batch, classes], but the output is {list(student.shape)}"
            )
        classes = [student.argmax(-1), teacher.argmax(-1)]
        self.rows += student.shape[0]
        self.agreed += int((classes[0] == classes[1]).sum())
        if labels is None:
            return
        if labels.shape != classes[0].shape:
            raise InputError(f"labels are {list(labels.shape)} for logits {list(student.shape)}: give one for each row")
        counted = labels != IGNORED
        self.labelled += int(counted.sum())
        for index, found in enumerate(classes):
            self.correct[index] += int(((found == labels) & counted).sum())

    def result(self) -> Evaluation:
        """The shares."""
        between = {"top-1 agreement": self.agreed / self.rows}
        if not self.labelled:
            return Evaluation("classification", self.rows, self.rows, {}, {}, between, ("the data has no labels",))
        own, wanted = ({"top-1": correct / self.labelled} for correct in self.correct)
        return Evaluation("classification", self.rows, self.rows, own, wanted, between)


_METERS: Mapping[str, Callable[[int], _Meter]] = {
    "lm": _LanguageModel,
    "embedding": _Embedding,
    "classification": _Classification,
}


def _kind_of(field: str, output: Tensor, labels: Tensor | None) -> str:
    if field == "logits" and output.dim() == 3:
        return "lm"
    by_row = output.dim() == 2 and (field == "logits" or (labels is not None and labels.dim() == 1))
    return "classification" if by_row else "embedding"


def _pooled(output: Tensor, batch: Any) -> Tensor:
    """``[batch, width]``: the mean over valid positions of ``[batch, sequence, width]``, anything else flattened."""
    if output.dim() != 3:
        return output.flatten(1) if output.dim() > 1 else output[:, None]
    mask = valid_positions(batch, output.shape[:2])
    if mask is None:
        return output.mean(1)
    # Positions that do not count may hold NaN, which no factor of 0 removes.
    total = torch.where(mask[..., None], output, 0.0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _call(model: nn.Module, batch: Any) -> Any:
    args, kwargs = inputs_for(model, batch)
    return model(*args, **kwargs)


@contextlib.contextmanager
def _in_eval(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The model in eval mode on ``device``: itself, or a copy where it would have to be moved."""
    places = {t.device for t in (*model.parameters(), *model.buffers())}
    used = copied_to(model, device) if len(places) == 1 and places != {device} else model
    modes = [(part, part.training) for part in used.modules()]
    was_training = used.training
    used.eval()
    try:
        yield used
    finally:
        if was_training:
            used.train()
        for part, mode in modes:
            part.training = mode
