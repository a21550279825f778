"""Evaluation: numbers checked against hand-written ones, over what counts, whatever the batches."""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heal_models import HELD_OUT, TRAIN, student, teacher
from torch import Tensor, nn

import sqa_fx
from sqa_fx.errors import InputError
from sqa_fx.evaluate import rank_correlation

CPU: dict[str, Any] = {"device": "cpu"}


@functools.cache
def _student_once() -> sqa_fx.ConvertedModule:
    return student()


def _student() -> sqa_fx.ConvertedModule:
    """A student of its own for each test."""
    return copy.deepcopy(_student_once())


class _Fixed(nn.Module):
    """Returns one tensor after another, whatever comes in."""

    def __init__(self, *outputs: Any) -> None:
        super().__init__()
        self.outputs, self.calls = outputs, 0

    def forward(self, input_ids: Any = None, attention_mask: Any = None) -> Any:
        found = self.outputs[self.calls % len(self.outputs)]
        self.calls += 1
        assert not self.training
        return found


def test_language_models_are_measured_on_valid_tokens_only() -> None:
    original, converted = teacher(), _student()
    found = sqa_fx.evaluate(converted, original, TRAIN, **CPU)
    assert found.kind == "lm" and found.samples == 30
    for model, numbers in ((converted, found.student), (original, found.teacher)):
        losses: list[float] = []
        for batch in TRAIN:
            logits = model(**batch)["logits"].detach()
            for row, ids, length in zip(logits, batch["input_ids"], batch["attention_mask"].sum(1), strict=True):
                losses += [float(F.cross_entropy(row[i], ids[i + 1])) for i in range(int(length) - 1)]
        assert numbers["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert numbers["perplexity"] == pytest.approx(math.exp(numbers["loss"]))
    assert found.positions == sum(int(b["attention_mask"].sum()) for b in TRAIN)
    whole = {name: torch.cat([b[name] for b in TRAIN]) for name in TRAIN[0]}
    again = sqa_fx.evaluate(converted, original, [whole], **CPU)
    assert again.student["loss"] == pytest.approx(found.student["loss"], rel=1e-5)
    assert again.between == pytest.approx(found.between)
    same = sqa_fx.evaluate(original, original, TRAIN, **CPU)
    assert same.between["top-1 agreement"] == 1.0 and same.student == same.teacher
    assert "perplexity" in found.table() and json.loads(found.to_json())["kind"] == "lm"


def test_positional_ids_and_ids_without_a_mask_count_whole() -> None:
    logits = torch.randn(2, 5, 7)
    ids = torch.randint(0, 7, (2, 5))
    found = sqa_fx.evaluate(_Fixed({"logits": logits}), _Fixed({"logits": logits}), [ids], **CPU)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.student["loss"] == pytest.approx(float(expected)) and found.positions == 10


def test_a_decoder_predicts_its_own_tokens() -> None:
    logits, ids = torch.randn(2, 4, 7), torch.tensor([[1, 2, 3, 4], [4, 5, 0, 0]])

    class Decoder(_Fixed):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **decoder: Any) -> Any:
            return super().forward(input_ids)

    batch = {"input_ids": torch.zeros(2, 4), "attention_mask": torch.zeros(2, 4), "decoder_input_ids": ids}
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = sqa_fx.evaluate(Decoder({"logits": logits}), Decoder({"logits": logits}), [batch], **CPU)
    losses = [float(F.cross_entropy(logits[r, i], ids[r, i + 1])) for r, i in ((0, 0), (0, 1), (0, 2), (1, 0))]
    assert found.student["loss"] == pytest.approx(sum(losses) / 4) and found.positions == 6


def test_embeddings_are_pooled_over_valid_positions() -> None:
    own, wanted = torch.randn(2, 3, 4, 5).unbind()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    own[0, 2:] = float("nan")
    pooled = [
        torch.stack([row[: int(n)].mean(0) for row, n in zip(side, mask.sum(1), strict=True)]) for side in (own, wanted)
    ]
    batch = {"input_ids": torch.zeros(3, 4, dtype=torch.long), "attention_mask": mask}
    found = sqa_fx.evaluate(_Fixed(own), _Fixed(wanted), [batch], **CPU)
    assert found.kind == "embedding" and found.samples == 3
    assert found.between["mean cosine"] == pytest.approx(
        float(F.cosine_similarity(pooled[0], pooled[1]).mean()), abs=1e-6
    )
    similar = []
    for side in pooled:
        unit = F.normalize(side, dim=-1)
        similar.append([float(unit[i] @ unit[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
    ranks = [[sorted(s).index(x) + 1 for x in s] for s in similar]
    expected = 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (3 * 8)
    assert found.between["rank correlation of similarities"] == pytest.approx(expected)


def test_pairs_are_limited_and_cosines_are_not() -> None:
    sides = torch.randn(2, 12, 6)
    batches = [torch.zeros(4, 1)] * 3
    few = sqa_fx.evaluate(_Fixed(*sides[0].split(4)), _Fixed(*sides[1].split(4)), batches, pairs=5, **CPU)
    all_rows = sqa_fx.evaluate(_Fixed(sides[0]), _Fixed(sides[1]), [torch.zeros(12, 1)], **CPU)
    five = sqa_fx.evaluate(_Fixed(sides[0, :5]), _Fixed(sides[1, :5]), [torch.zeros(5, 1)], **CPU)
    name = "rank correlation of similarities"
    assert few.between["mean cosine"] == pytest.approx(all_rows.between["mean cosine"])
    assert few.between[name] == pytest.approx(five.between[name]) and few.notes and not five.notes
    two = sqa_fx.evaluate(_Fixed(sides[0, :2]), _Fixed(sides[1, :2]), [torch.zeros(2, 1)], **CPU)
    assert name not in two.between and "3 rows" in two.notes[0]


def test_classes_with_labels_in_a_mapping_or_a_tuple() -> None:
    own = torch.eye(3)[[0, 1, 2, 0]]
    wanted = torch.eye(3)[[0, 1, 1, 1]]
    labels = torch.tensor([0, 2, 1, -100])

    class Plain(nn.Module):
        def __init__(self, output: Tensor) -> None:
            super().__init__()
            self.inner = _Fixed(output)

        def forward(self, x: Any) -> Any:
            return self.inner(x)

    named = [{"input_ids": torch.zeros(4, 2), "labels": labels}]
    cases: list[tuple[list[Any], type[nn.Module]]] = [(named, _Fixed), ([(torch.zeros(4, 2), labels)], Plain)]
    for batches, kind in cases:
        found = sqa_fx.evaluate(kind(own), kind(wanted), batches, **CPU)
        assert found.kind == "classification"
        assert found.student == {"top-1": pytest.approx(1 / 3)} and found.teacher == {"top-1": pytest.approx(2 / 3)}
        assert found.between == {"top-1 agreement": 0.5}
    without = sqa_fx.evaluate(_Fixed({"logits": own}), _Fixed({"logits": wanted}), [torch.zeros(4, 2)], **CPU)
    assert without.kind == "classification" and not without.student and "no labels" in without.notes[0]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 2, 4], [1, 3, 2, 4], 0.9486832980505138),  # ranks 1, 2.5, 2.5, 4: 4.5 / sqrt(4.5 * 5)
        ([1, 1, 1], [1, 2, 3], float("nan")),
    ],
)
def test_rank_correlation_shares_ranks_of_ties(a: list[float], b: list[float], expected: float) -> None:
    assert rank_correlation(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, nan_ok=True)


def test_models_are_left_as_they_were() -> None:
    original, converted = teacher().train(), _student()
    original.get_submodule("norm").eval()
    modes = [m.training for m in original.modules()]
    before = copy.deepcopy(converted.state_dict())
    sqa_fx.evaluate(converted, original, HELD_OUT, precision="bf16", **CPU)
    assert [m.training for m in original.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in converted.state_dict().items())


def test_mistakes_are_told() -> None:
    a: Tensor = torch.randn(2, 3, 4)
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(InputError, match="no batches"):
        sqa_fx.evaluate(_Fixed(a), _Fixed(a), [], **CPU)
    with pytest.raises(InputError, match=r"\[2, 3, 4\] and the teacher's \[2, 3\]"):
        sqa_fx.evaluate(_Fixed(a), _Fixed(a[..., 0]), [ids], **CPU)
    with pytest.raises(InputError, match="kind is 'x'"):
        sqa_fx.evaluate(_Fixed(a), _Fixed(a), [ids], kind="x", **CPU)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"logits \[batch, sequence, vocabulary\]"):
        sqa_fx.evaluate(_Fixed(a), _Fixed(a), [ids[:, :2]], kind="lm", **CPU)
    with pytest.raises(InputError, match=r"logits \[batch, classes"):
        sqa_fx.evaluate(_Fixed(a), _Fixed(a), [ids], kind="classification", **CPU)
    with pytest.raises(InputError, match="follows"):
        sqa_fx.evaluate(_Fixed({"logits": a[:, :1]}), _Fixed({"logits": a[:, :1]}), [ids[:, :1]], **CPU)
