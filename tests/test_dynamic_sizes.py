"""One conversion serves every size: batch 1, length 1, a prime length and lengths above the traced one, exports too."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_models import CASES, converted, tensors, tokens
from plan_arithmetic import load_masked
from torch import Tensor, nn

import sqa_fx
from sqa_fx.runners import OnnxRunner

# The graphs are traced at (2, 7).
SIZES = ((1, 7), (2, 1), (1, 1), (3, 13), (1, 29), (5, 2))
NAMES = ("llama_gqa", "bert", "torch_encoder", "falcon_alibi")
EXPORTED = ("llama_gqa", "bert", pytest.param("torch_encoder", marks=pytest.mark.slow))


def _inputs(name: str, batch: int, length: int) -> dict[str, Any]:
    if name == "bert":
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, max(1, length - 2) :] = 0
        return {"input_ids": tokens(batch, length), "attention_mask": mask}
    return CASES[name].inputs(batch, length)


def _check(call: Callable[..., Any], model: Callable[..., Any], name: str, tolerance: float = 2e-5) -> None:
    for batch, length in SIZES:
        inputs = _inputs(name, batch, length)
        with torch.no_grad():
            expected = [t for t in tensors(model(**inputs)) if t.is_floating_point()]
            actual = [t for t in tensors(call(**inputs)) if t.is_floating_point()]
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=tolerance * max(1.0, float(e.abs().max())))


@functools.cache
def _converted(name: str) -> tuple[sqa_fx.ConvertedModule, nn.Module]:
    """The conversion, and the original with the masked weights."""
    model = CASES[name].build(CASES[name].impls[0]).eval()
    result = converted(model, hq=0.5, hkv=0.25, kwargs=_inputs(name, 2, 7))
    load_masked(model, result.plan.to_json())
    return result, model


# gpt2 and nano are llama_gqa with fewer parts; test_caches.py has a smaller encoder-decoder than t5.
@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "nano", "t5"))])
def test_every_size_computes_the_masked_original(name: str) -> None:
    result, model = _converted(name)
    assert result.report.proof is not None
    assert {"longer", "batch 1", "length 1", "batch 1, length 1"} <= set(result.report.proof["sizes"])
    _check(result, model, name)


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_serve_every_size(name: str, tmp_path: Path) -> None:
    result, model = _converted(name)
    _check(result.exported_program().module(check_guards=False), model, name)
    sqa_fx.export(result, tmp_path / "model.onnx")
    runner = OnnxRunner(tmp_path / "model.onnx")

    def run(**inputs: Any) -> list[Tensor]:
        return runner.run((), {k: v for k, v in inputs.items() if isinstance(v, Tensor)})

    _check(run, model, name, 1e-4)


@pytest.mark.parametrize(
    "name", ["llama_gqa", *(pytest.param(n, marks=pytest.mark.slow) for n in ("torch_encoder", "bert", "vit"))]
)
def test_a_converted_model_compiles_without_graph_breaks(name: str) -> None:
    case, result = CASES[name], copy.deepcopy(_converted(name)[0])
    torch._dynamo.reset()
    compiled = torch.compile(result, backend="aot_eager", fullgraph=True)
    for batch, length in ((2, 7), (3, 11)) if case.free_length else ((2, 7), (3, 7)):
        inputs = case.inputs(batch, length)
        for a, e in zip(tensors(compiled(**inputs)), tensors(result(**inputs)), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    torch.stack([t.square().mean() for t in tensors(compiled(**inputs)) if t.is_floating_point()]).sum().backward()
    gradients = {n: p.grad.clone() for n, p in result.named_parameters() if p.grad is not None}
    result.zero_grad()
    torch.stack([t.square().mean() for t in tensors(result(**inputs)) if t.is_floating_point()]).sum().backward()
    assert len(gradients) > 4
    for n, p in result.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[n], p.grad, rtol=1e-4, atol=1e-6)


def test_activations_between_attentions_are_computed_again() -> None:
    case = CASES["llama_gqa"]
    inputs, kept, gradients = case.inputs(2, 31), [], []
    result = converted(case.build("sdpa").train(), hq=0.5, hkv=0.25, kwargs=inputs, dynamic_shapes=None)
    for enabled in (False, True):
        result.checkpoint_activations(enabled).zero_grad()
        count = [0]

        def pack(tensor: Tensor, count: list[int] = count) -> Tensor:
            count[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = result(**inputs)
        output["logits"].square().mean().backward()
        kept.append(count[0])
        gradients.append([p.grad.clone() for p in result.parameters() if p.grad is not None])
    assert kept[1] < 0.7 * kept[0], kept
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
