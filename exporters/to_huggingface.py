"""Write a directory in the Hugging Face layout: natively where a config says SQA, else for sqa_fx.from_pretrained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqa_fx.checkpoint_layout import other_files
from sqa_fx.errors import InputError, SqaError, VerifyError, first_line
from sqa_fx.exporters.program_checks import precision_of
from sqa_fx.exporters.ranges import input_specs, output_specs
from sqa_fx.exporters.sidecar import Sidecar, sha256, versions
from sqa_fx.exporters.target_file import staging
from sqa_fx.inputs import Inputs, example_inputs
from sqa_fx.module import ConvertedModule
from sqa_fx.native import Native, find_native, stock_behind, whole_state
from sqa_fx.native_proof import NativeProof, input_sets, same_outputs, tokens_agree
from sqa_fx.operated import Operated, find_surgery, operated, with_tokens
from sqa_fx.partly import PartlyConvertedModule
from sqa_fx.plan import Plan
from sqa_fx.pretrained import from_pretrained as own_from_pretrained
from sqa_fx.pretrained import own_bytes
from sqa_fx.stock_model import Stock, auto_class, quiet
from sqa_fx.storage import META
from sqa_fx.surgery import SurgeryReport
from sqa_fx.surgery_layout import Order, arranged_plan
from sqa_fx.surgery_record import Surgery
from sqa_fx.whole_file import replace_directory

SIDECAR = "sqa_fx_export"
"""The sidecar lies in the directory, as ``sqa_fx_export.json``."""


@dataclass(frozen=True)
class _Job:
    """What is to be written."""

    stock: Stock
    reference: nn.Module
    plan: Plan
    state: dict[str, Tensor]
    example: Inputs
    sets: Sequence[tuple[str, Inputs]]
    max_shard_size: int | str | None
    surgery: Surgery | None


@dataclass(frozen=True)
class _Written:
    """How the directory loads, and why not natively; what was proved."""

    loads: str
    form: str
    why: str | None
    proof: Mapping[str, Any] | None
    notes: tuple[str, ...]
    fields: Mapping[str, Any] | None = None
    order: Order = "plan"


def export_huggingface(
    model: nn.Module,
    target: Path,
    *,
    original: nn.Module | None = None,
    surgery: SurgeryReport | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    native: bool = True,
    max_shard_size: int | str | None = None,
    progress: Callable[[str], None] = lambda _: None,
    overwrite: bool = False,
) -> Sidecar:
    """Write the converted ``model`` as a directory that transformers loads, and return its sidecar.

    ``original`` is the model that it was converted from (or one like it), where the conversion does not remember it.
    A model that ``convert_`` changed in place comes with the ``surgery`` that it returned.
    ``native=False`` skips the search for a config. ``max_shard_size`` is that of ``save_pretrained``.

    Raises InputError (what cannot be written, or is no transformers model) and VerifyError (nothing could be proved,
    and there is no graph of the whole model); nothing is written then.
    """
    place = check_directory(target, overwrite)
    if surgery is None and not isinstance(model, ConvertedModule | PartlyConvertedModule):
        raise InputError(
            f"{type(model).__name__} is not converted: convert it first, or write it with its own save_pretrained "
            "(after convert_, pass surgery=, what it returned)"
        )
    stock = stock_behind(model, original)
    job = _Job(
        stock,
        model,
        plan_of(model, surgery),
        whole_state(model, stock, original),
        example := _example(model, args, kwargs),
        input_sets(model, example),
        max_shard_size,
        None if surgery is None else surgery.surgery,
    )
    with staging(place) as directory:
        staged = directory / place.name
        written = _write(job, staged, native, progress)
        copied = _copy_beside(stock, staged)
        sidecar = _sidecar(job, written, copied, staged)
        _publish(staged, place, directory / "replaced")
    return sidecar


def plan_of(model: nn.Module, surgery: SurgeryReport | None) -> Plan:
    """What was done to the model, heads in fused parameters in the order in which they lie."""
    plan: Plan = model.plan if surgery is None else surgery.layout  # type: ignore[assignment]
    return plan


def check_directory(path: Path, overwrite: bool) -> Path:
    """``path`` made absolute, when a directory may be written there. Raises InputError."""
    place = path.absolute()
    if not place.parent.is_dir():
        raise InputError(f"cannot write {path}: {place.parent} is not a directory; create it first")
    if not place.exists():
        return place
    if not overwrite:
        raise InputError(f"{path} exists already; pass overwrite=True to replace it, or give another path")
    if not place.is_dir() or not (place / f"{SIDECAR}.json").is_file():
        raise InputError(f"{path} exists and was not written by this export: it is not overwritten")
    return place


def _example(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Inputs:
    if isinstance(model, ConvertedModule):
        return tuple(model.example_args), dict(model.example_kwargs)
    if args or kwargs:
        return tuple(args), dict(kwargs or {})
    found = example_inputs(model.eager if isinstance(model, PartlyConvertedModule) else model)
    if found is None:
        raise InputError("the model says nothing of its inputs: pass args= or kwargs= as you would call it")
    return found


def _write(job: _Job, staged: Path, native: bool, progress: Callable[[str], None]) -> _Written:
    why = "the search for a config was left out"
    if native:
        progress("searching a config")
        found = find_native(job.stock, job.reference, job.plan, job.state, job.sets)
        if isinstance(found, Native):
            try:
                return _write_native(job, found, staged)
            except VerifyError as error:
                why = f"with {', '.join(map(str, found.changes))} a model is right, but its directory is not: {error}"
                shutil.rmtree(staged, ignore_errors=True)
        else:
            why = found.why
    progress("searching surgery")
    surgery = job.surgery if job.surgery is not None else find_surgery(job.stock, job.plan, job.example)
    failed = surgery if isinstance(surgery, str) else _write_operated(job, surgery, why, staged)
    if isinstance(failed, _Written):
        return failed
    if not isinstance(job.reference, ConvertedModule):
        raise VerifyError(
            f"nothing was written: {why}; surgery on the stock class fails too ({failed}), and there is no graph of "
            "the whole model to save"
        )
    progress("saving the graph")
    job.reference.save(staged)
    why = f"{why}; surgery on the stock class fails too: {failed}"
    notes = ("sqa_fx.from_pretrained returns the converted graph, which is no transformers model",)
    return _Written("needs sqa_fx.from_pretrained", "graph", why, None, notes)


def _write_native(job: _Job, found: Native, staged: Path) -> _Written:
    """Save, load with the stock Auto class, and compare again. Raises VerifyError."""
    auto = auto_class(job.stock)
    _save(job, found.model, staged)
    try:
        with quiet():
            loaded, info = auto.from_pretrained(staged, dtype="auto", local_files_only=True, output_loading_info=True)
    except Exception as error:  # whatever transformers raises on a directory that it does not take
        raise VerifyError(f"{auto.__name__} cannot load it: {first_line(error)}") from error
    wrong = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ()), *info.get("unexpected_keys", ())]
    if wrong:
        raise VerifyError(f"{auto.__name__} finds other tensors: {', '.join(map(str, wrong[:5]))}")
    proof = _compared(job, found.model, loaded.eval(), found.proof)
    return _Written(f"natively, with {auto.__name__}", "native", None, proof.to_json(), (), found.fields, found.order)


def _write_operated(job: _Job, surgery: Surgery, why: str, staged: Path) -> _Written | str:
    """Save and load with our loader; what is wrong where that cannot be proved."""
    made = operated(job.stock, surgery, job.reference, job.plan, job.state, job.sets)
    if not isinstance(made, Operated):
        return made
    try:
        _save(job, made.model, staged)
        # The stock config, whatever surgery did to the model's own copy.
        config = job.stock.config()
        config.architectures = [job.stock.name]
        config.dtype = made.model.dtype
        config.save_pretrained(staged)
        layout = arranged_plan(job.plan, made.order).to_json()
        (staged / META).write_bytes(own_bytes(job.stock.name, why, surgery, layout, made.proof.to_json()))
        proof = _compared(job, made.model, own_from_pretrained(staged), made.proof)
    except SqaError as error:
        shutil.rmtree(staged, ignore_errors=True)
        return first_line(error)
    (staged / META).write_bytes(own_bytes(job.stock.name, why, surgery, layout, proof.to_json()))
    lines = tuple(surgery.lines())
    return _Written("needs sqa_fx.from_pretrained", "surgery", why, proof.to_json(), lines, order=made.order)


def _save(job: _Job, model: Any, staged: Path) -> None:
    size = {} if job.max_shard_size is None else {"max_shard_size": job.max_shard_size}
    with quiet():
        model.save_pretrained(staged, **size)


def _compared(job: _Job, made: nn.Module, loaded: nn.Module, proof: NativeProof) -> NativeProof:
    """The proof with what the loaded model generates. Raises VerifyError unless it has the bits of ``made``."""
    state = loaded.state_dict()
    other = [
        name
        for name, held in made.state_dict().items()
        if name not in state or state[name].dtype != held.dtype or not torch.equal(state[name].to(held.device), held)
    ]
    if other:
        raise VerifyError(f"what is loaded from it has another {', '.join(other[:5])}")
    same_outputs(made, loaded, job.example)
    return with_tokens(proof, tokens_agree(job.reference, loaded, job.example))


def _copy_beside(stock: Stock, staged: Path) -> tuple[str, ...]:
    """Copy the tokenizer's and other small files of the model's own folder, where the export has none of its own."""
    if stock.folder is None:
        return ()
    copied = []
    for name in other_files(stock.folder):
        if not (staged / name).exists() and not name.startswith("sqa_fx") and not name.endswith(".py"):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(stock.folder / name, staged / name)
            copied.append(name)
    return tuple(copied)


def _sidecar(job: _Job, written: _Written, copied: Sequence[str], staged: Path) -> Sidecar:
    notes = [f"loads {written.loads}" if written.form == "native" else written.loads]
    if written.why is not None:
        notes.append(f"not native: {written.why}")
    if written.fields:
        notes.append(f"config: {', '.join(f'{name}={value}' for name, value in written.fields.items())}")
    notes.extend(written.notes)
    if copied:
        notes.append(f"copied beside: {', '.join(copied)}")
    proof = dict(written.proof or {})
    verdict: dict[str, Any] = {"checked": bool(proof), "form": written.form, "fields": dict(written.fields or {})}
    verdict |= {**proof, "labels": proof["sizes"]} if proof else {"reason": "the graph was saved as it is"}
    program = job.reference.exported_program() if isinstance(job.reference, ConvertedModule) else None
    sidecar = Sidecar(
        format="huggingface",
        inputs=input_specs(program) if program is not None else (),
        outputs=output_specs(program) if program is not None else (),
        precision=precision_of(program) if program is not None else None,
        plan=arranged_plan(job.plan, written.order).to_json(),
        versions=versions("transformers", "safetensors"),
        files={
            path.relative_to(staged).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in sorted(p for p in staged.rglob("*") if p.is_file())
        },
        notes=tuple(notes),
        validation=json.loads(json.dumps(verdict)),
    )
    return sidecar.write(staged / SIDECAR)


def _publish(staged: Path, place: Path, aside: Path) -> None:
    """Give the directory its name; what was there goes, or comes back when that fails. Raises InputError."""
    try:
        replace_directory(staged, place, aside)
    except OSError as error:
        raise InputError(f"cannot write {place}: {error}; give another path") from error
