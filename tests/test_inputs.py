"""Example inputs: the texts of the command line, and what models say of themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqa_fx.errors import InputError
from sqa_fx.inputs import bind_inputs, example_inputs, parse_input_spec, vocabulary_size


class Named(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x * mask


def run(model: nn.Module) -> dict[str, Any]:
    """The example inputs of ``model``, after a call with them went through."""
    found = example_inputs(model)
    assert found is not None
    args, kwargs = found
    with torch.no_grad():
        model.eval()(*args, **kwargs)
    return kwargs


def test_spec_gives_name_dtype_and_shape() -> None:
    name, x = parse_input_spec("x:float32[2,3,5,7]")
    assert (name, x.dtype, x.shape) == ("x", torch.float32, (2, 3, 5, 7))
    assert parse_input_spec(" y : bfloat16[ 4 ] ")[1].dtype is torch.bfloat16
    assert parse_input_spec("scale:float64[]")[1].shape == ()
    assert torch.equal(parse_input_spec("mask:bool[2,3]")[1], torch.ones(2, 3, dtype=torch.bool))


def test_spec_integers_stay_in_the_vocabulary() -> None:
    ids = parse_input_spec("input_ids:int64[64,64]", vocabulary=7)[1]
    assert ids.dtype is torch.int64
    assert sorted(ids.unique().tolist()) == list(range(7))
    assert sorted(parse_input_spec("token_type_ids:int32[64]")[1].unique().tolist()) == [0, 1]


def test_spec_is_deterministic() -> None:
    first, second = (parse_input_spec("x:float32[5,7]")[1] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, parse_input_spec("x:float32[5,7]", seed=1)[1])


@pytest.mark.parametrize(
    "text",
    ["x", "x:float32", "x[2,3]", "x:float32[2,,3]", "x:float32[2 3]", "x:float32[-1]", "2x:int64[1]", "x:float32[2]3"],
)
def test_malformed_spec_says_the_grammar(text: str) -> None:
    with pytest.raises(InputError, match=r"name:dtype\[shape\]"):
        parse_input_spec(text)


def test_unknown_dtype_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown dtype 'float31'.*float32"):
        parse_input_spec("x:float31[2]")


def test_vocabulary_size() -> None:
    assert vocabulary_size(nn.Sequential(nn.Embedding(13, 4), nn.Linear(4, 2))) == 13
    assert vocabulary_size(nn.Linear(4, 2)) is None


def test_bind_refuses_a_name_that_forward_lacks() -> None:
    x = torch.ones(2)
    assert bind_inputs(Named(), {"x": x}) == ((), {"x": x})
    with pytest.raises(InputError, match="no input y; its inputs are x, mask"):
        bind_inputs(Named(), {"x": x, "y": x})


def test_bind_lays_out_an_exported_program_as_it_was_exported() -> None:
    x, mask = torch.ones(2), torch.zeros(2)
    ep = torch.export.export(Named(), (x,), {"mask": mask})
    args, kwargs = bind_inputs(ep, {"mask": mask, "x": x})
    assert (len(args), list(kwargs)) == (1, ["mask"])
    assert torch.equal(ep.module()(*args, **kwargs), torch.zeros(2))
    with pytest.raises(InputError, match=r"not given: \['mask'\]"):
        bind_inputs(ep, {"x": x})


def test_a_plain_module_says_nothing() -> None:
    assert example_inputs(nn.Linear(2, 2)) is None


transformers = pytest.importorskip("transformers")


def test_decoder() -> None:
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    kwargs = run(transformers.LlamaForCausalLM(config))
    assert kwargs["input_ids"].shape == (2, 11)
    assert int(kwargs["input_ids"].max()) < 23
    assert kwargs["use_cache"] is False


def test_short_positions_bound_the_sequence() -> None:
    config = transformers.BertConfig(
        vocab_size=23, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config.max_position_embeddings = 6
    assert run(transformers.BertModel(config))["input_ids"].shape == (2, 6)


def test_encoder_decoder_gets_decoder_ids() -> None:
    config = transformers.T5Config(vocab_size=23, d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2)
    kwargs = run(transformers.T5ForConditionalGeneration(config))
    assert kwargs["input_ids"].shape == (2, 11)
    assert kwargs["decoder_input_ids"].shape == (2, 9)


def test_vision_in_the_dtype_of_the_model() -> None:
    config = transformers.ViTConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, num_channels=5
    )
    image = run(transformers.ViTModel(config).double())["pixel_values"]
    assert (image.shape, image.dtype) == ((2, 5, 32, 32), torch.float64)


def test_audio() -> None:
    config = transformers.WhisperConfig(
        vocab_size=23,
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    assert run(transformers.WhisperModel(config))["input_features"].shape == (2, 8, 20)


def test_waveform_is_long_enough_for_the_convolutions() -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
    )
    model = transformers.Wav2Vec2Model(config)
    waveform = run(model)["input_values"]
    assert model.eval()(input_values=waveform).last_hidden_state.shape[1] == 11


def test_two_towers_get_both_inputs() -> None:
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 23, "eos_token_id": 22},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    kwargs = run(transformers.CLIPModel(config))
    assert kwargs["input_ids"].shape == (2, 11)
    assert kwargs["pixel_values"].shape == (2, 3, 32, 32)


def test_timm_honours_the_size_it_was_built_with() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", img_size=64, in_chans=4)
    found = example_inputs(model)
    assert found is not None
    assert found[0][0].shape == (2, 4, 64, 64)
    model.eval()(*found[0])
