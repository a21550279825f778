"""The training loop of healing."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sqa_fx.errors import HealError, InputError
from sqa_fx.heal_checkpoint import (
    Checkpoints,
    optimizer_tensors,
    require_checkpoint,
    require_same_options,
    restore_optimizer,
)
from sqa_fx.heal_data import Batches, Data, batches_of, share_of
from sqa_fx.heal_devices import OneDevice, whole, write_into
from sqa_fx.heal_log import HealLog
from sqa_fx.heal_loss import Measured, measure, sites_distance
from sqa_fx.heal_options import HealOptions
from sqa_fx.heal_random import mixed, random_kept, seed_all
from sqa_fx.heal_report import HealReport
from sqa_fx.heal_sites import check_same_sites, with_sites
from sqa_fx.heal_trained import Trained
from sqa_fx.model_calls import inputs_for, on_device, token_count
from sqa_fx.module import ConvertedModule


class Healing:
    """One run. ``trained`` and ``teacher`` are on the device of ``devices`` already.

    ``sites`` is the teacher with the outputs of ``weights``, for a warm-up on sites. ``identity`` is data that a
    checkpoint must have in common with this run.
    """

    def __init__(
        self,
        trained: Trained,
        teacher: nn.Module,
        data: Data,
        held_out: Data | None,
        options: HealOptions,
        devices: OneDevice,
        identity: dict[str, Any],
        sites: tuple[ConvertedModule, list[str]] | None,
    ) -> None:
        self.options, self.devices, self.teacher, self.held_out = options, devices, teacher, held_out
        self.identity = {**options.that_matter(), **identity, "processes": devices.world}
        self.batches = Batches(data, options.seed)
        self._student = trained.base  # to bind inputs by
        self._teacher_sites = None if sites is None else (sites[0], with_sites(*sites))
        with _deterministic(options.deterministic):
            self.model, self.optimizer = devices.prepare(trained, _adamw(trained, options))
        self.trained: Trained = devices.bare(self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: learning_rate(step, options))
        self.names: dict[Tensor, str] = {p: n for n, p in self.trained.named_parameters() if p.requires_grad}
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.best: tuple[int, float] | None = None
        self.best_learned: dict[str, Tensor] | None = None
        self.waited = 0
        self.stopped_early = False
        self.resumed_from: int | None = None

    # --- the run -------------------------------------------------------------------------------------------------

    def run(self) -> tuple[HealReport, dict[str, Tensor]]:
        """Train; returns the report and the student's new parameters and buffers, on the CPU."""
        options, device = self.options, self.devices.device
        seed_all(mixed("training", options.seed, self.devices.rank), device)
        saved = (
            Checkpoints(options.checkpoints, options.keep, self.devices) if options.checkpoints is not None else None
        )
        if saved is not None:
            self._resume(saved)
        first = self.devices.rank == 0
        log = HealLog(
            options.steps,
            log=options.log if first else None,
            tensorboard=options.tensorboard if first else None,
            progress=options.progress and first,
            step=self.resumed_from,
        )
        with contextlib.closing(log), _deterministic(options.deterministic):
            if self.held_out is not None and self.step == 0 and not self.history:
                self._evaluate({"step": 0}, log)
            while self.step < options.steps and not self.stopped_early:
                self._one_step(log)
                last = self.step == options.steps or self.stopped_early
                if saved is not None and (last or self.step % options.checkpoint_every == 0):
                    self._save(saved)
        report = HealReport(
            history=tuple(self.history),
            steps=self.step,
            best_step=None if self.best is None else self.best[0],
            stopped_early=self.stopped_early,
            resumed_from=self.resumed_from,
            trained_parameters=sum(p.numel() for p in self.names),
            processes=self.devices.world,
        )
        return report, self._result()

    def _one_step(self, log: HealLog) -> None:
        options, devices = self.options, self.devices
        began = time.perf_counter()
        on_sites = self.step < options.site_warmup
        totals = torch.zeros(3, device=devices.device)
        for part in range(options.accumulate):
            batch = self._own_share(self.batches.take())
            with devices.part(self.model, part == options.accumulate - 1):
                found = self._measure_sites(batch) if on_sites else self._measure(self.model, batch)
                devices.backward(found.total)
            totals += torch.stack(
                [found.total.detach().float(), found.weight, found.weight.new_tensor(token_count(batch))]
            )
        loss_sum, weight, tokens = devices.total(totals).tolist()
        self.step += 1
        if not weight:
            raise InputError(f"step {self.step}: no position of its batches counts by their attention masks")
        if not math.isfinite(loss_sum):
            raise HealError(f"the loss is {loss_sum} at step {self.step}: lower lr ({options.lr:g}), or raise warmup")
        # Each process added up a sum; DDP and FSDP average over processes.
        norm = _scale_and_clip(self.names, devices.world / weight, options.max_grad_norm)
        if not math.isfinite(norm):
            raise HealError(f"the gradients are not finite at step {self.step}: lower lr ({options.lr:g})")
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        evaluates = self.held_out is not None and (
            self.step % options.evaluate_every == 0 or self.step == options.steps
        )
        log.advance(loss_sum / weight)
        if not evaluates and self.step % options.log_every and self.step != options.steps:
            return
        entry: dict[str, Any] = {
            "step": self.step,
            "phase": "sites" if on_sites else "outputs",
            "loss": loss_sum / weight,
            "lr": rate,
            "grad_norm": norm,
            "tokens_per_s": tokens / (time.perf_counter() - began),
        }
        if evaluates:
            self._evaluate(entry, log)
        else:
            self._note(entry, log)

    def _note(self, entry: dict[str, Any], log: HealLog) -> None:
        self.history.append(entry)
        log.write(entry)

    # --- losses --------------------------------------------------------------------------------------------------

    def _measure(self, model: Any, batch: Any) -> Measured:
        with self._autocast():
            with torch.no_grad():
                args, kwargs = inputs_for(self.teacher, batch)
                wanted = self.teacher(*args, **kwargs)
            outputs = model(*inputs_for(self._student, batch))
        return measure(self.options.loss, outputs, wanted, batch)

    def _measure_sites(self, batch: Any) -> Measured:
        assert self._teacher_sites is not None
        twin, wide = self._teacher_sites
        with self._autocast():
            with torch.no_grad():
                floating = next((p.dtype for p in twin.parameters() if p.is_floating_point()), None)
                args, kwargs = twin._binder.bind(*inputs_for(twin, batch), floating)
                wanted = wide(*args, **kwargs)["sites"]
            own = self.model(*inputs_for(self._student, batch), sites=True)["sites"]
        check_same_sites(own, wanted)
        return sites_distance(own, wanted, batch)

    def _autocast(self) -> Any:
        return torch.autocast(self.devices.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def _own_share(self, batch: Any) -> Any:
        part = share_of(batch, self.devices.rank, self.devices.world)
        if part is None:
            raise InputError(
                f"a batch cannot be split evenly among {self.devices.world} processes: give batches of a multiple of "
                f"{self.devices.world} rows, and drop a smaller last one (drop_last=True)"
            )
        return on_device(part, self.devices.device)

    # --- held-out data -------------------------------------------------------------------------------------------

    def _evaluate(self, entry: dict[str, Any], log: HealLog) -> None:
        """Note the held-out loss in ``entry``, and what follows from it."""
        loss, agreement = self._held_out_loss()
        entry["held_out_loss"] = loss
        if agreement is not None:
            entry["held_out_agreement"] = agreement
        self._note(entry, log)
        if not math.isfinite(loss):
            raise HealError(f"the held-out loss is {loss} after step {self.step}")
        if self.best is None or loss < self.best[1]:
            self.best, self.waited = (self.step, loss), 0
            self.best_learned = self._snapshot()
        elif self.step > self.options.site_warmup:
            self.waited += 1
            self.stopped_early = self.options.patience is not None and self.waited >= self.options.patience

    def _held_out_loss(self) -> tuple[float, float | None]:
        """(mean loss, share of equal most likely classes or None) over the held-out data."""
        assert self.held_out is not None
        model = self.model if self.devices.shards else self.trained
        training = self._student.training
        loss_sum = weight_sum = agreed_sum = 0.0
        classes = True
        with random_kept(self.devices.device), torch.no_grad():
            seed_all(mixed("held out", self.options.seed))
            if training:
                self._student.eval()
            try:
                for batch in batches_of(self.held_out):
                    part = share_of(batch, self.devices.rank, self.devices.world)
                    # A batch that does not divide is run whole by every process, and counts for its share in each.
                    times = 1.0 if part is not None else 1.0 / self.devices.world
                    found = self._measure(model, on_device(batch if part is None else part, self.devices.device))
                    loss_sum += times * float(found.total)
                    weight_sum += times * float(found.weight)
                    classes = classes and found.agreed is not None
                    agreed_sum += times * float(found.agreed) if found.agreed is not None else 0.0
            finally:
                if training:
                    self._student.train()
        sums = torch.tensor([loss_sum, weight_sum, agreed_sum], dtype=torch.float64).to(self.devices.device)
        loss_sum, weight_sum, agreed_sum = self.devices.total(sums).tolist()
        if not weight_sum:
            raise InputError("the held-out data holds nothing that counts: give batches that can be iterated again")
        return loss_sum / weight_sum, agreed_sum / weight_sum if classes else None

    def _snapshot(self) -> dict[str, Tensor] | None:
        """What is learned so far, on the CPU of the first process; every process must call this."""
        found = {}
        for name, tensor in self.trained.learned().items():
            held = whole(tensor.detach())
            if self.devices.rank == 0:
                found[name] = held.to("cpu", copy=True)
        return found if self.devices.rank == 0 else None

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self, saved: Checkpoints) -> None:
        state = {
            "options": self.identity,
            "epoch": self.batches.epoch,
            "position": self.batches.position,
            "best": self.best,
            "waited": self.waited,
            "stopped_early": self.stopped_early,
            "history": self.history,
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
            "rates": [group["lr"] for group in self.optimizer.param_groups],
        }
        best = self.best_learned if self.best is not None and self.best[0] != self.step else None
        saved.save(self.step, state, self.trained.learned(), optimizer_tensors(self.optimizer, self.names), best)

    def _resume(self, saved: Checkpoints) -> None:
        held = saved.load() if self.options.resume != "never" or not saved.found() else None
        if self.options.resume == "never" and saved.found():
            raise InputError(f"{saved.folder} holds checkpoints of another run: give another folder, or delete them")
        if held is None:
            if self.options.resume == "must":
                raise require_checkpoint(saved.folder)
            return
        require_same_options(held.folder, held.state["options"], self.identity)
        own = self.trained.learned()
        for name, tensor in own.items():
            write_into(tensor, held.learned[name])
        restore_optimizer(self.optimizer, self.names, held.optimizer)
        self.scheduler.load_state_dict(dict(held.state["scheduler"], lr_lambdas=[None] * len(held.state["rates"])))
        for group, rate in zip(self.optimizer.param_groups, held.state["rates"], strict=True):
            group["lr"] = rate
        self.step = self.resumed_from = int(held.state["step"])
        self.history = held.state["history"]
        self.waited, self.stopped_early = held.state["waited"], held.state["stopped_early"]
        if held.state["best"] is not None:
            self.best = tuple(held.state["best"])
            self.best_learned = (held.best or held.learned) if self.devices.rank == 0 else None
        if self.step < self.options.steps and not self.stopped_early:
            self.batches.seek(held.state["epoch"], held.state["position"])
        held.random.use(self.devices.device)

    def _result(self) -> dict[str, Tensor]:
        if self.best is None:
            learned = {name: whole(tensor.detach()).cpu() for name, tensor in self.trained.learned().items()}
        else:
            held = self.best_learned or {}
            learned = {n: self.devices.from_first(held.get(n), t) for n, t in self.trained.learned().items()}
        return learned


def learning_rate(step: int, options: HealOptions) -> float:
    """The share of ``lr`` that step number ``step`` (from 0) uses: a rise over ``warmup``, then half a cosine."""
    if step < options.warmup:
        return (step + 1) / (options.warmup + 1)
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.final_lr + (1 - options.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _adamw(trained: Trained, options: HealOptions) -> torch.optim.AdamW:
    parameters = [p for p in trained.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=options.lr,
    )


def _scale_and_clip(parameters: dict[Tensor, str], factor: float, largest: float) -> float:
    """Multiply all gradients, then clip them; the norm before clipping."""
    held = [p for p in parameters if p.grad is not None]
    for parameter in held:
        assert parameter.grad is not None
        parameter.grad.mul_(factor)
    return float(whole(torch.nn.utils.clip_grad_norm_(held, largest)))


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
