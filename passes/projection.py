"""A projection as a matrix: the product of activations with one parameter, whichever op and layout it is written in.

Every contraction is described by how its operands' dimensions meet (see ops), so that a linear layer, a transposed
matmul, a 1x1 convolution and an einsum over [heads, head_dim] all become y[n, out] = x[n, in] W[out, in]^T + b[out].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqa_fx.passes.aten_call import argument
from sqa_fx.passes.evaluate import constant_tensor
from sqa_fx.passes.graph import attribute
from sqa_fx.passes.hints import concrete, is_tensor, shape_of
from sqa_fx.passes.op_kinds import Aligned, Move, Operand
from sqa_fx.passes.ops import step


@dataclass(frozen=True, eq=False)
class Projection:
    """``node`` multiplies ``activation`` with the parameter ``weight``.

    ``index`` [out, in] tells, for every element of the matrix, which element of the flattened parameter it is.
    ``inner`` are the dimensions of the activation that are contracted, in the order of the matrix's columns;
    ``outer`` those of the node that the matrix's rows make, ``rest`` the node's others in the order in which the
    activation has them. ``bias`` is the parameter that is added to the rows, and ``bias_index`` [out] its elements.
    """

    node: fx.Node
    activation: fx.Node
    weight: str
    index: Tensor
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    rest: tuple[int, ...]
    bias: str | None = None
    bias_index: Tensor | None = None

    def rows_in(self, value: Tensor) -> Tensor:
        """The activation as a matrix x [n, in]; n runs over its other dimensions in order."""
        rest = [d for d in range(value.dim()) if d not in self.inner]
        return value.permute(*rest, *self.inner).reshape(-1, self.index.size(1))

    def rows_out(self, value: Tensor) -> Tensor:
        """The node's value as a matrix y [n, out], n as in `rows_in`."""
        return value.permute(*self.rest, *self.outer).reshape(-1, self.index.size(0))

    def value(self, rows: Tensor, like: Tensor) -> Tensor:
        """The node's value, laid out like ``like``, whose matrix (`rows_out`) is ``rows`` [n, out]."""
        order = (*self.rest, *self.outer)
        return rows.reshape(like.permute(order).shape).permute(*(order.index(d) for d in range(like.dim())))

    def matrix(self, parameter: Tensor) -> Tensor:
        """W [out, in] of the parameter's tensor."""
        return parameter.reshape(-1)[self.index.to(parameter.device)]

    def parameter(self, old: Tensor, matrix: Tensor) -> Tensor:
        """The parameter's tensor with the elements that the matrix has replaced."""
        new = old.detach().clone().reshape(-1)
        new[self.index.to(old.device).reshape(-1)] = matrix.reshape(-1).to(old)
        return new.reshape(old.shape)

    def along(self, shape: Sequence[int], axis: int) -> Tensor:
        """The position along ``axis`` of the parameter (of ``shape``) that each matrix element has: [out, in]."""
        stride = 1
        for size in shape[axis + 1 :]:
            stride *= size
        return self.index // stride % shape[axis]

    def line(self, shape: Sequence[int], axis: int, columns: bool) -> Tensor | None:
        """`along` for each column, or each row, of the matrix; None where it differs within one."""
        along = self.along(shape, axis)
        first = along[:1] if columns else along[:, :1]
        return first.flatten() if bool((along == first).all()) else None


def projection(module: fx.GraphModule, node: fx.Node) -> Projection | None:
    """``node`` as a matrix product of activations with a parameter; None when it is none, or when batches, groups or a
    kernel keep it from being one matrix."""
    description = step(node)
    if not isinstance(description, Aligned) or not description.contraction or len(description.operands) < 2:
        return None
    for data, weight in (description.operands[:2], description.operands[1::-1]):
        found = moved_parameter(module, weight.node)
        if found is not None and is_tensor(data.node):
            return _projection(module, node, data, weight, found, description.operands[2:])
    return None


def _projection(
    module: fx.GraphModule,
    node: fx.Node,
    data: Operand,
    weight: Operand,
    found: tuple[str, Tensor],
    added: Sequence[Operand],
) -> Projection | None:
    name, index = found
    inner = [d for d in weight.dims if d is not None and d < 0 and d in data.dims]
    outer = [d for d in weight.dims if d is not None and d >= 0]
    if not inner or any(d in data.dims for d in outer):
        return None
    order: list[int] = [*(weight.dims.index(d) for d in outer), *(weight.dims.index(d) for d in inner)]
    spare = [i for i in range(len(weight.dims)) if i not in order]
    if any(index.size(i) != 1 for i in spare):
        return None
    rest = _rest(node, data, inner)
    if rest is None or sorted((*rest, *outer)) != list(range(len(shape_of(node)))):
        return None
    columns = 1
    for d in inner:
        columns *= index.size(weight.dims.index(d))
    matrix = index.permute(*order, *spare).reshape(-1, columns)
    if matrix.unique().numel() != matrix.numel():
        return None
    bias: str | None = None
    bias_index: Tensor | None = None
    for operand in added:
        moved = moved_parameter(module, operand.node)
        if moved is None or [d for d in operand.dims if d is not None] != outer or moved[1].numel() != matrix.size(0):
            return None
        bias, bias_index = moved[0], moved[1].reshape(-1)
    columns_of = tuple(data.dims.index(d) for d in inner)
    return Projection(node, data.node, name, matrix, columns_of, tuple(outer), rest, bias, bias_index)


def _rest(node: fx.Node, data: Operand, inner: Sequence[int]) -> tuple[int, ...] | None:
    """The dimensions of ``node`` that those of the activation become, without the contracted ones; None when one does
    not come out as it went in (a convolution that strides or pads)."""
    found: list[int] = []
    for size, d in zip(shape_of(data.node), data.dims, strict=True):
        if d in inner:
            continue
        if d is None or -10 < d < 0:
            return None
        # The spatial dimensions of a convolution have numbers of their own, see ops.
        found.append(d if d >= 0 else 2 - 10 - d)
        if shape_of(node)[found[-1]] != size:
            return None
        if d < 0 and any(int(n) != 1 for n in concrete(argument(node, "stride"))):
            return None
    return tuple(found)


def moved_parameter(module: fx.GraphModule, node: fx.Node) -> tuple[str, Tensor] | None:
    """The parameter that ``node`` is, or is moved from, and which of its elements each element of ``node`` is."""
    chain = [node]
    while chain[-1].op != "get_attr":
        move = step(chain[-1])
        if not isinstance(move, Move) or len(set(move.sources)) != 1:
            return None
        chain.append(move.sources[0])
    source = chain[-1]
    held = attribute(module, source.target)
    if not isinstance(held, Tensor) or not held.is_floating_point():
        return None
    numbers = torch.arange(held.numel()).reshape(held.shape)
    value = constant_tensor(node, _Numbered(module, str(source.target), numbers))
    return None if value is None or tuple(value.shape) != shape_of(node) else (str(source.target), value)


class _Numbered(torch.nn.Module):
    """A module in which one name stands for the numbers of a parameter's elements, beside the graph's own constants
    (by which a rewritten graph may select them)."""

    def __init__(self, module: fx.GraphModule, name: str, numbers: Tensor) -> None:
        super().__init__()
        for constant, held in module.named_buffers(recurse=False):
            if constant != name:
                self.register_buffer(constant, held)
        owner: torch.nn.Module = self
        *path, last = name.split(".")
        for part in path:
            child = torch.nn.Module()
            owner.add_module(part, child)
            owner = child
        owner.register_buffer(last, numbers)


def readers(module: fx.GraphModule, parameter: fx.Node) -> list[Projection]:
    """The projections that multiply activations with ``parameter`` (a get_attr node), or with what is moved from it."""
    found: list[Projection] = []
    queue, seen = [parameter], {parameter}
    while queue:
        for user in queue.pop().users:
            if user in seen or not is_tensor(user):
                continue
            seen.add(user)
            description = step(user)
            if isinstance(description, Move):
                queue.append(user)
            elif (made := projection(module, user)) is not None and made.weight == str(parameter.target):
                found.append(made)
    return found


def read_elsewhere(module: fx.GraphModule, made: Projection) -> str:
    """Why the parameters of a projection cannot be changed: something else reads them; '' when nothing does."""
    for name in (made.weight, made.bias):
        nodes = [n for n in module.graph.find_nodes(op="get_attr") if str(n.target) == name]
        if any(len(n.users) != 1 for n in nodes) or len(nodes) > 1:
            return f"parameter {name} is read in several places"
    node = next(n for n in module.graph.find_nodes(op="get_attr") if str(n.target) == made.weight)
    return "" if len(readers(module, node)) == 1 else f"parameter {made.weight} is read in several places"


def weight_of(module: fx.GraphModule, made: Projection) -> Tensor:
    """The matrix W [out, in] of a projection."""
    return made.matrix(torch.as_tensor(attribute(module, made.weight)).detach())


def bias_of(module: fx.GraphModule, made: Projection) -> Tensor | None:
    """The bias [out] of a projection."""
    if made.bias is None or made.bias_index is None:
        return None
    held = attribute(module, made.bias)
    return torch.as_tensor(held).detach().reshape(-1)[made.bias_index.to(held.device)]
