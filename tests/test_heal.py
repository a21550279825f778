"""Healing: it learns what it should, from what counts, and nothing else changes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import heal_fixtures
import pytest
import torch
from heal_fixtures import QUICK, changed_weights, same_weights, weights_of
from heal_models import HELD_OUT, TRAIN, student, teacher
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sqa_fx
from sqa_fx.errors import HealError, InputError, MissingError, SqaError
from sqa_fx.heal_data import Batches, share_of
from sqa_fx.heal_loop import learning_rate
from sqa_fx.heal_loss import measure
from sqa_fx.heal_options import HealOptions
from sqa_fx.heal_sites import output_weights, with_sites

# pytest finds fixtures by the names of a test module.
original, _converted, converted = heal_fixtures.original, heal_fixtures._converted, heal_fixtures.converted


# --- what is learned -------------------------------------------------------------------------------------------------


def test_healing_lowers_the_held_out_divergence(original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    before, mode = weights_of(original), original.training
    start = sqa_fx.evaluate(converted, original, HELD_OUT, device="cpu")
    report = sqa_fx.heal(
        converted, original, TRAIN, held_out=HELD_OUT, **{**QUICK, "steps": 40}, evaluate_every=10, log=None
    )
    first, best = report.held_out(0), report.held_out(report.best_step or 0)
    assert first is not None and best is not None
    assert best["held_out_loss"] < 0.75 * first["held_out_loss"]
    # The numbers of the report are those of an evaluation on its own.
    healed = sqa_fx.evaluate(converted, original, HELD_OUT, device="cpu")
    assert first["held_out_agreement"] == pytest.approx(start.between["top-1 agreement"])
    assert best["held_out_agreement"] == pytest.approx(healed.between["top-1 agreement"])
    assert type(converted) is sqa_fx.ConvertedModule
    assert same_weights(weights_of(original), before) and original.training == mode
    assert all(p.grad is None and p.requires_grad for p in (*original.parameters(), *converted.parameters()))
    assert "best on held-out data" in report.table()
    assert json.loads(report.to_json())["steps"] == 40


def test_the_mode_of_every_part_of_the_teacher_is_put_back(converted: sqa_fx.ConvertedModule) -> None:
    original = teacher().train()
    original.get_submodule("layers.0").eval()
    modes = [m.training for m in original.modules()]
    assert False in modes and True in modes
    seen: list[bool] = []
    original.register_forward_hook(lambda module, args, output: seen.append(module.training))
    sqa_fx.heal(converted, original, TRAIN, **QUICK)
    assert [m.training for m in original.modules()] == modes and not any(seen) and seen


def test_random_state_of_the_caller_stays(original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    torch.manual_seed(11)
    random.seed(11)
    expected = torch.rand(3), random.random()
    torch.manual_seed(11)
    random.seed(11)
    sqa_fx.heal(converted, original, TRAIN, **QUICK)
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


@pytest.mark.parametrize("train", ["all", "sites", "low-rank"])
def test_only_what_is_asked_for_is_trained(train: str, original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    before = weights_of(converted)
    report = sqa_fx.heal(converted, original, TRAIN, **QUICK, train=train, rank=3)
    changed = changed_weights(before, weights_of(converted))
    sites = {f"layers.{i}.{part}" for i in (0, 1) for part in ("c_attn.weight", "c_proj.weight")}
    biases = {name.replace("weight", "bias") for name in sites}
    assert changed == {"all": set(before), "sites": sites | biases, "low-rank": sites}[train]
    if train == "low-rank":
        for name in sites:
            update = converted.get_parameter(name).detach() - before[name]
            assert int(torch.linalg.matrix_rank(update, atol=1e-5)) == 3
        assert report.trained_parameters == 2 * 3 * ((3 * 20 + 40) + (40 + 20))


def test_low_rank_gives_back_what_was_evaluated(original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    report = sqa_fx.heal(converted, original, TRAIN, held_out=HELD_OUT, **QUICK, train="low-rank", evaluate_every=3)
    again = sqa_fx.heal(copy.deepcopy(converted), original, TRAIN, held_out=HELD_OUT, **QUICK)
    before, after = report.held_out(report.best_step or 0), again.held_out(0)
    assert report.best_step == 6 and before is not None and after is not None
    assert after["held_out_loss"] == pytest.approx(before["held_out_loss"], rel=1e-5)


def test_half_precision_weights_learn_from_small_steps(original: nn.Module) -> None:
    """Steps of 1e-5 vanish in bfloat16 weights unless they are gathered in float32."""
    half = copy.deepcopy(original).bfloat16()
    healed = student(half)
    before = weights_of(healed)
    options = {**QUICK, "steps": 30, "lr": 1e-4, "final_lr": 1.0}
    sqa_fx.heal(healed, original, TRAIN, **options, precision="bf16")
    assert all(p.dtype is torch.bfloat16 for p in healed.parameters())
    weight = "layers.0.c_attn.weight"
    moved = (healed.get_parameter(weight) != before[weight]).float().mean()
    assert moved > 0.3


def test_site_warmup_moves_the_sites_towards_the_teacher(
    original: nn.Module, converted: sqa_fx.ConvertedModule
) -> None:
    weights = output_weights(converted)
    assert weights == ["layers.0.c_proj.weight", "layers.1.c_proj.weight"]
    captured: list[Tensor] = []
    hooks = [
        original.get_submodule(w.removesuffix(".weight")).register_forward_hook(lambda m, a, out: captured.append(out))
        for w in weights
    ]
    with torch.no_grad():
        original(**HELD_OUT[0])
    for hook in hooks:
        hook.remove()

    def apart() -> float:
        with torch.no_grad():
            own = with_sites(converted, weights)(**HELD_OUT[0])["sites"]
        assert [s.shape for s in own] == [s.shape for s in captured]
        return sum(float((a - b).square().mean()) for a, b in zip(own, captured, strict=True))

    start = apart()
    report = sqa_fx.heal(converted, original, TRAIN, **{**QUICK, "steps": 40}, site_warmup=39)
    assert apart() < 0.9 * start  # on data that it has not seen
    losses = [e["loss"] for e in report.history]
    assert losses[38] < 0.8 * losses[0]
    assert [e["phase"] for e in report.history] == ["sites"] * 39 + ["outputs"]


def test_site_outputs_are_those_of_the_model(converted: sqa_fx.ConvertedModule) -> None:
    found = with_sites(converted, output_weights(converted))(**HELD_OUT[0])
    assert torch.equal(found["outputs"]["logits"], converted(**HELD_OUT[0])["logits"])


def test_site_warmup_is_refused_where_sites_do_not_show(original: nn.Module) -> None:
    with pytest.raises(InputError, match="Speaker does not show"):
        sqa_fx.heal(copy.deepcopy(original), original, TRAIN, **QUICK, site_warmup=1)


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.drop = teacher(), nn.Dropout(0.5)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.drop(self.inner(input_ids, attention_mask)["logits"])
            return out

    original = Dropping().train()
    healed = student(original)
    assert healed.training
    once, again = (
        sqa_fx.heal(copy.deepcopy(healed), original, TRAIN, held_out=HELD_OUT, **{**QUICK, "seed": seed, "steps": 2})
        for seed in (0, 1)
    )
    assert once.history[0]["held_out_loss"] == again.history[0]["held_out_loss"]
    assert once.history[1]["loss"] != again.history[1]["loss"]
    assert healed.training and original.drop.training


# --- what counts -----------------------------------------------------------------------------------------------------


def test_the_divergence_of_a_hand_computed_case() -> None:
    own = torch.tensor([[[0.0, 0.0], [9.0, 0.0]]])
    wanted = torch.tensor([[[0.0, 3.0], [0.0, 0.0]]]).log1p()  # chances 1/5 and 4/5
    expected = 0.2 * torch.tensor(0.4).log() + 0.8 * torch.tensor(1.6).log()
    mask = {"attention_mask": torch.tensor([[1, 0]])}
    found = measure("auto", {"logits": own}, {"logits": wanted}, mask)
    assert float(found.total) == pytest.approx(float(expected)) and float(found.weight) == 1
    assert found.agreed is not None and int(found.agreed) == 0
    both = measure("kl", {"logits": own}, {"logits": wanted}, {})
    assert float(both.weight) == 2 and float(both.total) > 3
    impossible = torch.tensor([[[0.0, float("-inf")]]])
    assert float(measure("kl", impossible, impossible, {}).total) == 0


def test_the_embedding_loss_is_zero_only_for_the_same_vectors() -> None:
    vectors = torch.randn(2, 3, 5)
    mask = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    same = measure("auto", vectors, vectors, mask)
    assert float(same.total) == pytest.approx(0, abs=1e-5) and float(same.weight) == 5 and same.agreed is None
    other = vectors.clone()
    other[0, 2] += 100
    assert float(measure("embedding", other, vectors, mask).total) == pytest.approx(0, abs=1e-5)
    assert float(measure("embedding", -vectors[:, 0], vectors[:, 0], {}).total) > 4
    with pytest.raises(InputError, match=r"\[2, 5\] and the teacher's \[2, 3, 5\]"):
        measure("embedding", vectors[:, 0], vectors, mask)


def test_padding_has_no_influence(original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    other = [{**b, "input_ids": torch.where(b["attention_mask"] > 0, b["input_ids"], 5)} for b in TRAIN]
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(TRAIN, other, strict=True))
    twin = copy.deepcopy(converted)
    sqa_fx.heal(converted, original, TRAIN, **QUICK)
    sqa_fx.heal(twin, original, other, **QUICK)
    assert same_weights(weights_of(converted), weights_of(twin))


def test_accumulated_parts_are_one_batch(original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    """Also when the parts have different numbers of tokens."""
    whole = [{k: torch.cat([TRAIN[i][k], TRAIN[i + 1][k]]) for k in TRAIN[0]} for i in (0, 2)]
    assert len({int(b["attention_mask"].sum()) for b in TRAIN[:4]}) > 1
    twin = copy.deepcopy(converted)
    options = {**QUICK, "steps": 2}
    one = sqa_fx.heal(converted, original, whole, **options)
    two = sqa_fx.heal(twin, original, TRAIN[:4], accumulate=2, **options)
    for a, b in zip(one.history, two.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )


def test_labels_reach_only_models_that_take_them(original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    labelled = [{**b, "labels": b["input_ids"]} for b in TRAIN]
    twin = copy.deepcopy(converted)
    sqa_fx.heal(converted, original, labelled, **QUICK)
    sqa_fx.heal(twin, original, TRAIN, **QUICK)
    assert same_weights(weights_of(converted), weights_of(twin))


def test_a_loss_of_ones_own(original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    def loss(own: Any, wanted: Any, batch: Any) -> Tensor:
        assert not wanted["logits"].requires_grad and batch["input_ids"].shape[0] == 6
        value: Tensor = (own["logits"] - wanted["logits"]).square().mean()
        return value

    report = sqa_fx.heal(converted, original, TRAIN, loss=loss, **{**QUICK, "steps": 20})
    assert report.history[-1]["loss"] < 0.7 * report.history[0]["loss"]
    with pytest.raises(InputError, match="scalar"):
        sqa_fx.heal(converted, original, TRAIN, loss=lambda a, b, c: a["logits"], **QUICK)


def test_tuples_with_labels_and_images_heal() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(24, 4, batch_first=True), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
            return out

    torch.manual_seed(1)
    original = Classifier().eval()
    x, y = torch.randn(12, 7, 24), torch.arange(12) % 5
    healed = sqa_fx.convert(original, hq=2, hkv=2, args=(x[:3],), verify=False)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    report = sqa_fx.heal(healed, original, loader, loss="kl", **{**QUICK, "steps": 12}, site_warmup=3)
    assert report.history[-1]["loss"] < report.history[3]["loss"]


# --- best weights, early end, failures -------------------------------------------------------------------------------


def test_early_stop_gives_back_the_best(original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    before = weights_of(converted)
    options = {**QUICK, "lr": 3.0, "warmup": 0, "steps": 50}
    report = sqa_fx.heal(converted, original, TRAIN, held_out=HELD_OUT, **options, evaluate_every=2, patience=2)
    assert report.stopped_early and report.steps == 4 and report.best_step == 0
    assert same_weights(weights_of(converted), before)


class _Failing:
    """A batch whose model input makes the loss NaN or whose iteration raises, after some good ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[Any]:
        yield from TRAIN[:3]
        if self.kind == "raise":
            raise RuntimeError("the disk is gone")
        yield {**TRAIN[0], "nan": torch.tensor(1)}


@pytest.mark.parametrize("kind", ["nan", "raise", "interrupt"])
def test_failures_leave_the_student_as_it_was(
    kind: str, original: nn.Module, converted: sqa_fx.ConvertedModule
) -> None:
    before = weights_of(converted)

    def loss(own: Any, wanted: Any, batch: Any) -> Tensor:
        value: Tensor = (own["logits"] - wanted["logits"]).square().mean()
        if "nan" in batch and kind == "interrupt":
            raise KeyboardInterrupt
        return value * float("nan") if "nan" in batch else value

    def strip(model: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {k: v for k, v in kwargs.items() if k != "nan"}

    healed = copy.deepcopy(converted)
    hook = original.register_forward_pre_hook(strip, with_kwargs=True)
    wrapped = _Tolerant(healed)
    try:
        if kind == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                sqa_fx.heal(wrapped, original, _Failing(kind), loss=loss, **QUICK)
        else:
            match = (
                "loss is nan at step 4: lower lr" if kind == "nan" else "after step 3: RuntimeError: the disk is gone"
            )
            with pytest.raises(HealError, match=match) as caught:
                sqa_fx.heal(wrapped, original, _Failing(kind), loss=loss, **QUICK)
            assert caught.value.exit_code == 1
    finally:
        hook.remove()
    assert same_weights(weights_of(healed), before)
    assert not original.training


class _Tolerant(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, nan: Any = None, **kwargs: Any) -> Any:
        return self.inner(**kwargs)


# --- data ------------------------------------------------------------------------------------------------------------


def test_data_that_can_be_read_once_lasts_for_one_epoch(original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    report = sqa_fx.heal(converted, original, (b for b in TRAIN), **{**QUICK, "steps": 5})
    assert report.steps == 5
    with pytest.raises(InputError, match="used up after one epoch"):
        sqa_fx.heal(converted, original, (b for b in TRAIN), **QUICK)
    assert sqa_fx.heal(converted, original, lambda: (b for b in TRAIN), **QUICK).steps == 6
    nothing: list[Any] = []
    for empty in (nothing, lambda: iter(nothing)):
        with pytest.raises(InputError, match="no batches"):
            sqa_fx.heal(converted, original, empty, **QUICK)


def _loader(seed: int, generator: bool) -> DataLoader[Any]:
    own = torch.Generator().manual_seed(seed) if generator else None
    return DataLoader(list(range(20)), batch_size=3, shuffle=True, generator=own)  # type: ignore[arg-type]


@pytest.mark.parametrize("generator", [True, False])
def test_the_order_of_a_loader_is_that_of_seed_and_epoch(generator: bool) -> None:
    def taken(seed: int, count: int, noise: int) -> list[list[int]]:
        torch.manual_seed(noise)
        batches = Batches(_loader(noise, generator), seed)
        found = []
        for _ in range(count):
            found.append(batches.take().tolist())
            torch.rand(noise)  # training draws, too
        return found

    run = taken(4, 14, 1)
    assert run == taken(4, 14, 2) != taken(5, 14, 1)
    assert run[:7] != run[7:] and sorted(sum(run[:7], [])) == list(range(20))  # noqa: RUF017
    resumed = Batches(_loader(9, generator), 4)
    resumed.seek(1, 2)
    assert resumed.take().tolist() == run[9]
    with pytest.raises(InputError, match="only 7"):
        resumed.seek(0, 8)


def test_shares_of_a_batch_make_it_up() -> None:
    whole = {"x": torch.arange(12).view(6, 2), "scale": torch.tensor([1.0, 2.0]), "flag": True}
    parts = [share_of(whole, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([p["x"] for p in parts if p is not None]), whole["x"])  # type: ignore[arg-type]
    assert all(p is not None and torch.equal(p["scale"], torch.tensor([1.0, 2.0])) and p["flag"] for p in parts)
    assert share_of(whole, 0, 4) is None and share_of(whole, 0, 1) is whole


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss": "mse"}, "loss is 'mse'"),
        ({"train": "some"}, "one of all, sites, low-rank"),
        ({"steps": 0}, "steps is 0"),
        ({"accumulate": 1.5}, "accumulate is 1.5"),
        ({"lr": -1.0}, "must be above 0"),
        ({"patience": 0}, "patience"),
        ({"resume": "must"}, "needs checkpoints"),
        ({"stpes": 3}, "no option stpes"),
    ],
)
def test_options_that_make_no_sense_are_told(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        HealOptions().changed(changes)


def test_models_and_devices_that_do_not_fit_are_told(original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    twin = copy.deepcopy(original)
    cases: list[tuple[type[SqaError], str, Callable[[], Any]]] = [
        (InputError, "the same again", lambda: sqa_fx.heal(original, original, TRAIN, **QUICK)),
        (InputError, "read only once", lambda: sqa_fx.heal(converted, original, TRAIN, held_out=iter([]), **QUICK)),
        (InputError, "give an iterable", lambda: sqa_fx.heal(converted, original, TRAIN[0]["input_ids"], **QUICK)),
        (InputError, "converted student", lambda: sqa_fx.heal(twin, original, TRAIN, **QUICK, train="sites")),
        (MissingError, "no device", lambda: sqa_fx.heal(converted, original, TRAIN, **{**QUICK, "device": "cuda:77"})),
        (MissingError, "tensorboard", lambda: sqa_fx.heal(converted, original, TRAIN, **QUICK, tensorboard="/nowhere")),
    ]  # fmt: skip
    for kind, match, call in cases:
        with pytest.raises(kind, match=match):
            call()


def test_the_learning_rate_rises_and_falls() -> None:
    options = HealOptions(steps=100, warmup=9, final_lr=0.1)
    rates = [learning_rate(step, options) for step in range(101)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3]) and rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[100] == pytest.approx(0.1)
