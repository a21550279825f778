"""A stock model after surgery that computes what a converted module computes: for architectures whose config has no
words for SQA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from sqa_fx.errors import SqaError, first_line
from sqa_fx.inputs import Inputs
from sqa_fx.native_proof import NativeProof, prove_native
from sqa_fx.plan import Plan
from sqa_fx.runners import module_dtype
from sqa_fx.stock_model import Stock
from sqa_fx.surgery import convert_
from sqa_fx.surgery_layout import Order, arranged_tensors, orders
from sqa_fx.surgery_record import Surgery


@dataclass(frozen=True)
class Operated:
    """A stock model after surgery with the cut weights, the record of the surgery, and the proof."""

    model: Any
    surgery: Surgery
    proof: NativeProof
    order: Order


def find_surgery(stock: Stock, plan: Plan, example: Inputs) -> Surgery | str:
    """The surgery that makes a model of the stock class follow ``plan``, searched and proved on one with random
    weights; or why there is none."""
    cuts = Plan(plan.sites, plan.parameters, plan.inputs)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            twin = stock.build()
            floats = pytree.tree_map(
                lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, example
            )
            return convert_(twin, plan=cuts, args=floats[0], kwargs=floats[1]).surgery
        except SqaError as error:
            return first_line(error)


def operated(
    stock: Stock,
    surgery: Surgery,
    reference: nn.Module,
    plan: Plan,
    state: Mapping[str, Tensor],
    sets: Sequence[tuple[str, Inputs]],
    tried: Sequence[Order] | None = None,
) -> Operated | str:
    """The stock model after ``surgery`` with the weights ``state``, proved against ``reference``; or what is wrong.
    Heads in fused parameters may have to lie in one of the orders ``tried`` (default: any)."""
    failed = ""
    for order in orders(plan) if tried is None else tried:
        try:
            model = stock.build(dtype=module_dtype(reference))
            surgery.apply(model)
            stock.fill(model, arranged_tensors(state, plan, order))
            return Operated(model, surgery, prove_native(reference, model, plan, sets, order), order)
        except (SqaError, RuntimeError) as error:
            failed = failed or first_line(error)
    return failed


def with_tokens(proof: NativeProof, said: str) -> NativeProof:
    """The proof with what was found of generated tokens."""
    return replace(proof, generated=said)
