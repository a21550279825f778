"""Calibration end to end: heads chosen from data, KV heads laid on each other, projections fitted again; all proved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sqa_fx
from sqa_fx import Plan
from sqa_fx.calibration import Spool, calibrate
from sqa_fx.errors import InputError, MissingError, PlanError
from sqa_fx.passes.capture import Captured, capture
from sqa_fx.passes.evidence import Evidence
from sqa_fx.passes.pipeline import Analysis, find_sites, make_plan
from sqa_fx.passes.rotation import structures
from sqa_fx.passes.statistics import SiteStatistics
from sqa_fx.request import HeadScore, KvMerge

WIDTH, SIZE, TOKENS, ROWS = 20, 3, 7, 4


class Layer(nn.Module):
    """Attention of ``heads`` heads of 3 on ``kv_heads``, added to the stream."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q, self.o = nn.Linear(WIDTH, SIZE * heads), nn.Linear(SIZE * heads, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, SIZE * kv_heads), nn.Linear(WIDTH, SIZE * kv_heads)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x and the result: [batch, tokens, width]; mask: [batch, 1, 1, tokens]."""
        q = self.q(x).unflatten(-1, (self.heads, SIZE)).transpose(1, 2)
        k, v = (m(x).unflatten(-1, (self.kv_heads, SIZE)).transpose(1, 2) for m in (self.k, self.v))
        y = F.scaled_dot_product_attention(0.2 * q, k, v, mask, enable_gqa=self.heads != self.kv_heads)
        out: Tensor = x + self.o(y.transpose(1, 2).flatten(2))
        return out


class Model(nn.Module):
    """``layers`` layers and a classifier of every token; with ``shared`` they are one layer, as in ALBERT."""

    def __init__(self, layers: int = 1, heads: int = 6, kv_heads: int = 6, shared: bool = False) -> None:
        super().__init__()
        made = [Layer(heads, kv_heads) for _ in range(1 if shared else layers)]
        self.layers, self.times = nn.ModuleList(made), layers if shared else 1
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Logits of hidden states [batch, tokens, width]."""
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        for layer in list(self.layers) * self.times:
            x = layer(x, mask)
        return {"logits": self.head(x), "hidden": x}


def model_of(*args: Any, **kwargs: Any) -> Model:
    torch.manual_seed(0)
    return Model(*args, **kwargs).eval()


def data(batches: int = 6, seed: int = 1) -> list[Tensor]:
    """Batches as trained models see them: hidden states lie near a plane of few dimensions."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(99))
    each = [torch.randn(ROWS, TOKENS, 5, generator=generator) @ plane for _ in range(batches)]
    return [x + 0.1 * torch.randn(x.shape, generator=generator) for x in each]


def rows(head: int) -> slice:
    return slice(SIZE * head, SIZE * (head + 1))


@torch.no_grad()
def hush(layer: Layer, *heads: int) -> None:
    """Let heads say next to nothing."""
    for h in heads:
        layer.v.weight[rows(h)] *= 1e-3
        layer.v.bias[rows(h)] *= 1e-3


@torch.no_grad()
def twin(layer: Layer, head: int, of: int, turned: bool) -> None:
    """Make the keys and values of ``head`` those of head ``of``, turned if asked; its queries and output stay its
    own."""
    generator = torch.Generator().manual_seed(head)
    for part in (layer.k, layer.v):
        turn = structures(SIZE)[0].random(SIZE, generator).float() if turned else torch.eye(SIZE)
        part.weight[rows(head)] = turn.T @ part.weight[rows(of)]
        part.bias[rows(head)] = turn.T @ part.bias[rows(of)]


def evidence(model: nn.Module, given: Any, how: str = "", loss: Any = None) -> tuple[Captured, Analysis, Evidence]:
    """What the data says, without a conversion."""
    first = given[0]
    args, kwargs = ((), first) if isinstance(first, dict) else ((first,), {})
    captured = capture(model, args, kwargs, None)
    analysis = find_sites(captured.graph_module)
    with Spool(captured) as spool:
        return captured, analysis, calibrate(captured, analysis, given, spool, bool(how), False, loss)


def error(converted: nn.Module, model: nn.Module, fresh: list[Tensor]) -> float:
    with torch.no_grad():
        apart = sum(float((converted(x)["hidden"] - model(x)["hidden"]).square().sum()) for x in fresh)
        return apart / sum(float(model(x)["hidden"].square().sum()) for x in fresh)


# --- which heads stay -----------------------------------------------------------------------------------------------


@cache
def hushed() -> tuple[Captured, Analysis, dict[bool, Evidence]]:
    model = model_of()
    hush(model.layers[0], 1, 4)  # type: ignore[arg-type]

    def labelled(outputs: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"].flatten(0, 1), torch.zeros(batch.shape[:2]).long().flatten())

    captured, analysis, own = evidence(model, data(), "fisher")
    return captured, analysis, {False: own, True: evidence(model, data(), "fisher", labelled)[2]}


@pytest.mark.parametrize(
    ("how", "loss"),
    [*((how, False) for how in ("reconstruct", "importance", "activation", "wifv", "taylor", "fisher")),
     ("taylor", True), ("fisher", True)],
)  # fmt: skip
def test_every_method_drops_heads_that_say_nothing(how: HeadScore, loss: bool) -> None:
    _, analysis, found = hushed()
    [site] = make_plan(analysis, 4, None, how, "mean", evidence=found[loss]).values()
    assert site.query_heads == (0, 2, 3, 5)
    assert site.heads_by == how


def test_gradients_need_a_loss_or_their_own() -> None:
    """Gradients of a loss that the user gave are others than those of the model's own uncertainty."""
    found = {loss: next(iter(e.statistics.values())) for loss, e in hushed()[2].items()}
    assert found[True].samples == found[False].samples == 6 * ROWS
    assert not torch.allclose(found[True].fisher, found[False].fisher)
    assert torch.equal(found[True].norms, found[False].norms)


def test_of_two_heads_that_say_the_same_one_goes() -> None:
    model = model_of()
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    for head, of in ((4, 0), (5, 2)):
        twin(layer, head, of, turned=True)
        with torch.no_grad():  # what they attend to is the same, too
            layer.q.weight[rows(head)] = torch.linalg.lstsq(
                layer.k.weight[rows(head)].T, layer.k.weight[rows(of)].T @ layer.q.weight[rows(of)]
            ).solution
            layer.q.bias[rows(head)] = 0
            layer.q.bias[rows(of)] = 0
            layer.k.bias[rows(head)] = 0
            layer.k.bias[rows(of)] = 0
    converted = sqa_fx.convert(model, hq=4, args=(data()[0],), calibration=data(), dynamic_shapes=None)
    [site] = converted.plan.sites
    gone = set(range(6)) - set(site.query_heads)
    assert len(gone & {0, 4}) == len(gone & {2, 5}) == 1
    assert error(converted, model, data(2, seed=5)) < 1e-6
    assert converted.report.proof is not None


# --- KV heads that become one ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["aligned", "joint"])
def test_turned_twins_are_merged_exactly(how: KvMerge) -> None:
    """Heads 3, 5 and 4 are turned copies of 0, 1 and 2: laid on each other, nothing is lost; as they are, much is."""
    model = model_of()
    for head, of in ((3, 0), (5, 1), (4, 2)):
        twin(model.layers[0], head, of, turned=True)  # type: ignore[arg-type]
    request: dict[str, Any] = {"hq": 6, "hkv": 3, "args": (data()[0],), "calibration": data(), "repair": False}
    merged = sqa_fx.convert(model, kv_merge=how, **request, dynamic_shapes=None)
    assert merged.plan.sites[0].kv_groups == ((0, 3), (1, 5), (2, 4))
    assert merged.plan.sites[0].kv_merge == how
    fresh = data(2, seed=5)
    assert error(merged, model, fresh) < 1e-10
    assert merged.report.proof is not None
    if how == "aligned":
        assert error(sqa_fx.convert(model, kv_merge="mean", **request, dynamic_shapes=None), model, fresh) > 1e-3


def test_grouped_queries() -> None:
    model = model_of(heads=8, kv_heads=4)
    with torch.no_grad():
        twin(model.layers[0], 3, 0, turned=True)  # type: ignore[arg-type]
        twin(model.layers[0], 2, 1, turned=True)  # type: ignore[arg-type]
    request: dict[str, Any] = {"hkv": 2, "args": (data()[0],), "calibration": data(), "kv_merge": "aligned"}
    whole = sqa_fx.convert(model, hq=8, repair=False, **request, dynamic_shapes=None)
    assert whole.plan.sites[0].kv_groups == ((0, 3), (1, 2))
    fresh = data(2, seed=5)
    assert error(whole, model, fresh) < 1e-10
    half = sqa_fx.convert(model, hq=4, **request, dynamic_shapes=None)
    [site] = half.plan.sites
    assert [sum(h // 2 in group for h in site.query_heads) for group in site.kv_groups] == [2, 2]
    assert half.report.proof is not None
    assert error(half, model, fresh) < 0.1


# --- repair ---------------------------------------------------------------------------------------------------------


def test_repair_lowers_the_true_error() -> None:
    model = model_of(layers=2)
    request: dict[str, Any] = {"hq": 3, "args": (data()[0],), "calibration": data(12)}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    repaired = sqa_fx.convert(model, **request, dynamic_shapes=None)
    plain = sqa_fx.convert(model, repair=False, **request, dynamic_shapes=None)
    fresh = data(4, seed=5)
    assert error(repaired, model, fresh) < 0.5 * error(plain, model, fresh)
    assert repaired.plan.refitted == tuple(
        f"layers.{i}.{part}.{p}" for i in (0, 1) for part in "vo" for p in ("weight", "bias")
    )
    assert plain.plan.refitted == ()
    for site in repaired.report.sites:
        assert site.error_before_repair is not None
        assert site.error_after_repair is not None
        assert site.error_after_repair < site.error_before_repair
    assert "held-out error" in repaired.report.table()
    # The proof holds with the fitted weights, and the user's model is what it was.
    assert repaired.report.proof is not None
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_layers_that_share_parameters() -> None:
    """As in ALBERT: one choice for all of them, and no projection is fitted to one of its places alone."""
    model = model_of(layers=3, shared=True)
    hush(model.layers[0], 1, 4)  # type: ignore[arg-type]
    converted = sqa_fx.convert(model, hq=4, args=(data()[0],), calibration=data(2), dynamic_shapes=None)
    assert {site.query_heads for site in converted.plan.sites} == {(0, 2, 3, 5)}
    assert len(converted.plan.sites) == 3
    assert converted.plan.refitted == ()
    notes = [
        n for n in converted.report.notes if "is not repaired: parameter layers.0.o.weight is read in several" in n
    ]
    assert len(notes) == 3
    assert error(converted, model, data(1, seed=5)) < 1e-4


def test_too_few_samples_to_hold_any_out() -> None:
    x = data()[0][:2]
    converted = sqa_fx.convert(model_of(), hq=3, args=(x,), calibration=[x], dynamic_shapes=None)
    assert converted.plan.refitted == ()
    assert any("is not repaired: no sample is left to hold out" in n for n in converted.report.notes)


# --- the data -------------------------------------------------------------------------------------------------------


class TokensFirst(nn.Module):
    """nn.MultiheadAttention, which works on [tokens, batch, width] and flattens that."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, key_padding_mask=attention_mask == 0, need_weights=False)[0]
        return out


@pytest.mark.parametrize("build", [model_of, TokensFirst])
def test_padded_tokens_do_not_count(build: Callable[[], nn.Module]) -> None:
    """Batches with garbage behind their ends say the same as their rows one by one, cut off there."""
    x, lengths = data(1)[0], torch.tensor([7, 3, 5, 1])
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    garbage = torch.where(mask[..., None] != 0, x, torch.full_like(x, 50.0))
    captured = capture(build().eval(), (), {"x": x, "attention_mask": mask})
    analysis = find_sites(captured.graph_module)

    def of(batches: list[dict[str, Tensor]]) -> SiteStatistics:
        def loss(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
            hidden = outputs["hidden"] if isinstance(outputs, dict) else outputs
            valid = batch["attention_mask"][..., None] != 0
            return torch.where(valid, hidden, torch.zeros_like(hidden)).pow(3).sum()

        with Spool(captured) as spool:
            [own] = calibrate(captured, analysis, batches, spool, True, False, loss).statistics.values()
            return own

    padded = of([{"x": garbage, "attention_mask": mask}])
    alone = of(
        [
            {"x": row[None, :n], "attention_mask": torch.ones(1, n).long()}
            for row, n in zip(x, lengths.tolist(), strict=True)
        ]
    )
    assert padded.output.count == alone.output.count == int(lengths.sum())
    for part in ("output", "queries", "keys", "values"):
        own, other = getattr(padded, part), getattr(alone, part)
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own.second, other.second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded.norms, alone.norms, rtol=1e-4, atol=1e-4)
    assert padded.samples == alone.samples == ROWS
    torch.testing.assert_close(padded.fisher, alone.fisher, rtol=1e-3, atol=1e-4)


def test_a_generator_is_read_once() -> None:
    read = []

    def stream() -> Iterator[Tensor]:
        for number, x in enumerate(data(3)):
            read.append(number)
            yield x

    # The first batch is the example, too.
    converted = sqa_fx.convert(model_of(), hq=3, calibration=stream(), dynamic_shapes=None)
    assert read == [0, 1, 2]
    assert converted.plan.refitted
    assert converted(data()[0])["logits"].shape == (ROWS, TOKENS, 5)


def test_labels_and_other_extras_go_to_the_loss_only() -> None:
    batches = [{"x": x, "labels": torch.zeros(ROWS, TOKENS).long()} for x in data(2)]
    seen = []

    def loss(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        seen.append(batch)
        return F.cross_entropy(outputs["logits"].flatten(0, 1), batch["labels"].flatten())

    request: dict[str, Any] = {"hq": 3, "heads": "fisher", "loss": loss, "repair": False}
    # The example is the first batch without labels.
    sqa_fx.convert(model_of(), calibration=batches, **request, dynamic_shapes=None)
    assert [id(b) for b in seen] == [id(b) for b in batches]


def test_a_mask_that_the_graph_does_not_take_is_reported() -> None:
    mask = (torch.arange(TOKENS) < torch.tensor([[7], [3], [5], [1]])).long()
    batches = [{"x": x, "attention_mask": mask} for x in data(2)]
    converted = sqa_fx.convert(model_of(), hq=3, args=(data()[0],), calibration=batches, dynamic_shapes=None)
    assert any("attention_mask" in n and "example inputs" in n for n in converted.report.notes)


def test_what_is_wrong_with_the_data_or_the_request() -> None:
    model, x = model_of(), data()[0]
    with pytest.raises(InputError, match=r"calibration batch 0: input 'x' must have shape \[4, 7, 20\]"):
        sqa_fx.convert(model, hq=3, args=(x,), calibration=[x[:3]], dynamic_shapes=None)
    with pytest.raises(InputError, match="gave no batches"):
        sqa_fx.convert(model, hq=3, args=(x,), calibration=[])
    with pytest.raises(InputError, match="gave no batches"):
        sqa_fx.convert(model, hq=3, calibration=iter([]))
    for single in (x, {"x": x}):
        with pytest.raises(InputError, match="put a single batch in a list"):
            sqa_fx.convert(model, hq=3, args=(x,), calibration=single, dynamic_shapes=None)
    for choice in ({"heads": "reconstruct"}, {"kv_merge": "aligned"}, {"repair": True}):
        with pytest.raises(InputError, match="needs calibration="):
            sqa_fx.convert(model, hq=3, args=(x,), **choice, dynamic_shapes=None)
    with pytest.raises(InputError, match="either plan= or calibration="):
        sqa_fx.convert(model, plan=Plan(()), args=(x,), calibration=[x], dynamic_shapes=None)
    with pytest.raises(InputError, match="heads='best': known are"):
        sqa_fx.convert(model, hq=3, args=(x,), heads="best", dynamic_shapes=None)  # type: ignore[arg-type]


# --- the plan keeps it all ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> tuple[Model, Any]:
    model = model_of(layers=2)
    return model, sqa_fx.convert(
        model, hq=4, hkv=2, args=(data()[0],), calibration=data(), kv_merge="aligned", dynamic_shapes=None
    )


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


def test_a_saved_plan_gives_the_same_bits(made: tuple[Model, Any], tmp_path: Path) -> None:
    model, converted = made
    assert converted.plan.rotations
    assert converted.plan.refitted
    converted.plan.save(tmp_path / "plan.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == converted.plan
    assert {k: v.tolist() for k, v in plan.tensors.items()} == {
        k: v.tolist() for k, v in converted.plan.tensors.items()
    }
    again = sqa_fx.convert(model, plan=plan, args=(data()[1],), dynamic_shapes=None)
    assert same_bits(again, converted)
    assert again.plan == plan
    assert again.report.proof is not None


def test_tensors_that_are_missing_or_altered(made: tuple[Model, Any], tmp_path: Path) -> None:
    model, converted = made
    path, beside = tmp_path / "plan.json", tmp_path / "plan.safetensors"
    converted.plan.save(path)
    with pytest.raises(InputError, match="exists; choose another path"):
        converted.plan.save(path)
    content = beside.read_bytes()
    beside.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PlanError, match=r"plan\.safetensors is not the file that .* was written with"):
        Plan.load(path)
    beside.unlink()
    with pytest.raises(MissingError, match=r"needs plan\.safetensors beside it"):
        Plan.load(path)
    without = json.loads(path.read_text())
    del without["tensors"]
    with pytest.raises(PlanError, match=r"keep the \.safetensors file beside the plan"):
        sqa_fx.convert(model, plan=Plan.from_json(without), args=(data()[0],), verify=False, dynamic_shapes=None)
    for missing in ("rotations", "refitted"):
        with pytest.raises(PlanError, match=r"keep the \.safetensors file beside the plan"):
            sqa_fx.convert(
                model,
                plan=Plan.from_json({**without, missing: []}),
                args=(data()[0],),
                verify=False,
                dynamic_shapes=None,
            )


def test_tensors_of_another_model(made: tuple[Model, Any]) -> None:
    model, converted = made
    plan = converted.plan
    name = next(n for n in plan.tensors if n.startswith("refitted/") and n.endswith("weight"))
    for tensors, refitted in (({name: torch.zeros(2, 2)}, plan.refitted), ({"refitted/no": torch.ones(1)}, ("no",))):
        other = Plan(plan.sites, plan.parameters, plan.inputs, plan.rotations, refitted, {**plan.tensors, **tensors})
        with pytest.raises(PlanError, match="the plan refits"):
            sqa_fx.convert(model, plan=other, args=(data()[0],), verify=False, dynamic_shapes=None)


def test_a_saved_conversion_keeps_its_plan(made: tuple[Model, Any], tmp_path: Path) -> None:
    model, converted = made
    converted.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "plan.safetensors").is_file()
    loaded = sqa_fx.load(tmp_path / "saved")
    assert loaded.plan == converted.plan
    assert same_bits(sqa_fx.convert(model, plan=loaded.plan, args=(data()[0],), dynamic_shapes=None), converted)
    beside = tmp_path / "saved" / "plan.safetensors"
    content = beside.read_bytes()
    beside.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"plan\.safetensors: SHA-256 mismatch"):
        sqa_fx.load(tmp_path / "saved")
    beside.unlink()
    with pytest.raises(InputError, match=r"plan\.safetensors is missing"):
        sqa_fx.load(tmp_path / "saved")


def test_a_conversion_without_data_is_saved_as_before(tmp_path: Path) -> None:
    converted = sqa_fx.convert(model_of(), hq=3, args=(data()[0],), dynamic_shapes=None)
    converted.save(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "model.safetensors", "program.json", "sqa_fx.json"
    ]  # fmt: skip
    assert sqa_fx.load(tmp_path / "saved").plan == converted.plan


# --- torch.compile --------------------------------------------------------------------------------------------------


def test_the_backend_refuses_what_needs_data(made: tuple[Model, Any]) -> None:
    for options in ({"hq": 3, "heads": "reconstruct"}, {"hq": 3, "heads": "fisher"}, {"hq": 3, "kv_merge": "aligned"},
                    {"hq": "auto:0.5"}):  # fmt: skip
        with pytest.raises(PlanError, match=r"needs calibration data.* with convert\(\)"):
            sqa_fx.backend(**options)
    with pytest.raises(PlanError, match=r"turns or refits .* with convert\(\)"):
        sqa_fx.backend(plan=made[1].plan)
