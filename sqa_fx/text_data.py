"""Text and token files as batches of token ids: read once, re-iterable, the same on every machine.

Read are UTF-8 text (any suffix), ``.jsonl`` (a line is a list of ids, ``{"input_ids": [...]}`` or ``{"text": "..."}``),
``.npy`` (whole numbers ``[tokens]`` or ``[documents, tokens]``) and ``.safetensors`` (such a tensor called
``input_ids``). Of a folder, all files with a known suffix are read, in the order of their paths. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sqa_fx.errors import InputError, MissingError, first_line

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
TOKEN_SUFFIXES = (".jsonl", ".npy", ".safetensors")

Ids = NDArray[np.int32]


class Tokenizer(Protocol):
    """What `token_batches` needs of a tokenizer."""

    @property
    def end(self) -> int | None:
        """The id that closes a document in a stream, if there is one."""

    @property
    def pad(self) -> int:
        """The id that fills a short row."""

    def ids(self, text: str, special: bool) -> list[int]:
        """The token ids of ``text``, with the special tokens around it that the model was trained with if asked."""


@dataclass(frozen=True)
class ByteTokenizer:
    """A token for each byte of UTF-8: ids 0 to 255; a zero byte ends a document and pads."""

    end: int | None = 0
    pad: int = 0

    def ids(self, text: str, special: bool) -> list[int]:
        """The bytes of ``text``."""
        return list(text.encode())


class PretrainedTokenizer:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        end = next((i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None), None)
        self.end: int | None = end
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end or 0)

    def ids(self, text: str, special: bool) -> list[int]:
        """The token ids of ``text``; its length is not limited here."""
        found: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return found


def load_tokenizer(name: str) -> Tokenizer:
    """``bytes``, or the tokenizer that transformers saved in the folder ``name``; nothing is downloaded.

    Raises MissingError without transformers, InputError when there is no such tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    if not Path(name).is_dir():
        raise InputError(f"no tokenizer {name!r}: give a folder that transformers saved one to, or 'bytes'")
    try:
        import transformers
    except ImportError as error:
        raise MissingError(
            f"the tokenizer in {name} needs transformers: pip install transformers, or take 'bytes'"
        ) from error
    try:
        return PretrainedTokenizer(
            transformers.AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        )
    except Exception as error:  # transformers raises many kinds; each means that the files are at fault
        raise InputError(f"the tokenizer in {name} cannot be loaded: {first_line(error)}") from error


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """Rows of token ids in batches, re-iterable: each is ``{"input_ids": int64 [batch, sequence]}``, and with padded
    rows also ``"attention_mask"``, int64 of the same shape, 1 on tokens and 0 on padding.

    ``ids`` are int32 ``[rows, sequence]``; ``lengths``, int64 ``[rows]``, count the tokens of each row (None: all are
    full). Rows come in their own order, or with a ``seed`` in one that the seed and the epoch (`set_epoch`) determine.
    The last batch may be smaller, unless ``drop_last``.
    """

    ids: Tensor
    lengths: Tensor | None
    batch: int
    seed: int | None = None
    drop_last: bool = False

    def __len__(self) -> int:
        rows = self.ids.shape[0]
        return rows // self.batch if self.drop_last else -(-rows // self.batch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = self.ids.shape[0]
        order = torch.arange(rows)
        if self.seed is not None:
            mixed = int.from_bytes(hashlib.sha256(f"{self.seed} {self._epoch}".encode()).digest()[:7], "big")
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(mixed))
        for index in range(len(self)):
            yield self._rows(order[index * self.batch : (index + 1) * self.batch])

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of pass number ``epoch``: another order, where there is a seed."""
        self.__dict__["_epoch"] = epoch

    @property
    def _epoch(self) -> int:
        return int(self.__dict__.get("_epoch", 0))

    @property
    def fingerprint(self) -> str:
        """A digest of the rows, the batch size and the order."""
        found = hashlib.sha256(f"{tuple(self.ids.shape)} {self.batch} {self.seed} {self.drop_last}".encode())
        for tensor in (self.ids, self.lengths):
            if tensor is not None:
                found.update(tensor.numpy().tobytes())
        return found.hexdigest()[:16]

    def split(self, share: float) -> tuple[TokenBatches, TokenBatches]:
        """(all but the last rows, the last rows): the second has about ``share`` of them, in fixed order.

        Raises InputError when a part would be empty.
        """
        rows = self.ids.shape[0]
        held = max(1, round(rows * share))
        if not 0 < share < 1 or held >= rows:
            raise InputError(f"cannot hold out {share:g} of {rows} rows: each part needs one; give more data")
        first, last = slice(0, rows - held), slice(rows - held, rows)
        parts = [
            replace(self, ids=self.ids[part], lengths=None if self.lengths is None else self.lengths[part])
            for part in (first, last)
        ]
        return parts[0], replace(parts[1], seed=None, drop_last=False)

    def _rows(self, index: Tensor) -> dict[str, Tensor]:
        found = {"input_ids": self.ids[index].long()}
        if self.lengths is not None:
            found["attention_mask"] = (torch.arange(self.ids.shape[1]) < self.lengths[index, None]).long()
        return found


def token_batches(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer | None,
    sequence: int,
    batch: int,
    *,
    pack: bool = True,
    rows: int | None = None,
    vocabulary: int | None = None,
    seed: int | None = None,
    drop_last: bool = False,
    mask: bool = False,
) -> TokenBatches:
    """The text or token ids in ``path`` (a file or a folder) as batches of ``batch`` rows of ``sequence`` tokens.

    With ``pack``, all documents are one stream that is cut into full rows; what is left over is not used. A document
    of text is a file (of ``.jsonl``, a line), and is followed by the tokenizer's end token. Without ``pack``, every
    document is a row of its own, cut off at ``sequence`` tokens or padded to it, with an attention mask; a document
    of text is then a line that is not blank, with the tokenizer's special tokens. ``tokenizer`` may be None for files
    of ids. ``rows`` stops reading after that many. ``vocabulary`` is the number of ids that the model knows. ``seed``
    and ``drop_last`` are those of `TokenBatches`; with ``mask``, full rows have an attention mask, too. Ids are held in
    memory, 4 bytes each.

    Raises:
        MissingError: there is no such path.
        InputError: no file there can be read, it is not what its suffix says, text comes without a tokenizer, an id
            is not in the vocabulary, or there are fewer tokens than one row needs.
    """
    if sequence < 1 or batch < 1 or (rows is not None and rows < 1):
        raise InputError(f"sequence, batch and rows must be at least 1, but are {sequence}, {batch} and {rows}")
    wanted = None if rows is None else (rows * sequence if pack else rows)
    found: list[Ids] = []
    have = 0
    for origin, document in _documents(Path(path), tokenizer, pack):
        _check_ids(origin, document, vocabulary)
        if document.size == 0:
            continue
        found.append(document if pack else document[:sequence])
        have += document.size if pack else 1
        if wanted is not None and have >= wanted:
            break
    ids, lengths = _packed(found, sequence, rows) if pack else _padded(found, sequence, tokenizer)
    if ids.shape[0] == 0:
        raise InputError(
            f"{path} holds {have} tokens, fewer than one row of {sequence}: give more data or a shorter sequence"
            if pack
            else f"{path} holds no tokens"
        )
    if mask and lengths is None:
        lengths = torch.full((ids.shape[0],), sequence)
    return TokenBatches(torch.from_numpy(ids), lengths, batch, seed, drop_last)


def _packed(documents: Sequence[Ids], sequence: int, rows: int | None) -> tuple[Ids, None]:
    stream = np.concatenate([np.zeros(0, np.int32), *documents])
    count = stream.size // sequence if rows is None else min(rows, stream.size // sequence)
    return stream[: count * sequence].reshape(count, sequence).copy(), None


def _padded(documents: Sequence[Ids], sequence: int, tokenizer: Tokenizer | None) -> tuple[Ids, Tensor]:
    ids = np.full((len(documents), sequence), tokenizer.pad if tokenizer is not None else 0, np.int32)
    for row, document in zip(ids, documents, strict=True):
        row[: document.size] = document
    return ids, torch.tensor([document.size for document in documents], dtype=torch.int64)


def _check_ids(origin: str, ids: Ids, vocabulary: int | None) -> None:
    if ids.size and (int(ids.min()) < 0 or (vocabulary is not None and int(ids.max()) >= vocabulary)):
        known = "0 and above" if vocabulary is None else f"0 to {vocabulary - 1}"
        raise InputError(
            f"{origin} has token ids from {ids.min()} to {ids.max()}, but the model knows {known}: "
            "take the tokenizer that belongs to it"
        )


# --- files -----------------------------------------------------------------------------------------------------------


def _documents(path: Path, tokenizer: Tokenizer | None, pack: bool) -> Iterator[tuple[str, Ids]]:
    """Every document with where it is from."""
    for file in _files(path):
        if file.suffix == ".npy":
            yield from _array(file, _numpy(file))
        elif file.suffix == ".safetensors":
            yield from _array(file, _safetensors(file))
        elif file.suffix == ".jsonl":
            yield from _lines(file, tokenizer, pack)
        else:
            text = _text(file)
            for piece in [text] if pack else text.splitlines():
                if piece.strip():
                    yield str(file), _tokens(file, piece, tokenizer, pack)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MissingError(f"there is no data at {path}: give a file or a folder of text or token ids")
    known = (*TEXT_SUFFIXES, *TOKEN_SUFFIXES)
    found = sorted(
        (p for p in path.rglob("*") if p.suffix in known and p.is_file()), key=lambda p: p.relative_to(path).parts
    )
    if not found:
        raise InputError(f"{path} has no files that end in {', '.join(known)}")
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text: {error}") from error


def _tokens(file: Path, text: str, tokenizer: Tokenizer | None, pack: bool) -> Ids:
    if tokenizer is None:
        raise InputError(f"{file} holds text: give a tokenizer, or files of token ids")
    ids = tokenizer.ids(text, special=not pack)
    return np.asarray(ids + [tokenizer.end] * (pack and tokenizer.end is not None), np.int32)


def _lines(file: Path, tokenizer: Tokenizer | None, pack: bool) -> Iterator[tuple[str, Ids]]:
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        origin = f"{file} line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{origin} is not JSON: {error}") from error
        if isinstance(value, dict):
            value = value.get("input_ids", value.get("text"))
        if isinstance(value, str):
            yield origin, _tokens(file, value, tokenizer, pack)
        elif isinstance(value, list) and all(type(i) is int and abs(i) < 2**31 for i in value):
            yield origin, np.asarray(value, np.int32)
        else:
            raise InputError(f'{origin} must be a list of ids, {{"input_ids": [...]}} or {{"text": "..."}}')


def _numpy(file: Path) -> NDArray[Any]:
    try:
        found: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} is not an array of numbers: {first_line(error)}") from error
    return found


def _safetensors(file: Path) -> NDArray[Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is not a safetensors file: {first_line(error)}") from error
    if "input_ids" not in held:
        raise InputError(f"{file} has no tensor input_ids, but {', '.join(sorted(held)) or 'nothing'}")
    ids = held["input_ids"]
    numbers: NDArray[Any] = (ids.double() if ids.is_floating_point() else ids).numpy()  # others are refused later
    return numbers


def _array(file: Path, array: NDArray[Any]) -> Iterator[tuple[str, Ids]]:
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise InputError(
            f"{file} holds {array.dtype} {list(array.shape)}: token ids are whole numbers, [tokens] or "
            "[documents, tokens]"
        )
    for row in array if array.ndim == 2 else [array]:
        if row.size and int(row.max()) >= 2**31:
            raise InputError(f"{file} has a token id of {row.max()}: ids are below 2^31")
        yield str(file), np.ascontiguousarray(row, np.int32)
