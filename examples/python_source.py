"""Python source and docstrings that lie on every machine with Python: data for the quality examples, split by file."""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 20
"""Every so many files one is held out, by a hash of its path."""


def source_files(installed: bool) -> list[Path]:
    """The .py files of the standard library and, if ``installed``, of installed packages; in a fixed random order."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    if installed:
        roots.append(Path(torch.__file__).parent.parent)
    found: dict[str, Path] = {}
    for root in roots:
        for file in root.rglob("*.py"):
            name = str(file.relative_to(root))
            if "site-packages" not in name and "dist-packages" not in name:
                found.setdefault(name, file)
    return [found[name] for name in sorted(found, key=lambda n: hashlib.sha256(n.encode()).digest())]


def is_held_out(position: int) -> bool:
    """True for the files that nothing is trained or calibrated on."""
    return position % HELD_OUT == 0


def docstrings(held_out: bool, limit: int) -> list[str]:
    """Docstrings of the standard library of at least 60 characters, as one line each."""
    texts: list[str] = []
    for position, file in enumerate(source_files(installed=False)):
        if is_held_out(position) == held_out:
            texts += _docstrings_of(file)
    texts = list(dict.fromkeys(texts))
    return sorted(texts, key=lambda t: hashlib.sha256(t.encode()).digest())[:limit]


def more_docstrings(limit: int) -> list[str]:
    """As many docstrings of installed packages, of files in a fixed random order; none that is held out."""
    if limit == 0:
        return []
    known = set(docstrings(held_out=True, limit=10**9))
    own = set(source_files(installed=False))
    files = [file for file in source_files(installed=True) if file not in own]
    texts: dict[str, None] = {}
    # New interpreters: a fork would take CUDA's state along.
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), get_context("spawn")) as pool:
        for start in range(0, len(files), 512):
            for found in pool.map(_docstrings_of, files[start : start + 512], chunksize=16):
                texts |= dict.fromkeys(t for t in found if t not in known)
            if len(texts) >= limit:
                break
    return [*texts][:limit]


def _docstrings_of(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return []
    nodes = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module))
    texts = (" ".join((ast.get_docstring(node) or "").split()) for node in nodes)
    return [text for text in texts if len(text) >= 60]


def source_tokens(vocabulary: int, megabytes: float, cache: Path | None = None) -> tuple[Tensor, Tensor, float]:
    """Token ids of training and held-out source under a byte-level BPE trained on the training part; and bytes per
    token. ``cache`` is a file to read them from, written if it is not there."""
    if cache is not None and cache.exists():
        known = torch.load(cache, weights_only=True)
        return known["train"], known["held_out"], known["bytes"]
    train, held, ratio = _tokenized(vocabulary, megabytes)
    if cache is not None:
        torch.save({"train": train, "held_out": held, "bytes": ratio}, cache)
    return train, held, ratio


def _tokenized(vocabulary: int, megabytes: float) -> tuple[Tensor, Tensor, float]:
    from tokenizers import ByteLevelBPETokenizer

    texts: dict[bool, list[str]] = {False: [], True: []}
    size = 0
    for position, file in enumerate(source_files(installed=True)):
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) > 200_000:
            continue  # generated tables
        texts[is_held_out(position)].append(text)
        size += len(text)
        if size > megabytes * 1e6:
            break

    def sample() -> Iterator[str]:
        yield from texts[False][: max(1, int(len(texts[False]) * min(1.0, 8 / megabytes)))]

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sample(), vocab_size=vocabulary, min_frequency=2, show_progress=False)

    def encoded(parts: list[str]) -> Tensor:
        ids = [e.ids for e in tokenizer.encode_batch(parts)]
        return torch.tensor([i for each in ids for i in each], dtype=torch.int32)

    train, held = encoded(texts[False]), encoded(texts[True])
    return train, held, size / (len(train) + len(held))


def windows(tokens: Tensor, batch: int, length: int, seed: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows and the tokens that follow: two [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length + 1)
    while True:
        starts = torch.randint(len(tokens) - length - 1, (batch, 1), generator=generator)
        found = tokens[starts + offsets].long().to(device, non_blocking=True)
        yield found[:, :-1], found[:, 1:]
