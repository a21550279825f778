"""``generate()`` over converted graphs: a thin copy of a transformers model whose every call runs a converted graph.

``generate()`` calls a model in a few forms: the prompt with an empty cache, one token with a filled one, and for an
encoder-decoder the encoder. Each form becomes a graph of its own. All of them follow one plan and share one set of
weights, and the caches that they pass on hold the keys and values of the new KV heads only.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from sqa_fx.api import convert
from sqa_fx.errors import InputError, NoAttentionError
from sqa_fx.module import ConvertedModule
from sqa_fx.passes.capture_ways import register_caches
from sqa_fx.passes.record import Call
from sqa_fx.plan import Plan
from sqa_fx.request import Request

_STEPS = 3  # the prompt, the first step with a cache, and one more that shows which sizes grow


class _Enough(Exception):
    """Raised to leave ``generate()`` once every form of call was seen."""


class GenerationForms:
    """The converted graphs of one model or encoder, of which every call takes the one that it fits.

    ``graphs`` are the ConvertedModules in the order in which ``generate()`` first needs them.
    """

    def __init__(self, name: str, graphs: Sequence[ConvertedModule]) -> None:
        self.name, self.graphs = name, list(graphs)

    @property
    def plan(self) -> Plan:
        """The plan that all graphs follow."""
        return self.graphs[0].plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the graph that takes this call; a cache among the inputs is brought up to date.

        Raises InputError when no graph takes it.
        """
        reasons = []
        for graph in self.graphs:
            try:
                outputs = graph(*args, **kwargs)
            except InputError as error:
                reasons.append(str(error))
                continue
            return _with_cache(outputs, kwargs)
        raise InputError(
            f"generate() calls {self.name} in a form that was not seen when it was converted: {'; '.join(reasons)}. "
            "Convert with example inputs and generate options like those of this call (a batch above 1 frees its size)"
        )


def convert_for_generation(
    model: nn.Module,
    *,
    hq: Request = None,
    hkv: Request = None,
    kwargs: Mapping[str, Any],
    generate: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A model like ``model`` whose ``generate()`` runs converted graphs; ``model`` itself is not changed.

    ``kwargs`` are example inputs of ``model.generate`` (``input_ids`` [batch, length], with a batch and a length above
    1, so that both stay free), and ``generate`` its options where they change how the model is called
    (``cache_implementation="static"``, ``max_new_tokens``). ``hq``, ``hkv`` and ``options`` are those of
    :func:`sqa_fx.convert`. The result's ``sqa_forms`` are the graphs of the model, ``sqa_encoder_forms`` those of its
    encoder (or None), for export; its own parameters are the original ones, which the graphs do not read.

    Raises InputError for a model without ``generate()``, and what convert raises.
    """
    if not callable(getattr(model, "generate", None)):
        raise InputError(f"{type(model).__name__} has no generate(); use sqa_fx.convert for a plain module")
    encoder = _encoder_of(model)
    calls = _record(model, encoder, kwargs, generate or {})
    if len(calls[model]) < 2:
        raise InputError("generate() made one call only with these options: let it make three tokens (max_new_tokens)")
    twin: Any = copy.copy(model)
    twin._modules = dict(model._modules)
    forms = _forms(type(model).__name__, model, calls[model], hq, hkv, options)
    twin.sqa_forms, twin.sqa_encoder_forms = forms, None
    if encoder is not None and calls.get(encoder):
        name = next(n for n, m in model.named_modules() if m is encoder)
        with contextlib.suppress(NoAttentionError):
            own = _within(hq, name), _within(hkv, name)
            encoded = _forms(f"the encoder of {type(model).__name__}", encoder, calls[encoder], *own, options)
            shell = _calling(copy.copy(encoder), encoded)
            twin.sqa_encoder_forms = encoded
            twin.get_encoder = lambda *args, **kwargs: shell
    return _calling(twin, forms)


def _calling(module: nn.Module, forms: GenerationForms) -> nn.Module:
    """``module`` with its forward replaced by ``forms``, under the same signature."""
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return forms(*args, **kwargs)

    module.forward = forward
    return module


def _encoder_of(model: nn.Module) -> nn.Module | None:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    get: Callable[[], nn.Module] = model.get_encoder  # type: ignore[assignment]
    return get()


def _record(
    model: nn.Module, encoder: nn.Module | None, kwargs: Mapping[str, Any], generate: Mapping[str, Any]
) -> dict[nn.Module, list[Call]]:
    """The first calls that ``generate()`` makes of the model and its encoder; caches are copied as they came."""
    calls: dict[nn.Module, list[Call]] = {model: []}

    def enter(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module is model and len(calls[model]) == _STEPS:
            raise _Enough
        calls.setdefault(module, []).append(Call(*copy.deepcopy((args, named))))

    hooks = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in (model, encoder) if m is not None]
    try:
        with torch.no_grad(), contextlib.suppress(_Enough):
            settings = {"do_sample": False, "disable_compile": True, **generate}
            model.generate(**kwargs, **settings)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _forms(
    name: str, model: nn.Module, calls: Sequence[Call], hq: Request, hkv: Request, options: Mapping[str, Any]
) -> GenerationForms:
    """A converted graph for every form among ``calls``; all share the weights of the first one."""
    graphs: list[ConvertedModule] = []
    seen: list[Any] = []
    for call in calls:
        if (form := _form_of(call)) in seen:
            continue
        seen.append(form)
        request = {"hq": hq, "hkv": hkv} if not graphs else {"plan": graphs[0].plan}
        graph = convert(model, args=call.args, kwargs=call.kwargs, **request, **options)
        if not isinstance(graph, ConvertedModule):
            raise InputError(f"{name} cannot be exported as a whole in the form that generate() calls it in")
        if graphs:
            share_parameters(graphs[0], graph)
        graphs.append(graph)
    return GenerationForms(name, graphs)


def _form_of(call: Call) -> Any:
    """Equal for calls that one graph can serve: sizes above 1 may be free, those of 1 are fixed by torch.export."""
    register_caches(call.args, call.kwargs)
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    kinds = [
        (leaf.dtype, tuple(min(size, 2) for size in leaf.shape)) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    ]
    return spec, kinds


def share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` use the parameters and buffers of ``source`` wherever both have one of the same name and shape."""
    held = dict((*source.named_parameters(remove_duplicate=False), *source.named_buffers(remove_duplicate=False)))
    for path, module in target.named_modules():
        for table in (module._parameters, module._buffers):
            for name, own in table.items():
                other = held.get(f"{path}.{name}" if path else name)
                if own is not None and other is not None and other.shape == own.shape:
                    table[name] = other


def _with_cache(outputs: Any, kwargs: Mapping[str, Any]) -> Any:
    """``outputs`` with the caller's own cache object in place of the one that the graph made, holding its contents."""
    given = [v for v in kwargs.values() if _holds_cache(v)]
    if isinstance(outputs, MutableMapping):
        for name, value in list(outputs.items()):
            same = next((g for g in given if type(g) is type(value)), None)
            if same is not None and value is not same:
                vars(same).update(vars(value))
                outputs[name] = same
    return outputs


def _holds_cache(value: Any) -> bool:
    known = type(value) in pytree.SUPPORTED_NODES and hasattr(value, "__dict__")
    return known and not isinstance(value, Mapping | Tensor) and hasattr(value, "get_seq_length")


def _within(request: Request, path: str) -> Request:
    """A request by site patterns as the submodule at ``path`` sees it."""
    if not isinstance(request, Mapping):
        return request
    return {pattern.removeprefix(f"{path}."): wanted for pattern, wanted in request.items()}
