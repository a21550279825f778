"""A small language model with experts, which torch.export cannot take as a whole, and its parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from attention_models import VOCABULARY, noise, perturb
from torch import Tensor, nn

import sqa_fx

WIDTH, HEADS = 30, 6
X = noise(2, 7, WIDTH)


class Experts(nn.Module):
    """A mixture of experts as it is often written: a Python loop over the experts that some token chose."""

    def __init__(self, width: int, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = self.router(flat).softmax(-1).argmax(-1)
        out = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            rows = torch.nonzero(chosen == number).squeeze(1)
            out = out.index_add(0, rows, self.experts[number](flat[rows]))
        return out.view_as(x)


class Attention(nn.Module):
    """Masked multi-head attention with an option and an argument that carries nothing."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0, **unused: Any) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q * scale, k, v, attn_mask=mask)
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH, heads: int = HEADS, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention, self.experts = Attention(width, heads), Experts(width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm(x), mask=mask, kind=None))
        out: Tensor = x + self.experts(x)
        return out


class Mixture(nn.Module):
    """A small language model with experts; torch.export cannot take it, and can take its attention."""

    def __init__(self, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(dropout=dropout) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros(()))

    calls: Tensor

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        mask = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()[None, None]
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return {"logits": self.head(x), "last": x}


def mixture(**settings: Any) -> Mixture:
    torch.manual_seed(0)
    model = Mixture(**settings)
    perturb(model)
    return model.eval()


def note_with(report: sqa_fx.Report, words: str) -> str:
    note = next((n for n in report.notes if words in n), "")
    assert note, report.notes
    return note


class KeyCache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []
