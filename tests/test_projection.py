"""A projection is y = x W^T + b, in whatever op and layout it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sqa_fx.passes.capture import capture
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.projection import Projection, bias_of, moved_parameter, projection, readers


class Op(nn.Module):
    """``call(module, x)`` with parameters w of ``shape`` and, if ``bias`` says, b."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...], bias: tuple[int, ...] = ()):
        super().__init__()
        self.call = call
        self.w = nn.Parameter(torch.randn(shape))
        if bias:
            self.b = nn.Parameter(torch.randn(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


class All(nn.Module):
    """Many ops, each on an input of its own: one capture for all."""

    def __init__(self, ops: dict[str, Op]) -> None:
        super().__init__()
        self.names, self.ops = list(ops), nn.ModuleList(ops.values())

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [op(x) for op, x in zip(self.ops, inputs, strict=True)]


@dataclass
class Graph:
    """A captured graph, the projections of each op by its name, and the value of every node."""

    module: fx.GraphModule
    found: dict[str, list[Projection]]
    values: dict[fx.Node, Tensor]


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    cases = {name: (op, shape) for name, (op, shape, _) in CASES.items()} | OTHERS
    inputs = [torch.randn(shape) for _, shape in cases.values()]
    module = capture(All({n: op for n, (op, _) in cases.items()}), (inputs,), dynamic_shapes=None).graph_module
    run = fx.Interpreter(module, garbage_collect_values=False)
    run.run(*inputs, enable_io_processing=False)
    found: dict[str, list[Projection]] = {name: [] for name in cases}
    for node in module.graph.nodes:
        made = projection(module, node)
        if made is not None:
            found[list(cases)[int(made.weight.split(".")[1])]].append(made)
    return Graph(module, found, run.env)


X = (2, 3, 5)  # [batch, tokens, width]
CASES: dict[str, tuple[Op, tuple[int, ...], tuple[int, int]]] = {
    "linear": (Op(lambda m, x: F.linear(x, m.w), (7, 5)), X, (7, 5)),
    "linear with bias": (Op(lambda m, x: F.linear(x, m.w, m.b), (7, 5), (7,)), X, (7, 5)),
    "addmm": (Op(lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w), (5, 7), (7,)), X, (7, 5)),
    "transposed": (Op(lambda m, x: x @ m.w.T, (7, 5)), X, (7, 5)),
    "matmul": (Op(lambda m, x: x @ m.w, (5, 7)), X, (7, 5)),
    "weight first": (Op(lambda m, x: m.w @ x, (7, 5)), (2, 5, 3), (7, 5)),
    "1x1 convolution": (Op(lambda m, x: F.conv2d(x, m.w, m.b), (7, 5, 1, 1), (7,)), (2, 5, 3, 4), (7, 5)),
    "conv1d": (Op(lambda m, x: F.conv1d(x, m.w), (7, 5, 1)), (2, 5, 3), (7, 5)),
    "transposed convolution": (Op(lambda m, x: F.conv_transpose1d(x, m.w), (5, 7, 1)), (2, 5, 3), (7, 5)),
    "einsum to heads": (Op(lambda m, x: torch.einsum("bsd,hde->bshe", x, m.w), (7, 5, 2)), X, (14, 5)),
    "einsum from heads": (Op(lambda m, x: torch.einsum("bshe,hed->bsd", x, m.w), (7, 2, 5)), (2, 3, 7, 2), (5, 14)),
    "einsum that moves tokens": (Op(lambda m, x: torch.einsum("bsd,hde->sbhe", x, m.w), (7, 5, 2)), X, (14, 5)),
    "rows of a fused weight": (Op(lambda m, x: F.linear(x, m.w[7:14], m.b[7:14]), (21, 5), (21,)), X, (7, 5)),
    "moved": (Op(lambda m, x: x @ m.w.T[:, 2:4].contiguous(), (7, 5)), X, (2, 5)),
    "chunk of columns": (Op(lambda m, x: x @ m.w.chunk(3, 1)[1], (5, 21)), X, (7, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_matrix_computes_what_the_op_computes(graph: Graph, name: str) -> None:
    module, _, size = CASES[name]
    [made] = graph.found[name]
    held = attribute(graph.module, made.weight)
    matrix = made.matrix(held)
    assert tuple(matrix.shape) == size
    bias = bias_of(graph.module, made)
    assert (bias is not None) == hasattr(module, "b")
    y = made.rows_in(graph.values[made.activation]) @ matrix.T + (0 if bias is None else bias)
    torch.testing.assert_close(y, made.rows_out(graph.values[made.node]))
    assert torch.equal(made.parameter(held, matrix), held)


def test_a_changed_matrix_changes_only_its_own_elements(graph: Graph) -> None:
    [made] = graph.found["rows of a fused weight"]
    held = attribute(graph.module, made.weight)
    new = made.parameter(held, made.matrix(held) + 1)
    assert torch.equal(new[:7], held[:7])
    assert torch.equal(new[14:], held[14:])
    assert torch.equal(new[7:14], held[7:14] + 1)
    # Which of the parameter's 21 rows each row of the matrix is, and which column.
    assert made.along(held.shape, 0)[:, 0].tolist() == list(range(7, 14))
    assert made.along(held.shape, 1)[0].tolist() == list(range(5))


def test_every_reader_of_a_shared_weight_is_found(graph: Graph) -> None:
    found = graph.found["both ways"]
    weight = next(n for n in graph.module.graph.nodes if str(n.target) == found[0].weight)
    assert {p.node for p in readers(graph.module, weight)} == {p.node for p in found}
    assert len(found) == 2
    assert torch.equal(found[0].index, found[1].index.T)


OTHERS: dict[str, tuple[Op, tuple[int, ...]]] = {
    "grouped convolution": (Op(lambda m, x: F.conv1d(x, m.w, groups=2), (8, 3, 1)), (2, 6, 5)),
    "depthwise convolution": (Op(lambda m, x: F.conv1d(x, m.w, groups=6), (6, 1, 1)), (2, 6, 5)),
    "3x3 convolution": (Op(lambda m, x: F.conv2d(x, m.w, padding=1), (7, 5, 3, 3)), (2, 5, 4, 4)),
    "a convolution that strides": (Op(lambda m, x: F.conv1d(x, m.w, stride=2), (7, 5, 1)), (2, 5, 6)),
    "one that pads": (Op(lambda m, x: F.conv1d(x, m.w, padding=1), (7, 5, 1)), (2, 5, 6)),
    "one that does both": (Op(lambda m, x: F.conv1d(x, m.w, padding=1, stride=2), (7, 5, 1)), (2, 5, 3)),
    "experts": (Op(lambda m, x: torch.bmm(x, m.w), (3, 5, 7)), (3, 2, 5)),
    "a matrix for each head": (Op(lambda m, x: torch.einsum("bhd,hde->bhe", x, m.w), (3, 5, 7)), (2, 3, 5)),
    "two activations": (Op(lambda m, x: x @ (x * m.w).transpose(1, 2), (5,)), X),
    "a repeated weight": (Op(lambda m, x: x @ m.w.expand(5, 7), (1, 7)), X),
    "a computed weight": (Op(lambda m, x: x @ (2 * m.w), (5, 7)), X),
    "both ways": (Op(lambda m, x: F.linear(F.linear(x, m.w), m.w.T), (7, 5)), X),
    "a foreign bias": (Op(lambda m, x: F.linear(x, m.w, x[0, 0, 0] * m.b), (7, 5), (7,)), X),
}


@pytest.mark.parametrize("name", [n for n in OTHERS if n != "both ways"])
def test_no_single_matrix(graph: Graph, name: str) -> None:
    assert graph.found[name] == []


def test_elements_are_followed_through_moves(graph: Graph) -> None:
    [made] = graph.found["moved"]
    weight = made.node.args[1]
    assert isinstance(weight, fx.Node)
    found = moved_parameter(graph.module, weight)
    assert found is not None
    name, index = found
    assert name == made.weight
    assert torch.equal(index, torch.arange(35).reshape(7, 5).T[:, 2:4])
