"""Source of models for the command line, written as a module into a test's folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BLOCK = '''
import torch
from torch import nn


class Block(nn.Module):
    """Attention over ``[batch, seq, 24]`` with 4 query and KV heads of size 6."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))
'''


def factory_module(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with this source in ``folder``, which becomes the current one; no other test has it."""
    module = f"small_{abs(hash(folder))}"
    (folder / f"{module}.py").write_text(source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return module
