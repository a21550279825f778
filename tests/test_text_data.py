"""Text and token files become the same batches every time, and what cannot be read is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sqa_fx.errors import InputError, MissingError
from sqa_fx.text_data import ByteTokenizer, TokenBatches, load_tokenizer, token_batches


def _all(batches: TokenBatches) -> list[list[int]]:
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def test_packed_text_is_one_stream_in_the_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("cd")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("ab€")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    batches = token_batches(tmp_path, ByteTokenizer(), sequence=3, batch=2)
    stream = [*"ab€".encode(), 0, *b"cd", 0]
    assert _all(batches) == [stream[i : i + 3] for i in (0, 3, 6)]
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 3), (1, 3)] and len(batches) == 2
    assert all(b.keys() == {"input_ids"} and b["input_ids"].dtype is torch.int64 for b in batches)
    dropped = token_batches(tmp_path, ByteTokenizer(), sequence=3, batch=2, drop_last=True)
    assert len(dropped) == len(list(dropped)) == 1


def test_lines_are_padded_rows_with_a_mask(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abcdef\n\nxy\n")
    (batch,) = token_batches(tmp_path / "x.txt", ByteTokenizer(), sequence=4, batch=5, pack=False)
    assert batch["input_ids"].tolist() == [[97, 98, 99, 100], [120, 121, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_every_kind_of_token_file_gives_the_same_rows(tmp_path: Path) -> None:
    ids = np.arange(12).reshape(3, 4)
    np.save(tmp_path / "rows.npy", ids.astype(np.uint16))
    np.save(tmp_path / "stream.npy", ids.reshape(-1))
    save_file({"input_ids": torch.from_numpy(ids)}, tmp_path / "t.safetensors")
    (tmp_path / "l.jsonl").write_text(f"[0,1,2,3]\n{json.dumps({'input_ids': [4, 5, 6, 7]})}\n\n[8,9,10,11]\n")
    for name in ("rows.npy", "stream.npy", "t.safetensors", "l.jsonl"):
        assert _all(token_batches(tmp_path / name, None, 4, 2)) == ids.tolist(), name
    assert _all(token_batches(tmp_path / "rows.npy", None, 6, 2, rows=1)) == [[0, 1, 2, 3, 4, 5]]
    assert _all(token_batches(tmp_path / "l.jsonl", None, 4, 2, pack=False, rows=2)) == ids[:2].tolist()


def test_order_depends_on_seed_and_epoch_only(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(40))
    first, second = (token_batches(tmp_path / "x.npy", None, 2, 3, seed=5) for _ in range(2))
    torch.manual_seed(1)
    epochs = []
    for epoch in (0, 1):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        assert _all(first) == _all(second) == _all(first)
        epochs.append(_all(first))
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    assert _all(token_batches(tmp_path / "x.npy", None, 2, 3, seed=6)) != epochs[0]
    assert first.fingerprint == second.fingerprint != token_batches(tmp_path / "x.npy", None, 2, 4).fingerprint


def test_split_holds_out_the_last_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(20))
    train, held = token_batches(tmp_path / "x.npy", None, 2, 3, seed=1).split(0.2)
    assert _all(held) == [[16, 17], [18, 19]]
    assert sorted(i for row in _all(train) for i in row) == list(range(16))
    with pytest.raises(InputError, match="hold out"):
        held.split(0.9)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.txt", b"\xff\xfe", "UTF-8"),
        ("x.jsonl", b"{oops", "line 1 is not JSON"),
        ("x.jsonl", b"[1.5]", "must be a list of ids"),
        ("x.npy", b"no array", "not an array"),
        ("x.safetensors", b"no tensors", "not a safetensors"),
        ("x.jsonl", b"[1, 2]", "fewer than one row of 4"),
        ("x.jsonl", b"[1, 2, 3, 99]", "0 to 9"),
        ("x.jsonl", b"[-1, 2, 3, 4]", "-1"),
        ("x.bin2", b"abcdefgh", "0 to 9"),
    ],
)
def test_unreadable_data_is_told(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match):
        token_batches(tmp_path / name, ByteTokenizer(), 4, 2, vocabulary=10)


def test_other_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no data"):
        token_batches(tmp_path / "nowhere", None, 4, 2)
    with pytest.raises(InputError, match="no files"):
        token_batches(tmp_path, None, 4, 2)
    (tmp_path / "x.txt").write_text("abcdef")
    with pytest.raises(InputError, match="tokenizer"):
        token_batches(tmp_path, None, 4, 2)
    with pytest.raises(InputError, match="at least 1"):
        token_batches(tmp_path, None, 0, 2)
    np.save(tmp_path / "f.npy", np.zeros(4))
    with pytest.raises(InputError, match=r"float64 \[4\]"):
        token_batches(tmp_path / "f.npy", None, 4, 2)
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer("nowhere")


def test_a_pretrained_tokenizer_ends_documents(tmp_path: Path) -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[EOS]": 1, "a": 2, "b": 3}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[EOS]").save_pretrained(tmp_path / "t")
    (tmp_path / "x.jsonl").write_text('{"text": "a b"}\n{"text": "b c b"}\n')
    loaded = load_tokenizer(str(tmp_path / "t"))
    assert _all(token_batches(tmp_path / "x.jsonl", loaded, 7, 1)) == [[2, 3, 1, 3, 0, 3, 1]]
    assert _all(token_batches(tmp_path / "x.jsonl", loaded, 4, 2, pack=False)) == [[2, 3, 1, 1], [3, 0, 3, 1]]
