"""Healing that is logged, stopped, gone on with or spread over processes: it comes to the same bits."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import heal_fixtures
import pytest
import torch
from heal_fixtures import QUICK, changed_weights, same_weights, weights_of
from heal_models import HELD_OUT, TRAIN, student
from torch import nn

import sqa_fx
from sqa_fx.errors import HealError, InputError, MissingError

# pytest finds fixtures by the names of a test module.
original, _converted, converted = heal_fixtures.original, heal_fixtures._converted, heal_fixtures.converted


# --- logs and checkpoints --------------------------------------------------------------------------------------------


def test_the_log_has_what_the_report_has(
    tmp_path: Path, original: nn.Module, converted: sqa_fx.ConvertedModule
) -> None:
    report = sqa_fx.heal(
        converted, original, TRAIN, held_out=HELD_OUT, **{**QUICK, "log_every": 2}, evaluate_every=3, log=tmp_path / "l"
    )
    lines = [json.loads(line) for line in (tmp_path / "l").read_text().splitlines()]
    assert lines == list(report.history) and [e["step"] for e in lines] == [0, 2, 3, 4, 6]
    assert lines[1].keys() == {"step", "phase", "loss", "lr", "grad_norm", "tokens_per_s"}
    assert lines[2].keys() >= {"held_out_loss", "held_out_agreement"}


def test_another_run_does_not_resume(tmp_path: Path, original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    options = {**QUICK, "checkpoints": tmp_path / "c", "checkpoint_every": 2}
    with pytest.raises(MissingError, match="no checkpoint"):
        sqa_fx.heal(copy.deepcopy(converted), original, TRAIN, **options, resume="must")
    sqa_fx.heal(copy.deepcopy(converted), original, TRAIN, **options)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-00000004", "step-00000006"]
    with pytest.raises(InputError, match=r"lr \(was 0\.003, is 0\.5\)"):
        sqa_fx.heal(copy.deepcopy(converted), original, TRAIN, **{**options, "lr": 0.5})
    with pytest.raises(InputError, match="student"):
        sqa_fx.heal(student(original, heads="first", hq=1), original, TRAIN, **options)
    with pytest.raises(InputError, match="delete them"):
        sqa_fx.heal(copy.deepcopy(converted), original, TRAIN, **options, resume="never")
    weights = tmp_path / "c" / "step-00000006" / "learned.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="is damaged"):
        sqa_fx.heal(copy.deepcopy(converted), original, TRAIN, **options)


def test_a_finished_run_only_gives_back_its_weights(
    tmp_path: Path, original: nn.Module, converted: sqa_fx.ConvertedModule
) -> None:
    twin = copy.deepcopy(converted)
    options = {**QUICK, "checkpoints": tmp_path / "c", "evaluate_every": 2}
    first = sqa_fx.heal(converted, original, TRAIN, held_out=HELD_OUT, **options)
    again = sqa_fx.heal(twin, original, TRAIN, held_out=HELD_OUT, **options)
    assert again.resumed_from == 6 and again.best_step == first.best_step and again.history == first.history
    assert same_weights(weights_of(converted), weights_of(twin))


# --- processes --------------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).parent / "heal_models.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that are started: sums of several threads have another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _start(folder: Path, *runs: dict[str, Any], **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(runs)]
    return subprocess.Popen(command, env={**ENVIRONMENT, **environment}, stderr=subprocess.PIPE, text=True)


def _finish(*workers: subprocess.Popen[str]) -> None:
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(w.returncode == 0 for w in workers), "\n".join(e[-2000:] for e in errors)


def _last_step(log: Path) -> int:
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=-1)


def _without_times(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in entries]


def test_killed_at_a_random_step_it_resumes_to_the_same_bits(
    tmp_path: Path, one_thread: None, original: nn.Module, converted: sqa_fx.ConvertedModule
) -> None:
    steps = 60
    options: dict[str, Any] = {"steps": steps, "lr": 3e-3, "warmup": 5, "evaluate_every": 20, "site_warmup": 15,
                               "accumulate": 2, "log_every": 1, "checkpoint_every": 7}  # fmt: skip
    stored: dict[str, Any] = {"checkpoints": str(tmp_path / "checkpoints"), "log": str(tmp_path / "log.jsonl")}
    when = random.SystemRandom().randrange(8, steps - 10)
    converted.save(tmp_path / "student")
    killed = _start(tmp_path, {**options, **stored})
    until = time.monotonic() + 200
    while _last_step(tmp_path / "log.jsonl") < when and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not list(tmp_path.glob("*.pt")), when
    here: dict[str, Any] = {**options, "held_out": HELD_OUT, "progress": False, "device": "cpu"}
    resumed, whole = copy.deepcopy(converted), converted
    report = sqa_fx.heal(resumed, original, TRAIN, **here, **stored)
    expected = sqa_fx.heal(whole, original, TRAIN, **here)
    assert report.resumed_from is not None and 7 <= report.resumed_from < steps, when
    assert same_weights(weights_of(whole), weights_of(resumed)), when
    assert _without_times(report.history) == _without_times(expected.history)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert _without_times(logged) == _without_times(expected.history)


@pytest.mark.parametrize("train", ["all", "low-rank"])
def test_a_run_that_an_error_ended_resumes_to_the_same_bits(
    train: str, tmp_path: Path, original: nn.Module, converted: sqa_fx.ConvertedModule
) -> None:
    options: dict[str, Any] = {**QUICK, "steps": 14, "evaluate_every": 4, "train": train, "precision": "bf16"}
    stored: dict[str, Any] = {"checkpoints": tmp_path / "c", "checkpoint_every": 3}
    whole, broken = copy.deepcopy(converted), copy.deepcopy(converted)
    sqa_fx.heal(whole, original, TRAIN, held_out=HELD_OUT, **options)
    with pytest.raises(HealError, match=r"after step 8.*\n?.*stays"):
        sqa_fx.heal(broken, original, _Until(8), held_out=HELD_OUT, **options, **stored)
    assert same_weights(weights_of(broken), weights_of(converted))
    report = sqa_fx.heal(broken, original, TRAIN, held_out=HELD_OUT, **options, **stored)
    assert report.resumed_from == 6 and same_weights(weights_of(broken), weights_of(whole))


class _Until:
    """The training data, until a number of batches was read."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __iter__(self) -> Iterator[Any]:
        for one in TRAIN:
            if not self.left:
                raise OSError("the network is gone")
            self.left -= 1
            yield one


def test_two_processes_heal_as_one(tmp_path: Path, original: nn.Module, converted: sqa_fx.ConvertedModule) -> None:
    """Padding differs between the halves of a batch; one held-out batch does not divide."""
    options: dict[str, Any] = {**QUICK, "steps": 8, "evaluate_every": 4, "accumulate": 2, "site_warmup": 2}
    stored = {**options, "checkpoints": str(tmp_path / "c"), "checkpoint_every": 4}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    converted.save(tmp_path / "student")
    # The second run finds the checkpoint of step 4, since the last one is taken away between them.
    runs = [stored, {**stored, "take_away": "step-00000008"}]
    _finish(*(_start(tmp_path, *runs, RANK=rank, LOCAL_RANK=rank, **meeting) for rank in ("0", "1")))
    before = weights_of(converted)
    one = sqa_fx.heal(converted, original, TRAIN, held_out=HELD_OUT, **options)
    two, again = (json.loads((tmp_path / f"report-{i}.json").read_text()) for i in (0, 1))
    assert (one.processes, two["processes"], again["resumed_from"]) == (1, 2, 4)
    for a, b in zip(one.history, two["history"], strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "grad_norm", "held_out_loss", "held_out_agreement"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4), (a["step"], name)
    weights = [torch.load(tmp_path / f"weights-{i}.pt", weights_only=True) for i in (0, 1)]
    assert same_weights(*weights) and changed_weights(weights[0], before)
    # Adam divides by gradients that rounding alone makes (those of key biases), so a step or two of lr may differ.
    for name, value in weights_of(converted).items():
        torch.testing.assert_close(weights[0][name], value, rtol=0, atol=6e-3)


def test_accelerate_in_one_process_is_the_same(
    original: nn.Module, converted: sqa_fx.ConvertedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = pytest.importorskip("accelerate.state")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    twin = copy.deepcopy(converted)
    sqa_fx.heal(converted, original, TRAIN, held_out=HELD_OUT, **QUICK)
    try:
        sqa_fx.heal(twin, original, TRAIN, held_out=HELD_OUT, **QUICK, accelerate=True)
    finally:
        state.AcceleratorState._reset_state(reset_partial_state=True)
    assert same_weights(weights_of(converted), weights_of(twin))
