"""Prove that a stock class, built from a changed config, computes what a converted module computes.

Both get the same weights. With the weights of the model as they are, a wrong scale or rotation of the scores may drown
in rounding (an untrained model hardly looks at its scores); so what the plan cuts is first filled with random numbers
that make scores of ordinary size, and that proof counts only if the outputs notice when the scores are changed a
little. Then the weights themselves are compared, and for models that generate, tokens.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sqa_fx.errors import VerifyError, first_line
from sqa_fx.inputs import Inputs
from sqa_fx.module import ConvertedModule
from sqa_fx.partly import tensors_of
from sqa_fx.passes.other_sizes import other_inputs
from sqa_fx.passes.verify import TOLERANCE, distance
from sqa_fx.plan import Plan
from sqa_fx.runners import module_dtype
from sqa_fx.stock_model import quiet
from sqa_fx.surgery_layout import Order, arranged_tensors

_LOOSEST = TOLERANCE[torch.float32]  # stock classes cast to float32 on the way (norms, rotary embedding)
_NOTICED = 20.0
_NEW_TOKENS = 8


@dataclass(frozen=True)
class NativeProof:
    """What was compared; errors are relative to the largest value of an output."""

    error: float
    tolerance: float
    own_error: float
    """With the model's own weights; the one before is with random weights."""
    noticed: float
    """How far the outputs move when all scores grow by a quarter: what a wrong scale would have done."""
    precision: str
    sizes: tuple[str, ...]
    generated: str

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {**vars(self), "sizes": list(self.sizes)}

    def line(self) -> str:
        """As a line of text."""
        return (
            f"outputs equal at {len(self.sizes)} sizes ({', '.join(self.sizes)}) in {self.precision}: relative error "
            f"{self.error:.2g} with random weights, {self.own_error:.2g} with the model's own; {self.generated}"
        )


def input_sets(reference: nn.Module, example: Inputs) -> list[tuple[str, Inputs]]:
    """The example and other sizes, as far as the converted graph takes them; without a graph, the example and its first
    row."""
    args, kwargs = example
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)), is_leaf=lambda x: x is None)
    found = [("example", example)]
    if isinstance(reference, ConvertedModule):
        for name, forms in other_inputs(reference.graph_module.graph, leaves):
            for form in forms:
                inputs: Inputs = pytree.tree_unflatten(form, spec)
                try:
                    with torch.no_grad():
                        reference(*inputs[0], **inputs[1])
                except Exception:  # the model does not run at this size
                    continue
                found.append((name, inputs))
                break
        return found
    rows = {t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim() > 1}
    if len(rows) == 1 and rows.pop() > 1:
        first = [t[:1] if isinstance(t, Tensor) and t.dim() > 1 else t for t in leaves]
        found.append(("batch 1", pytree.tree_unflatten(first, spec)))
    return found


def prove_native(
    reference: nn.Module, stock: nn.Module, plan: Plan, sets: Sequence[tuple[str, Inputs]], order: Order = "plan"
) -> NativeProof:
    """Compare ``stock`` with ``reference``, whose weights it has, heads in fused ones in ``order``. Neither is changed.

    Raises VerifyError, saying what differs.
    """
    widened = _widened(stock, sets[0][1])
    wide = widened is not None
    mine, theirs = stock, reference
    if widened is not None:
        mine = widened
        theirs = reference if isinstance(reference, ConvertedModule) else copy.deepcopy(reference).double()
    tolerance = _LOOSEST if wide else max(_LOOSEST, TOLERANCE.get(module_dtype(stock), _LOOSEST))
    precision = "float64" if wide else str(module_dtype(stock)).removeprefix("torch.")
    own = _apart(theirs, mine, sets, wide)
    if not own <= tolerance:
        raise VerifyError(f"with the model's weights its outputs differ by {own:.3g} (relative)")
    state = _ordinary_scores(reference.state_dict(), plan)
    a, b = _with_state(theirs, state), _with_state(mine, arranged_tensors(state, plan, order))
    error = _apart(a, b, sets, wide)
    if not error <= tolerance:
        raise VerifyError(f"with random weights its outputs differ by {error:.3g} (relative)")
    noticed = _noticed(b, sets[0][1], wide)
    if not noticed > _NOTICED * max(error, 1e-12):
        raise VerifyError(
            f"its outputs differ by {error:.3g} (relative), and a change of the scores moves them by {noticed:.3g} "
            "only: nothing can be concluded"
        )
    return NativeProof(error, tolerance, own, noticed, precision, tuple(name for name, _ in sets), "no tokens compared")


def tokens_agree(reference: nn.Module, stock: Any, example: Inputs) -> str:
    """Let ``stock`` generate greedily with its cache, and compare each token with what ``reference`` says without one.

    Returns what was found, as text. Raises VerifyError when a token differs.
    """
    prompt = example[1].get("input_ids")
    if not type(stock).can_generate() or not isinstance(prompt, Tensor) or prompt.dim() != 2:
        return "it does not generate from tokens"
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=_NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=0)
    start = getattr(stock.config, "decoder_start_token_id", None)
    decodes = bool(getattr(stock.config, "is_encoder_decoder", False))
    if decodes:
        settings.decoder_start_token_id = 0 if start is None else start
    with torch.no_grad(), quiet():
        # With a mask, as otherwise tokens that look like padding would be left out.
        tokens = stock.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        named = {"input_ids": prompt, "decoder_input_ids": tokens} if decodes else {"input_ids": tokens}
        kwargs = {**example[1], **named}
        held = {n: torch.ones_like(tokens) for n in kwargs if n == "attention_mask" and not decodes}
        kwargs |= held
        by = "the converted graph"
        try:
            logits = _logits(reference(*example[0], **kwargs))
        except Exception:  # a graph of fixed sizes: the stock class itself, without a cache, was proved equal to it
            by, logits = "itself without a cache", _logits(stock(**{**kwargs, "use_cache": False}))
    begin = 1 if decodes else prompt.shape[1]
    said, new = logits[:, begin - 1 : tokens.shape[1] - 1].double(), tokens[:, begin:]
    behind = said.amax(-1) - said.gather(-1, new[..., None]).squeeze(-1)
    ends = stock.generation_config.eos_token_id
    ended = torch.isin(new, torch.as_tensor([] if ends is None else ends, dtype=new.dtype).reshape(-1))
    live = (ended.cumsum(-1) - ended.long()) == 0  # what follows an end is padding
    short = float(behind[live].max() / said.abs().max())
    if not short <= TOLERANCE.get(module_dtype(stock), _LOOSEST):
        raise VerifyError(f"greedy generation with its KV cache takes other tokens than {by}")
    count = int(live.sum(-1).max())
    return f"{count} greedy tokens with its KV cache are those of {by}"


def same_outputs(made: nn.Module, loaded: nn.Module, example: Inputs) -> None:
    """Raise VerifyError unless two models of the same weights compute the same on the example."""
    for a, b in zip(_run(made, example, False), _run(loaded, example, False), strict=True):
        if not distance(a, b) <= TOLERANCE.get(a.dtype, _LOOSEST):
            raise VerifyError("what is loaded from it computes something else")


def _logits(outputs: Any) -> Tensor:
    found = outputs["logits"] if isinstance(outputs, Mapping) else tensors_of(outputs)[0]
    assert isinstance(found, Tensor)
    return found


def _apart(a: nn.Module, b: nn.Module, sets: Sequence[tuple[str, Inputs]], wide: bool) -> float:
    """The largest relative difference of an output at any size; ``wide``: they run in float64."""
    worst = 0.0
    for _, inputs in sets:
        expected, actual = _run(a, inputs, wide), _run(b, inputs, wide)
        if len(expected) != len(actual) or not expected:
            return float("inf")
        pairs = zip(expected, actual, strict=True)
        worst = max(worst, *(distance(e, r.to(e.dtype) if r.is_floating_point() else r) for e, r in pairs))
    return worst


def _run(module: nn.Module, inputs: Inputs, wide: bool) -> list[Tensor]:
    graph = isinstance(module, ConvertedModule)  # it widens its inputs itself
    args, kwargs = pytree.tree_map(
        lambda x: x.double() if wide and not graph and isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )
    call = module.widened if wide and isinstance(module, ConvertedModule) else module
    state = torch.random.get_rng_state()
    try:
        with torch.no_grad(), quiet():
            return tensors_of(call(*args, **kwargs))
    except Exception as error:  # whatever a stock class raises on a config it was not made for
        raise VerifyError(f"{type(module).__name__} does not run: {first_line(error)}") from error
    finally:
        torch.random.set_rng_state(state)


def _widened(model: nn.Module, inputs: Inputs) -> nn.Module | None:
    """The model in float64; None where it has no kernels for that, or float64 copies of its weights do not fit into
    memory."""
    held = sum(p.numel() for p in model.parameters()) * 8
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if module_dtype(model) != torch.float64 and 3 * held > free:
        return None
    widened = copy.deepcopy(model).double()
    try:
        _run(widened, inputs, True)
    except VerifyError:  # in its own dtype it may run; if not, that is told
        return None
    return widened


def _ordinary_scores(state: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """``state`` with random numbers in all that the plan cuts, such that projections keep the size of what they read;
    tied tensors stay tied."""
    generator = torch.Generator().manual_seed(0)
    cuts = {p.name: p for p in plan.parameters}
    made: dict[int, Tensor] = {}
    found = {}
    for name, held in state.items():
        cut, key = cuts.get(name), held.data_ptr()
        if cut is None or not held.is_floating_point() or not held.numel():
            found[name] = made.get(key, held) if held.numel() else held
            continue
        if key not in made:
            noise = torch.randn(held.shape, generator=generator, dtype=torch.float64)
            if held.dim() == 1:
                made[key] = (1 + noise / 4 if bool((held > 0.5).all()) else noise / 4).to(held)
            else:
                reads_heads = any(b.role == "o" for b in cut.blocks)
                fan_in = held.shape[cut.axis] if reads_heads else held.numel() // held.shape[cut.axis]
                made[key] = (noise * fan_in**-0.5).to(held)
        found[name] = made[key]
    # A tied tensor that came before the one that the plan names.
    return {name: made.get(state[name].data_ptr(), t) if t.numel() else t for name, t in found.items()}


def _with_state(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``module`` with other weights."""
    twin = copy.deepcopy(module)
    own = twin.state_dict()
    with torch.no_grad():
        for name, held in own.items():
            if name in state and state[name].shape == held.shape:
                held.copy_(state[name])
    return twin


def _noticed(stock: nn.Module, inputs: Inputs, wide: bool) -> float:
    """How far the outputs move when all scores of attention are a quarter larger."""
    before = _run(stock, inputs, wide)
    for names in (("scaled_dot_product_attention",), ("softmax", "_softmax")):
        mode = _LouderScores(names)
        with mode:
            after = _run(stock, inputs, wide)
        if mode.calls:
            return max(distance(a, b) for a, b in zip(before, after, strict=True))
    return 0.0


class _LouderScores(TorchFunctionMode):
    """Multiplies the first operand of some functions: the query of attention, or the scores of a softmax."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names, self.calls = names, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "").removesuffix(".default") in self.names:
            self.calls += 1
            if args:
                args = (args[0] * 1.25, *args[1:])
            else:
                first = "query" if "query" in kwargs else "input"
                kwargs[first] = kwargs[first] * 1.25
        return func(*args, **kwargs)
