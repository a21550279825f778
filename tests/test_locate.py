"""Reports and errors name sites by the line of source that computes them, say what would make a refused one
convertible, and see mixers that are no attention."""

from __future__ import annotations

import inspect as python_inspect
import json
import re
import sys
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from attention_models import FusedAttention, Stack, converted, tokens
from test_refusals import OutputSquaredAcrossHeads, Plain, Projected, TalkingHeads
from torch import Tensor, nn

import sqa_fx
from sqa_fx.errors import InputError, MissingError, NoAttentionError, PlanError, VerifyError
from sqa_fx.layered_layout import layered
from sqa_fx.passes import verify
from sqa_fx.passes.advice import ADVICE, RefusalKind
from sqa_fx.passes.locate import Place, nodes_at, place
from sqa_fx.region_drawing import draw_regions
from sqa_fx.report import Report

X = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))


def line_of(module: type[nn.Module], text: str) -> str:
    """file.py:N of the one line of ``module`` that holds ``text``."""
    lines, start = python_inspect.getsourcelines(module)
    (number,) = (i for i, line in enumerate(lines) if text in line)
    path = Path(str(python_inspect.getsourcefile(module))).resolve()
    return f"{path.relative_to(Path.cwd())}:{start + number}"


class Pair(nn.Module):
    """Two mixers with a residual each."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        y: Tensor = self.second(x)
        return x + y


class FeatureMapAttention(Projected):
    """Linear attention with elu + 1 as feature map: no softmax anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return self.merge(q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(2).unsqueeze(-1)))


class Retention(Projected):
    """Scores without softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        decay = torch.ones(x.size(1), x.size(1)).tril()
        return self.merge((q @ k.transpose(-2, -1) * decay) @ v)


class Recurrent(nn.Module):
    """One layer of the given kind."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU | nn.RNN]) -> None:
        super().__init__()
        self.layer = kind(24, 24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


class StateSpace(nn.Module):
    """A diagonal state-space model, unrolled by a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.inner = nn.Parameter(torch.rand(24)), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        u = self.inner(x)
        state, states = torch.zeros_like(u[:, 0]), []
        for i in range(7):
            state = self.decay * state + u[:, i]
            states.append(state)
        return torch.stack(states, 1)


class SelectiveScan(nn.Module):
    """A state-space model whose steps depend on the input: a weight times the input stands on the left, as learned
    queries do, and an exponential between two contractions."""

    def __init__(self) -> None:
        super().__init__()
        self.rates, self.step = nn.Parameter(-torch.rand(24, 4)), nn.Parameter(torch.randn(24, 6))
        self.narrow, self.write, self.read = (nn.Linear(24, n) for n in (6, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        steps = F.softplus(self.step @ self.narrow(x).transpose(1, 2))  # [batch, channel, position]
        decay = (self.rates[None, :, None] * steps[..., None]).exp()
        written = steps[..., None] * self.write(x)[:, None] * x.transpose(1, 2)[..., None]
        state, made = torch.zeros(x.size(0), 24, 4), []
        for i in range(7):
            state = decay[:, :, i] * state + written[:, :, i]
            made.append((state @ self.read(x)[:, i].unsqueeze(-1))[..., 0])
        return torch.stack(made, 1)


class RunningSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real
        return y


class EveryFrame(nn.Module):
    """The same thing at each position, one after the other: nothing is mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(x[:, i]).relu() for i in range(7)], 1)


class PooledGate(nn.Module):
    """A mean over positions, and a product of two activations over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x).unflatten(-1, (6, 4)), self.right(x).unflatten(-1, (4, 6))
        y: Tensor = self.out((left @ right).flatten(2)[..., :24]) * x.mean(1, keepdim=True)
        return y


# -- locations -------------------------------------------------------------------------------------------------------


def test_sites_and_refusals_name_the_line_of_the_attention() -> None:
    model = Pair(Plain(), OutputSquaredAcrossHeads()).eval()
    report = converted(model, hq=2, args=(X,), dynamic_shapes=None).report
    assert [s.location for s in report.sites] == [line_of(Plain, "F.scaled_dot_product_attention")]
    (refused,) = report.refused
    assert refused.location == line_of(OutputSquaredAcrossHeads, "F.scaled_dot_product_attention")
    assert refused.source == "y = F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2)"
    assert refused.node_locations == (line_of(OutputSquaredAcrossHeads, "self.out(F.layer_norm"),)
    assert refused.kind in get_args(RefusalKind) and refused.advice == ADVICE[refused.kind]  # type: ignore[index]
    assert report.sites[0].location in report.table()
    assert refused.line() in report.table().splitlines()
    assert refused.line().startswith(f"refused second ({refused.location}): {refused.reason} (node layer_norm")
    assert refused.line().endswith(f"; to convert: {refused.advice}")
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_softmax_is_found_where_it_is_called() -> None:
    model = Stack([FusedAttention(30, 6, fused=False)], 30).eval()
    report = sqa_fx.inspect(model, args=(tokens(2, 7),), dynamic_shapes=None)
    assert [s.location for s in report.sites] == [line_of(FusedAttention, "F.softmax")]


def test_a_known_kind_of_refusal_comes_with_its_advice() -> None:
    (refused,) = sqa_fx.inspect(TalkingHeads(True).eval(), args=(X,), dynamic_shapes=None).refused
    assert refused.kind == "talking heads"
    assert refused.advice == ADVICE["talking heads"]
    assert set(ADVICE) == set(get_args(RefusalKind))


def test_modules_of_torch_stand_in_where_the_trace_holds_nothing_else() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 52, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    report = sqa_fx.inspect(model, args=(torch.randn(2, 5, 32),), dynamic_shapes=None)
    assert len(report.sites) == 2
    assert all(re.fullmatch(r"torch/nn/modules/activation\.py:\d+", s.location) for s in report.sites)

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.encoder(x)
            return y

    report = sqa_fx.inspect(Mine().eval(), args=(torch.randn(2, 5, 32),), dynamic_shapes=None)
    assert {s.location for s in report.sites} == {line_of(Mine, "self.encoder(x)")}


def test_a_program_without_traces_has_no_locations() -> None:
    model = Pair(Plain(), TalkingHeads(True)).eval()
    program = torch.export.export(model, (X,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
        node.meta.pop("nn_module_stack", None)
    report = converted(program, hq=2, args=(X,), dynamic_shapes=None).report
    assert [s.location for s in report.sites] == [""]
    assert [(r.location, r.source, r.node_locations) for r in report.refused] == [("", "", ("",))]
    assert "()" not in report.table()
    with pytest.raises(PlanError, match=r"hq=9 is not between 1 and 4$"):
        sqa_fx.convert(program, hq=9, args=(X,), dynamic_shapes=None)


def _node(*frames: tuple[str, int, str]) -> torch.fx.Node:
    node = torch.fx.Graph().placeholder("x")
    node.meta["stack_trace"] = "".join(
        f'  File "{file}", line {line}, in forward\n    {text}\n' for file, line, text in frames
    )
    return node


def test_paths_are_short_and_printable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_file = str(Path(torch.__file__).parent / "nn" / "functional.py")
    module_file = str(Path(torch.__file__).parent / "nn" / "modules" / "activation.py")
    assert place(_node((torch_file, 3, "a"))) == Place("torch/nn/functional.py:3", "a")
    assert place(_node((module_file, 5, "b"), (torch_file, 3, "a"))) == Place("torch/nn/modules/activation.py:5", "b")
    packaged = "/elsewhere/lib/python3.11/site-packages/models/vit.py"
    assert place(_node((packaged, 7, "c"), (module_file, 5, "b"))) == Place("models/vit.py:7", "c")
    assert place(_node((packaged, 7, "c"), ("<eval_with_key>.3", 5, "b"))).where == "models/vit.py:7"
    monkeypatch.chdir(tmp_path)
    assert place(_node((str(tmp_path / "sub" / "my model.py"), 9, "d"))).where == "sub/my model.py:9"
    assert place(_node(("/nowhere/else.py", 9, "\x1b[31md"))) == Place("/nowhere/else.py:9", "[31md")
    assert place(_node()) == Place()
    assert nodes_at(("a", "b"), ("x.py:1", "x.py:2"), "x.py:1") == "a, b (x.py:2)"


def test_errors_name_the_line() -> None:
    with pytest.raises(NoAttentionError) as missing:
        sqa_fx.convert(OutputSquaredAcrossHeads().eval(), hq=2, args=(X,), dynamic_shapes=None)
    assert f"({line_of(OutputSquaredAcrossHeads, 'F.scaled_dot_product_attention')})" in str(missing.value)
    assert f"({line_of(OutputSquaredAcrossHeads, 'self.out(F.layer_norm')})" in str(missing.value)
    assert "to convert: " in str(missing.value)
    with pytest.raises(PlanError, match="hq=9") as impossible:
        sqa_fx.convert(Pair(Plain(), Plain()).eval(), hq=9, args=(X,), dynamic_shapes=None)
    assert f"the site is at {line_of(Plain, 'F.scaled_dot_product_attention')}" in str(impossible.value)


def test_a_failed_proof_names_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "masked_weights", lambda module, plan: {})
    with pytest.raises(VerifyError, match="first at site") as failed:
        sqa_fx.convert(Plain().eval(), hq=2, args=(X,), dynamic_shapes=None)
    assert f"({line_of(Plain, 'F.scaled_dot_product_attention')})" in str(failed.value)


# -- mixers that are no attention ------------------------------------------------------------------------------------

SEEN: list[tuple[nn.Module, str, str]] = [
    (FeatureMapAttention(), "second", "linear attention"),
    (Retention(), "second", "linear attention"),
    (Recurrent(nn.LSTM), "second.layer", "LSTM"),
    (Recurrent(nn.GRU), "second.layer", "GRU"),
    (Recurrent(nn.RNN), "second.layer", "recurrent"),
    (StateSpace(), "second", "loop over positions"),
    (SelectiveScan(), "second", "state-space"),
    (RunningSum(), "second", "running sum"),
    (Fourier(), "second", "Fourier"),
]
UNSEEN = [EveryFrame(), PooledGate(), Plain(), OutputSquaredAcrossHeads(), TalkingHeads(True), TalkingHeads(False)]


# LSTM stands for all recurrent layers of torch; the others are marked slow.
SEEN_CASES = [
    pytest.param(*c, id=f"{c[0]._get_name()}-{c[2]}", marks=[pytest.mark.slow] * (c[2] in ("GRU", "recurrent")))
    for c in SEEN
]


@pytest.mark.parametrize(("model", "name", "what"), SEEN_CASES)
def test_other_mixers_are_seen_and_left_alone(model: nn.Module, name: str, what: str) -> None:
    report = converted(Pair(Plain(), model).eval(), hq=2, args=(X,), dynamic_shapes=None).report
    assert [s.name for s in report.sites] == ["first"]
    (mixer,) = report.other_mixers
    assert mixer.name == name
    assert what in mixer.what
    assert mixer.location.startswith("tests/test_locate.py:")
    assert f"left alone {mixer.name} ({mixer.location}): {mixer.what}" in report.table()
    assert Report.from_json(json.loads(json.dumps(report.to_json()))).other_mixers == report.other_mixers


UNSEEN_CASES = [pytest.param(m, id=m._get_name(), marks=[pytest.mark.slow] * (i > 3)) for i, m in enumerate(UNSEEN)]


@pytest.mark.parametrize("model", UNSEEN_CASES)
def test_what_is_no_other_mixer(model: nn.Module) -> None:
    assert sqa_fx.inspect(Pair(Plain(), model).eval(), args=(X,), dynamic_shapes=None).other_mixers == []


def test_relative_positions_belong_to_their_site() -> None:
    """The score term q . r and the value term of learned relative positions are no mixers of their own."""

    class Relative(Projected):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            r = self.position(x).unflatten(-1, (4, 6)).transpose(1, 2)
            scores = q @ k.transpose(-2, -1) + q @ r.transpose(-2, -1)
            return self.merge(scores.softmax(-1) @ v)

    report = sqa_fx.inspect(Relative().eval(), args=(X,), dynamic_shapes=None)
    assert len(report.sites) + len(report.refused) == 1
    assert report.other_mixers == []


def test_no_attention_says_what_is_there_instead() -> None:
    with pytest.raises(NoAttentionError, match=r"no attention found.*seen instead: 'layer' \(tests.*LSTM"):
        sqa_fx.convert(Recurrent(nn.LSTM).eval(), hq=2, args=(X,), dynamic_shapes=None)


# -- the drawing -----------------------------------------------------------------------------------------------------


def _texts(path: Path) -> str:
    return "\n".join(e.text or "" for e in ElementTree.parse(path).iter() if e.tag.endswith("}text"))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Plain() for _ in range(3)])
        self.odd, self.recurrent = OutputSquaredAcrossHeads(), Recurrent(nn.LSTM)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.recurrent(self.odd(x))
        return y


def test_the_drawing_holds_every_site(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "regions.svg"
    report = sqa_fx.inspect(Mixture().eval(), hq=2, hkv=1, args=(X,), graph=path, dynamic_shapes=None)
    text = _texts(path)
    assert "blocks.0 ... blocks.2  x 3" in text
    assert "4 query heads, 4 KV heads of 6 -> 2, 1" in text
    assert report.sites[0].location in text
    assert "qkv.weight" in text and "[72*, 24]" in text and "-> [24, 24]" in text  # 2 * 6 + 2 * (1 * 6)
    assert "scaled_dot_product_attention" in text
    assert "refused: " + report.refused[0].reason in text
    assert "left alone: 'recurrent.layer'" in text
    assert all(site.name in path.read_text() for site in report.sites)
    first = path.read_bytes()
    sqa_fx.inspect(Mixture().eval(), hq=2, hkv=1, args=(X,), graph=path, overwrite=True, dynamic_shapes=None)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["regions.svg"]


def test_drawings_of_other_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    sqa_fx.inspect(Plain().eval(), args=(X,), graph=tmp_path / "one.png", dynamic_shapes=None)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    sqa_fx.inspect(Recurrent(nn.LSTM).eval(), args=(X,), graph=tmp_path / "none.svg", dynamic_shapes=None)
    assert "no attention site" in _texts(tmp_path / "none.svg")
    for name, words in (("one.png", "exists"), ("one.pdf", r"\.svg or \.png"), ("no/such.svg", "does not exist")):
        with pytest.raises(InputError, match=words):
            draw_regions([], tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingError, match="pip install matplotlib"):
        draw_regions([], tmp_path / "missing.svg")


def test_layers_go_down_and_neighbours_do_not_overlap() -> None:
    edges = [(0, 2), (1, 2), (2, 3), (2, 4), (3, 5), (0, 5), (6, 5), (4, 5)]
    widths = [1.0, 2.0, 1.5, 1.0, 3.0, 2.0, 0.5]
    layout = layered(edges, widths, 0.25)
    assert all(layout.layers[a] < layout.layers[b] for a, b in edges)
    assert layout.layers == (0, 0, 1, 2, 2, 3, 2)
    for a in range(7):
        for b in range(a):
            if layout.layers[a] == layout.layers[b]:
                assert abs(layout.x[a] - layout.x[b]) >= (widths[a] + widths[b]) / 2 + 0.25 - 1e-9
        assert widths[a] / 2 - 1e-9 <= layout.x[a] <= layout.width - widths[a] / 2 + 1e-9
    assert [len(b) for b in layout.bends] == [0, 0, 0, 0, 0, 2, 0, 0]
    with pytest.raises(ValueError, match="cycle"):
        layered([(0, 1), (1, 0)], [1.0, 1.0], 0.1)
