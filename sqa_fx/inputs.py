"""Example inputs: what a model says of itself, and the ``name:dtype[shape]`` texts of the command line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sqa_fx.errors import InputError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

SPEC_GRAMMAR = "name:dtype[shape], for example input_ids:int64[2,16] or x:float32[2,3,224,224]"
_SPEC = re.compile(r"\s*(?P<name>[A-Za-z_]\w*)\s*:\s*(?P<dtype>\w+)\s*\[(?P<shape>[\d\s,]*)\]\s*")
_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
}
_BATCH = 2
# Lengths that differ from each other and from usual sizes, so that no axis is mistaken for another.
_SEQUENCE, _DECODER_SEQUENCE = 11, 9
_SEED = 0
_NOT_TOKENS = ("token_type_ids", "position_ids")


def vocabulary_size(model: nn.Module) -> int | None:
    """Number of token ids that the model knows: its config's ``vocab_size``, else the rows of its first embedding."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        size = getattr(part, "vocab_size", None)
        if isinstance(size, int) and size > 0:
            return size
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)


def parse_input_spec(text: str, *, vocabulary: int | None = None, seed: int = _SEED) -> tuple[str, Tensor]:
    """Make the input that ``text`` names: ``name:dtype[shape]``.

    Floating inputs are standard normal; integers uniform in ``[0, vocabulary)``, or in ``[0, 2)`` without one or for
    inputs that count something else than tokens; bools, and all that is called a mask, are True or 1 everywhere. The
    same text and seed give the same tensor.

    Raises:
        InputError: the text does not follow the grammar, or names an unknown dtype.
    """
    match = _SPEC.fullmatch(text)
    if match is None:
        raise InputError(f"cannot read the input {text!r}: write it as {SPEC_GRAMMAR}")
    dtype = _DTYPES.get(match["dtype"])
    if dtype is None:
        raise InputError(f"input {text!r}: unknown dtype {match['dtype']!r}; use one of {', '.join(sorted(_DTYPES))}")
    sizes = [part.strip() for part in match["shape"].split(",")] if match["shape"].strip() else []
    if not all(size.isdigit() for size in sizes):
        raise InputError(f"input {text!r}: every size must be a number; write it as {SPEC_GRAMMAR}")
    return match["name"], make_input(match["name"], [int(size) for size in sizes], dtype, vocabulary, seed)


def make_input(name: str, shape: list[int], dtype: torch.dtype, vocabulary: int | None, seed: int = _SEED) -> Tensor:
    """The input of that name, shape and dtype, with the values that `parse_input_spec` tells of."""
    if name.endswith("mask"):
        return torch.ones(shape, dtype=dtype)
    return _random(shape, dtype, _generator(seed), None if name in _NOT_TOKENS else vocabulary)


def bind_inputs(target: nn.Module | torch.export.ExportedProgram, tensors: Mapping[str, Tensor]) -> Inputs:
    """Lay named tensors out as ``(args, kwargs)`` for a call of ``target``.

    A module takes them by keyword; an exported program takes those first that it was exported with as positional.

    Raises:
        InputError: a name that the call does not have, or one that an exported program needs and that is not given.
    """
    if isinstance(target, torch.export.ExportedProgram):
        names = list(target.graph_signature.user_inputs)
        texts = [name for name in names if isinstance(name, str)]
        _refuse_unknown(tensors, texts)
        missing = [name for name in texts if name not in tensors]
        if missing or len(texts) != len(names):
            raise InputError(f"the exported program needs all of its inputs {texts}; not given: {missing}")
        positional = target.call_spec.in_spec.children()[0].num_leaves if target.call_spec.in_spec else len(names)
        return tuple(tensors[name] for name in texts[:positional]), {name: tensors[name] for name in texts[positional:]}
    parameters = inspect.signature(target.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        _refuse_unknown(tensors, list(parameters))
    return (), {**tensors, **_no_cache(target)}


def example_inputs(model: nn.Module) -> Inputs | None:
    """Example inputs ``(args, kwargs)`` from what the model says of itself, or None where it says nothing.

    transformers models are asked for their config and ``main_input_name``, timm models for ``pretrained_cfg``. Tokens
    are ``[batch, sequence]``, images ``[batch, channels, height, width]``, audio features ``[batch, bins, frames]``.
    Tensors are on the model's device and in its dtype, and are the same on every call.
    """
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        return _transformers_inputs(model)
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if cfg is not None:
        return _timm_inputs(model, cfg)
    return None


def _transformers_inputs(model: nn.Module) -> Inputs | None:
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    main: Any = model.main_input_name
    if not isinstance(main, str):
        return None
    generator = _generator(_SEED)
    kwargs: dict[str, Tensor] = {}
    wanted = [main]
    if getattr(config, "text_config", None) is not None and getattr(config, "vision_config", None) is not None:
        # A two-tower model names one main input, but its forward needs both.
        wanted += [name for name in ("input_ids", "pixel_values") if name in parameters and name != main]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        wanted.append("decoder_input_ids")
    for name in wanted:
        shape = _transformers_shape(name, config)
        if shape is None:
            return None
        tokens = name.endswith("_ids")
        kwargs[name] = _random(
            shape, torch.int64 if tokens else _dtype(model), generator, vocabulary_size(model) if tokens else None
        ).to(_device(model))
    return (), {**kwargs, **_no_cache(model)}


def _no_cache(model: nn.Module) -> dict[str, bool]:
    """Ask a transformers model for no cache: it is an output that carries heads, and nobody asked for one here."""
    ours = hasattr(model, "config") and hasattr(model, "main_input_name")
    return {"use_cache": False} if ours and "use_cache" in inspect.signature(model.forward).parameters else {}


def _transformers_shape(name: str, config: Any) -> list[int] | None:
    """Shape of the input ``name`` of a transformers model, or None where its config does not tell."""
    if name in ("input_ids", "decoder_input_ids"):
        text = getattr(config, "text_config", None) or config
        longest = getattr(text, "max_position_embeddings", None)
        length = _SEQUENCE if name == "input_ids" else _DECODER_SEQUENCE
        return [_BATCH, min(length, longest) if isinstance(longest, int) and longest > 0 else length]
    if name == "pixel_values":
        vision = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", None)
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        return [_BATCH, getattr(vision, "num_channels", 3), height, width]
    bins = getattr(config, "num_mel_bins", None)
    if name == "input_features" and bins is not None:
        frames = getattr(config, "max_source_positions", None)
        # Two frames make one position: the stride of the convolution in front of the encoder.
        return None if frames is None else [_BATCH, bins, 2 * frames]
    if name == "input_values":
        if bins is not None and getattr(config, "max_length", None):
            return [_BATCH, config.max_length, bins]
        strides = getattr(config, "conv_stride", None)
        if strides is None:
            return None
        samples = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(strides), strict=True):
            samples = (samples - 1) * stride + kernel
        ratio = 1
        for stride in strides:
            ratio *= stride
        return [_BATCH, samples + (_SEQUENCE - 1) * ratio]
    return None


def _timm_inputs(model: nn.Module, cfg: Any) -> Inputs | None:
    size = cfg.get("input_size") if isinstance(cfg, Mapping) else getattr(cfg, "input_size", None)
    if size is None:
        return None
    channels, height, width = (int(n) for n in size)
    patch = getattr(model, "patch_embed", None)
    if getattr(patch, "img_size", None) is not None:  # what it was built with, where that is not the default
        height, width = (int(n) for n in patch.img_size)  # type: ignore[union-attr]
    projection = getattr(patch, "proj", None)
    if isinstance(projection, nn.Conv2d):
        channels = projection.in_channels
    image = _random([_BATCH, channels, height, width], _dtype(model), _generator(_SEED), None)
    return (image.to(_device(model)),), {}


def _random(shape: list[int], dtype: torch.dtype, generator: torch.Generator, vocabulary: int | None) -> Tensor:
    if dtype is torch.bool:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    high = min(vocabulary or 2, torch.iinfo(dtype).max)
    return torch.randint(0, high, shape, generator=generator, dtype=dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _refuse_unknown(tensors: Mapping[str, Tensor], names: list[str]) -> None:
    unknown = sorted(set(tensors) - set(names))
    if unknown:
        raise InputError(f"the model has no input {', '.join(unknown)}; its inputs are {', '.join(names)}")


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
