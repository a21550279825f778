"""Input sets at min, opt, max and odd sizes of a sidecar's inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sqa_fx.errors import InputError
from sqa_fx.exporters.sidecar import AxisRange, Sidecar, TensorSpec
from sqa_fx.shape_sets import input_sets_at_shapes, laid_out, shared_specs

BATCH, LENGTH = AxisRange("s1", 1, 2, 8), AxisRange("s2", 4, 16, 64)
TEXT = (
    TensorSpec("input_ids", "torch.int64", (BATCH, LENGTH)),
    TensorSpec("attention_mask", "torch.int64", (BATCH, LENGTH)),
    TensorSpec("features", "torch.float16", (BATCH, 3, LENGTH)),
)


def sizes(made: list[tuple[str, dict[str, Tensor]]], name: str) -> dict[str, tuple[int, ...]]:
    return {label: tuple(tensors[name].shape) for label, tensors in made}


def test_one_size_per_symbol_at_every_shape() -> None:
    made = input_sets_at_shapes(TEXT)
    assert sizes(made, "input_ids") == {"min": (1, 4), "opt": (2, 16), "max": (8, 64), "odd": (3, 17)}
    assert sizes(made, "features") == {"min": (1, 3, 4), "opt": (2, 3, 16), "max": (8, 3, 64), "odd": (3, 3, 17)}
    sidecar = Sidecar("onnx", TEXT, ())
    for _, tensors in made:
        sidecar.check_inputs(tensors)


def test_values_follow_the_rules_of_input_texts() -> None:
    _, tensors = input_sets_at_shapes(TEXT, vocabulary=5)[2]
    assert tensors["attention_mask"].eq(1).all()
    assert tensors["input_ids"].unique().tolist() == [0, 1, 2, 3, 4]
    assert tensors["features"].dtype is torch.float16
    assert tensors["features"].float().std().item() == pytest.approx(1, abs=0.1)
    again = input_sets_at_shapes(TEXT, vocabulary=5)[2][1]
    assert all(torch.equal(value, again[name]) for name, value in tensors.items())
    assert not torch.equal(tensors["input_ids"], input_sets_at_shapes(TEXT, vocabulary=5, seed=9)[2][1]["input_ids"])


def test_inputs_of_one_shape_differ() -> None:
    """Equal ones would hide that an engine swapped them."""
    pair = [TensorSpec(name, "torch.float32", (BATCH, 7)) for name in ("a", "b")]
    _, tensors = input_sets_at_shapes(pair)[0]
    assert not torch.equal(tensors["a"], tensors["b"])


def test_duplicates_are_left_out() -> None:
    spec = [TensorSpec("x", "torch.float32", (AxisRange("n", 4, 4, 9), 3))]
    assert sizes(input_sets_at_shapes(spec), "x") == {"min": (4, 3), "max": (9, 3), "odd": (5, 3)}
    fixed = [TensorSpec("x", "torch.float32", (2, 3))]
    assert sizes(input_sets_at_shapes(fixed), "x") == {"min": (2, 3)}
    pinned = [TensorSpec("x", "torch.float32", (AxisRange("n", 6, 6, 6),))]
    assert sizes(input_sets_at_shapes(pinned), "x") == {"min": (6,)}


def test_shapes_asked_for() -> None:
    assert [label for label, _ in input_sets_at_shapes(TEXT, odd=False)] == ["min", "opt", "max"]
    assert [label for label, _ in input_sets_at_shapes(TEXT, shapes=["max"])] == ["max", "odd"]
    with pytest.raises(InputError, match="no shapes huge; there are min, opt, max, odd"):
        input_sets_at_shapes(TEXT, shapes=["huge"])


@pytest.mark.parametrize(
    ("axis", "cap", "most", "odd"),
    [
        (AxisRange("n", 0, 12, None), None, None, 13),  # open: as at opt, which is a duplicate
        (AxisRange("n", 0, 12, None), 40, 40, 13),
        (AxisRange("n", 0, 12, 1000), 40, 40, 13),
        (AxisRange("n", 0, 12, 30), 40, 30, 13),
        (AxisRange("n", 0, 12, 1000), 5, None, 11),  # never below opt
        (AxisRange("n", 2, 12, 13), None, 13, 11),  # 13 is max, so a prime below opt
    ],
)
def test_maxima_and_odd_sizes(axis: AxisRange, cap: int | None, most: int | None, odd: int) -> None:
    found = sizes(input_sets_at_shapes([TensorSpec("x", "torch.float32", (axis,))], cap=cap), "x")
    assert found["min"] == (max(1, axis.min),)
    assert found.get("max") == (None if most is None else (most,))
    assert found["odd"] == (odd,)


def test_odd_sizes_differ_between_symbols() -> None:
    spec = [TensorSpec("x", "torch.float32", (AxisRange("a", 1, 8, 64), AxisRange("b", 1, 8, 64)))]
    assert sizes(input_sets_at_shapes(spec), "x")["odd"] == (11, 13)


def test_a_range_without_a_prime() -> None:
    spec = [TensorSpec("x", "torch.float32", (AxisRange("a", 8, 8, 10), AxisRange("b", 1, 2, 2)))]
    assert sizes(input_sets_at_shapes(spec), "x") == {"min": (8, 1), "opt": (8, 2), "max": (10, 2), "odd": (9, 2)}


def test_an_axis_that_is_an_expression_of_others_follows_them() -> None:
    past, new = AxisRange("s3", 1, 5, 20), AxisRange("s4", 1, 2, 4)
    both, half = AxisRange("s3 + s4", 0, 7, None), AxisRange("((2*s3 + 4)//2)", 0, 7, None)
    specs = [TensorSpec("past", "torch.float32", (past, new)), TensorSpec("mask", "torch.bool", (both, half))]
    found = sizes(input_sets_at_shapes(specs), "mask")
    assert found == {"min": (2, 3), "opt": (7, 7), "max": (24, 22), "odd": (7 + 3, 9)}
    narrow = [specs[0], TensorSpec("mask", "torch.bool", (AxisRange("s3 + s4", 0, 7, 9), 1))]
    with pytest.raises(InputError, match="at max, s3 \\+ s4 is 24, outside of"):
        input_sets_at_shapes(narrow)


def test_an_expression_of_something_else_is_a_symbol_of_its_own() -> None:
    spec = [TensorSpec("x", "torch.float32", (AxisRange("__import__('os').getpid()", 1, 2, 3),))]
    assert sizes(input_sets_at_shapes(spec), "x") == {"min": (1,), "opt": (2,), "max": (3,)}


def test_dtypes_without_a_rule() -> None:
    for dtype in ("torch.complex64", "float31"):
        with pytest.raises(InputError, match=dtype):
            input_sets_at_shapes([TensorSpec("x", dtype, (2,))])


def test_ranges_that_several_artifacts_share() -> None:
    other = (
        TensorSpec("features", "torch.float16", (4, 3, AxisRange("n", 8, 9, None))),
        TensorSpec("input_ids", "torch.int64", (AxisRange("m", 2, 3, 5), AxisRange("n", 8, 9, None))),
        TensorSpec("attention_mask", "torch.int64", (AxisRange("m", 2, 3, 5), AxisRange("n", 1, 9, 32))),
    )
    shared = shared_specs(TEXT, [other])
    assert shared_specs(TEXT[2:], [[TensorSpec("features", "torch.float32", TEXT[2].shape)]]) == TEXT[2:]
    with pytest.raises(InputError, match="do not take the same inputs"):
        shared_specs(TEXT[:1], [[TensorSpec("input_ids", "torch.int32", TEXT[0].shape)]])
    assert shared[0].shape == (AxisRange("s1", 4, 4, 4), AxisRange("s2", 8, 16, 32))
    assert shared[1].shape == shared[0].shape and shared[2].shape == (shared[0].shape[0], 3, shared[0].shape[1])
    assert shared_specs(TEXT, []) == TEXT
    with pytest.raises(InputError, match="no such input in another"):
        shared_specs(TEXT, [other[:1]])
    with pytest.raises(InputError, match="no size fits both"):
        shared_specs(TEXT[2:], [[TensorSpec("features", "torch.float16", (2, 3, 65))]])


def test_calls_are_laid_out_by_name_and_then_in_order() -> None:
    a, b, c, d = (torch.full((2,), float(i)) for i in range(4))
    tensors = {"x": a, "keep": b, "pair_0": c, "pair_1": d}
    old = torch.zeros(3)
    args, kwargs = laid_out(tensors, (old, 7), {"pair": (old, old), "flag": True, "keep": old})
    assert args[0] is a and args[1] == 7
    assert kwargs["pair"][0] is c and kwargs["pair"][1] is d and kwargs["keep"] is b and kwargs["flag"] is True
    args, kwargs = laid_out(tensors, [(old, old)], {"pair": [old, old]})
    assert args[0][0] is a and args[0][1] is b and kwargs["pair"][1] is d
    with pytest.raises(InputError, match="called with 2 tensors, and the artifact takes 4"):
        laid_out(tensors, (old,), {"keep": old})
