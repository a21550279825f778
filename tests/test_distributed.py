"""Two processes (gloo, CPU) train a converted model under DDP and FSDP2 to the weights of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_models import tokens
from distributed_worker import BATCH, OPTIONS, converted, model, train

import sqa_fx

WAYS = ("ddp", "fsdp2", "ddp checkpoint autocast", "fsdp2 checkpoint autocast")
BACKEND = "backend ddp"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the weights that two processes arrive at in every way: half of their time is their start."""
    here, folder = Path(__file__).parent, tmp_path_factory.mktemp("trained")
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "distributed_worker.py"), str(folder), *WAYS, BACKEND]
    workers = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, cwd=here, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=600)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(e[-2000:] for e in errors)
    return folder


def _weights(trained: Path, way: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(trained / f"{way}.pt", weights_only=True)
    return state


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(way: str, trained: Path) -> None:
    state = _weights(trained, way)
    alone = converted()
    before = {n: p.detach().clone() for n, p in alone.named_parameters()}
    train(alone, list(alone.parameters()), tokens(BATCH, 7), "autocast" in way)
    tolerance = 2e-2 if "autocast" in way else 1e-5
    assert state.keys() == before.keys()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), rtol=tolerance, atol=tolerance * 0.1)
    assert sum(float((state[n] - before[n]).abs().max()) > 1e-3 for n in before) > len(before) // 2


def test_backend_under_ddp_trains_as_one_process(trained: Path) -> None:
    state = _weights(trained, BACKEND)
    torch._dynamo.reset()
    alone = model()
    before = {n: p.detach().clone() for n, p in alone.named_parameters()}
    train(torch.compile(alone, backend="sqa_fx", options=OPTIONS), list(alone.parameters()), tokens(BATCH, 7))
    assert sqa_fx.Plan.load(trained / "plan.json").same_cuts(sqa_fx.last_plan(alone))
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    assert sum(float((state[n] - before[n]).abs().max()) > 1e-3 for n in before) > len(before) // 2
