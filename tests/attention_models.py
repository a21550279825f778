"""Tiny models of many styles, built from configuration with random weights; every axis has a size of its own.

A model has two layers where layers can touch each other (shared positions, windows that move) or where its kind stands
for all like it; elsewhere one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sqa_fx
from sqa_fx import ConvertedModule

BATCH, LENGTH = 2, 7
OTHER_BATCH, OTHER_LENGTH = 3, 11
VOCABULARY = 37
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model: how to build it (by implementation), its inputs for (batch, length), and what is true of it.

    ``free_length`` is False when the model itself fixes the length (images). ``mode`` is "train" or "eval".
    """

    build: Callable[[str], nn.Module]
    inputs: Callable[[int, int], Inputs]
    sites: int
    impls: tuple[str, ...] = ("sdpa", "eager")
    free_length: bool = True
    grouped: bool = False


def library(name: str) -> Any:
    """The library, or a skip that says it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")


def tokens(batch: int, length: int) -> Tensor:
    """Token numbers [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator)


def noise(*shape: int) -> Tensor:
    """Gaussian noise, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def perturb(model: nn.Module) -> nn.Module:
    """Give biases and norms values other than zero and one, so that losing one shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1 and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def _hf(model: str, config: str, **settings: Any) -> Callable[[str], nn.Module]:
    def build(impl: str) -> nn.Module:
        transformers = library("transformers")
        made = getattr(transformers, config)(**settings)
        made._attn_implementation = impl
        torch.manual_seed(0)
        built: nn.Module = getattr(transformers, model)(made)
        return perturb(built.eval())

    return build


def _ids(batch: int, length: int) -> Inputs:
    return {"input_ids": tokens(batch, length)}


def _ids_without_cache(batch: int, length: int) -> Inputs:
    return {"input_ids": tokens(batch, length), "use_cache": False}


def _padded(batch: int, length: int) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, length - 2 :] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def _sequence_pair(batch: int, length: int) -> Inputs:
    return {"input_ids": tokens(batch, length), "decoder_input_ids": tokens(batch, 5), "use_cache": False}


def _speech(batch: int, length: int) -> Inputs:
    return {"input_features": noise(batch, 10, 26), "decoder_input_ids": tokens(batch, length), "use_cache": False}


def _image(batch: int, length: int) -> Inputs:
    return {"pixel_values": noise(batch, 3, 24, 24)}


_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 80,
    "intermediate_size": 52,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 72, "n_layer": 2, "n_head": 12}
_FALCON = {"vocab_size": VOCABULARY, "hidden_size": 80, "num_hidden_layers": 1, "num_attention_heads": 8, "bias": True}


class FusedAttention(nn.Module):
    """nanoGPT's causal self-attention: one linear for q, k and v."""

    def __init__(self, width: int, heads: int, fused: bool = True) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.fused = heads, fused

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width] -> the same shape."""
        b, t, c = x.shape
        q, k, v = self.c_attn(x).split(c, dim=2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            hidden = torch.ones(t, t, dtype=torch.bool).tril() == 0
            y = F.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1) @ v
        out: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return out


class EinsumAttention(nn.Module):
    """Attention whose projections and products are einsums over weights [heads, width, head_dim]."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.randn(width, heads, head_dim) * 0.2) for _ in range(3))
        self.out = nn.Parameter(torch.randn(heads, head_dim, width) * 0.2)
        self.scale = head_dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width] -> the same shape."""
        q, k, v = (torch.einsum("btc,chd->bthd", x, w) for w in (self.query, self.key, self.value))
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale, dim=-1)
        return torch.einsum("bqhd,hdc->bqc", torch.einsum("bhqk,bkhd->bqhd", weights, v), self.out)


class Stack(nn.Module):
    """Residual layers over token embeddings."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(VOCABULARY, width), nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, length] -> [batch, length, width]."""
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """nn.MultiheadAttention whose queries and keys come from different inputs."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(40, 8, kdim=28, vdim=36, batch_first=batch_first, bias=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, length, width] each."""
        out: Tensor = self.attention(query, key, value, need_weights=False)[0]
        return out


def _nano(impl: str) -> nn.Module:
    return perturb(Stack([FusedAttention(72, 12, impl == "sdpa") for _ in range(2)], 72).eval())


def _einsum(impl: str) -> nn.Module:
    return perturb(Stack([EinsumAttention(44, 8, 6)], 44).eval())


def _encoder(impl: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(80, 8, 52, dropout=0.0 if impl == "train" else 0.1, batch_first=True)
    return perturb(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).train(impl == "train"))


def _self_attention(impl: str) -> nn.Module:
    return perturb(nn.MultiheadAttention(40, 8, batch_first=True).eval())


def _cross_attention(impl: str) -> nn.Module:
    return perturb(CrossAttention(True).eval())


def _timm(impl: str) -> nn.Module:
    library("timm")
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer import VisionTransformer

    set_fused_attn(impl == "sdpa")
    try:
        model = VisionTransformer(
            img_size=24, patch_size=8, embed_dim=72, depth=1, num_heads=12, num_classes=13, qk_norm=True
        )
    finally:
        set_fused_attn(True)
    return perturb(model.eval())


def _dit(impl: str) -> nn.Module:
    library("diffusers")
    from diffusers import DiTTransformer2DModel
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model = DiTTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=6,
        in_channels=3,
        num_layers=1,
        sample_size=6,
        patch_size=2,
        num_embeds_ada_norm=17,
        norm_num_groups=1,
    )
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor2_0() if impl == "sdpa" else AttnProcessor())
    return perturb(model.eval())


def _dit_inputs(batch: int, length: int) -> Inputs:
    return {
        "hidden_states": noise(batch, 3, 6, 6),
        "timestep": torch.arange(batch) * 5 + 3,
        "class_labels": torch.arange(batch) + 2,
        "return_dict": False,
    }


def _floats(*names_and_widths: tuple[str, int]) -> Callable[[int, int], Inputs]:
    return lambda batch, length: {n: noise(batch, length, w) for n, w in names_and_widths}


def _attention_inputs(batch: int, length: int) -> Inputs:
    x = noise(batch, length, 40)
    return {"query": x, "key": x, "value": x, "need_weights": False}


def _cross_inputs(batch: int, length: int) -> Inputs:
    return {"query": noise(batch, 5, 40), "key": noise(batch, length, 28), "value": noise(batch, length, 36)}


CASES: Mapping[str, Case] = {
    "gpt2": Case(_hf("GPT2LMHeadModel", "GPT2Config", **_GPT2), _ids_without_cache, 2),
    "llama_mha": Case(_hf("LlamaForCausalLM", "LlamaConfig", **_LLAMA, num_hidden_layers=1), _ids_without_cache, 1),
    "llama_gqa": Case(
        _hf("LlamaForCausalLM", "LlamaConfig", **_LLAMA, num_hidden_layers=2, num_key_value_heads=4),
        _ids_without_cache,
        2,
        grouped=True,
    ),
    "bert": Case(
        _hf(
            "BertModel",
            "BertConfig",
            vocab_size=VOCABULARY,
            hidden_size=72,
            num_hidden_layers=1,
            num_attention_heads=12,
            intermediate_size=52,
            max_position_embeddings=32,
        ),
        _padded,
        1,
    ),
    "t5": Case(
        _hf(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=44,
            d_kv=6,
            d_ff=52,
            num_layers=2,
            num_decoder_layers=1,
            num_heads=8,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=9,
        ),
        _sequence_pair,
        4,
    ),
    "vit": Case(
        _hf(
            "ViTModel",
            "ViTConfig",
            hidden_size=72,
            num_hidden_layers=1,
            num_attention_heads=12,
            intermediate_size=52,
            image_size=24,
            patch_size=8,
        ),
        _image,
        1,
        free_length=False,
    ),
    "whisper": Case(
        _hf(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=VOCABULARY,
            num_mel_bins=10,
            d_model=48,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=8,
            decoder_attention_heads=8,
            encoder_ffn_dim=52,
            decoder_ffn_dim=52,
            max_source_positions=13,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        ),
        _speech,
        3,
    ),
    "falcon_mha": Case(_hf("FalconForCausalLM", "FalconConfig", **_FALCON, multi_query=False), _ids_without_cache, 1),
    "falcon_gqa": Case(
        _hf("FalconForCausalLM", "FalconConfig", **_FALCON, new_decoder_architecture=True, num_kv_heads=4),
        _ids_without_cache,
        1,
        grouped=True,
    ),
    "falcon_alibi": Case(
        _hf("FalconForCausalLM", "FalconConfig", **_FALCON, multi_query=False, alibi=True), _ids_without_cache, 1
    ),
    "bloom": Case(
        _hf("BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=80, n_layer=2, n_head=8),
        _ids_without_cache,
        2,
        impls=("eager",),
    ),
    "swin": Case(
        _hf(
            "SwinModel",
            "SwinConfig",
            image_size=32,
            patch_size=4,
            embed_dim=40,
            depths=[2],
            num_heads=[8],
            window_size=4,
            num_channels=3,
        ),
        lambda batch, length: {"pixel_values": noise(batch, 3, 32, 32)},
        2,
        free_length=False,
    ),
    "timm_vit": Case(_timm, lambda batch, length: {"x": noise(batch, 3, 24, 24)}, 1, free_length=False),
    "torch_encoder": Case(_encoder, _floats(("src", 80)), 1, impls=("eval", "train")),
    "torch_attention": Case(_self_attention, _attention_inputs, 1, impls=("eval",)),
    "torch_cross_attention": Case(_cross_attention, _cross_inputs, 1, impls=("eval",)),
    "nano": Case(_nano, _ids, 2),
    "einsum": Case(_einsum, _ids, 1, impls=("eager",)),
    "dit": Case(_dit, _dit_inputs, 1, free_length=False),
}

RUNS = [(name, impl) for name, case in CASES.items() for impl in case.impls]


def converted(model: nn.Module | torch.export.ExportedProgram, **request: Any) -> ConvertedModule:
    """``sqa_fx.convert`` with example inputs, which converts at once."""
    result = sqa_fx.convert(model, **request)
    assert isinstance(result, ConvertedModule)
    return result


def tensors(outputs: Any) -> list[Tensor]:
    """Every tensor of a model's outputs, in order."""
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
