"""Healing: a converted model learns again, from its original, what the dropped heads knew."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sqa_fx.errors import HealError, InputError, SqaError, first_line
from sqa_fx.heal_data import Data
from sqa_fx.heal_devices import OneDevice, devices_for
from sqa_fx.heal_loop import Healing
from sqa_fx.heal_options import HealOptions
from sqa_fx.heal_random import random_kept
from sqa_fx.heal_report import HealReport
from sqa_fx.heal_sites import output_weights, teacher_with_sites
from sqa_fx.heal_trained import Trained
from sqa_fx.module import ConvertedModule
from sqa_fx.moved import copied_to


def heal(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    *,
    held_out: Data | None = None,
    options: HealOptions | None = None,
    **changes: Any,
) -> HealReport:
    """Distil ``teacher`` into ``student``, which it was converted from; the student is changed in place.

    ``data`` gives batches: a tensor (the one input), a tuple (positional inputs) or a mapping (keyword inputs); it is
    iterated again for every epoch, or called for new batches when it is a function. A DataLoader that shuffles is
    seeded by (seed, epoch). Positions ``[batch, sequence]`` that an ``attention_mask`` in the batch leaves out do not
    count; labels are passed on to models that take them. ``held_out`` is of the same form; with it, the weights of the
    step with the lowest held-out loss are given back, those before training included.

    Options are those of `HealOptions`, as an object or by name: ``heal(student, teacher, data, steps=500, lr=2e-4)``.
    With ``checkpoints=DIR``, a run that was killed goes on from the last one when it is called again, and on a CPU
    ends with the same bits (on a GPU with ``deterministic=True``). Started by ``accelerate launch`` or torchrun, every
    process must call this with the same data; each takes its share of every batch's rows.

    Training works on a copy: until it ends well the student has its original weights. It trains in the mode that the
    student is in (dropout needs a student that was converted in training mode). The teacher runs in eval mode without
    gradients; its weights are not changed, and its mode and device are put back. Random number generators are put
    back, too.

    Raises:
        InputError: options, data or models that do not fit, or a checkpoint of another run.
        MissingError: no such device, or a library is missing.
        HealError: the loss is not finite, or a model fails underway.
    """
    chosen = (options or HealOptions()).changed(changes)
    if not isinstance(student, nn.Module) or not isinstance(teacher, nn.Module) or student is teacher:
        raise InputError(
            f"heal takes the converted module and the original, two modules; got a {type(student).__name__} and "
            + ("the same again" if student is teacher else f"a {type(teacher).__name__}")
        )
    if hasattr(held_out, "__next__"):
        raise InputError("held_out is an iterator, to be read only once: give a list, a DataLoader or a function")
    devices = devices_for(chosen.device, chosen.accelerate)
    run: Healing | None = None
    with random_kept(devices.device):
        try:
            with _frozen(teacher, devices.device):
                run = _prepared(student, teacher, data, held_out, chosen, devices)
                report, learned = run.run()
        except SqaError:
            raise
        except Exception as error:
            at = "before the first step" if run is None else f"after step {run.step}"
            kept = "" if chosen.checkpoints is None else f", and what it wrote to {chosen.checkpoints} stays"
            raise HealError(
                f"healing failed {at}: {type(error).__name__}: {first_line(error)}; the student is as it was{kept}"
            ) from error
    _write_back(student, run.trained, learned)
    return report


def _prepared(
    student: nn.Module, teacher: nn.Module, data: Data, held_out: Data | None, options: HealOptions, devices: OneDevice
) -> Healing:
    identity = {
        "student": _fingerprint(student),
        "teacher": _fingerprint(teacher),
        "data": getattr(data, "fingerprint", None),
    }
    weights = output_weights(student) if options.site_warmup else None
    sites = None
    if weights is not None:
        assert isinstance(student, ConvertedModule)
        sites = teacher_with_sites(teacher, student), weights
    base = copied_to(student, devices.device, move=not devices.shards)
    trained = Trained(base, options.train, options.rank, options.seed, weights)
    return Healing(trained, teacher, data, held_out, options, devices, identity, sites)


@contextlib.contextmanager
def _frozen(teacher: nn.Module, device: torch.device) -> Iterator[None]:
    """The teacher in eval mode on ``device``, and as it was afterwards. One that is spread over devices stays there."""
    modes = [(part, part.training) for part in teacher.modules()]
    places = {t.device for t in (*teacher.parameters(), *teacher.buffers())}
    (place,) = places if len(places) == 1 else (device,)
    for part, _ in modes:
        part.training = False
    try:
        if place != device:
            teacher.to(device)
        yield
    finally:
        if place != device:
            teacher.to(place)
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def _write_back(student: nn.Module, trained: Trained, learned: Mapping[str, Tensor]) -> None:
    held = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    for name, value in trained.as_student(learned, held).items():
        held[name].copy_(value)


@torch.no_grad()
def _fingerprint(module: nn.Module) -> str:
    """A digest of all names, shapes and dtypes, and of some numbers of each parameter."""
    found = hashlib.sha256()
    for name, tensor in module.named_parameters():
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 64)].double().cpu()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:16]
