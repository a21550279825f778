"""Runners under CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqa_fx.bench import bench
from sqa_fx.cuda_graph_runner import CudaGraphRunner, CudaGraphs, form
from sqa_fx.errors import InputError, MissingError
from sqa_fx.runners import CompiledRunner, EagerRunner

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to record graphs on")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        return {"y": self.linear(x).relu() * scale, "x": x + 1}


class Waits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.sum().item())


def test_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for make in (lambda r: CudaGraphRunner(r, (torch.zeros(3, 5),), {}), CudaGraphs):
        with pytest.raises(MissingError, match="need a CUDA device"):
            make(EagerRunner(Net()))


def test_streams_and_devices_are_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class Engine:
        name, kind, dtype = "engine", "onnx", torch.float32

        def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
            raise AssertionError("not called")

    with pytest.raises(InputError, match="streams of its own"):
        CudaGraphs(Engine())
    with pytest.raises(InputError, match=r"\[\[3, 5\]\], on \['cpu'\]"):
        CudaGraphRunner(EagerRunner(Net()), (torch.zeros(3, 5),), {})


def test_forms() -> None:
    a = torch.zeros(3, 5)
    assert form(a) == form(torch.ones(3, 5))
    assert len({form(x) for x in (a, a.double(), a[:2], 1, True, 1.0, None, "1")}) == 8


@on_cuda
@pytest.mark.parametrize("kind", [EagerRunner, CompiledRunner])
def test_results_follow_the_inputs(kind: type[EagerRunner] | type[CompiledRunner]) -> None:
    net = Net().cuda()
    x = torch.randn(3, 5, device="cuda")
    runner = CudaGraphRunner(kind(net), (x,), {"scale": 2.0})
    results = []
    for inputs in (x, torch.randn(3, 5, device="cuda"), x.clone()):
        results.append((runner.run((inputs,), {"scale": 2.0}), EagerRunner(net).run((inputs,), {"scale": 2.0})))
    for got, expected in results:  # all at the end: a later call must not change earlier results
        torch.testing.assert_close(got, expected)
    assert runner.kind == kind.kind and runner.device_memory() > 0


@on_cuda
def test_outputs_of_the_graph_itself() -> None:
    net = Net().cuda()
    one, other = torch.randn(2, 3, 5, device="cuda")
    runner = CudaGraphRunner(EagerRunner(net), (one,), {}, clone_outputs=False)
    first = runner.run((one,), {})
    second = runner.run((other,), {})
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    torch.testing.assert_close(second, EagerRunner(net).run((other,), {}))


@on_cuda
def test_other_forms() -> None:
    net = Net().cuda()
    x = torch.randn(3, 5, device="cuda")
    runner = CudaGraphRunner(EagerRunner(net), (x,), {"scale": 2.0})
    for args, kwargs in (((x[:2],), {"scale": 2.0}), ((x,), {"scale": 3.0}), ((x,), {}), ((x.cpu(),), {"scale": 2.0})):
        with pytest.raises(InputError, match="was recorded for inputs"):
            runner.run(args, kwargs)
    many = CudaGraphs(EagerRunner(net))
    for inputs in (x, x[:2], x * 2):
        torch.testing.assert_close(many.run((inputs,), {}), EagerRunner(net).run((inputs,), {}))


@on_cuda
def test_in_bench() -> None:
    net = Net().cuda()
    eager = EagerRunner(net)
    sets: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((torch.randn(n, 5, device="cuda"),), {}) for n in (3, 4)]
    report = bench([eager, CudaGraphs(eager, clone_outputs=False)], sets, iterations=2, progress=False)
    assert [row.runner for row in report.rows] == ["eager", "eager + CUDA graph"] * 2
    assert all(row.peak_memory_bytes is not None and row.p50_ms > 0 for row in report.rows)


@on_cuda
def test_calls_that_wait_cannot_be_recorded() -> None:
    with pytest.raises(InputError, match="cannot be recorded as a CUDA graph"):
        CudaGraphRunner(EagerRunner(Waits()), (torch.ones(3, device="cuda"),), {})


@on_cuda
def test_random_numbers_after_a_recording_that_failed() -> None:
    torch.manual_seed(3)
    expected = [torch.randn(5, device="cuda") for _ in range(2)]
    torch.manual_seed(3)
    before = torch.randn(5, device="cuda")
    with pytest.raises(InputError):
        CudaGraphRunner(EagerRunner(Waits()), (torch.ones(3, device="cuda"),), {})
    torch.testing.assert_close([before, torch.randn(5, device="cuda")], expected)
