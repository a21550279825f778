"""convert_ on models of transformers and timm: outputs, greedy tokens with every cache, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from plan_arithmetic import load_masked
from torch import Tensor, nn

import sqa_fx

SIZES: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 8, "num_hidden_layers": 2, "intermediate_size": 40}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def _ids() -> Tensor:
    return torch.randint(3, 99, (3, 7))


def _gpt2() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.GPT2Config(
        n_embd=96, n_layer=2, n_head=8, vocab_size=99, bos_token_id=1, eos_token_id=None, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": _ids()}


def _llama() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=4)
    return transformers.LlamaForCausalLM(config), {"input_ids": _ids()}


def _qwen3() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.Qwen3Config(**TEXT, num_key_value_heads=4, head_dim=12)
    return transformers.Qwen3ForCausalLM(config), {"input_ids": _ids()}


def _bert() -> tuple[nn.Module, dict[str, Any]]:
    return transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=99)), {"input_ids": _ids()}


def _vit() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ViTConfig(**SIZES, image_size=20, patch_size=5)
    return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 20, 20)}


def _timm() -> tuple[nn.Module, dict[str, Any]]:
    import timm

    model = timm.models.VisionTransformer(img_size=20, patch_size=5, embed_dim=96, depth=2, num_heads=8, num_classes=7)
    return model, {"x": torch.randn(2, 3, 20, 20)}


def _t5() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.T5Config(
        d_model=96, d_kv=12, num_heads=8, num_layers=2, d_ff=40, vocab_size=99, decoder_start_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), {"input_ids": _ids(), "decoder_input_ids": _ids()[:, :5]}


def _whisper() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.WhisperConfig(
        d_model=96, encoder_layers=1, decoder_layers=1, encoder_attention_heads=8, decoder_attention_heads=8,
        encoder_ffn_dim=40, decoder_ffn_dim=40, vocab_size=99, num_mel_bins=8, max_source_positions=11,
        max_target_positions=20, decoder_start_token_id=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(2, 8, 22), "decoder_input_ids": torch.randint(3, 99, (2, 5))}
    return transformers.WhisperForConditionalGeneration(config), inputs


Build = Callable[[], tuple[nn.Module, dict[str, Any]]]
SHORT: list[tuple[Build, int, int]] = [(_gpt2, 4, 4), (_llama, 6, 2), (_bert, 4, 4), (_whisper, 4, 4)]
LONG: list[tuple[Build, int, int]] = [(_qwen3, 4, 2), (_vit, 4, 4), (_timm, 4, 4), (_t5, 4, 4)]
CASES = [*SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize(("build", "hq", "hkv"), CASES, ids=lambda value: getattr(value, "__name__", str(value))[1:])
def test_models(build: Build, hq: int, hkv: int) -> None:
    model, inputs = build()
    model.eval()
    original = copy.deepcopy(model)
    shapes = "auto" if build is _bert else None  # what is changed hangs on no size
    report = sqa_fx.convert_(model, hq=hq, hkv=hkv, kwargs=inputs, dynamic_shapes=shapes)
    assert type(model) is type(original) and report.proof.precision == "float64"
    assert all((site.hq, site.hkv) == (hq, hkv) for site in report.plan.sites)
    oracle = copy.deepcopy(original)
    load_masked(oracle, report.plan.to_json())
    with torch.no_grad():
        expected, actual = oracle(**inputs), model(**inputs)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    sqa_fx.Surgery.from_json(report.surgery.to_json()).apply(original)
    original.load_state_dict(model.state_dict())
    with torch.no_grad():
        again = original(**inputs)
    assert torch.equal(*(out if isinstance(out, Tensor) else out[0] for out in (again, actual)))
    if "input_ids" in inputs and hasattr(model, "lm_head"):
        assert "generate" in report.proof.calls
        for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
            tokens = model.generate(inputs["input_ids"], **GREEDY, **cache)  # type: ignore[operator]
            assert torch.equal(tokens, oracle.generate(inputs["input_ids"], **GREEDY, **cache))  # type: ignore[operator]


def test_more_query_heads_per_kv_head_than_the_code_can_group_are_refused() -> None:
    model, inputs = _bert()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(sqa_fx.SqaError, match="in place"):
        sqa_fx.convert_(model.train(), hq=4, hkv=2, kwargs=inputs, dynamic_shapes=None)
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
