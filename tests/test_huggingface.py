"""Directories in the Hugging Face layout: which families load natively, which need our loader, what they compute."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import example_path  # noqa: F401 (finds the examples)
import huggingface_table
import pytest
import torch
from torch import Tensor

import sqa_fx
from sqa_fx.cli import main
from sqa_fx.errors import InputError
from sqa_fx.exporters import to_huggingface
from sqa_fx.partly import tensors_of
from sqa_fx.passes.parameters import cut_tensor
from sqa_fx.passes.verify import masked_tensor
from sqa_fx.plan import Plan

IDS = torch.arange(2, 20).reshape(2, 9)
ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1}
TEXT: dict[str, Any] = {**huggingface_table.TEXT, **ONE_LAYER}


def _make(name: str, config: str, **fields: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        torch.manual_seed(5)
        return getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()

    return build


def _listed(name: str, **changes: Any) -> Callable[[], Any]:
    """A model of the table in examples/, with other fields."""
    cls, config, fields = huggingface_table.MODELS[name]
    return _make(cls, config, **{**fields, **changes})


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _listed("Llama", **ONE_LAYER),
    "qwen2": _listed("Qwen2", **ONE_LAYER),
    "qwen3": _listed("Qwen3", **ONE_LAYER),
    "mistral": _listed("Mistral", **ONE_LAYER),
    "gemma": _listed("Gemma", **ONE_LAYER),
    "gemma2": _listed("Gemma 2", **ONE_LAYER),
    "gemma3": _listed("Gemma 3", layer_types=["sliding_attention", "full_attention"]),
    "bert": _listed("BERT", **ONE_LAYER),
    "vit": _listed("ViT", **ONE_LAYER),
    "whisper": _listed("Whisper", encoder_layers=1, decoder_layers=1),
    "mixture": _make(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        **TEXT,
        head_dim=10,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    ),
    "hybrid": _listed("Bamba (attention and state-space)"),
}
NATIVE: dict[str, dict[str, int]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma3": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "vit": {"num_attention_heads": 4, "head_dim": 6},
    "mixture": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "hybrid": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
}
OURS = ("bert", "whisper")
# The rest go the same way: they are marked slow.
SHORT = ("llama", "qwen2", "vit", "bert")
GENERATE = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "mixture", "hybrid")


def _marked(name: str) -> Any:
    return name if name in SHORT else pytest.param(name, marks=pytest.mark.slow)


@dataclass
class Exported:
    model: Any
    converted: Any
    artifact: sqa_fx.Artifact
    folder: Path


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    done: dict[str, Exported] = {}

    def once(name: str) -> Exported:
        if name not in done:
            model = MODELS[name]()
            converted = sqa_fx.convert(
                model, hq=4, hkv=2 if "num_key_value_heads" in NATIVE.get(name, {}) else 4, dynamic_shapes=None
            )
            folder = tmp_path_factory.mktemp(name) / "out"
            done[name] = Exported(model, converted, sqa_fx.export(converted, folder, to="huggingface"), folder)
        return done[name]

    return once


def masked(exported: Exported) -> Any:
    """The original with the oracle's weights."""
    model = copy.deepcopy(exported.model)
    held = model.state_dict()
    for parameter in exported.converted.plan.parameters:
        with torch.no_grad():
            held[parameter.name].copy_(masked_tensor(held[parameter.name].clone(), parameter))
    return model


def same(a: Any, b: Any) -> bool:
    pairs = list(zip(tensors_of(a), tensors_of(b), strict=True))
    return bool(pairs) and all(torch.allclose(x, y, atol=2e-6, rtol=1e-4) for x, y in pairs)


@pytest.mark.parametrize("name", map(_marked, NATIVE))
def test_loads_natively(export: Callable[[str], Exported], name: str) -> None:
    import transformers

    made = export(name)
    notes, verdict = made.artifact.sidecar.notes, made.artifact.sidecar.validation
    assert verdict is not None and verdict["form"] == "native" and notes[0].startswith("loads natively, with AutoModel")
    assert not (made.folder / "sqa_fx.json").exists()
    config = made.model.config
    before = json.loads(json.dumps(config._encode_special_floats(config.to_dict())))
    after = json.loads((made.folder / "config.json").read_text())
    changed = {n: v for n, v in after.items() if n in before and before[n] != v}
    for own in ("dtype", "architectures", "transformers_version"):
        changed.pop(own, None)
    added = {n: v for n, v in after.items() if n not in before}
    added.pop("architectures", None)
    assert {**changed, **added} == NATIVE[name] == verdict["fields"], "nothing else is touched"
    auto = getattr(transformers, notes[0].removeprefix("loads natively, with "))
    loaded = auto.from_pretrained(made.folder).eval()
    assert type(loaded) is type(made.model) and loaded.dtype == made.model.dtype
    kwargs = made.converted.example_kwargs
    with torch.no_grad():
        assert same(loaded(**kwargs), made.converted(**kwargs))
    assert len({tuple(p.shape) for p in loaded.parameters()}) > 1
    if name in GENERATE:
        prompt = kwargs["input_ids"]
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
        assert torch.equal(loaded.generate(prompt, **settings), masked(made).generate(prompt, **settings))
        assert "greedy tokens" in verdict["generated"]


@pytest.mark.parametrize("name", map(_marked, OURS))
def test_needs_our_loader(export: Callable[[str], Exported], name: str) -> None:
    made = export(name)
    notes, verdict = made.artifact.sidecar.notes, made.artifact.sidecar.validation
    assert verdict is not None and verdict["form"] == "surgery" and notes[0] == "needs sqa_fx.from_pretrained"
    assert notes[1].startswith("not native: no field of ")
    config = json.loads((made.folder / "config.json").read_text())
    before = made.model.config.to_dict()
    assert all(before[n] == v for n, v in config.items() if n in before and n not in ("dtype", "architectures"))
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        type(made.model).from_pretrained(made.folder)
    loaded = sqa_fx.from_pretrained(made.folder)
    assert type(loaded) is type(made.model)
    kwargs = made.converted.example_kwargs
    with torch.no_grad():
        assert same(loaded(**kwargs), made.converted(**kwargs))
    if name == "whisper":
        features = kwargs["input_features"]
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
        tokens: Tensor = loaded.generate(features, **settings)
        assert torch.equal(tokens, masked(made).generate(features, **settings))


def test_ties_sizes_and_files_beside(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "in").eval()
    converted = sqa_fx.convert(model, hq=4, hkv=2, dynamic_shapes=None)
    sqa_fx.export(converted, tmp_path / "out", to="huggingface", max_shard_size="20KB")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and loaded.generation_config.temperature == 0.5
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    state = converted.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())


def test_layers_that_keep_different_numbers(tmp_path: Path) -> None:
    model = _make("LlamaForCausalLM", "LlamaConfig", **{**TEXT, "num_hidden_layers": 2})()
    converted = sqa_fx.convert(model, hq={"*.0.*": 4, "*.1.*": 2}, hkv=2, dynamic_shapes=None)
    artifact = sqa_fx.export(converted, tmp_path / "out", to="huggingface")
    assert "layers of one kind keep different numbers of heads" in artifact.sidecar.notes[1]
    assert artifact.sidecar.validation is not None and artifact.sidecar.validation["form"] != "native"
    loaded = sqa_fx.from_pretrained(tmp_path / "out")
    assert isinstance(converted, sqa_fx.ConvertedModule)
    kwargs = converted.example_kwargs
    with torch.no_grad():
        assert same(loaded(**kwargs), converted(**kwargs))


def test_the_graph_where_nothing_else_is_proved(
    export: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = export("bert")
    monkeypatch.setattr(to_huggingface, "find_surgery", lambda *_: "not today")
    artifact = sqa_fx.export(made.converted, tmp_path / "out", to="huggingface")
    assert artifact.sidecar.validation is not None and artifact.sidecar.validation["form"] == "graph"
    assert "not today" in artifact.sidecar.notes[1]
    with pytest.warns(UserWarning, match="converted graph"):
        loaded = sqa_fx.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, sqa_fx.ConvertedModule)
    with pytest.raises((OSError, ValueError, RuntimeError)):
        type(made.model).from_pretrained(tmp_path / "out")


def test_a_failed_proof_is_not_native(
    export: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that scales the scores of the cut model in another way has the right shapes, and is found out."""
    import transformers

    made = export("llama")
    built = transformers.models.llama.modeling_llama.LlamaAttention.__init__

    def wrong(self: Any, config: Any, layer_idx: int) -> None:
        built(self, config, layer_idx)
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaAttention, "__init__", wrong)
    monkeypatch.setattr(to_huggingface, "find_surgery", lambda *_: "not today")
    artifact = sqa_fx.export(made.converted, tmp_path / "out", to="huggingface")
    assert artifact.sidecar.validation is not None and artifact.sidecar.validation["form"] == "graph"
    assert "the shapes are right, but" in artifact.sidecar.notes[1]


def test_nothing_is_left_behind(
    export: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = export("bert")
    with pytest.raises(InputError, match="not converted"):
        sqa_fx.export(made.model, tmp_path / "out", to="huggingface")
    with pytest.raises(InputError, match="no option opsets"):
        sqa_fx.export(made.converted, tmp_path / "out", to="huggingface", opsets=1)
    with pytest.raises(InputError, match="belong to engines"):
        sqa_fx.export(made.converted, tmp_path / "out", to="huggingface", attention="plain")
    monkeypatch.setattr(to_huggingface, "find_surgery", lambda *_: "not today")

    def full(self: Any, directory: Any, overwrite: bool = False) -> None:
        os.makedirs(directory)
        raise InputError("the disk is full")

    monkeypatch.setattr(sqa_fx.ConvertedModule, "save", full)
    with pytest.raises(InputError, match="disk is full"):
        sqa_fx.export(made.converted, tmp_path / "out", to="huggingface")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        sqa_fx.export(made.converted, tmp_path / "out", to="huggingface")
    with pytest.raises(InputError, match="not overwritten"):
        sqa_fx.export(made.converted, tmp_path / "out", to="huggingface", overwrite=True)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MODELS["llama"]().save_pretrained(tmp_path / "in")
    command = ["--hq", "4", "--hkv", "2", "--static", "-o", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "in"), "--to", "huggingface", *command]) == 0
    assert "loads natively, with AutoModelForCausalLM" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "in"), *command[:-1], str(tmp_path / "graph")]) == 0
    again = ["export", str(tmp_path / "graph"), "--to", "huggingface", "-o", str(tmp_path / "again")]
    assert main(again) == 2 and "pass original=model" in capsys.readouterr().err
    assert main([*again, "--original", str(tmp_path / "in")]) == 0
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_a_model_that_was_changed_in_place(tmp_path: Path) -> None:
    import transformers

    model = MODELS["llama"]()
    report = sqa_fx.convert_(model, hq=4, hkv=2, dynamic_shapes=None)
    with pytest.raises(InputError, match="pass surgery="):
        sqa_fx.export(model, tmp_path / "out", to="huggingface")
    artifact = sqa_fx.export(
        model, tmp_path / "out", to="huggingface", surgery=report, original=MODELS["llama"](), kwargs={"input_ids": IDS}
    )
    assert artifact.sidecar.notes[0].startswith("loads natively")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-6)


def test_fused_projections_lie_as_the_class_expects(tmp_path: Path) -> None:
    """Keys and values of a head lie side by side in one projection; the plan has all keys first."""
    import transformers

    build = _listed("DeepSeek-V3", **ONE_LAYER, first_k_dense_replace=1)
    converted = sqa_fx.convert(build(), hq=4, hkv=4, dynamic_shapes=None)
    artifact = sqa_fx.export(converted, tmp_path / "out", to="huggingface")
    assert artifact.sidecar.notes[0] == "loads natively, with AutoModelForCausalLM"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    kept = Plan.from_json(artifact.sidecar.plan)
    cut = next(p for p in kept.parameters if p.name == name)
    assert torch.equal(loaded.state_dict()[name], cut_tensor(build().state_dict()[name], cut))
    assert isinstance(converted, sqa_fx.ConvertedModule)
    with torch.no_grad():
        assert same(loaded(**converted.example_kwargs), converted(**converted.example_kwargs))
