"""What is known of an exported file, written beside it as ``FILE.json``: inputs with their ranges, how it was built,
which plan it holds, what its validation said, and its SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqa_fx.errors import InputError, MissingError
from sqa_fx.version import __version__
from sqa_fx.whole_file import write_whole

FORMAT = "sqa-fx-artifact"
VERSION = 1


@dataclass(frozen=True)
class AxisRange:
    """A dynamic size: its symbol, the sizes that the artifact accepts, and the one it is best at. ``max`` None: any."""

    name: str
    min: int
    opt: int
    max: int | None

    def __contains__(self, size: int) -> bool:
        return self.min <= size and (self.max is None or size <= self.max)

    def __str__(self) -> str:
        return f"{self.name} in {self.min}..{'' if self.max is None else self.max}"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: name, dtype as in ``torch.float32``, and a size or an AxisRange per axis."""

    name: str
    dtype: str
    shape: tuple[int | AxisRange, ...]

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype that is meant; None where this torch has none of that name."""
        found = getattr(torch, self.dtype.removeprefix("torch."), None)
        return found if isinstance(found, torch.dtype) else None

    def sizes(self, which: str) -> tuple[int, ...]:
        """The shape at ``which`` of ``min``, ``opt`` and ``max``. An open maximum counts as ``opt``."""
        return tuple(n if isinstance(n, int) else int(getattr(n, which) or n.opt) for n in self.shape)


@dataclass(frozen=True)
class Sidecar:
    """The content of ``FILE.json``.

    ``attention`` says in words how attention is computed, ``built_for`` is the GPU that the file runs on ("sm_90";
    None: any), ``plan`` is the plan's JSON (None: not converted), ``validation`` the verdict of a ValidationReport.
    """

    format: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attention: tuple[str, ...] = ()
    built_for: str | None = None
    opset: int | None = None
    precision: str | None = None
    plan: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By file name, relative to the sidecar: ``sha256`` and ``bytes``."""
    notes: tuple[str, ...] = ()
    validation: Mapping[str, Any] | None = None

    def write(self, path: str | os.PathLike[str], files: Sequence[Path] = ()) -> Sidecar:
        """Write this as the sidecar of the artifact at ``path`` (complete or not at all), with the digests of ``files``
        (default: of ``path``) unless it has digests already; the sidecar as written."""
        files = files or (Path(path),)
        digests = self.files or {f.name: {"sha256": sha256(f), "bytes": f.stat().st_size} for f in files}
        done = replace(self, files=digests, versions={**versions(), **self.versions})
        text = json.dumps({"format_of_this": FORMAT, "version": VERSION, **asdict(done)}, indent=1, allow_nan=False)
        write_whole(sidecar_path(path), f"{text}\n".encode(), overwrite=True)
        return done

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, check: bool = True) -> Sidecar:
        """The sidecar of the artifact at ``path``; with ``check``, after comparing the digests of its files.

        Raises MissingError when there is none, InputError when it is not one or a file was changed since.
        """
        target = sidecar_path(path)
        if not target.is_file():
            raise MissingError(f"{path} has no {target.name} beside it; export it again, or keep the two together")
        try:
            content = json.loads(target.read_bytes())
            if content.pop("format_of_this") != FORMAT or content.pop("version") != VERSION:
                raise ValueError("another format or version")
            for which in ("inputs", "outputs"):
                content[which] = tuple(_spec(entry) for entry in content[which])
            for name in ("attention", "notes"):
                content[name] = tuple(content[name])
            found = cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{target} is no sidecar of this version of sqa-fx ({error}); export again") from error
        for name, entry in found.files.items() if check else ():
            file = target.with_name(name)
            if not file.is_file():
                raise MissingError(f"{target.name} speaks of {name}, which is not beside it; export again")
            if sha256(file) != entry["sha256"]:
                raise InputError(f"{file} is not the file that {target.name} describes (SHA-256 differs); export again")
        return found

    @property
    def floating_dtype(self) -> torch.dtype:
        """The first floating point type of the outputs, else of the inputs; float32 without any."""
        kinds = (spec.torch_dtype for spec in (*self.outputs, *self.inputs))
        return next((d for d in kinds if d is not None and d.is_floating_point), torch.float32)

    def check_inputs(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise InputError unless ``tensors``, by input name, fit: dtype, rank, sizes within their ranges, and equal
        sizes wherever one symbol stands."""
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            have = tensors.get(spec.name)
            if have is None:
                raise InputError(f"input {spec.name} is missing; it takes {', '.join(s.name for s in self.inputs)}")
            if str(have.dtype) != spec.dtype:
                raise InputError(f"input {spec.name} is {spec.dtype}, but got {have.dtype}; pass x.to({spec.dtype})")
            if have.dim() != len(spec.shape):
                raise InputError(f"input {spec.name} has {len(spec.shape)} axes, but got shape {list(have.shape)}")
            for axis, (want, size) in enumerate(zip(spec.shape, have.shape, strict=True)):
                if isinstance(want, int):
                    if want != size:
                        raise InputError(
                            f"input {spec.name} has size {want} at axis {axis}, but got {list(have.shape)}"
                        )
                    continue
                if size not in want:
                    raise InputError(
                        f"input {spec.name} has {want} at axis {axis}, but got shape {list(have.shape)}; export with a "
                        "wider range"
                    )
                known, first = sizes.setdefault(want.name, (size, spec.name))
                if known != size:
                    raise InputError(
                        f"input {spec.name} has size {size} at axis {axis}, {want.name!r}, which is {known} in input "
                        f"{first}; they must be equal"
                    )


def sidecar_path(path: str | os.PathLike[str]) -> Path:
    """``model.onnx.json`` for ``model.onnx``."""
    return Path(f"{os.fspath(path)}.json")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, torch, sqa_fx and of those of ``packages`` that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "sqa_fx": __version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(n if isinstance(n, int) else AxisRange(**n) for n in entry["shape"])
    return TensorSpec(entry["name"], entry["dtype"], shape)
