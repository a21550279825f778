"""One of two processes that train a converted model together, in several ways one after the other; run by
test_distributed.py.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_models import FusedAttention, Stack, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sqa_fx

STEPS, BATCH = 3, 4
OPTIONS: dict[str, Any] = {"hq": 4, "hkv": 2, "inner": "aot_eager", "on_refused": "raise"}


def model() -> nn.Module:
    """The same model in every process."""
    torch.manual_seed(3)
    return Stack([FusedAttention(48, 8)], 48)


@functools.cache
def _converted_once() -> sqa_fx.ConvertedModule:
    result = sqa_fx.convert(model(), hq=4, hkv=2, args=(tokens(BATCH, 7),))
    assert isinstance(result, sqa_fx.ConvertedModule)
    return result


def converted() -> sqa_fx.ConvertedModule:
    """The same converted model in every process."""
    return copy.deepcopy(_converted_once())


def train(module: Callable[..., Any], parameters: list[nn.Parameter], ids: Tensor, autocast: bool = False) -> None:
    """Some steps on one batch."""
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = module(ids)
        output.float().square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """A parameter with all of its shards."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _train_in(way: str, rank: int, folder: Path) -> None:
    """Train in ``way`` on this process's half of the batch; the first process writes the weights."""
    ids = tokens(BATCH, 7)[rank * 2 : rank * 2 + 2]
    own: nn.Module = model() if way == "backend ddp" else converted()
    if "checkpoint" in way:
        own.checkpoint_activations()  # type: ignore[operator]
    module: Any = own
    if "fsdp" in way:
        fully_shard(own, mesh=init_device_mesh("cpu", (2,)))
        assert all(isinstance(p, DTensor) for p in own.parameters())
    else:
        module = DistributedDataParallel(own)
    if way == "backend ddp":
        module = torch.compile(module, backend="sqa_fx", options=OPTIONS)
    train(module, list(own.parameters()), ids, "autocast" in way)
    state = {name: whole(p) for name, p in own.named_parameters()}
    if rank == 0:
        torch.save(state, folder / f"{way}.pt")
        if way == "backend ddp":
            sqa_fx.last_plan(own).save(folder / "plan.json")
    dist.barrier()


def main(folder: Path, ways: list[str]) -> None:
    """Train in every one of ``ways``, each time from the same weights."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for way in ways:
        _train_in(way, rank, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
