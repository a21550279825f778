"""Numbers that turn out to mean the same: union-find over tensors of numbers."""

from __future__ import annotations

import torch
from torch import Tensor


class Classes:
    """Union-find over channel numbers, in batches of pairs."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def find(self, item: int) -> int:
        """The smallest number of the class of ``item``."""
        parent = self.parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Unite ``first[i]`` with ``second[i]`` wherever both are numbers (>= 0), broadcasting."""
        first, second = torch.broadcast_tensors(first, second)
        both = (first >= 0) & (second >= 0) & (first != second)
        if not bool(both.any()):
            return
        size = len(self.parent)
        for code in torch.unique(first[both] * size + second[both]).tolist():
            a, b = self.find(code // size), self.find(code % size)
            if a != b:
                self.parent[max(a, b)] = min(a, b)

    def roots(self, numbers: Tensor) -> Tensor:
        """The class of each number; -1 stays."""
        table = torch.tensor([self.find(i) for i in range(len(self.parent))] or [0])
        return torch.where(numbers >= 0, table[numbers.clamp(min=0)], numbers)
