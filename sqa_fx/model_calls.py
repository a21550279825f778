"""Call a student and its teacher on the same batch, and find what they said and on which positions it counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from sqa_fx.batches import as_call, labels_last
from sqa_fx.errors import InputError
from sqa_fx.inputs import Inputs
from sqa_fx.module import ConvertedModule
from sqa_fx.partly import tensors_of

LABELS = ("labels", "label")
"""Names of what a batch holds for a loss; a model that does not take them is called without."""

_FIELDS = ("logits", "sentence_embedding", "text_embeds", "image_embeds", "last_hidden_state", "pooler_output")


def inputs_for(model: nn.Module, batch: Any) -> Inputs:
    """(args, kwargs) for a call of ``model`` on ``batch``: labels only where it takes them, and no cache is asked for.

    Labels are called so in a mapping; in a tuple they are a last entry ``[batch]`` of whole numbers that is one more
    than the model takes. Raises InputError for a batch that is no tensor, tuple or mapping.
    """
    args, kwargs = as_call(batch)
    kwargs = {name: value for name, value in kwargs.items() if name not in LABELS or _takes(model, name)}
    if _labels_last(model, args):
        args = args[:-1]
    cached = hasattr(model, "config") and hasattr(model, "main_input_name") and _takes(model, "use_cache")
    return args, {"use_cache": False, **kwargs} if cached else kwargs


def labels_in(model: nn.Module, batch: Any) -> Tensor | None:
    """The labels that ``batch`` brings, see `inputs_for`."""
    args, kwargs = as_call(batch)
    found = next((kwargs[name] for name in LABELS if name in kwargs), None)
    if found is None and _labels_last(model, args):
        found = args[-1]
    return found if isinstance(found, Tensor) else None


def _labels_last(model: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether the last of ``args`` is one too many for the model and looks like labels."""
    return len(args) > 1 and labels_last(args, _room(model))


def _room(model: nn.Module) -> int:
    """How many positional inputs a call takes."""
    if isinstance(model, ConvertedModule):
        return len(model._binder._captured) if model._binder.signature is not None else len(model.example_args)
    kinds = [p.kind for p in inspect.signature(_forward(model)).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 2**31
    return sum(k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds)


def _takes(model: nn.Module, name: str) -> bool:
    if isinstance(model, ConvertedModule):
        return name in model._binder._captured or name in model.example_kwargs
    return name in inspect.signature(_forward(model)).parameters


def _forward(model: nn.Module) -> Callable[..., Any]:
    """The method that says what a call takes; that of a partly converted model is its copy's."""
    found: Callable[..., Any] = getattr(model, "eager", model).forward
    return found


def on_device(value: Any, device: torch.device) -> Any:
    """The same nest of containers with its tensors on ``device``."""
    if isinstance(value, Mapping) and not isinstance(value, dict):
        value = dict(value)  # what tokenizers return is a mapping of its own kind
    return pytree.tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, value)


def main_output(outputs: Any, field: str | None = None) -> tuple[str, Tensor]:
    """The field and the tensor that a model's outputs are about: logits or embeddings of a known name, else the first
    floating tensor with two or more axes (field ''). With ``field``, that one.

    Raises InputError when there is none.
    """
    if isinstance(outputs, Mapping):
        for name in _FIELDS if field is None else (field,):
            value = outputs.get(name)
            if isinstance(value, Tensor):
                return name, value
    if not field:
        tensors = [t for t in tensors_of(outputs) if t.is_floating_point()]
        for tensor in sorted(tensors, key=lambda t: t.dim() < 2):
            return "", tensor
    raise InputError(
        f"the outputs hold no {field or 'floating tensor'}: they are a {type(outputs).__name__}"
        + (f" with {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else "")
    )


def both_outputs(student: Any, teacher: Any) -> tuple[str, Tensor, Tensor]:
    """`main_output` of both. Raises InputError when they differ in shape or the teacher's has no such field."""
    field, own = main_output(student)
    _, wanted = main_output(teacher, field)
    if own.shape != wanted.shape:
        raise InputError(
            f"the student's {field or 'output'} is {list(own.shape)} and the teacher's {list(wanted.shape)}: they must "
            "be of the same model before and after its conversion"
        )
    return field, own, wanted


def valid_positions(batch: Any, shape: torch.Size) -> Tensor | None:
    """Which of the positions ``[batch, sequence]`` (``shape``) count by the batch's attention mask: bool, or None for
    all. A decoder's positions have ``decoder_attention_mask``."""
    if not isinstance(batch, Mapping):
        return None
    decodes = "decoder_input_ids" in batch or "decoder_attention_mask" in batch
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == shape else None


def row_count(batch: Any) -> int:
    """The size of the first axis of the first tensor. Raises InputError without any."""
    args, kwargs = as_call(batch)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
    if not tensors:
        raise InputError("a batch holds no tensor with a batch axis")
    return int(tensors[0].shape[0])


def token_count(batch: Any) -> int:
    """How many tokens a batch has: those that its mask counts, else all token ids, else its rows."""
    args, kwargs = as_call(batch)
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids", args[0] if args else None)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int(mask.sum())
    if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
        return ids.numel()
    return row_count(batch)
