"""The state of every random number generator that training draws from, as data and as a thing to switch."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_CPU = torch.device("cpu")


def mixed(*parts: object) -> int:
    """A seed below 2^32 that depends on all ``parts``."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


@dataclass(frozen=True)
class RandomState:
    """Python's, numpy's and torch's generators, with that of an accelerator."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    device: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device = _CPU) -> RandomState:
        """The present state."""
        own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), own)

    def use(self, device: torch.device = _CPU) -> None:
        """Make it the present state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.device is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.device, device)

    def to_json(self) -> dict[str, Any]:
        """The state as JSON-ready data."""
        name, keys, *rest = self.numpy
        return {
            "python": self.python,
            "numpy": [name, keys.tolist(), *rest],
            "cpu": self.cpu.numpy().tobytes().hex(),
            "device": None if self.device is None else self.device.numpy().tobytes().hex(),
        }

    @staticmethod
    def from_json(data: Any) -> RandomState:
        """The state that `to_json` wrote."""
        version, inner, gauss = data["python"]
        name, keys, *rest = data["numpy"]
        return RandomState(
            (version, tuple(inner), gauss),
            (name, np.asarray(keys, np.uint32), *rest),
            _bytes(data["cpu"]),
            None if data["device"] is None else _bytes(data["device"]),
        )


def seed_all(seed: int, device: torch.device = _CPU) -> None:
    """Seed every generator; of accelerators, that of ``device`` only."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def random_kept(device: torch.device = _CPU) -> Iterator[None]:
    """Whatever is drawn inside, the generators are as before afterwards."""
    before = RandomState.now(device)
    try:
        yield
    finally:
        before.use(device)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
