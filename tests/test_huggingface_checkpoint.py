"""Converted checkpoints: config.json says SQA where that is proved on a small sibling; else sqa_fx.json says why."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sqa_fx
from sqa_fx import checkpoint_native
from sqa_fx.checkpoint_native import Verdict, judge, native_config
from sqa_fx.cli import main
from sqa_fx.config_search import Heads, head_groups
from sqa_fx.errors import InputError
from sqa_fx.partly import tensors_of
from sqa_fx.plan import Plan, SitePlan
from sqa_fx.sibling import LARGEST, small_siblings
from sqa_fx.stock_model import Stock, plain_fields, stock_of, stock_of_config

FIELDS: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def model() -> Any:
    import transformers

    torch.manual_seed(4)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**FIELDS)).eval()


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "in"
    model().save_pretrained(folder, max_shard_size="100KB")
    return folder


def test_a_config_that_says_sqa(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    plan = sqa_fx.plan(checkpoint, hq=4, hkv=2, dynamic_shapes=None)
    asked: list[Verdict] = []

    def cut_off(folder: Path, plan: Plan) -> Verdict:
        asked.append(judge(folder, plan))
        raise InputError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_native.loading_finish, "__defaults__", (cut_off,))
        with pytest.raises(InputError, match="killed"):
            sqa_fx.convert_checkpoint(checkpoint, tmp_path / "out", plan=plan)
    assert not (tmp_path / "out").exists()
    report = sqa_fx.convert_checkpoint(checkpoint, tmp_path / "out", plan=plan)
    assert report.shards_kept == report.shards
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_native.loading_finish, "__defaults__", (lambda *_: asked[0],))
        sqa_fx.convert_checkpoint(checkpoint, tmp_path / "straight", plan=plan)
    assert digests(tmp_path / "out") == digests(tmp_path / "straight"), "a run that was cut off leaves the same bytes"
    assert report.notes[0] == "loads natively, with AutoModelForCausalLM"
    assert (
        "num_attention_heads=4, num_key_value_heads=2, head_dim=" in report.notes[1] and "a sibling" in report.notes[1]
    )
    before, after = (json.loads((f / "config.json").read_text()) for f in (checkpoint, tmp_path / "out"))
    assert after == {**before, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    converted = sqa_fx.convert(model(), plan=plan)
    assert isinstance(converted, sqa_fx.ConvertedModule)
    with torch.no_grad():
        ours, theirs = (m(**converted.example_kwargs).logits for m in (converted, loaded))
    assert torch.allclose(ours, theirs, atol=1e-5)
    sqa_fx.verify_checkpoint(tmp_path / "out")


def test_a_class_without_such_a_config(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(2)
    config = transformers.BertConfig(
        hidden_size=96, intermediate_size=72, num_hidden_layers=3, num_attention_heads=8, vocab_size=97
    )
    original = transformers.BertModel(config).eval()
    original.save_pretrained(tmp_path / "in")
    plan = sqa_fx.plan(tmp_path / "in", hq=4, hkv=2, dynamic_shapes=None)
    report = sqa_fx.convert_checkpoint(tmp_path / "in", tmp_path / "out", plan=plan)
    if report.notes[0] == "needs sqa_fx.from_pretrained":
        loaded = sqa_fx.from_pretrained(tmp_path / "out")
        converted = sqa_fx.convert(original, plan=plan)
        assert isinstance(converted, sqa_fx.ConvertedModule)
        with torch.no_grad():
            pairs = zip(*(tensors_of(m(**converted.example_kwargs)) for m in (loaded, converted)), strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
    else:
        assert "nothing loads the result" in report.notes[0]
        with pytest.raises(InputError, match="cannot be loaded"):
            sqa_fx.from_pretrained(tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert (tmp_path / "in" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


def test_no_search(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sqa_fx.plan(checkpoint, hq=4, hkv=2, dynamic_shapes=None).save(tmp_path / "plan.json")
    command = ["convert-checkpoint", str(checkpoint), str(tmp_path / "out"), "--plan", str(tmp_path / "plan.json")]
    assert main([*command, "--no-native"]) == 0
    assert "config.json is a copy: it still says" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    assert not (tmp_path / "out" / "sqa_fx.json").exists()


def test_reasons_are_told_not_raised(tmp_path: Path) -> None:
    plan = Plan((SitePlan("s", 4, 4, 2, 2, 8, (0, 1), ((0,), (1,)), ((0,), (1,))),))
    assert judge(tmp_path, plan).why == "there is no config.json"
    (tmp_path / "config.json").write_text("{}")
    assert judge(tmp_path, plan).why == "config.json names no architecture"
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    assert "has no NoSuchModel" in judge(tmp_path, plan).why


def test_what_used_to_follow_is_written_down() -> None:
    """A config.json without a head size: when the number of heads changes, the head size must not."""
    import transformers

    known = plain_fields(transformers.LlamaConfig(**FIELDS))
    stock = Stock(transformers.LlamaForCausalLM, transformers.LlamaConfig, known)
    raw = {**FIELDS, "model_type": "llama"}
    made = native_config(raw, stock, {"num_attention_heads": 4, "num_key_value_heads": 2})
    assert made == {**raw, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}


def test_a_sibling_of_a_large_model(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=8,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        bos_token_id=128000,
        eos_token_id=128001,
        architectures=["LlamaForCausalLM"],
    )
    config.head_dim = None
    config.save_pretrained(tmp_path)
    plan = sqa_fx.plan(tmp_path, hq=32, hkv=4, heads="first", dynamic_shapes=None)
    small = next(small_siblings(stock_of_config(tmp_path), plan))
    count = sum(t.numel() for t in small.bare().state_dict().values())
    assert count < LARGEST / 4 and small.fields["num_hidden_layers"] == 1
    assert (small.fields["num_attention_heads"], small.fields["num_key_value_heads"]) == (64, 8)
    assert head_groups(plan) == [Heads(64, 8, 32, 4, 128)]


def test_classes_of_others_are_not_stock() -> None:
    import transformers

    class Mine(transformers.Qwen2ForCausalLM):  # type: ignore[misc]
        pass

    assert stock_of(Mine(transformers.Qwen2Config(**FIELDS))) is None
    assert stock_of(torch.nn.Linear(2, 2)) is None
    known = stock_of(model())
    assert known is not None and known.name == "Qwen2ForCausalLM" and ("head_dim",) in known.unset_fields()
