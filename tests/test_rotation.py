"""Rotations of heads: the best one in closed form, which ones a model allows, and what they do to its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import library
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sqa_fx.errors import PlanError
from sqa_fx.passes.allowed_rotations import KEYS, VALUES, allowed_rotations
from sqa_fx.passes.capture import capture
from sqa_fx.passes.pipeline import find_sites
from sqa_fx.passes.rotation import Structure, rotated, structures
from sqa_fx.plan import Rotation

SIZE = 8
NAMES = [s.name for s in structures(SIZE)]


def structure(name: str) -> Structure:
    return structures(SIZE)[NAMES.index(name)]


def test_the_freest_come_first() -> None:
    assert NAMES == ["any", "halves of 2", "halves of 4", "neighbours in 4", "halves of 8", "neighbours in 8"]
    assert structure("halves of 8").pairs == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert structure("neighbours in 4") == Structure("neighbours in 4", (4, 5, 6, 7), ((0, 1), (2, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_orthogonal_and_within_the_structure(name: str) -> None:
    made = structure(name).random(SIZE, torch.Generator().manual_seed(0))
    torch.testing.assert_close(made @ made.T, torch.eye(SIZE, dtype=torch.float64))
    blocks = [list(structure(name).free or [0]), *map(list, structure(name).pairs)]
    outside = torch.ones(SIZE, SIZE, dtype=torch.bool)
    for block in blocks:
        outside[torch.tensor(block)[:, None], torch.tensor(block)] = False
    assert not made[outside].any()
    assert not torch.allclose(made, torch.eye(SIZE, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_nearest_beats_random_rotations(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(50, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    best = structure(name).nearest(a.T @ b)
    gap = (a @ best - b).square().sum()
    for _ in range(50):
        assert gap <= (a @ structure(name).random(SIZE, generator) - b).square().sum()


@pytest.mark.parametrize("name", NAMES)
def test_nearest_finds_a_planted_rotation(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(50, SIZE, generator=generator, dtype=torch.float64)
    planted = structure(name).random(SIZE, generator)
    torch.testing.assert_close(structure(name).nearest(a.T @ (a @ planted)), planted)


def test_golden_of_a_pair() -> None:
    """By hand: cross = [[3, -4], [0, 0]] asks for tan = (0 + 4) / (3 + 0), a triangle of 3, 4 and 5."""
    pair = Structure("pair", (), ((0, 1),))
    made = pair.nearest(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
    torch.testing.assert_close(made, torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64))


def test_rotated_by_hand() -> None:
    """R = [[0, -1], [1, 0]] makes (a, b) into R^T (a, b) = (b, -a)."""
    turn = {"r": torch.tensor([[0.0, -1.0], [1.0, 0.0]])}
    held = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    made = rotated(held, [Rotation("w", 1, ("1:4:2",), "r")], turn)
    assert torch.equal(made, torch.tensor([[1.0, 4.0, 3.0, -2.0], [5.0, 8.0, 7.0, -6.0]]))
    made = rotated(held, [Rotation("w", 0, ("0:2",), "r")], turn)
    assert torch.equal(made, torch.tensor([[5.0, 6.0, 7.0, 8.0], [-1.0, -2.0, -3.0, -4.0]]))
    made = rotated(held.to(torch.bfloat16), [Rotation("w", 0, ("0:2",), "r")], turn)
    assert made.dtype == torch.bfloat16


def test_what_is_not_there_or_does_not_fit() -> None:
    with pytest.raises(PlanError, match=r"the rotation 'r' is not with it: keep the \.safetensors file"):
        rotated(torch.ones(2, 2), [Rotation("w", 0, ("0:2",), "r")], {})
    for entries, shape in (("0:2", (3, 3)), ("1:3", (2, 2))):
        with pytest.raises(PlanError, match="rotation 'r' does not fit entries"):
            rotated(torch.ones(2, 2), [Rotation("w", 0, (entries,), "r")], {"r": torch.ones(shape)})


# --- which rotations models allow -----------------------------------------------------------------------------------


def allowed(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
    """The names of the structures that every site allows its keys and its values, '' for none."""
    captured = capture(model.eval(), args, kwargs, dynamic_shapes=None)
    sites = find_sites(captured.graph_module).sites
    inputs = pytree.tree_leaves((captured.args, captured.kwargs))
    names = []
    for roles in (KEYS, VALUES):
        found = allowed_rotations(captured.graph_module, sites, roles, inputs)
        names.append([found[s.name].name if s.name in found else "" for s in sites])
    return names[0], names[1]


class Plain(nn.Module):
    """Attention of 3 heads of 8; ``between`` acts on queries and keys [batch, heads, tokens, 8]."""

    def __init__(self, between: Callable[[Tensor], Tensor], gate: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.between, self.gate = between, gate

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (3, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.between(q), self.between(k), v.tanh() if self.gate else v)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


def test_without_anything_between() -> None:
    assert allowed(Plain(lambda x: x), torch.randn(2, 5, 24)) == (["any"], ["any"])


def test_something_for_each_channel() -> None:
    scale = torch.linspace(0.5, 2, 8)
    assert allowed(Plain(lambda x: x * scale, gate=True), torch.randn(2, 5, 24)) == ([""], [""])


def test_a_norm_without_a_weight_allows_all() -> None:
    assert allowed(Plain(lambda x: F.rms_norm(x, (8,))), torch.randn(2, 5, 24)) == (["any"], ["any"])


IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])


def _model(name: str, **settings: Any) -> nn.Module:
    transformers = library("transformers")
    made = getattr(transformers, f"{name}Config")(vocab_size=37, **settings)
    model: nn.Module = getattr(transformers, f"{name}Model")(made).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms with weights other than one
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:  # scores that matter
                parameter.mul_(5)
    return model


_SIZES = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3}
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Llama": (
        lambda: _model("Llama", **{**_SIZES, "num_attention_heads": 6}, num_key_value_heads=3, head_dim=8),
        "halves of 8",
    ),
    "GPT-J": (lambda: _model("GPTJ", n_embd=24, n_layer=1, n_head=3, rotary_dim=4), "neighbours in 4"),
    "GPT-NeoX": (lambda: _model("GPTNeoX", **_SIZES, rotary_pct=0.25), "halves of 2"),
    "Qwen3, a norm with a weight for each channel": (
        lambda: _model("Qwen3", **_SIZES, num_key_value_heads=3, head_dim=8),
        "",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str) -> None:
    build, keys = MODELS[name]
    assert allowed(build(), input_ids=IDS, use_cache=False) == ([keys], ["any"])
