"""validate and the runners: what must pass, what must fail, and what the report says."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqa_fx.errors import InputError, MissingError
from sqa_fx.runners import CompiledRunner, EagerRunner, OnnxRunner, Runner, named_outputs
from sqa_fx.validate import DEFAULT_ATOL, ValidationReport, validate


class Attention(nn.Module):
    """Self-attention over ``[batch, seq, 21]`` with 3 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(21, 63), nn.Linear(21, 21)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> dict[str, Tensor]:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, 3, 7).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if keep is None else keep[:, None, None, :])
        y = self.o(y.transpose(1, 2).reshape(b, s, 21))
        return {"last_hidden_state": y, "pooled": y.mean(1)}


class Fake:
    """A runner that returns what it is given, or what a function makes of the right outputs."""

    kind = "eager"

    def __init__(self, module: nn.Module, change: Any, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.module, self.change, self.dtype = "fake", module, change, dtype

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            return list(self.change([t.clone() for _, t in named_outputs(self.module(*args, **kwargs))]))


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention().eval()


def inputs(b: int = 2, s: int = 5, seed: int = 1) -> tuple[tuple[Tensor], dict[str, Any]]:
    return (torch.randn(b, s, 21, generator=torch.Generator().manual_seed(seed)),), {}


def changed(change: Any, **options: Any) -> ValidationReport:
    module = attention()
    return validate(module, [Fake(module, change)], [inputs()], **options)


def add_to_first(amount: float) -> Any:
    def change(outputs: list[Tensor]) -> list[Tensor]:
        outputs[0][1, 3, 2] += amount
        return outputs

    return change


def test_eager_and_half_pass() -> None:
    module = attention()
    candidates: list[Runner] = [EagerRunner(module), EagerRunner(attention().bfloat16(), "bf16")]
    report = validate(module, candidates, [inputs(), inputs(3, 11, 2)])
    assert report.passed, report.table()
    assert report.reference_dtype == "float64" and report.notes == ()
    assert [(c.candidate, c.input_set, c.output) for c in report.comparisons[:2]] == [
        ("eager", 0, "last_hidden_state"),
        ("eager", 0, "pooled"),
    ]
    assert len(report.comparisons) == 8
    for c in report.comparisons:
        assert c.compared == ((2 * 5, 3 * 11)[c.input_set] if c.output != "pooled" else (2, 3)[c.input_set]) * 21
        assert c.max_abs == c.eager_max_abs > 0  # the candidate is the baseline, and float64 is better than both
        assert c.cosine == pytest.approx(1, abs=1e-4)
        assert c.minimum_atol == 0
    bf16 = [c for c in report.comparisons if c.candidate == "bf16"]
    assert all(c.dtype == "bfloat16" and c.max_abs > 1e-4 for c in bf16)
    assert module.training is False and module.qkv.weight.dtype == torch.float32  # not touched


def test_compiled_runner() -> None:
    module = attention()
    runner = CompiledRunner(module, backend="aot_eager")
    report = validate(module, [runner], [inputs()])
    assert runner.kind == "compiled" and report.passed, report.table()


def test_rule() -> None:
    """Error may reach factor * eager + atol and no more; the minimum tolerance is what passes, and just passes."""
    report = changed(add_to_first(1e-3))
    first, second = report.comparisons
    assert not report.passed and not first.passed and second.passed
    assert first.problem is not None and first.problem.startswith("error")
    assert first.tolerance == pytest.approx(2 * first.eager_max_abs + DEFAULT_ATOL[torch.float32])
    assert first.max_abs == pytest.approx(1e-3, rel=1e-2)
    assert first.minimum_atol is not None
    assert changed(add_to_first(1e-3), atol=first.minimum_atol * 1.0001).passed
    assert not changed(add_to_first(1e-3), atol=first.minimum_atol * 0.9999).passed
    assert changed(add_to_first(1e-3), factor=1.01 * first.max_abs / first.eager_max_abs).passed


def test_atol_default_is_that_of_the_dtype() -> None:
    """An error of 1e-3 is fine in bfloat16, where eager makes more, and not in float32."""
    module = attention()
    half = attention().bfloat16()
    assert validate(module, [Fake(half, add_to_first(1e-3), torch.bfloat16)], [inputs()]).passed
    assert not validate(module, [Fake(half, add_to_first(0.5), torch.bfloat16)], [inputs()]).passed
    assert not changed(add_to_first(1e-3)).passed


def test_by_hand() -> None:
    """(1, 2), (3, 4) against (1, 2.5), (5, 4): largest errors 2 and 0.4, the second row has another argmax."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    x = torch.tensor([[1.0, 2.5], [5.0, 4.0]])
    report = validate(Constant(), [Fake(Constant(), lambda _: [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])], [((x,), {})])
    [c] = report.comparisons
    assert (c.output, c.compared, c.max_abs, c.eager_max_abs, c.top1) == ("output", 4, 2.0, 0.0, 0.5)
    assert c.max_rel == pytest.approx(0.4)
    assert c.minimum_atol == 2.0
    dot, norms = 1 + 5 + 15 + 16, (1 + 4 + 9 + 16) ** 0.5 * (1 + 6.25 + 25 + 16) ** 0.5
    assert c.cosine == pytest.approx(dot / norms)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_fails(bad: float) -> None:
    report = changed(add_to_first(bad), atol=1e9)
    first = report.comparisons[0]
    assert not report.passed
    assert (first.nonfinite, first.nonfinite_mismatch, first.minimum_atol) == (1, 1, None)
    assert json.loads(report.to_json())["comparisons"][0]["minimum_atol"] is None


def test_all_nan_on_both_sides_is_not_agreement() -> None:
    module = attention()
    (x,), _ = inputs()
    report = validate(module, [EagerRunner(module)], [((x * float("nan"),), {})])
    assert not report.passed and report.comparisons[0].problem == "nothing finite to compare"


def test_wrong_shape_and_count_fail() -> None:
    shape = changed(lambda outputs: [outputs[0][:, :4], outputs[1]])
    assert shape.comparisons[0].problem == "shape [2, 4, 21] instead of [2, 5, 21]"
    assert not shape.passed and shape.comparisons[1].passed
    count = changed(lambda outputs: outputs[:1])
    assert not count.passed
    assert count.comparisons[0].problem == "1 outputs instead of 2 (last_hidden_state, pooled)"
    assert "FAILED" in count.table() and json.loads(count.to_json())["passed"] is False


def test_valid_mask() -> None:
    """Errors in padding do not count, and errors outside of it do."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert not changed(add_to_first(float("nan")), valid_mask=mask).passed
    mask[1, 3] = False
    report = changed(add_to_first(float("nan")), valid_mask=mask)
    assert report.passed
    assert [c.compared for c in report.comparisons] == [9 * 21, 2 * 21]
    assert changed(add_to_first(7.0), valid_mask=[mask]).passed
    assert not changed(add_to_first(7.0), valid_mask=mask.roll(1, 0)).passed


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 6, dtype=torch.bool),
        torch.ones(2, 5),
        torch.ones(2, 5, 1, dtype=torch.bool),
        torch.zeros(2, 5, dtype=torch.bool),
        [torch.ones(2, 5, dtype=torch.bool)] * 2,
    ],
    ids=["length", "dtype", "rank", "empty", "count"],
)
def test_bad_masks(mask: Any) -> None:
    with pytest.raises(InputError, match="valid_mask"):
        changed(lambda outputs: outputs, valid_mask=mask)


def test_integer_outputs_must_be_equal() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    x = torch.arange(7)
    module = Tokens()
    assert validate(module, [EagerRunner(module)], [((x,), {})]).passed
    report = validate(module, [Fake(module, lambda o: [o[0] + (x == 3)])], [((x,), {})], atol=10.0)
    assert not report.passed and report.comparisons[0].tolerance == 0


def test_reference_that_cannot_run_in_float64() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(21, 21)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.l(x.float())
            return y

    module = Casts().eval()
    report = validate(module, [EagerRunner(module)], [inputs()])
    assert report.reference_dtype == "float32" and report.passed
    assert "cannot run in float64" in report.notes[0] and "float32" in report.notes[0]
    assert report.notes[0] in report.table()
    assert not validate(module, [Fake(module, add_to_first(1e-3))], [inputs()]).passed


def test_reference_that_casts_its_output() -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).float()

    report = validate(Narrow(), [EagerRunner(Narrow())], [inputs()])
    assert report.passed and "output (float32)" in report.notes[0]


def test_dropout_is_off_in_the_reference() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            dropped: Tensor = self.drop(x)
            return dropped

    module = Drops().train()
    report = validate(module, [EagerRunner(Drops().eval())], [inputs()])
    assert report.passed and module.training
    assert not validate(module, [EagerRunner(module)], [inputs()]).passed


def test_nothing_to_compare() -> None:
    with pytest.raises(InputError, match="nothing to compare"):
        validate(attention(), [], [inputs()])


def test_outputs_that_pytree_cannot_see() -> None:
    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    class Boxed(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"y": x, "box": Box(x)}

    with pytest.raises(InputError, match="Box"):
        EagerRunner(Boxed()).run((torch.randn(3),), {})


def test_labels() -> None:
    module = attention()
    report = validate(module, [EagerRunner(module)], [inputs(1, 3), inputs(2, 7)], labels=["min", "max"])
    assert report.labels == ("min", "max") and json.loads(report.to_json())["labels"] == ["min", "max"]
    assert [line.split()[1] for line in report.table().splitlines()[2:6]] == ["min", "min", "max", "max"]
    with pytest.raises(InputError, match="1 labels for 2 input sets"):
        validate(module, [EagerRunner(module)], [inputs(1, 3), inputs(2, 7)], labels=["min"])


def test_summary() -> None:
    module = attention()
    good = validate(module, [EagerRunner(module)], [inputs()], labels=["opt"])
    summary = good.summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["passed"] is True and summary["problem"] is None and summary["failed"] == 0
    assert summary["labels"] == ["opt"] and summary["reference_dtype"] == "float64" and summary["compared"] == 2
    worst = max(good.comparisons, key=lambda c: c.max_abs / c.tolerance)
    assert (summary["error"], summary["tolerance"]) == (worst.max_abs, worst.tolerance)
    assert summary["min_cosine"] == min(c.cosine for c in good.comparisons if c.cosine is not None)

    bad = changed(add_to_first(1.0), labels=["odd"]).summary()
    assert bad["passed"] is False and bad["failed"] == 1 and bad["error"] == pytest.approx(1.0, rel=1e-3)
    assert bad["problem"].startswith("last_hidden_state at input set odd: error 1 > ")
    unbounded = changed(lambda outputs: outputs[:1]).summary()
    assert (unbounded["error"], unbounded["compared"], unbounded["failed"]) == (None, 1, 1)


@pytest.mark.parametrize("error", [RuntimeError("no profile\nfor 7"), InputError("no profile\nfor 7")])
def test_a_candidate_that_raises_has_failed_there_only(error: Exception) -> None:
    module = attention()

    class Picky(EagerRunner):
        def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
            if args[0].shape[1] == 7:
                raise error
            return super().run(args, kwargs)

    report = validate(module, [Picky(module, "picky"), EagerRunner(module)], [inputs(2, 7), inputs(2, 5)])
    assert not report.passed
    failed = [c for c in report.comparisons if not c.passed]
    assert [(c.candidate, c.input_set, c.output) for c in failed] == [("picky", 0, "all")]
    assert failed[0].problem == f"does not run: {type(error).__name__}: no profile"
    assert len(report.comparisons) == 1 + 2 + 4


def test_a_reference_that_raises_ends_the_validation() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise InputError("not these sizes")

    with pytest.raises(InputError, match="not these sizes"):
        validate(Refuses(), [EagerRunner(attention())], [inputs()])


def test_pieces_of_a_large_output_count_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the comparison is cut up, it says the same."""
    whole = changed(add_to_first(1e-3)).comparisons
    monkeypatch.setattr("sqa_fx.validate._AT_ONCE", 13)
    for one, other in zip(whole, changed(add_to_first(1e-3)).comparisons, strict=True):
        assert one.cosine == pytest.approx(other.cosine, rel=1e-12)
        assert replace(one, cosine=None) == replace(other, cosine=None)
    assert changed(add_to_first(float("nan"))).comparisons[0].nonfinite_mismatch == 1


# --- the ONNX runner -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from sqa_fx.exporters.to_onnx import export_onnx

    auto = torch.export.Dim.AUTO
    (x,), _ = inputs(3, 11)
    return export_onnx(
        attention(),
        tmp_path_factory.mktemp("onnx") / "m.onnx",
        args=(x, torch.ones(3, 11, dtype=torch.bool)),
        dynamic_shapes={"x": {0: auto, 1: auto}, "keep": {0: auto, 1: auto}},
    ).path


def with_keep(b: int = 2, s: int = 5) -> dict[str, Tensor]:
    (x,), _ = inputs(b, s)
    return {"x": x, "keep": torch.arange(s).expand(b, s) < s - 1}


def test_onnx_runner(onnx_path: Path) -> None:
    runner = OnnxRunner(onnx_path)
    assert (runner.kind, runner.dtype) == ("onnx", torch.float32)
    assert runner.input_names == ("x", "keep")
    a = with_keep()
    by_order: tuple[Any, Any] = ((a["x"], a["keep"]), {})
    by_name: tuple[Any, Any] = ((), {"keep": a["keep"], "x": a["x"]})
    mixed = ((a["x"],), {"keep": a["keep"], "flag": None})
    report = validate(attention(), [runner], [by_order, by_name])
    assert report.passed, report.table()
    for call in (by_name, mixed):
        assert all(torch.equal(p, q) for p, q in zip(runner.run(*call), runner.run(*by_order), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"x": a["x"]}, "takes 2 tensors, x, keep, but got 1"),
        (lambda a: {**a, "more": a["x"]}, "but got 3"),
        (lambda a: {**a, "x": a["x"].double()}, r"float64; pass x\.to\(torch\.float32\)"),
        (lambda a: {**a, "x": a["x"][0]}, "3 axes"),
        (lambda a: {**a, "x": a["x"][..., :20]}, "size 21 at axis 2"),
        (lambda a: {**a, "keep": a["keep"][:, :4]}, "which is 5 in input x"),
    ],
    ids=["too few", "too many", "dtype", "rank", "static size", "symbols disagree"],
)
def test_onnx_runner_refuses(onnx_path: Path, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnnxRunner(onnx_path).run((), change(with_keep()))


def test_onnx_runner_checks_providers(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    with pytest.raises(MissingError, match="NoSuchProvider"):
        OnnxRunner(onnx_path, providers=["NoSuchProvider"])

    # Listed as available, and yet not in the session: what happens with the GPU build where there is no GPU.
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["GpuProvider", "CPUExecutionProvider"])
    real = ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, providers: real(path, providers=["CPUExecutionProvider"])
    )
    with pytest.raises(MissingError, match="asked for GpuProvider, but the session runs on CPUExecutionProvider"):
        OnnxRunner(onnx_path, providers=["GpuProvider", "CPUExecutionProvider"])


def test_onnx_runner_bad_files(onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingError, match="no ONNX model"):
        OnnxRunner(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(InputError, match="cannot load"):
        OnnxRunner(broken)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingError, match="pip install"):
        OnnxRunner(onnx_path)
