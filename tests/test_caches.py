"""KV caches as inputs, outputs and buffers: they hold the new KV heads only, and decoding gives the oracle's tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_models import CASES, converted, library, noise, perturb, tokens
from cache_models import (
    HEAD_DIM,
    KV_HEADS,
    ROOM,
    WIDTH,
    Buffered,
    Crossing,
    Elsewhere,
    Growing,
    Stacked,
    Summing,
    Written,
)
from plan_arithmetic import load_masked
from torch import Tensor, nn

import sqa_fx
from sqa_fx.errors import SqaError

HQ, HKV = 4, 2


def _masked(model: nn.Module, plan: sqa_fx.Plan) -> nn.Module:
    oracle = copy.deepcopy(model)
    load_masked(oracle, plan.to_json())
    return oracle


def _groups(plan: sqa_fx.Plan) -> list[tuple[int, ...]]:
    return list(plan.sites[0].kv_groups)


def _cut(cache: Tensor, plan: sqa_fx.Plan, dim: int = 1) -> Tensor:
    """The cache [.., KV heads, ..] with the heads of each group averaged, written out by hand."""
    parts = [torch.stack([cache.select(dim, g) for g in group]).mean(0) for group in _groups(plan)]
    return torch.stack(parts, dim)


def _merged(cache: Tensor, plan: sqa_fx.Plan, dim: int = 1) -> Tensor:
    """The cache with every head of a group replaced by their average."""
    result = cache.clone()
    for group in _groups(plan):
        mean = torch.stack([cache.select(dim, g) for g in group]).mean(0)
        for g in group:
            result.select(dim, g).copy_(mean)
    return result


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_past_keys_and_values_shrink_and_grow() -> None:
    model = perturb(Growing().eval())
    past = noise(2, KV_HEADS, 7, HEAD_DIM), noise(2, KV_HEADS, 7, HEAD_DIM) * 2
    auto = torch.export.Dim.AUTO
    free = {"x": {0: auto, 1: auto}, "past_k": {0: auto, 2: auto}, "past_v": {0: auto, 2: auto}}
    result = converted(model, hq=HQ, hkv=HKV, args=(noise(2, 3, WIDTH), *past), dynamic_shapes=free)
    assert [p.size for p in result.plan.inputs] == [(KV_HEADS, HKV)] * 2
    assert any("KV caches among the inputs hold 2 heads instead of 3: past_k, past_v" in n for n in result.report.notes)
    assert any("KV heads of an output, 2 instead of 3" in n for n in result.report.notes)
    oracle = _masked(model, result.plan)
    for batch, length, before in ((2, 3, 7), (1, 1, 7), (3, 1, 1), (1, 5, 23), (2, 1, 13)):
        x = noise(batch, length, WIDTH)
        k, v = noise(batch, KV_HEADS, before, HEAD_DIM), noise(batch, KV_HEADS, before, HEAD_DIM).flip(0)
        expected = oracle(x, _merged(k, result.plan), _merged(v, result.plan))
        actual = result(x, _cut(k, result.plan), _cut(v, result.plan))
        _close(actual[0], expected[0])
        for own, whole in zip(actual[1:], expected[1:], strict=True):
            assert own.shape == (batch, HKV, before + length, HEAD_DIM)
            _close(own, _cut(whole, result.plan))


def test_keys_and_values_in_one_tensor() -> None:
    model = perturb(Stacked().eval())
    x, past = noise(2, 3, WIDTH), noise(2, 2, KV_HEADS, 7, HEAD_DIM)
    result = converted(model, hq=HQ, hkv=HKV, args=(x, past), dynamic_shapes=None)
    expected = _masked(model, result.plan)(x, _merged(past, result.plan, 2))
    actual = result(x, _cut(past, result.plan, 2))
    _close(actual[0], expected[0])
    _close(actual[1], _cut(expected[1], result.plan, 2))
    assert actual[1].shape == (2, 2, HKV, 10, HEAD_DIM)


@pytest.mark.parametrize(
    ("way", "length"),  # "where" writes one position
    [
        ("index_copy", 3),
        ("index_put", 3),
        ("where", 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("index_copy", 1), ("scatter", 3))),
    ],
)
def test_caches_written_in_place(way: str, length: int) -> None:
    model = perturb(Written(way).eval())
    x, position = noise(2, length, WIDTH), torch.tensor(5)
    k, v = noise(2, KV_HEADS, ROOM, HEAD_DIM), noise(2, KV_HEADS, ROOM, HEAD_DIM) * 2
    shapes = "auto" if way == "index_copy" else None
    result = converted(model, hq=HQ, hkv=HKV, args=(x, k, v, position), dynamic_shapes=shapes)
    oracle = _masked(model, result.plan)
    for at in (5, 2):
        whole = [_merged(t, result.plan) for t in (k, v)]
        own = [_cut(t, result.plan) for t in (k, v)]
        _close(result(x, *own, torch.tensor(at)), oracle(x, *whole, torch.tensor(at)))
        for small, large in zip(own, whole, strict=True):
            _close(small, _cut(large, result.plan))
        assert not torch.equal(own[0], _cut(k, result.plan)), "nothing was written"


def test_caches_in_buffers() -> None:
    model = perturb(Buffered().eval())
    result = converted(model, hq=HQ, hkv=HKV, args=(noise(2, 3, WIDTH), torch.tensor(0)), dynamic_shapes=None)
    assert result.get_buffer("cache_k").shape == (2, HKV, ROOM, HEAD_DIM)
    assert not result.get_buffer("cache_k").any(), "converting wrote into the cache"
    oracle = _masked(model, result.plan)
    for position, length in ((0, 3), (3, 3), (6, 3)):
        x = noise(2, length, WIDTH) + position
        _close(result(x, torch.tensor(position)), oracle(x, torch.tensor(position)))
    _close(result.get_buffer("cache_v"), _cut(oracle.get_buffer("cache_v"), result.plan))


def test_keys_and_values_made_elsewhere() -> None:
    model = perturb(Crossing().eval())
    x, k, v = noise(2, 3, WIDTH), noise(2, KV_HEADS, 9, HEAD_DIM), noise(2, KV_HEADS, 9, HEAD_DIM) * 2
    result = converted(model, hq=HQ, hkv=HKV, args=(x, k, v))
    assert (result.plan.sites[0].heads, result.plan.sites[0].kv_heads) == (6, 3)
    expected = _masked(model, result.plan)(x, _merged(k, result.plan), _merged(v, result.plan))
    _close(result(x, _cut(k, result.plan), _cut(v, result.plan)), expected)
    again = sqa_fx.Plan.from_json(result.plan.to_json())
    assert again == result.plan and again.inputs
    twice = converted(model, plan=again, args=(x, k, v), dynamic_shapes=None)
    assert twice.plan == result.plan


def test_all_kv_heads_kept_keep_the_caches() -> None:
    model = perturb(Growing().eval())
    inputs = noise(2, 3, WIDTH), noise(2, KV_HEADS, 7, HEAD_DIM), noise(2, KV_HEADS, 7, HEAD_DIM)
    result = converted(model, hq=3, hkv=3, args=inputs, dynamic_shapes=None)
    for own, expected in zip(result(*inputs), _masked(model, result.plan)(*inputs), strict=True):
        _close(own, expected)
    assert not any("KV" in note for note in result.report.notes)


def test_a_cache_that_is_read_otherwise_is_refused() -> None:
    inputs = noise(2, 3, WIDTH), noise(2, KV_HEADS, 9, HEAD_DIM), noise(2, KV_HEADS, 9, HEAD_DIM)
    with pytest.raises(SqaError, match=r"cross_k is also read as a whole.*to convert: keep all KV heads"):
        sqa_fx.convert(Summing().eval(), hq=HQ, hkv=HKV, args=inputs, dynamic_shapes=None)


def test_keys_that_leave_for_other_purposes_stay_whole() -> None:
    model = perturb(Elsewhere().eval())
    x = noise(2, 3, WIDTH)
    result = converted(model, hq=HQ, hkv=HKV, args=(x,), dynamic_shapes=None)
    oracle = _masked(model, result.plan)
    for actual, expected in zip(result(x), oracle(x), strict=True):
        _close(actual, expected)
    _close(result.get_buffer("kept"), oracle.get_buffer("kept"))


def test_a_compiled_model_keeps_the_callers_caches() -> None:
    """The caller of a compiled graph owns the caches: all KV heads stay, or the site does."""
    model = perturb(Written("index_copy").eval())
    x, position = noise(2, 1, WIDTH), torch.tensor(5)
    cache = noise(2, KV_HEADS, ROOM, HEAD_DIM), noise(2, KV_HEADS, ROOM, HEAD_DIM) * 2
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sqa_fx", options={"hq": 3, "hkv": 3, "inner": "eager"})
    own, whole = [t.clone() for t in cache], [t.clone() for t in cache]
    with torch.no_grad():
        actual = compiled(x, *own, position)
        _close(actual, _masked(model, sqa_fx.last_plan(model))(x, *whole, position))
    for a, b in zip(own, whole, strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sqa_fx", options={"hq": 4, "hkv": 2, "inner": "eager"})
    with torch.no_grad():
        _close(compiled(x, *[t.clone() for t in cache], position), model(x, *[t.clone() for t in cache], position))


def _decoder(layers: int = 2) -> Any:
    model: Any = perturb(CASES["llama_gqa"].build("sdpa"))
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    return model


def _static_cache(model: Any, batch: int, room: int) -> Any:
    """An empty static cache whose tensors exist."""
    cache = library("transformers").StaticCache(config=model.config, max_cache_len=room)
    config = model.config
    cache.early_initialization(
        batch, config.num_key_value_heads, config.hidden_size // config.num_attention_heads, torch.float32, "cpu"
    )
    return cache


def _cache_name(model: Any) -> str:
    """transformers calls the argument ``past_key_values`` or ``cache``."""
    import inspect

    names = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def test_static_cache_decodes_the_tokens_of_the_oracle(tmp_path: Path) -> None:
    """Prefill and decoding graphs, exported and saved, driven by hand: 32 greedy tokens."""
    library("transformers")
    model, prompt, room = _decoder(), tokens(2, 5), 40
    name = _cache_name(model)
    first = converted(
        model,
        hq=HQ,
        hkv=HKV,
        kwargs={"input_ids": prompt, name: _static_cache(model, 2, room), "use_cache": True},
        dynamic_shapes=None,
    )
    step = converted(
        model,
        plan=first.plan,
        kwargs={"input_ids": prompt[:, :1], name: _static_cache(model, 2, room), "use_cache": True},
        dynamic_shapes=None,
    )
    assert step.plan.same_cuts(first.plan) and len(first.plan.inputs) == 4
    first.save(tmp_path / "prefill")
    step.save(tmp_path / "decode")
    oracle: Any = _masked(model, first.plan)
    expected = oracle.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert len(set(expected[:, 5:].flatten().tolist())) > 8
    assert not torch.equal(
        expected, model.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=-1, pad_token_id=0)
    )
    exported = [first.exported_program().module(), step.exported_program().module()]
    for graphs in (exported, [sqa_fx.load(tmp_path / "prefill"), sqa_fx.load(tmp_path / "decode")]):
        ids = _decode(graphs, prompt, name, _smaller_cache(model, first.plan, room))
        assert torch.equal(ids, expected)


def _smaller_cache(model: Any, plan: sqa_fx.Plan, room: int) -> Any:
    """An empty static cache for the new KV heads."""
    config = copy.deepcopy(model.config)
    config.num_attention_heads, config.num_key_value_heads = HQ, HKV
    config.hidden_size = HQ * (model.config.hidden_size // model.config.num_attention_heads)
    cache = library("transformers").StaticCache(config=config, max_cache_len=room)
    cache.early_initialization(2, HKV, plan.sites[0].head_dim, torch.float32, "cpu")
    for layer in cache.layers:
        if hasattr(layer, "num_heads"):
            layer.num_heads = model.config.num_key_value_heads  # a number in the cache's form, which nothing reads
    return cache


def _decode(graphs: Sequence[Any], prompt: Tensor, name: str, cache: Any) -> Tensor:
    """The prompt and 32 greedy tokens after it [batch, length]."""
    with torch.no_grad():
        out = graphs[0](**{"input_ids": prompt, name: cache, "use_cache": True})
        ids = [prompt, out["logits"][:, -1].argmax(-1, keepdim=True)]
        for _ in range(31):
            out = graphs[1](**{"input_ids": ids[-1], name: cache, "use_cache": True})
            ids.append(out["logits"][:, -1].argmax(-1, keepdim=True))
    return torch.cat(ids, 1)


def _translator() -> Any:
    """An encoder-decoder whose tokens change from step to step."""
    transformers = library("transformers")
    torch.manual_seed(1)
    config = transformers.BartConfig(
        vocab_size=37, d_model=40, encoder_layers=1, decoder_layers=1, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=52, decoder_ffn_dim=52, max_position_embeddings=64, init_std=0.1,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    model: Any = perturb(transformers.BartForConditionalGeneration(config).eval())
    with torch.no_grad():
        model.model.decoder.embed_positions.weight.mul_(8)
    return model


_GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0, "max_new_tokens": 32}


# A static cache always decodes above.
@pytest.mark.parametrize("kind", ["decoder", pytest.param("decoder static", marks=pytest.mark.slow), "encoder-decoder"])
def test_generate_gives_the_tokens_of_the_oracle(kind: str) -> None:
    library("transformers")
    model = _translator() if kind == "encoder-decoder" else _decoder(1 if "static" in kind else 2)
    settings = {**_GREEDY, **({"cache_implementation": "static"} if "static" in kind else {})}
    prompt = tokens(2, 5)
    fast = sqa_fx.convert_for_generation(model, hq=0.5, hkv=0.5, kwargs={"input_ids": prompt}, generate=settings)
    oracle = _masked(model, fast.sqa_forms.plan)
    if kind == "encoder-decoder":
        load_masked(oracle.get_encoder(), fast.sqa_encoder_forms.plan.to_json())  # type: ignore[operator]
        assert {s.name.split(".")[-1] for s in fast.sqa_forms.plan.sites} == {"self_attn", "encoder_attn"}
    # A static cache fixes the batch and the room for tokens.
    for ids in (prompt, *([] if "static" in kind else [tokens(3, 7), tokens(1, 5), tokens(2, 1)])):
        actual = fast.generate(ids, **settings)
        expected: Tensor = oracle.generate(ids, **settings)  # type: ignore[operator]
        assert torch.equal(actual, expected)
    assert len(set(expected.flatten().tolist())) > 4
    assert not torch.equal(model.generate(prompt, **settings), oracle.generate(prompt, **settings))  # type: ignore[operator]
    first, *others = fast.sqa_forms.graphs
    assert others
    for graph in others:
        held = dict(first.named_parameters())
        assert all(held[n] is p for n, p in graph.named_parameters() if n in held)
    with pytest.raises(SqaError, match="in a form that was not seen when it was converted"):
        fast.generate(prompt, output_attentions=True, return_dict_in_generate=True, **settings)


def test_models_without_generate_are_an_error() -> None:
    with pytest.raises(SqaError, match="has no generate"):
        sqa_fx.convert_for_generation(nn.Linear(2, 2), hq=1, hkv=1, kwargs={})
