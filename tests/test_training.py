"""After conversion the model trains, dropout follows the mode, and shared weights stay shared."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import CASES, EinsumAttention, FusedAttention, Stack, library, tokens
from attention_models import converted as convert_now
from torch import Tensor, nn

import sqa_fx


@functools.cache
def _trainable(name: str, impl: str) -> tuple[sqa_fx.ConvertedModule, dict[str, Any]]:
    case = CASES[name]
    inputs = case.inputs(2, 7)
    return convert_now(case.build(impl).train(), hq=0.5, hkv=0.25, kwargs=inputs, dynamic_shapes=None), inputs


def _loss(outputs: Any) -> Tensor:
    total = torch.zeros(())
    for leaf in torch.utils._pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            weights = torch.linspace(0.5, 1.5, leaf.numel()).view(leaf.shape)
            total = total + (leaf * weights).sum() + (leaf * leaf * weights).mean()
    return total


@pytest.mark.parametrize(
    ("name", "impl"), [("llama_gqa", "sdpa"), ("bert", "eager"), ("nano", "sdpa"), ("torch_encoder", "train")]
)
def test_gradients_reach_every_sliced_parameter(name: str, impl: str) -> None:
    converted, inputs = _trainable(name, impl)
    converted.zero_grad()
    _loss(converted(**inputs)).backward()
    parameters = dict(converted.named_parameters())
    sliced = [p for p in converted.plan.parameters if p.name in parameters]
    assert len(sliced) >= 2 * len(converted.plan.sites)
    for entry in sliced:
        gradient = parameters[entry.name].grad
        assert gradient is not None and gradient.shape == parameters[entry.name].shape
        if entry.name.endswith("bias") and all(b.role == "k" for b in entry.blocks):
            continue  # a bias on every key moves all scores of a row alike: its gradient is zero
        for block in entry.blocks:
            if block.role in ("q", "k", "v", "o") and not (entry.name.endswith("bias") and block.role == "k"):
                first, last = (int(part) for part in block.to[0].split(":")[:2])
                assert gradient.narrow(entry.axis, first, last - first).abs().max() > 0, (entry.name, block)


def test_training_leaves_the_original_alone() -> None:
    ids = tokens(2, 7)
    model = Stack([FusedAttention(30, 6)], 30)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    converted = sqa_fx.convert(model, hq=3, hkv=3, args=(ids,), dynamic_shapes=None)
    optimiser = torch.optim.SGD(converted.parameters(), lr=0.1)
    converted(ids).sum().backward()
    optimiser.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(converted.get_parameter("embedding.weight"), before["embedding.weight"])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("hq", "hkv"), [(4, 2), (2, 4)])
def test_loss_falls(hq: int, hkv: int) -> None:
    """Each position must name the token before it: impossible without attention."""
    torch.manual_seed(4)
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, 6, (16, 9), generator=generator)
    model = Stack([FusedAttention(48, 8), FusedAttention(48, 8)], 48)
    converted = sqa_fx.convert(model, hq=hq, hkv=hkv, args=(ids,), dynamic_shapes=None)
    head = nn.Linear(48, 6)
    optimiser = torch.optim.Adam([*converted.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = F.cross_entropy(head(converted(ids))[:, 1:].flatten(0, 1), ids[:, :-1].flatten())
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0], losses


class Dropping(nn.Module):
    """Dropout on the probabilities (by SDPA or by a module) and on the output."""

    def __init__(self, fused: bool, inside: float, outside: float) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(30, 90), nn.Linear(30, 30)
        self.fused, self.inside, self.drop = fused, inside, nn.Dropout(outside)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 6, 5).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.inside if self.training else 0.0)
        else:
            y = F.dropout((q @ k.transpose(-2, -1) / 5**0.5).softmax(-1), self.inside, self.training) @ v
        out: Tensor = self.drop(self.out(y.transpose(1, 2).flatten(2)))
        return out


@pytest.mark.parametrize(
    ("fused", "inside", "outside"), [(True, 0.4, 0.0), (False, 0.4, 0.0), (False, 0.0, 0.4), (True, 0.3, 0.3)]
)
def test_dropout_follows_the_mode(fused: bool, inside: float, outside: float) -> None:
    x = torch.randn(2, 7, 30)
    model = Dropping(fused, inside, outside).train()
    converted = sqa_fx.convert(model, hq=4, hkv=2, args=(x,), dynamic_shapes=None)
    assert model.training and converted.training
    assert not torch.equal(converted(x), converted(x))
    converted.eval()
    quiet = converted(x)
    assert torch.equal(quiet, converted(x))
    expected = sqa_fx.convert(model.eval(), hq=4, hkv=2, args=(x,), dynamic_shapes=None)(x)
    torch.testing.assert_close(quiet, expected, rtol=0, atol=1e-6)
    converted.train()
    assert not torch.equal(converted(x), converted(x))


def test_dropout_keeps_its_rate_and_mean() -> None:
    """With everything dropped at rate 0.4, the mean over many draws is the value without dropout."""
    x = torch.randn(2, 7, 30)
    converted = sqa_fx.convert(Dropping(True, 0.0, 0.4).train(), hq=4, hkv=2, args=(x,), dynamic_shapes=None)
    draws = torch.stack([converted(x) for _ in range(400)])
    share = float((draws == 0).double().mean())
    assert 0.38 < share < 0.42
    torch.testing.assert_close(draws.mean(0), converted.eval()(x), rtol=0, atol=0.2)


def test_train_after_eval_capture_warns() -> None:
    x = torch.randn(2, 7, 30)
    converted = sqa_fx.convert(Dropping(True, 0.4, 0.4).eval(), hq=4, hkv=2, args=(x,), dynamic_shapes=None)
    with pytest.warns(UserWarning, match="captured in eval mode"):
        converted.train()
    assert torch.equal(converted(x), converted(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted.eval()


def _tied(name: str) -> tuple[nn.Module, tuple[str, str]]:
    transformers = library("transformers")
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=37, n_positions=32, n_embd=72, n_layer=1, n_head=12, bos_token_id=1, eos_token_id=2
        )
        return transformers.GPT2LMHeadModel(config).eval(), ("transformer.wte.weight", "lm_head.weight")
    config = transformers.BertConfig(
        vocab_size=37,
        hidden_size=72,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=52,
        max_position_embeddings=32,
    )
    model = transformers.BertForMaskedLM(config).eval()
    return model, ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_tied_embeddings_stay_tied(name: str, tmp_path: Path) -> None:
    model, (first, second) = _tied(name)
    originals = _parameters(model)
    assert originals[first] is originals[second]
    inputs: dict[str, Any] = {"input_ids": tokens(2, 7)}
    if name == "gpt2":
        inputs["use_cache"] = False
    converted = sqa_fx.convert(model, hq=6, hkv=3, kwargs=inputs, dynamic_shapes=None)
    converted.save(tmp_path / "saved")
    for module in (converted, sqa_fx.load(tmp_path / "saved")):
        held = _parameters(module)
        assert first in held
        # The graph may hold a shared weight under one of its names only: then there is nothing to come apart.
        assert second not in held or held[second] is held[first]
        names = set(module.state_dict()) & {first, second}
        assert names
        size = sum(p.numel() for p in module.parameters())
        assert size == converted.report.parameters_after
        before = module(**inputs)["logits"].detach().clone()
        with torch.no_grad():
            held[first].mul_(1.5)
        after = module(**inputs)["logits"]
        assert not torch.equal(before, after)
        for parameter in module.parameters():
            parameter.grad = None
        after.square().sum().backward()
        gradient = held[first].grad
        # The row of a token that never occurs in the input gets a gradient only through the output side.
        absent = next(t for t in range(4, 37) if not bool((inputs["input_ids"] == t).any()))
        assert gradient is not None and gradient[absent].abs().max() > 0
        present = int(inputs["input_ids"][0, 0])
        assert gradient[present].abs().max() > 0


def test_save_and_load_compute_the_same(tmp_path: Path) -> None:
    ids = tokens(2, 7)
    converted = sqa_fx.convert(
        CASES["llama_mha"].build("sdpa"), hq=4, hkv=2, kwargs={"input_ids": ids, "use_cache": False}
    )
    converted.save(tmp_path / "saved")
    loaded = sqa_fx.load(tmp_path / "saved")
    assert loaded.plan == converted.plan
    for batch, length in ((2, 7), (3, 11)):
        call = {"input_ids": tokens(batch, length), "use_cache": False}
        assert torch.equal(loaded(**call)["logits"], converted(**call)["logits"])
    assert loaded.state_dict().keys() == converted.state_dict().keys()
    loaded(**call)["logits"].sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


@pytest.mark.parametrize("kind", ["fused", "einsum"])
def test_layers_that_share_weights_keep_sharing(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(6)
    layer: nn.Module = FusedAttention(30, 6) if kind == "fused" else EinsumAttention(30, 6, 5)
    ids = tokens(2, 7)
    model = Stack([layer, layer, layer], 30).eval()
    count = len(list(model.parameters()))
    converted = sqa_fx.convert(model, hq=2, hkv=1, args=(ids,), dynamic_shapes=None)
    assert len(converted.report.sites) == 3
    plans = converted.plan.sites
    assert len({(p.query_heads, p.kv_groups) for p in plans}) == 1
    assert all(set(p.sites) == {s.name for s in plans} for p in converted.plan.parameters)
    converted.save(tmp_path / "saved")
    for module in (converted, sqa_fx.load(tmp_path / "saved")):
        assert len(list(module.parameters())) == count
    torch.testing.assert_close(sqa_fx.load(tmp_path / "saved")(ids), converted(ids), rtol=0, atol=0)


def test_shared_weights_cannot_be_cut_in_two_ways() -> None:
    layer = FusedAttention(30, 6)
    model, ids = Stack([layer, layer], 30).eval(), tokens(2, 7)
    names = [s.name for s in sqa_fx.inspect(model, args=(ids,), dynamic_shapes=None).sites]
    with pytest.raises(sqa_fx.SqaError, match=r"share|weight|parameter|conflict"):
        sqa_fx.convert(model, hq={names[0]: 3, names[1]: 2}, args=(ids,), dynamic_shapes=None)
