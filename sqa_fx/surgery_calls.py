"""Other ways of calling a model than the one that was captured: padded, generating, and what the user names.

A forward pass reads other attributes when it gets a padding mask or a cache. The graph knows nothing of such calls, so
here the masked original itself, in eager, says what the changed model must give.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sqa_fx.passes.capture_ways import fresh
from sqa_fx.surgery_run import Inputs

Function = Callable[[nn.Module], Any]
STEPS = 3
"""Tokens that are generated."""


@dataclass(frozen=True)
class FurtherCall:
    """A call of the model; ``required``: the user asked for it, so that a model on which it fails is an error."""

    label: str
    function: Function
    required: bool = False


def further_calls(model: nn.Module, inputs: Inputs, also: Sequence[Function]) -> list[FurtherCall]:
    """The calls of ``also``, and those that the model offers: with an ``attention_mask`` [batch, tokens] that leaves
    tokens out where it takes one and the example has none, and ``generate()``."""
    found = [FurtherCall(f"also[{i}]", function, required=True) for i, function in enumerate(also)]
    args, kwargs = inputs
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point() or tokens.shape[1] < 3:
        return found
    mask = torch.ones_like(tokens, dtype=torch.int64)
    mask[0, :2] = 0  # on the left, where generation wants padding
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    if takes_mask and kwargs.get("attention_mask") is None:

        def padded(model: nn.Module) -> Any:
            own, named = fresh(inputs)
            return model(*own, **{**named, "attention_mask": mask.clone()})

        found.append(FurtherCall("padded", padded))
    can_generate = getattr(model, "can_generate", None)
    if callable(can_generate) and can_generate():

        def generated(model: nn.Module) -> Any:
            made: Any = model.generate(  # type: ignore[operator]
                tokens.clone(),
                **({"attention_mask": mask.clone()} if takes_mask else {}),
                max_new_tokens=STEPS,
                min_new_tokens=STEPS,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
            return made.sequences, made.logits

        found.append(FurtherCall("generate", generated))
    return found
