"""Where healing runs: one device in plain PyTorch, or many through Hugging Face Accelerate (DDP, FSDP2)."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sqa_fx.errors import InputError, MissingError


class OneDevice:
    """One process with one device."""

    rank: int = 0
    world: int = 1
    shards: bool = False
    device: torch.device

    def __init__(self, device: str) -> None:
        if device == "auto":
            found = torch.accelerator.current_accelerator(check_available=True)
            self.device = torch.device("cpu") if found is None else found
        else:
            try:
                self.device = torch.device(device)
                torch.empty(1, device=self.device)
            except (RuntimeError, AssertionError) as error:
                raise MissingError(f"there is no device {device!r} here: {str(error).splitlines()[0]}") from error
        if str(self.device) == "cuda":  # the name without a number is not that of any tensor
            self.device = torch.device("cuda", torch.cuda.current_device())

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, torch.optim.Optimizer]:
        """The model to call and the optimiser to step."""
        return model, optimizer

    def bare(self, model: Any) -> Any:
        """The model without what `prepare` put around it."""
        return model

    def part(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the forward and backward pass of one part of a step's batch."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        loss.backward()

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over processes."""
        return numbers

    def wait(self) -> None:
        """Until all processes are here."""

    def from_first(self, tensor: Tensor | None, like: Tensor) -> Tensor:
        """What the first process has, on the CPU."""
        assert tensor is not None
        return tensor


class ManyDevices(OneDevice):
    """The processes that ``accelerate launch`` (or torchrun) started, one device each."""

    def __init__(self, device: str) -> None:
        try:
            import accelerate
        except ImportError as error:
            raise MissingError(
                "healing in several processes needs Hugging Face Accelerate: pip install 'sqa-fx[heal]'"
            ) from error
        self._accelerator = accelerate.Accelerator(
            cpu=device == "cpu" or None,
            mixed_precision="no",  # autocast is the same here as on one device
            kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        plugin = getattr(self._accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            if plugin.fsdp_version != 2:
                raise InputError("healing takes FSDP2: add --fsdp_version 2 to accelerate launch")
            # A converted graph is flat, so that it is one unit; every process has its weights already.
            plugin.auto_wrap_policy, plugin.cpu_ram_efficient_loading = None, False
            plugin.set_auto_wrap_policy = lambda model: None
            self.shards = True
        elif _wants_fsdp():
            raise InputError("Accelerate shards (FSDP) on GPUs only: leave it out, CPU processes work as DDP")
        elif str(self._accelerator.distributed_type).rpartition(".")[2] in ("DEEPSPEED", "MEGATRON_LM"):
            raise InputError("healing takes DDP or FSDP2 of Accelerate, nothing else")

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, torch.optim.Optimizer]:
        """The model to call and the optimiser to step."""
        prepared, stepped = self._accelerator.prepare(model, optimizer)
        return prepared, stepped.optimizer

    def bare(self, model: Any) -> Any:
        """The model without what `prepare` put around it."""
        return self._accelerator.unwrap_model(model)

    def part(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the forward and backward pass of one part of a step's batch."""
        return contextlib.nullcontext() if last else self._accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        self._accelerator.backward(loss)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over processes."""
        found: Tensor = self._accelerator.reduce(numbers, reduction="sum")
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        self._accelerator.wait_for_everyone()

    def from_first(self, tensor: Tensor | None, like: Tensor) -> Tensor:
        """What the first process has, on the CPU."""
        if self.world == 1:
            return super().from_first(tensor, like)
        held = torch.empty(like.shape, dtype=like.dtype) if tensor is None else tensor
        held = held.to(self.device)
        dist.broadcast(held, src=0)
        return held.cpu()


def devices_for(device: str, accelerate: bool | None) -> OneDevice:
    """Accelerate where it is asked for or where there are several processes; else one device.

    Raises MissingError for a device or a library that is not there, InputError where several processes are not to use
    Accelerate, or use a form of it that is not supported.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerate is False and processes > 1:
        raise InputError(f"accelerate=False, but there are {processes} processes: they must work together")
    many = accelerate or processes > 1 or _wants_fsdp()
    return ManyDevices(device) if many else OneDevice(device)


def _wants_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def write_into(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
