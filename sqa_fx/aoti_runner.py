"""Run an AOTInductor package, after the checks that its own code does not make."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqa_fx.call_tensors import lay_out
from sqa_fx.errors import InputError, MissingError
from sqa_fx.exporters.program_checks import root_cause
from sqa_fx.exporters.sidecar import Sidecar
from sqa_fx.exporters.size_conditions import check_conditions
from sqa_fx.exporters.to_aoti import CONDITIONS, DEVICE, OUTPUTS, capability, machine

_ALIGNMENT = 16
"""Bytes: compiled kernels load whole vectors from where an input starts."""

_VECTORS = ("DEFAULT", "AVX2", "AVX512")
"""Vector instructions of x86_64, each including those before it."""


class AotiRunner:
    """A package of ``export_aoti`` with its sidecar; inputs are moved to its device and laid out plainly.

    Compiled code checks nothing: a size outside of what it was made for reads out of bounds, gives garbage or ends the
    process. So every call is compared with the sidecar first. ``sidecar`` is what was read.

    Raises MissingError when the file, its sidecar or the kind of device it was built for is not there, and InputError
    when a file was changed, was built for another processor or GPU, or cannot be loaded.
    """

    kind = "aoti"

    def __init__(self, path: str | os.PathLike[str], name: str = "aoti") -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise MissingError(f"there is no AOTInductor package at {self.path}")
        self.name = name
        self.sidecar = Sidecar.read(self.path)
        if self.sidecar.format != "aoti":
            raise InputError(f"{self.path} is a file of format {self.sidecar.format}, not an AOTInductor package")
        self.device = _device(self.path, self.sidecar)
        self._loader, metadata = _load(self.path, self.sidecar, self.device)
        if metadata.get(DEVICE) != self.device.type or not {CONDITIONS, OUTPUTS} <= metadata.keys():
            raise InputError(f"{self.path} was not written by sqa-fx, or by another version; export again")
        self._conditions: list[str] = json.loads(metadata[CONDITIONS])
        self._positions = [int(i) for i in metadata[OUTPUTS].split(",") if i]
        self.input_names = tuple(spec.name for spec in self.sidecar.inputs)
        self.output_names = tuple(spec.name for spec in self.sidecar.outputs)
        self.dtype = self.sidecar.floating_dtype

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """See ``Runner.run``; keyword tensors go to the inputs of their names, all others to the rest in order.

        Raises InputError when count, dtype, rank or shape of the tensors is not what the package takes, and when the
        compiled code stops: it checks indices that it computes.
        """
        tensors = lay_out(self.input_names, args, kwargs, self.path.name)
        self.sidecar.check_inputs(tensors)
        check_conditions(self._conditions, tensors)
        with torch.no_grad():
            plain = [_plain(tensor, self.device) for tensor in tensors.values()]
            try:
                outputs = self._loader.run(plain)
            except RuntimeError as e:
                given = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
                raise InputError(
                    f"{self.path.name} stops on {given}: {root_cause(e)}; compare with eager PyTorch, or change sizes"
                ) from e
        return [outputs[i] for i in self._positions]


def _plain(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, its elements in row-major order, starting at an aligned address."""
    plain = tensor.detach().to(device).contiguous()
    return plain.clone() if plain.data_ptr() % _ALIGNMENT else plain


def _device(path: Path, sidecar: Sidecar) -> torch.device:
    built_for = sidecar.built_for or "cpu"
    if built_for == "cpu":
        _require_processor(path, sidecar.versions.get("machine", machine()))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MissingError(
            f"{path} was built for a GPU of {built_for}, and torch sees none here; run it on one, or export again from "
            "a program on the CPU"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if capability(device) != built_for:
        raise InputError(
            f"{path} was built for {built_for}, and {torch.cuda.get_device_name(device)} is {capability(device)}; "
            "export again on this GPU"
        )
    return device


def _require_processor(path: Path, built_on: str) -> None:
    have, _, vectors = machine().partition(" ")
    wanted, _, needed = built_on.partition(" ")
    known = needed in _VECTORS and vectors in _VECTORS
    enough = _VECTORS.index(vectors) >= _VECTORS.index(needed) if known else vectors == needed
    if have != wanted or not enough:
        raise InputError(
            f"{path} was built on a processor with {built_on}, and this one has {machine()}; export again here"
        )


def _load(path: Path, sidecar: Sidecar, device: torch.device) -> tuple[Any, dict[str, str]]:
    import torch._inductor

    index = -1 if device.index is None else device.index
    try:
        model = torch._inductor.aoti_load_package(str(path), device_index=index)
        return model.loader, dict(model.loader.get_metadata())
    except Exception as e:  # the loader raises RuntimeError for anything, from the archive to the dynamic linker
        built = sidecar.versions.get("torch", "another torch")
        raise InputError(
            f"cannot load {path}, built by torch {built}, in torch {torch.__version__}: {root_cause(e)}; export again "
            "with this version"
        ) from e
