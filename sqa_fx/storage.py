"""A directory that holds an exported program: tensors as safetensors, the graph as JSON, and what else belongs to it.

``model.safetensors``
    All parameters and buffers by name, other constants as ``constant/NAME``, example inputs as ``example/INDEX``.
    Tensors that share memory are stored once; the file's metadata (key ``sqa_fx``) says how each is a view of what.
``program.json``
    The graph in torch.export's own JSON schema, without the guards (they are Python code).
``sqa_fx.json``
    Format name and version, versions of sqa_fx and torch, SHA-256 of the other files, the example inputs that are
    not tensors, and ``extra`` (the plan, the report). Its own key ``sha256`` is that of the rest of it.
Others, such as ``plan.safetensors``
    What was given as ``beside``.

Nothing is pickled and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._export.serde.serialize import SerializeError
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from sqa_fx.errors import InputError
from sqa_fx.program_json import check_program_json, check_targets
from sqa_fx.version import __version__
from sqa_fx.whole_file import replace_directory

FORMAT = "sqa-fx-program"
FORMAT_VERSION = 1
WEIGHTS, PROGRAM, META = "model.safetensors", "program.json", "sqa_fx.json"
_CONSTANT, _EXAMPLE, _STORAGE = "constant/", "example/", "storage/"


def is_saved_program(directory: str | os.PathLike[str]) -> bool:
    """Whether ``directory`` claims to be one that `save_program` wrote."""
    return (Path(directory) / META).is_file()


def save_program(
    ep: torch.export.ExportedProgram,
    directory: str | os.PathLike[str],
    extra: Mapping[str, Any],
    *,
    beside: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``ep``, the JSON-able ``extra`` and the files ``beside`` it to ``directory``, wholly or not at all.

    Raises:
        InputError: ``directory`` exists and ``overwrite`` is not set (or it holds something else than a saved program),
            it cannot be written, or the program holds something that has no place in safetensors or JSON.
    """
    target = Path(directory)
    _refuse_existing(target, overwrite)
    tensors, layout = _tensor_entries(ep)
    program = _program_json(ep)
    leaves = _example_leaves(ep)
    try:
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "sqa_fx": __version__,
            "torch": torch.__version__,
            "examples": leaves,
            "extra": json.loads(json.dumps(dict(extra), allow_nan=False)),
        }
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot save to {target}: what goes beside the program must be JSON ({error})") from error
    with _whole_directory(target) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", "sqa_fx": json.dumps(layout)})
        (folder / PROGRAM).write_bytes(program)
        for name, content in (beside or {}).items():
            (folder / name).write_bytes(content)
        body["files"] = {name: _digest(folder / name) for name in (WEIGHTS, PROGRAM, *(beside or {}))}
        (folder / META).write_text(json.dumps({"sha256": _body_digest(body), **body}, indent=1), encoding="utf-8")


def load_program(directory: str | os.PathLike[str]) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """Read what `save_program` wrote: the program with its tensors on the CPU (tied ones tied), and ``extra``.

    Raises:
        InputError: the directory is not there or is not a saved program; a file is missing, truncated or altered; or
            the program was written by an incompatible version.
        MissingError: the program takes or returns a type of a library that is not installed.
    """
    folder = Path(directory)
    body = _read_meta(folder)
    tensors, layout = _read_weights(folder / WEIGHTS)
    program = _read_json(folder / PROGRAM)
    check_program_json(program, str(folder / PROGRAM))
    try:
        state, constants, examples = _rebuild_tensors(tensors, layout)
        ep = deserialize_program(program, state, constants, _rebuild_examples(program, body["examples"], examples))
    except SerializeError as error:
        raise InputError(
            f"{folder / PROGRAM}: written by torch {body.get('torch')}, not readable by {torch.__version__}: {error}"
        ) from error
    except Exception as error:  # files that do not fit each other fail in as many ways as torch has checks
        raise InputError(
            f"{folder}: the files do not fit each other: {type(error).__name__}: {error}. Save the model again"
        ) from error
    check_targets(ep, str(folder / PROGRAM))
    return ep, body["extra"]


def dynamic_shapes_of(ep: torch.export.ExportedProgram, names: Sequence[str]) -> dict[str, Any]:
    """What to pass as ``dynamic_shapes`` to export ``ep`` again with the same free dimensions.

    ``names`` are the parameters of the call (`inspect.signature(ep.module().forward)`), those of the positional first.
    """
    nodes = {node.name: node for node in ep.graph.nodes if node.op == "placeholder"}
    leaves: list[dict[int, Any] | None] = []
    for spec in ep.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            value = nodes[spec.arg.name].meta.get("val")
            free = (
                [d for d, n in enumerate(value.shape) if not isinstance(n, int)] if isinstance(value, Tensor) else None
            )
            leaves.append(None if free is None else dict.fromkeys(free, torch.export.Dim.AUTO))
    args, kwargs = pytree.tree_unflatten(leaves, ep.call_spec.in_spec)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def deserialize_program(
    program: dict[str, Any],
    state: dict[str, Tensor],
    constants: dict[str, Tensor],
    examples: tuple[tuple[Any, ...], dict[str, Any]] | None,
) -> torch.export.ExportedProgram:
    """Build an exported program from torch.export's JSON (checked by `check_program_json`) and tensors in memory."""
    from torch._export.serde import schema, serialize

    parsed = serialize._dict_to_dataclass(schema.ExportedProgram, program)
    # Without a version the deserializer only meets operators of this torch; examples are a tuple or empty bytes.
    return serialize.ExportedProgramDeserializer().deserialize(parsed, state, constants, examples or b"")


# --- writing ---


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        if not target.absolute().parent.is_dir():
            raise InputError(f"cannot write {target}: the folder {target.absolute().parent} does not exist")
        return
    if not overwrite:
        raise InputError(f"{target} exists; choose another path or ask for overwriting it")
    if not target.is_dir() or (any(target.iterdir()) and not is_saved_program(target)):
        raise InputError(f"{target} exists and is not a program saved by sqa-fx: it is not overwritten")


@contextlib.contextmanager
def _whole_directory(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes ``target`` when the block ends well, and vanishes otherwise."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        old = folder.with_name(folder.name + ".old")
        replace_directory(folder, target, old)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _program_json(ep: torch.export.ExportedProgram) -> bytes:
    from torch._export.serde import serialize

    try:
        # Older releases write the tensors too (as pickles, in memory); only the graph is taken from the result.
        write: Any = serialize.ExportedProgramSerializer().serialize
        parts = ("serialize_state_dict", "serialize_constants", "serialize_example_inputs")
        program = write(ep, **{part: False for part in parts if part in inspect.signature(write).parameters})
        parsed = dataclasses.replace(program.exported_program, guards_code=[])
        data: bytes = serialize._to_json_bytes(parsed)
    except (SerializeError, NotImplementedError, TypeError, AssertionError) as error:
        raise InputError(f"torch cannot write this program as JSON: {type(error).__name__}: {error}") from error
    # What cannot be loaded again must not be saved.
    check_program_json(json.loads(data), "this program")
    return data


def _example_leaves(ep: torch.export.ExportedProgram) -> list[Any] | None:
    """The example inputs' leaves, plain values or ``{"tensor": INDEX}``; None without examples or with other values."""
    if ep.example_inputs is None:
        return None
    leaves = pytree.tree_leaves(ep.example_inputs)
    if not all(isinstance(leaf, Tensor | int | float | str | bool | None) for leaf in leaves):
        return None
    return [{"tensor": i} if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)]


def _named_tensors(ep: torch.export.ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    yield from ep.state_dict.items()
    for name, value in ep.constants.items():
        if not isinstance(value, Tensor):
            raise InputError(f"the program holds {name} of type {type(value).__name__}: only tensors can be saved")
        yield _CONSTANT + name, value
    if _example_leaves(ep) is not None:
        for i, leaf in enumerate(pytree.tree_leaves(ep.example_inputs)):
            if isinstance(leaf, Tensor):
                yield f"{_EXAMPLE}{i}", leaf


def _tensor_entries(ep: torch.export.ExportedProgram) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors for safetensors, and for each name how it is made of them: entry, strides, whether a parameter."""
    groups: dict[tuple[int, torch.dtype], dict[str, Tensor]] = {}
    for name, tensor in _named_tensors(ep):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout is not torch.strided:
            raise InputError(
                f"{name} is a {type(tensor).__name__} on {tensor.device}: only plain dense tensors can be saved"
            )
        storage = tensor.untyped_storage().data_ptr()
        # Empty tensors share the null address without sharing memory.
        groups.setdefault((storage if tensor.numel() else id(tensor), tensor.dtype), {})[name] = tensor.detach()
    entries: dict[str, Tensor] = {}
    layout: dict[str, dict[str, Any]] = {}
    parameters = {name: value for name, value in ep.state_dict.items() if isinstance(value, nn.Parameter)}
    for number, group in enumerate(groups.values()):
        views = {(t.storage_offset(), tuple(t.shape), t.stride()) for t in group.values()}
        first = next(iter(group.values()))
        if len(views) == 1 and first.is_contiguous():
            base, flat, start = next(iter(group)), first.cpu(), first.storage_offset()
        else:
            # Overlapping or permuted views: the memory they span is stored flat, so that strides survive as well.
            spans = [(t.storage_offset(), t.storage_offset() + _span(t)) for t in group.values()]
            start, end = min(a for a, _ in spans), max(b for _, b in spans)
            base, flat = f"{_STORAGE}{number}", first.as_strided((end - start,), (1,), start).cpu()
        entries[base] = flat
        for name, tensor in group.items():
            row: dict[str, Any] = {"of": base}
            if base.startswith(_STORAGE):
                row |= {
                    "size": [*tensor.shape],
                    "stride": [*tensor.stride()],
                    "offset": tensor.storage_offset() - start,
                }
            if name in parameters:
                row["parameter"] = parameters[name].requires_grad
            layout[name] = row
    return entries, {name: layout[name] for name, _ in _named_tensors(ep)}  # state keeps its order


def _span(tensor: Tensor) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


# --- reading ---


def _read_meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not is_saved_program(folder):
        raise InputError(f"{folder} is not a model saved by sqa-fx: it has no {META}")
    body = _read_json(folder / META)
    if body.get("format") != FORMAT:
        raise InputError(f"{folder / META}: the format is {body.get('format')!r}, not {FORMAT!r}")
    if body.get("version") != FORMAT_VERSION:
        raise InputError(
            f"{folder / META}: format version {body.get('version')!r}, this sqa-fx reads {FORMAT_VERSION}; "
            "use the sqa-fx that wrote it, or save the model again"
        )
    found = body.pop("sha256", None)
    if found != _body_digest(body):
        raise InputError(f"{folder / META}: SHA-256 mismatch: it was altered after it was written")
    for name in dict.fromkeys((WEIGHTS, PROGRAM, *body["files"])):
        path = folder / Path(name).name
        if not path.is_file():
            raise InputError(f"{path} is missing: the model was saved with it")
        if _digest(path) != body["files"][name]:
            raise InputError(f"{path}: SHA-256 mismatch: it is truncated, or was altered after it was written")
    return body


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: it is truncated or something else ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            layout = json.loads((file.metadata() or {})["sqa_fx"])
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return tensors, layout


def _rebuild_tensors(
    tensors: dict[str, Tensor], layout: dict[str, dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[int, Tensor]]:
    state: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    examples: dict[int, Tensor] = {}
    made: dict[str, Tensor] = {}  # names with the same row are one tensor
    for name, row in layout.items():
        key = json.dumps(row, sort_keys=True)
        if key not in made:
            tensor = tensors[row["of"]]
            if "size" in row:
                if row["offset"] < 0 or min(row["stride"], default=0) < 0:
                    raise ValueError(f"{name}: a view outside of its memory")
                tensor = tensor.as_strided(row["size"], row["stride"], row["offset"])
            made[key] = nn.Parameter(tensor, requires_grad=row["parameter"]) if "parameter" in row else tensor
        if name.startswith(_CONSTANT):
            constants[name.removeprefix(_CONSTANT)] = made[key]
        elif name.startswith(_EXAMPLE):
            examples[int(name.removeprefix(_EXAMPLE))] = made[key]
        else:
            state[name] = made[key]
    return state, constants, examples


def _rebuild_examples(
    program: dict[str, Any], leaves: list[Any] | None, tensors: dict[int, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if leaves is None:
        return None
    calls = program["graph_module"]["module_call_graph"]
    spec = pytree.treespec_loads(next(call["signature"]["in_spec"] for call in calls if call["fqn"] == ""))
    values = [tensors[leaf["tensor"]] if isinstance(leaf, dict) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(values, spec)
    return tuple(args), kwargs


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _body_digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
