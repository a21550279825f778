"""Checkpoints of healing: folders of safetensors and JSON that appear whole or not at all.

``step-00000120/`` holds ``learned.safetensors`` (what training changes), ``optimizer.safetensors``, ``state.json``,
``random-RANK.json``, and ``best.safetensors`` (the best so far on held-out data) if that is not what is learned.
Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from sqa_fx.errors import InputError, MissingError, first_line
from sqa_fx.heal_devices import OneDevice, whole, write_into
from sqa_fx.heal_random import RandomState

VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What was read: everything but this process's random state is the same in every process."""

    folder: Path
    state: dict[str, Any]
    learned: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor] | None
    random: RandomState


class Checkpoints:
    """The checkpoints of one run in ``folder``, of which the last ``keep`` stay."""

    def __init__(self, folder: str | os.PathLike[str], keep: int, devices: OneDevice) -> None:
        self.folder, self._keep, self._devices = Path(folder), keep, devices
        if devices.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.glob(".step-*"):
                    shutil.rmtree(left, ignore_errors=True)  # what was being written when the process died
            except OSError as error:
                raise InputError(f"cannot write checkpoints to {self.folder}: {error.strerror}") from error
        devices.wait()

    def found(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        numbered = [(int(m[1]), p) for p in self.folder.iterdir() if (m := _NAME.fullmatch(p.name))]
        return [path for _, path in sorted(numbered)]

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        learned: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        best: Mapping[str, Tensor] | None,
    ) -> None:
        """Write a checkpoint; every process must call this. Raises InputError when it cannot be written."""
        target = self.folder / f"step-{step:08d}"
        staged = self.folder / f".{target.name}"
        random = RandomState.now(self._devices.device).to_json()
        kept, moments = _on_cpu(learned), _on_cpu(optimizer)
        try:
            if self._devices.rank == 0:
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir()
            self._devices.wait()
            (staged / f"random-{self._devices.rank}.json").write_text(json.dumps(random))
            self._devices.wait()
            if self._devices.rank == 0:
                save_file(kept, staged / "learned.safetensors")
                save_file(moments, staged / "optimizer.safetensors")
                if best is not None:
                    save_file(_on_cpu(best), staged / "best.safetensors")
                (staged / "state.json").write_text(json.dumps({"version": VERSION, "step": step, **state}))
                _publish(staged, target)
                for old in self.found()[: -self._keep]:
                    shutil.rmtree(old, ignore_errors=True)
            self._devices.wait()
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"cannot write the checkpoint {target}: {first_line(error)}") from error

    def load(self) -> Checkpoint | None:
        """The last checkpoint, None without any. Raises InputError for one that cannot be read."""
        folders = self.found()
        if not folders:
            return None
        folder = folders[-1]
        try:
            state = json.loads((folder / "state.json").read_bytes())
            best = folder / "best.safetensors"
            if state["version"] != VERSION:
                raise InputError(f"{folder} is of version {state['version']}; this release reads version {VERSION}")
            random = json.loads((folder / f"random-{self._devices.rank}.json").read_bytes())
            return Checkpoint(
                folder,
                state,
                load_file(folder / "learned.safetensors"),
                load_file(folder / "optimizer.safetensors"),
                load_file(best) if best.exists() else None,
                RandomState.from_json(random),
            )
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise InputError(
                f"the checkpoint {folder} is damaged ({first_line(error)}): delete it to go on from the one before"
            ) from error


def require_same_options(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError that says which options differ between a checkpoint and this run."""
    differing = [
        f"{name} (was {then.get(name)!r}, is {now.get(name)!r})"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    if differing:
        raise InputError(
            f"the checkpoint {folder} belongs to another run: {'; '.join(differing)}. Give the same options to resume, "
            "or another folder to start anew"
        )


def require_checkpoint(folder: Path) -> MissingError:
    """The error where resuming was demanded and there is nothing."""
    return MissingError(f"there is no checkpoint in {folder} to resume from")


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimiser's state as ``{"exp_avg:parameter name": tensor}``."""
    return {
        f"{key}:{names[parameter]}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], held: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    by_name = {name: parameter for parameter, name in names.items()}
    for entry, value in held.items():
        key, _, name = entry.partition(":")
        parameter = by_name[name]
        if value.shape == parameter.shape and key != "step":
            own = torch.zeros_like(parameter)
            write_into(own, value)
            value = own
        optimizer.state[parameter][key] = value


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies that share no memory, as safetensors wants them."""
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor).detach() if isinstance(tensor, DTensor) else tensor.detach()
        found[name] = gathered.to("cpu", copy=True).contiguous()
    return found


def _publish(staged: Path, target: Path) -> None:
    """Rename, after everything has reached the disk."""
    for path in [*staged.iterdir(), staged]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if target.exists():
        shutil.rmtree(target)
    os.replace(staged, target)
