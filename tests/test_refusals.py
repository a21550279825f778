"""What must not convert, and what is said about it; the model stays as it was."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import FusedAttention, Stack, tokens
from attention_models import converted as convert_now
from plan_arithmetic import whole_state
from torch import Tensor, nn

import sqa_fx
from sqa_fx.errors import InputError, NoAttentionError, PlanError, SqaError
from sqa_fx.passes.advice import ADVICE, RefusalKind

WIDTH, HEADS, HEAD_DIM = 24, 4, 6


class Projected(nn.Module):
    """q, k, v [batch, heads, seq, head_dim] and an output projection, for mixers that are not plain attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, y: Tensor) -> Tensor:
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Plain(Projected):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.heads(x)))


class ChannelAttention(Projected):
    """XCA: the softmax runs over channels, not positions."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(-2, -1) for y in self.heads(x))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.merge((weights @ v).transpose(-2, -1))


class TalkingHeads(Projected):
    def __init__(self, before: bool) -> None:
        super().__init__()
        self.mix, self.before = nn.Linear(HEADS, HEADS), before

    def talk(self, scores: Tensor) -> Tensor:
        mixed: Tensor = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return mixed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-2, -1)
        weights = self.talk(scores).softmax(-1) if self.before else self.talk(scores.softmax(-1))
        return self.merge(weights @ v)


class NormAcrossHeads(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HEADS * HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        b, _, t, _ = q.shape
        q = self.norm(q.transpose(1, 2).reshape(b, t, -1)).view(b, t, HEADS, HEAD_DIM).transpose(1, 2)
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class SoftmaxAcrossHeads(Projected):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge((q @ k.transpose(-2, -1)).softmax(dim=1) @ v)


class NoOutputProjection(Projected):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class OutputSquaredAcrossHeads(Projected):
    """A norm over all heads between attention and its output projection."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2)
        out: Tensor = self.out(F.layer_norm(y, (HEADS * HEAD_DIM,)))
        return out


class SharedOutput(Projected):
    """The output projection also projects something that is no attention."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.merge(F.scaled_dot_product_attention(*self.heads(x)))
        other: Tensor = self.out(self.qkv(x)[..., : HEADS * HEAD_DIM])
        return y + other


class FourierOutput(Projected):
    """An op that heads cannot be followed through stands before the output projection."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x))
        return self.merge(torch.fft.fft(y, dim=1).real)


class SummedHeads(Projected):
    """Every head adds the sum of all heads to its output."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x))
        return self.merge(y + y.sum(1, keepdim=True))


class ShuffledHeads(Projected):
    """The value of head h meets the probabilities of head h - 1."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.merge(weights.roll(1, 1) @ v + weights @ v)


class SingleHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-2, -1) / math.sqrt(WIDTH)
        out: Tensor = self.out(scores.softmax(-1) @ self.v(x))
        return out


class LinearAttention(Projected):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v))


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 31), nn.Linear(31, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x))).softmax(-1)  # type: ignore[no-any-return]


class Two(nn.Module):
    """One plain attention, then something else."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.plain, self.odd = Plain(), second

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.plain(x)
        return x + self.odd(x)  # type: ignore[no-any-return]


X = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))

REFUSED: list[tuple[str, nn.Module, str, RefusalKind]] = [
    ("talking before softmax", TalkingHeads(True), "head", "talking heads"),
    ("talking after softmax", TalkingHeads(False), "head", "talking heads"),
    ("norm of all heads' output", OutputSquaredAcrossHeads(), "norm.*heads|heads.*norm", "norm across heads"),
    ("softmax across heads", SoftmaxAcrossHeads(), "softmax|head", "norm across heads"),
    ("no output projection", NoOutputProjection(), "output|projection", "no output projection"),
    ("one head", SingleHead(), "one head", "one head"),
    ("shuffled heads", ShuffledHeads(), "head", "heads combined"),
    ("shared output projection", SharedOutput(), "also serves", "shared weights"),
    ("opaque op", FourierOutput(), "fft", "opaque op"),
    ("channel attention", ChannelAttention(), "channel attention", "channel attention"),
    ("sum of heads", SummedHeads(), "heads are summed", "norm across heads"),
]
SILENT: list[tuple[str, nn.Module]] = [
    ("linear attention", LinearAttention()),
    ("no attention", NoAttention()),
]


@pytest.mark.parametrize(
    ("model", "words", "kind", "free"),
    [pytest.param(m, w, k, number % 6 == 0, id=i) for number, (i, m, w, k) in enumerate(REFUSED)],
)
def test_refused_with_reason_and_node(model: nn.Module, words: str, kind: RefusalKind, free: bool) -> None:
    """Beside a plain site, which is converted all the same, the odd one stays as it was and the report says why; two
    of them in a graph of free sizes."""
    pair = Two(model).eval()
    before = whole_state(pair)
    converted = convert_now(pair, hq=2, hkv=2, args=(X,), dynamic_shapes="auto" if free else None)
    assert [s.name for s in converted.report.sites] == ["plain"]
    assert len(converted.report.refused) == 1
    refusal = converted.report.refused[0]
    assert refusal.name.startswith("odd")
    assert re.search(words, refusal.reason), refusal.reason
    assert refusal.kind == kind and refusal.advice == ADVICE[kind]
    here = Path(__file__).name
    assert Path(refusal.location.split(":")[0]).name == here and refusal.source
    assert all(Path(at.split(":")[0]).name == here for at in refusal.node_locations)
    names = {node.name for node in converted.graph_module.graph.nodes}
    assert refusal.nodes and set(refusal.nodes) & names
    assert refusal.reason in str(converted.report)
    after = dict(converted.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("odd."))
    assert all(torch.equal(value, before[name]) for name, value in whole_state(pair).items())


# A shared weight is seen only when the graph is rewritten, and is then a PlanError.
ALONE = [
    pytest.param(m, id=i, marks=[pytest.mark.slow] * (number % 2))
    for number, (i, m, _, kind) in enumerate(REFUSED)
    if kind != "shared weights"
]


@pytest.mark.parametrize("model", ALONE)
def test_alone_it_is_the_nearest_miss(model: nn.Module) -> None:
    report = sqa_fx.inspect(model.eval(), args=(X,), dynamic_shapes=None)
    assert not report.sites and report.refused
    with pytest.raises(NoAttentionError, match="nearest miss") as error:
        sqa_fx.convert(model.eval(), hq=2, hkv=2, args=(X,), dynamic_shapes=None)
    assert report.refused[0].reason in str(error.value)
    assert all(node in str(error.value) for node in report.refused[0].nodes)


@pytest.mark.parametrize("model", [pytest.param(m, id=i) for i, m in SILENT])
def test_no_attention_at_all(model: nn.Module) -> None:
    report = sqa_fx.inspect(model.eval(), args=(X,), dynamic_shapes=None)
    assert not report.sites
    with pytest.raises(NoAttentionError, match=r"softmax|nearest miss") as error:
        sqa_fx.convert(model.eval(), hq=2, hkv=2, args=(X,), dynamic_shapes=None)
    assert error.value.exit_code == 2
    mixed = sqa_fx.convert(Two(model).eval(), hq=2, hkv=2, args=(X,), dynamic_shapes=None)
    assert [s.name for s in mixed.report.sites] == ["plain"]


class QueriesFromOutside(Projected):
    """Queries come as an input."""

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        _, k, v = self.heads(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v))


def test_queries_from_an_input_are_refused() -> None:
    q = torch.randn(2, HEADS, 5, HEAD_DIM)
    (refusal,) = sqa_fx.inspect(QueriesFromOutside().eval(), args=(X, q), dynamic_shapes=None).refused
    assert "query" in refusal.reason


class ChosenByData(Projected):
    """Which heads' outputs are used hangs on the data."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x))
        return self.merge(y.index_select(1, x[0, :HEADS, 0].argsort()))


def test_heads_chosen_by_the_data_are_refused() -> None:
    report = sqa_fx.inspect(ChosenByData().eval(), args=(X,), dynamic_shapes=None)
    assert not report.sites or convert_refused(ChosenByData())


def convert_refused(model: nn.Module) -> bool:
    """True when convert refuses ``model`` for what its data chooses."""
    with pytest.raises(PlanError, match="not a fixed list") as error:
        sqa_fx.convert(model.eval(), hq=2, hkv=2, args=(X,), dynamic_shapes=None)
    return "to convert: " in str(error.value)


def test_a_norm_over_all_heads_of_the_query_converts() -> None:
    report = convert_now(NormAcrossHeads().eval(), hq=2, hkv=2, args=(X,), dynamic_shapes=None).report
    assert len(report.sites) == 1 and not report.refused and report.sites[0].inexact == ""


@pytest.mark.parametrize(
    ("model", "words"), [(OutputSquaredAcrossHeads(), "a norm runs"), (SummedHeads(), "a reduction")]
)
def test_inexact_only_where_it_is_allowed(model: nn.Module, words: str) -> None:
    """The odd site is marked and measured; the plain one behind it is still proved."""
    pair = Pair(model, Plain()).eval()
    converted = convert_now(pair, hq=2, hkv=2, args=(X,), allow_inexact=True, dynamic_shapes=None)
    odd, plain = converted.report.sites
    assert odd.inexact.startswith(words) and "kept heads only" in odd.inexact and plain.inexact == ""
    assert odd.proof_error is not None and odd.proof_error > 1e-3
    assert plain.proof_error is not None and plain.proof_error < 1e-12
    assert any(note.startswith("site 'first' is inexact, as allowed") for note in converted.report.notes)
    assert converted.report.proof is not None and [s["exact"] for s in converted.report.proof["sites"]] == [False, True]


class Pair(nn.Module):
    """One mixer, then another."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)  # type: ignore[no-any-return]


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"hq": 4, "hkv": 3}, r"'layers\.0' has 6 query heads and 6 KV heads.*divide"),
    ({"hq": 7}, r"'layers\.0' has 6 query heads and 6 KV heads.*hq=7"),
    ({"hq": 3, "hkv": 7}, r"'layers\.0'.*hkv=7"),
    ({"hq": 0}, r"'layers\.0'.*hq=0"),
    ({"hq": "nosuch"}, r"unknown variant 'nosuch'; known: SQA, "),
    ({"hq": {"decoder.*": 2}}, r"'decoder\.\*' matches no site; sites are: layers\.0, layers\.1"),
    ({"hq": {"layers.0": 2}, "hkv": {"nowhere": 1}}, r"'nowhere' matches no site"),
    ({"hq": {}}, r"no site is named.*layers\.0, layers\.1"),
    ({"hq": 3, "hkv": 3, "heads": {"*": [0, 1]}}, r"'layers\.0'.*\[0, 1\].*3 different heads"),
    ({"hq": 3, "hkv": 3, "heads": {"*": [0, 1, 1]}}, r"'layers\.0'.*3 different heads"),
    ({"hq": 3, "hkv": 3, "heads": {"*": [0, 1, 6]}}, r"'layers\.0'.*between 0 and 5"),
    ({"hq": 3, "hkv": 3, "heads": {"layers.0": [0, 1, 2]}}, r"layers\.1"),
]


def _model() -> Stack:
    torch.manual_seed(2)
    return Stack([FusedAttention(30, 6) for _ in range(2)], 30).eval()


@pytest.mark.parametrize(("request_", "words"), IMPOSSIBLE)
def test_impossible_requests(request_: dict[str, Any], words: str) -> None:
    model, ids = _model(), tokens(2, 7)
    before = whole_state(model)
    with pytest.raises(PlanError, match=words) as error:
        sqa_fx.convert(model, args=(ids,), dynamic_shapes=None, **request_)
    assert error.value.exit_code == 2
    assert all(torch.equal(value, before[name]) for name, value in whole_state(model).items())


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "hq"),
        ({"hq": 3, "heads": "best"}, "'best'.*'first', 'weights'"),
        ({"hq": 3, "kv_merge": "sum"}, "'sum'.*'mean', 'select'"),
    ],
)
def test_unknown_choices(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        sqa_fx.convert(_model(), args=(tokens(2, 7),), dynamic_shapes=None, **choices)


def test_plan_with_a_request_is_refused() -> None:
    plan = sqa_fx.convert(_model(), hq=3, hkv=3, args=(tokens(2, 7),), dynamic_shapes=None).plan
    with pytest.raises(InputError, match="either plan= or hq"):
        sqa_fx.convert(_model(), plan=plan, hq=3, args=(tokens(2, 7),), dynamic_shapes=None)


def test_plans_of_other_models(tmp_path: Path) -> None:
    ids = tokens(2, 7)
    made = sqa_fx.convert(_model(), hq=3, hkv=3, args=(ids,), dynamic_shapes=None)
    again = sqa_fx.convert(_model(), plan=made.plan, args=(ids,), dynamic_shapes=None)
    assert again.plan == made.plan and torch.equal(again(ids), made(ids))

    wider = Stack([FusedAttention(40, 8) for _ in range(2)], 40).eval()
    with pytest.raises(PlanError, match=r"'layers\.0' is for 6 query heads.*the model has 8"):
        sqa_fx.convert(wider, plan=made.plan, args=(ids,), dynamic_shapes=None)
    shorter = Stack([FusedAttention(30, 6)], 30).eval()
    with pytest.raises(PlanError, match=r"'layers\.1'.*does not have; it has: layers\.0"):
        sqa_fx.convert(shorter, plan=made.plan, args=(ids,), dynamic_shapes=None)
    other_head_dim = Stack([FusedAttention(42, 6) for _ in range(2)], 42).eval()
    with pytest.raises(PlanError, match="head dim 5"):
        sqa_fx.convert(other_head_dim, plan=made.plan, args=(ids,), dynamic_shapes=None)

    class Separate(nn.Module):
        """The same sites, heads and sizes, with other parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(30, 30) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = (f(x).view(b, t, 6, 5).transpose(1, 2) for f in (self.q, self.k, self.v))
            out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return out

    with pytest.raises(PlanError, match="another model"):
        sqa_fx.convert(
            Stack([Separate() for _ in range(2)], 30).eval(), plan=made.plan, args=(ids,), dynamic_shapes=None
        )

    path = tmp_path / "plan.json"
    made.plan.save(path)
    assert sqa_fx.Plan.load(path) == made.plan
    path.write_text(path.read_text()[:-200])
    with pytest.raises(PlanError):
        sqa_fx.Plan.load(path)


@functools.cache
def _plan_as_text() -> str:
    made = sqa_fx.convert(_model(), hq=3, hkv=3, heads="first", args=(tokens(2, 7),), dynamic_shapes=None)
    return json.dumps(made.plan.to_json())


EDITS: list[tuple[str, Any, str]] = [
    ("query_heads", [0, 1, 9], "do not exist|different"),
    ("query_heads", [0, 1, 1], "different"),
    ("kv_groups", [[0], [1], [1]], "two groups|another|merged"),
    ("kv_groups", [[3], [4], [5]], "not merged|KV"),
]


@pytest.mark.parametrize(("field", "value", "words"), EDITS)
def test_plans_edited_by_hand_are_checked(field: str, value: Any, words: str) -> None:
    ids = tokens(2, 7)
    data = json.loads(_plan_as_text())
    data["sites"][0][field] = value
    if field == "query_heads":
        data["sites"][0]["query_groups"] = [[h] for h in value]
    with pytest.raises(PlanError, match=words):
        sqa_fx.convert(_model(), plan=sqa_fx.Plan.from_json(data), args=(ids,), dynamic_shapes=None)


def test_what_is_no_model() -> None:
    with pytest.raises(InputError, match=r"nn\.Module"):
        sqa_fx.convert("model", hq=2)  # type: ignore[arg-type]


def test_every_error_is_ours() -> None:
    class Unexportable(Plain):
        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 0:
                x = x + 1
            return super().forward(x)

    with pytest.raises(SqaError, match=r"torch\.export failed.*what to try"):
        sqa_fx.convert(Unexportable().eval(), hq=2, args=(X,))
