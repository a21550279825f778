"""What a checkpoint directory holds: its shards and their headers, its index, and the other files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqa_fx.checkpoint_format import Entry, Header, read_header
from sqa_fx.errors import InputError, MissingError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".tflite"),
    *(".pt2", ".engine", ".npz", ".nemo", ".mlmodel", ".onnx_data"),
)


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint directory as it was found; nothing but headers was read."""

    directory: Path
    shards: Mapping[str, Header]
    """The header of every shard, by file name, in order."""
    index: Mapping[str, Any] | None
    """The content of the index file; None for a checkpoint of one file."""
    index_name: str = INDEX
    others: tuple[str, ...] = ()
    """Files to copy, as paths relative to the directory."""
    left_out: tuple[str, ...] = ()
    """Files that hold the original weights in another form."""
    _entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every tensor of the checkpoint, by name."""
        return self._entries

    @property
    def data_bytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(header.data_bytes for header in self.shards.values())


def read_checkpoint(directory: str | os.PathLike[str]) -> CheckpointFiles:
    """The files of the safetensors checkpoint in ``directory``: ``model.safetensors``, or the shards that
    ``model.safetensors.index.json`` names.

    Raises MissingError when there is no directory, or no safetensors file in it; InputError when the index is missing
    or damaged, does not agree with the shards, or a shard is missing or damaged.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise MissingError(f"{folder}: no such directory")
    indexes = sorted(path.name for path in folder.glob("*.safetensors.index.json"))
    index_name = INDEX if INDEX in indexes or not indexes else indexes[0]
    if INDEX not in indexes and len(indexes) > 1:
        raise InputError(f"{folder} holds several indexes ({', '.join(indexes)}): keep the one to convert")
    index = _read_index(folder / index_name) if indexes else None
    names = sorted(set(index["weight_map"].values())) if index is not None else [_only_file(folder)]
    shards = {}
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{folder / index_name} names the shard {name!r}: shards lie beside their index")
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}, which its index names: fetch it again")
        shards[name] = read_header(folder / name)
    entries: dict[str, Entry] = {}
    for name, header in shards.items():
        for entry in header.entries:
            if entry.name in entries:
                raise InputError(f"{folder}: the tensor {entry.name!r} is in {name} and in another shard")
            entries[entry.name] = entry
    if index is not None:
        _check_index(folder / index_name, index["weight_map"], shards)
    others, left_out = _other_files(folder, {*names, index_name})
    return CheckpointFiles(folder, shards, index, index_name, others, left_out, entries)


def _only_file(folder: Path) -> str:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE in files:
        return SINGLE
    if not files:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"it holds {', '.join(pickled[:3])}, which would have to be unpickled" if pickled else "nothing to cut"
        raise MissingError(
            f"{folder} has no *.safetensors: {found}. Save it with save_pretrained of a current transformers"
        )
    if len(files) > 1 or "-of-" in files[0]:
        raise InputError(
            f"{folder} holds {len(files)} shards ({files[0]}, ...) and no {INDEX}: without it nobody can tell whether "
            "all of them are here. Fetch it again, or save the model again"
        )
    return files[0]


def _read_index(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: it is truncated, or something else ({error})") from error
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{path} has no weight_map of tensor names to shards: fetch it again")
    return dict(value)


def _check_index(path: Path, weight_map: Mapping[str, str], shards: Mapping[str, Header]) -> None:
    held = {entry.name: shard for shard, header in shards.items() for entry in header.entries}
    wrong = sorted(name for name, shard in weight_map.items() if held.get(name) != shard)
    if wrong:
        raise InputError(
            f"{path} does not agree with its shards: {wrong[0]!r} is not in {weight_map[wrong[0]]}"
            + (f", nor are {len(wrong) - 1} more where they should be" if len(wrong) > 1 else "")
            + ". Fetch the checkpoint again"
        )
    more = sorted(set(held) - set(weight_map))
    if more:
        raise InputError(f"{path} does not name {more[0]!r}, which is in {held[more[0]]}: fetch the checkpoint again")


def other_files(folder: Path) -> tuple[str, ...]:
    """The files of a model's directory that are no weights: config, tokenizer and the like."""
    return _other_files(folder, set())[0]


def _other_files(folder: Path, weights: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files beside the weights: those to copy, and those that hold the original weights in another form."""
    copied: list[str] = []
    left: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root) / name
            relative = str(path.relative_to(folder))
            if relative in weights or name.startswith(".") or not path.is_file():
                continue
            weighs = name.endswith((*_OTHER_WEIGHTS, ".index.json", ".onnx.data"))
            (left if weighs else copied).append(relative)
    return tuple(copied), tuple(left)
