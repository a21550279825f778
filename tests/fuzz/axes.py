"""Tensors with a letter per dimension.

b batch, h heads, k KV heads, g group, n batch and heads folded, l queries, m keys, d head size, e value size,
f features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Named:
    """A tensor and the letters of its dimensions."""

    t: Tensor
    axes: str

    def size(self, letter: str) -> int:
        """The size of one dimension."""
        return self.t.shape[self.axes.index(letter)]

    def dim(self, letter: str) -> int:
        """The number of one dimension."""
        return self.axes.index(letter)

    def map(self, call: Callable[[Tensor], Tensor]) -> Named:
        """The same axes after ``call``."""
        return Named(call(self.t), self.axes)

    def named(self, **letters: str) -> Named:
        """The same tensor with other letters."""
        return Named(self.t, "".join(letters.get(c, c) for c in self.axes))

    def to(self, axes: str) -> Named:
        """Permuted to ``axes``; a swap of two is a transpose."""
        assert sorted(axes) == sorted(self.axes), (self.axes, axes)
        moved = [i for i, (a, b) in enumerate(zip(axes, self.axes, strict=True)) if a != b]
        if not moved:
            return self
        if len(moved) == 2:
            return Named(self.t.transpose(*moved), axes)
        return Named(self.t.permute([self.axes.index(c) for c in axes]), axes)

    def cut(self, letter: str, into: str, sizes: Sequence[int], style: str = "unflatten") -> Named:
        """One dimension cut into several, in one of the usual spellings."""
        at = self.dim(letter)
        axes = self.axes.replace(letter, into)
        shape = [*self.t.shape[:at], *sizes, *self.t.shape[at + 1 :]]
        if style == "view":
            return Named(self.t.contiguous().view(shape), axes)
        if style == "reshape":
            return Named(self.t.reshape(shape), axes)
        if style == "stack" and len(sizes) == 2:
            return Named(torch.stack(self.t.chunk(sizes[0], dim=at), dim=at), axes)
        return Named(self.t.unflatten(at, list(sizes)), axes)

    def join(self, letters: str, into: str, style: str = "flatten") -> Named:
        """Neighbouring dimensions made one."""
        at = self.axes.index(letters)
        axes = self.axes.replace(letters, into)
        if style == "flatten":
            return Named(self.t.flatten(at, at + len(letters) - 1), axes)
        return Named(self.t.reshape([*self.t.shape[:at], -1, *self.t.shape[at + len(letters) :]]), axes)

    def fit(self, want: str, short: bool = False) -> Tensor:
        """The tensor with dimensions of size one for missing letters; ``short`` leaves out leading ones."""
        t = self.to("".join(c for c in want if c in self.axes)).t
        first = min((want.index(c) for c in self.axes), default=0) if short else 0
        for i, letter in enumerate(want[first:]):
            if letter not in self.axes:
                t = t.unsqueeze(i)
        return t
