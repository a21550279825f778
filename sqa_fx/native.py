"""The stock model whose config says SQA, searched and proved: what loads without any code of sqa-fx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sqa_fx.config_search import Change, Search, cut_shapes, fields_of, head_groups, unevenness
from sqa_fx.errors import InputError, VerifyError, first_line
from sqa_fx.inputs import Inputs
from sqa_fx.module import ConvertedModule
from sqa_fx.native_proof import NativeProof, prove_native
from sqa_fx.partly import PartlyConvertedModule
from sqa_fx.plan import Plan
from sqa_fx.runners import module_dtype
from sqa_fx.stock_model import Stock, stock_of, with_values
from sqa_fx.surgery_layout import Order, arranged_tensors, orders

_Converted = TypeVar("_Converted", ConvertedModule, PartlyConvertedModule, ConvertedModule | PartlyConvertedModule)

MOST_PROOFS = 6
"""Sets of changes with the right shapes that are tried numerically."""


@dataclass(frozen=True)
class Native:
    """A stock model with the cut weights, the changes of its config, and the proof that it is the converted one."""

    model: Any
    changes: tuple[Change, ...]
    proof: NativeProof
    order: Order = "plan"
    """In which order the heads lie in fused parameters: the class may expect another one than the plan's."""

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the config that changed, by dotted path."""
        return fields_of(self.changes)


@dataclass(frozen=True)
class NotNative:
    """Why no config of the stock class says what the plan does."""

    why: str


def find_native(
    stock: Stock, reference: nn.Module, plan: Plan, state: Mapping[str, Tensor], sets: Sequence[tuple[str, Inputs]]
) -> Native | NotNative:
    """The stock model that computes what ``reference`` (with ``state`` as its weights) does, or why there is none."""
    uneven = unevenness(plan)
    if uneven is not None:
        return NotNative(f"{uneven}, and a field of the config holds for all of them")
    search = Search(stock, head_groups(plan), cut_shapes(stock.bare(), plan))
    failures: list[str] = []
    for changes in search.candidates():
        fields = with_values(stock.fields, [(c.path, c.value) for c in changes])
        for order in orders(plan):
            try:
                model = filled(stock, fields, arranged_tensors(state, plan, order), module_dtype(reference))
                return Native(model, changes, prove_native(reference, model, plan, sets, order), order)
            except VerifyError as error:
                failures.append(f"with {', '.join(map(str, changes))} the shapes are right, but {first_line(error)}")
        if len(failures) >= MOST_PROOFS:
            break
    return NotNative(failures[0] if failures else no_fields(stock, search))


def no_fields(stock: Stock, search: Search) -> str:
    """That the search found nothing, and what came nearest."""
    near = f": {search.nearest}" if search.nearest else ""
    return f"no field of {stock.config_class.__name__} gives {stock.name} these shapes{near}"


def filled(stock: Stock, fields: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The stock model of ``fields`` with the weights ``state``, ties kept. Raises VerifyError where they do not fit."""
    try:
        return stock.fill(stock.build(fields, dtype), state)
    except Exception as error:  # whatever the class raises on a config it was not made for
        raise VerifyError(f"{stock.name} cannot be built: {first_line(error)}") from error


def remember_stock(result: _Converted, model: Any) -> _Converted:
    """Let ``result``, a conversion of ``model``, remember the stock class, its config, and the tensors of the state
    dict that no graph reads. Returns it."""
    stock = stock_of(model) if isinstance(model, nn.Module) else None
    if stock is not None:
        held = result.state_dict()
        result.__dict__["stock"] = stock
        result.__dict__["unread"] = {n: t.detach() for n, t in model.state_dict().items() if n not in held}
    return result


def stock_behind(model: nn.Module, original: nn.Module | None) -> Stock:
    """The stock class that ``model`` was converted from. Raises InputError where that is not known, or none."""
    known = getattr(model, "stock", None)
    stock = stock_of(original) if original is not None else known
    if stock is None:
        stock = stock_of(model.eager if isinstance(model, PartlyConvertedModule) else model)
    if isinstance(stock, Stock):
        return stock
    if original is not None:
        raise InputError(f"{type(original).__name__} is no model of a class that transformers itself has")
    raise InputError(
        "the converted module does not say which transformers model it was made from (it was loaded from a file, or is "
        "none of a class that transformers itself has): pass original=model"
    )


def whole_state(model: nn.Module, stock: Stock, original: nn.Module | None) -> dict[str, Tensor]:
    """The state dict of the converted ``model`` under all names that the stock class has; what the graph does not read
    comes from the original. Raises InputError when a tensor is nowhere."""
    names = list(stock.bare().state_dict())
    held = {**getattr(model, "unread", {}), **model.state_dict()}
    if original is not None:
        held = {**original.state_dict(), **held}
    missing = [name for name in names if name not in held]
    if missing:
        raise InputError(f"the converted module has no {', '.join(missing[:5])}: pass original=model")
    return {name: held[name] for name in names}
