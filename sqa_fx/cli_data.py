"""The arguments of commands that read text or token ids, and the batches that they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from sqa_fx.inputs import vocabulary_size
from sqa_fx.text_data import TokenBatches, load_tokenizer, token_batches

PATH_HELP = "a file or folder of text, or of token ids: .jsonl, .npy, .safetensors"


def add_rows(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how data becomes batches."""
    parser.add_argument("--tokenizer", metavar="DIR", help="for text: a folder saved by transformers, or 'bytes'")
    parser.add_argument("--sequence", type=int, default=512, metavar="N", help="tokens of a row (default: 512)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows of a batch (default: 8)")
    parser.add_argument(
        "--pad", action="store_true", help="a document or line is a row of its own, padded; else all are one stream"
    )


def rows_of(
    path: Path,
    options: argparse.Namespace,
    model: nn.Module | None,
    rows: int | None,
    mask: bool,
    seed: int | None = None,
) -> TokenBatches:
    """At most ``rows`` rows of ``path`` for ``model``: for training with a ``seed``, in its order and in full batches
    only; with ``mask``, full rows have an attention mask, too."""
    return token_batches(
        path,
        load_tokenizer(options.tokenizer) if options.tokenizer else None,
        options.sequence,
        options.batch,
        pack=not options.pad,
        rows=rows,
        vocabulary=vocabulary_size(model) if model is not None else None,
        seed=seed,
        drop_last=seed is not None,
        mask=mask,
    )
