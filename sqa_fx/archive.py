"""Read what ``torch.export.save`` wrote, without unpickling.

``torch.export.load`` unpickles some entries, may load native code and evaluates text from the file. The entries that a
program of plain tensors needs are JSON and raw memory, so they are read here; what only a pickle could hold is refused.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.serde import schema, serialize
from torch.export.pt2_archive import constants as names

from sqa_fx.errors import InputError, SqaError
from sqa_fx.program_json import check_program_json, check_targets
from sqa_fx.storage import deserialize_program

_MODEL = "model"  # the name that torch.export.save gives to its one program


def read_archive(path: str | os.PathLike[str]) -> torch.export.ExportedProgram:
    """Load the program in the ``.pt2`` file ``path``, on the CPU, without running anything that the file holds.

    Guards that torch saved as Python code are dropped: they only repeat checks of input shapes.

    Raises:
        InputError: the file is missing, truncated or something else, or it holds pickled or native code.
        MissingError: the program takes or returns a type of a library that is not installed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, str(path))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is not a .pt2 file of torch.export.save, or it is truncated ({error})") from error


def _read(archive: zipfile.ZipFile, path: str) -> torch.export.ExportedProgram:
    # Everything lies in one folder, whose name is that of the file when it was written.
    entries = {str(PurePosixPath(*PurePosixPath(name).parts[1:])): name for name in archive.namelist()}
    program_entry = names.MODELS_FILENAME_FORMAT.format(_MODEL)
    if program_entry not in entries:
        raise InputError(
            f"{path} holds no {program_entry}: it is not a program of torch.export.save, or one of an older torch; "
            "save it again with this torch"
        )
    weights_entry = names.WEIGHTS_CONFIG_FILENAME_FORMAT.format(_MODEL)
    constants_entry = names.CONSTANTS_CONFIG_FILENAME_FORMAT.format(_MODEL)
    pickled = [
        name for name in entries if name.startswith((names.WEIGHTS_DIR, names.CONSTANTS_DIR)) and name[-3:] == ".pt"
    ]
    if pickled or not {weights_entry, constants_entry} <= set(entries):
        raise InputError(
            f"{path}: its tensors are stored as pickle ({', '.join(pickled) or 'no list of them'}): refused"
        )
    try:
        program = json.loads(archive.read(entries[program_entry]))
        if isinstance(program, dict):
            program["guards_code"] = []
        check_program_json(program, path)
        state = _tensors(archive, entries, weights_entry, names.WEIGHTS_DIR, path)
        constants = _tensors(archive, entries, constants_entry, names.CONSTANTS_DIR, path)
        examples = _examples(archive, entries, path)
        ep = deserialize_program(program, state, constants, examples)
    except SqaError:
        raise
    except Exception as error:  # a damaged program fails in as many ways as torch has checks
        raise InputError(f"{path} cannot be read as an exported program: {type(error).__name__}: {error}") from error
    check_targets(ep, path)
    return ep


def _tensors(
    archive: zipfile.ZipFile, entries: dict[str, str], listing: str, folder: str, path: str
) -> dict[str, Tensor]:
    """The tensors that the JSON ``listing`` names; those in one entry share memory, and equal parameters are one."""
    config = serialize._dict_to_dataclass(schema.PayloadConfig, json.loads(archive.read(entries[listing]))).config
    memory: dict[str, bytearray] = {}
    made: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, row in config.items():
        meta = row.tensor_meta
        if row.use_pickle or meta is None:
            raise InputError(
                f"{path}: {name} is stored as pickle ({row.path_name}): refused; save it as a plain tensor"
            )
        key = f"{row.path_name} {row.is_param} {meta}"
        if key not in made:
            if row.path_name not in memory:
                memory[row.path_name] = bytearray(archive.read(entries[folder + row.path_name]))
            dtype = serialize.deserialize_scalar_type(meta.dtype)
            size = serialize.deserialize_size(meta.sizes)
            if math.prod(size) == 0:
                tensor = torch.empty(size, dtype=dtype)
            else:
                flat = torch.frombuffer(memory[row.path_name], dtype=dtype)
                stride = serialize.deserialize_stride(meta.strides)
                tensor = flat.as_strided(size, stride, serialize.deserialize_storage_offset(meta.storage_offset))
            made[key] = nn.Parameter(tensor, requires_grad=meta.requires_grad) if row.is_param else tensor
        found[name] = made[key]
    return found


def _examples(
    archive: zipfile.ZipFile, entries: dict[str, str], path: str
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Example inputs, which torch writes as a pickle: read by torch's tensors-only reader, which runs no code."""
    entry = entries.get(names.SAMPLE_INPUTS_FILENAME_FORMAT.format(_MODEL))
    data = archive.read(entry) if entry else b""
    if not data:
        return None
    try:
        value = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path}: its example inputs are a pickle of more than tensors and plain values: refused, nothing was run"
        ) from error
    if not isinstance(value, tuple) or len(value) != 2:
        return None
    args, kwargs = value
    return tuple(args), dict(kwargs)
