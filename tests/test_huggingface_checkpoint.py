"""Converted checkpoints: config.json says SQA where that is proved on a small sibling; else sqa_fx.json says why."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import example_path  # noqa: F401 (finds the examples)
import pytest
import torch
from beside_worker import start_another
from huggingface_table import TEXT

import sqa_fx
from sqa_fx import checkpoint as checkpoint_module
from sqa_fx import checkpoint_native, cli_checkpoint
from sqa_fx.checkpoint_native import Verdict, judge, native_config
from sqa_fx.checkpoint_run import write_shards
from sqa_fx.cli import main
from sqa_fx.config_search import Heads, head_groups
from sqa_fx.errors import InputError
from sqa_fx.partly import tensors_of
from sqa_fx.plan import Plan, SitePlan
from sqa_fx.sibling import LARGEST, small_siblings
from sqa_fx.stock_model import Stock, plain_fields, stock_of, stock_of_config

FIELDS: dict[str, Any] = {**TEXT, "hidden_size": 96, "intermediate_size": 72, "num_hidden_layers": 1}


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


@pytest.fixture(scope="module")
def plan(checkpoint: Path) -> Plan:
    return sqa_fx.plan(checkpoint, hq=4, hkv=2, dynamic_shapes=None)


def test_a_config_that_says_sqa(checkpoint: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: list[Verdict] = []

    def cut_off(folder: Path, plan: Plan) -> Verdict:
        asked.append(judge(folder, plan))
        raise InputError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_native, "judge", cut_off)
        with pytest.raises(InputError, match="killed"):
            sqa_fx.convert_checkpoint(checkpoint, tmp_path / "out", plan=plan)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_native, "judge", lambda *_: asked[0])
        report = sqa_fx.convert_checkpoint(checkpoint, tmp_path / "out", plan=plan)
        assert report.shards_kept == report.shards
        sqa_fx.convert_checkpoint(checkpoint, tmp_path / "straight", plan=plan)
    assert digests(tmp_path / "out") == digests(tmp_path / "straight"), "a run that was cut off leaves the same bytes"
    assert report.notes[0] == "loads natively, with AutoModelForCausalLM"
    assert (
        "num_attention_heads=4, num_key_value_heads=2, head_dim=" in report.notes[1] and "a sibling" in report.notes[1]
    )
    before, after = (json.loads((f / "config.json").read_text()) for f in (checkpoint, tmp_path / "out"))
    assert after == {**before, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    converted = sqa_fx.convert(model(), plan=plan, dynamic_shapes=None)
    assert isinstance(converted, sqa_fx.ConvertedModule)
    with torch.no_grad():
        ours, theirs = (m(**converted.example_kwargs).logits for m in (converted, loaded))
    assert torch.allclose(ours, theirs, atol=1e-5)
    sqa_fx.verify_checkpoint(tmp_path / "out")


def test_a_class_without_such_a_config(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(2)
    config = transformers.BertConfig(
        hidden_size=96, intermediate_size=72, num_hidden_layers=1, num_attention_heads=8, vocab_size=97
    )
    original = transformers.BertModel(config).eval()
    original.save_pretrained(tmp_path / "in")
    plan = sqa_fx.plan(tmp_path / "in", hq=4, hkv=2, dynamic_shapes=None)
    report = sqa_fx.convert_checkpoint(tmp_path / "in", tmp_path / "out", plan=plan)
    if report.notes[0] == "needs sqa_fx.from_pretrained":
        loaded = sqa_fx.from_pretrained(tmp_path / "out")
        converted = sqa_fx.convert(original, plan=plan, dynamic_shapes=None)
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


@pytest.fixture
def command(checkpoint: Path, plan: Plan, tmp_path: Path) -> list[str]:
    """Converts ``checkpoint`` into ``out`` with a saved plan."""
    replace(plan, tensors={"spare": torch.ones(2)}).save(tmp_path / "plan.json")
    return ["convert-checkpoint", str(checkpoint), str(tmp_path / "out"), "--plan", str(tmp_path / "plan.json")]


def found(path: Path) -> bool:
    """True as soon as another process has made ``path``."""
    end = time.monotonic() + 120
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return path.exists()


def _judged_at_once(checkpoint: Path, plan: Plan) -> Verdict:
    assert not plan.tensors, "what is cut with stays where it is"
    (checkpoint / ".judging").touch()
    return Verdict("Qwen2ForCausalLM", "", why=f"process {os.getpid()} says so")


def _judged_never(checkpoint: Path, plan: Plan) -> Verdict:
    (checkpoint / ".judging").touch()
    time.sleep(600)
    raise AssertionError


def test_the_proof_runs_beside_the_shards(
    checkpoint: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any) -> Any:
        assert found(checkpoint / ".judging"), "nothing is written before"
        return write_shards(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cli_checkpoint, "_judged", _judged_at_once)
        patch.setattr(checkpoint_module, "write_shards", write)
        assert main(command) == 0
    (checkpoint / ".judging").unlink()
    said = capsys.readouterr().out
    assert "says so" in said and f"process {os.getpid()} " not in said
    monkeypatch.setattr(cli_checkpoint, "_beside", None)  # what is published needs no process
    assert main(command) == 0 and "says so" in capsys.readouterr().out


def test_an_error_does_not_wait_for_the_proof(
    checkpoint: Path,
    tmp_path: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed: list[float] = []

    def write(*_: Any) -> Any:
        assert found(checkpoint / ".judging")
        failed.append(time.monotonic())
        raise InputError("the disk is full")

    monkeypatch.setattr(cli_checkpoint, "_judged", _judged_never)
    monkeypatch.setattr(checkpoint_module, "write_shards", write)
    before = set(multiprocessing.active_children())
    assert main(command) == 2
    assert time.monotonic() - failed[0] < 10 and set(multiprocessing.active_children()) <= before
    (checkpoint / ".judging").unlink()
    assert capsys.readouterr().err == "sqa-fx: error: the disk is full\n"
    assert (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()


def runs(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""  # empty: it ended, and nobody took note yet
    return False


def test_a_process_that_dies_and_one_that_is_left_alone(tmp_path: Path) -> None:
    with cli_checkpoint._beside(os._exit, 1) as answer, pytest.raises(BrokenProcessPool):
        answer()
    # Not forked: a process that has threads leaves its children locks that nobody opens.
    starter = multiprocessing.get_context("spawn").Process(target=start_another, args=(tmp_path / "id",))
    starter.start()
    assert found(tmp_path / "id")
    worker, end = int((tmp_path / "id").read_text()), time.monotonic() + 10
    assert runs(worker)
    starter.kill()
    starter.join()
    while runs(worker) and time.monotonic() < end:
        time.sleep(0.01)
    assert not runs(worker)


def test_no_search(
    checkpoint: Path,
    tmp_path: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli_checkpoint, "_beside", None)  # it starts no process
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
        num_hidden_layers=2,
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
