"""A model whose submodules were converted one by one: the user's own module around converted graphs."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sqa_fx.errors import InputError, VerifyError
from sqa_fx.module import ConvertedModule
from sqa_fx.passes.capture_ways import fresh, reason
from sqa_fx.passes.record import undisturbed
from sqa_fx.passes.verify import TOLERANCE, distance, masked_tensor
from sqa_fx.plan import Plan
from sqa_fx.report import Report


class PartlyConvertedModule(nn.Module):
    """A copy of the user's module with converted submodules; everything else runs as it did.

    It is called and trained like the original, and its parameters have the original's names. ``plan`` and ``report``
    are those of the whole. ``eager`` is the copy itself, an instance of the user's class. It holds the user's own code,
    which is no data: it cannot be saved or exported as a graph.
    """

    def __init__(
        self, eager: nn.Module, *, submodules: Sequence[str], plan: Plan, report: Report, fixed: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.plan, self.report = plan, report
        self.submodules, self.fixed = tuple(submodules), dict(fixed)
        # The copy's own tables are this module's: one set of parameters under the original's names.
        self._parameters, self._buffers, self._modules = eager._parameters, eager._buffers, eager._modules
        self._non_persistent_buffers_set = eager._non_persistent_buffers_set
        self.__dict__["eager"] = eager
        self.training = eager.training

    eager: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's outputs. Raises InputError when a submodule gets inputs that its graph does not serve."""
        if self.fixed:
            given = inspect.signature(self.eager.forward).bind_partial(*args).arguments | kwargs
            for name, value in self.fixed.items():
                if name in given and given[name] != value:
                    raise InputError(
                        f"input {name!r} was {value!r} when the submodules were captured and is fixed; "
                        f"got {given[name]!r}"
                    )
                if name not in given:
                    kwargs[name] = value
        return self.eager(*args, **kwargs)

    def train(self, mode: bool = True) -> PartlyConvertedModule:
        """Switch training mode on or off, as for a ConvertedModule. Raises InputError where one of them does."""
        self.eager.train(mode)
        self.training = mode
        return self

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> NoReturn:
        """Not possible: raises InputError, which says what is."""
        raise InputError(
            f"nothing was written to {directory}: the model was converted per submodule, and what lies between them is "
            "its own code, which is not saved. Save state_dict() (safetensors) and plan.save(...); to load, "
            "convert(model, plan=Plan.load(...), args=...) the original again and load_state_dict()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PartlyConvertedModule:
        """A copy with parameters of its own."""
        twin = PartlyConvertedModule(
            copy.deepcopy(self.eager, memo),
            submodules=self.submodules,
            plan=self.plan,
            report=self.report,
            fixed=self.fixed,
        )
        memo[id(self)] = twin
        return twin

    def extra_repr(self) -> str:
        """A line a site."""
        return "\n".join(f"{s.name}: {s.heads}/{s.kv_heads} -> {s.hq}/{s.hkv} heads" for s in self.plan.sites)


def put_in_place(twin: nn.Module, path: str, converted: ConvertedModule) -> None:
    """Put ``converted`` where ``twin`` has the submodule ``path``, wherever it appears.

    Parameters that were not cut stay the very tensors of ``twin``, so that ties with the rest of it hold. Plain
    attributes of the submodule (a config, a layer's number) stay readable for the code around it.
    """
    original = twin.get_submodule(path)
    cut = {parameter.name for parameter in converted.plan.parameters}
    for prefix, owner in original.named_modules(remove_duplicate=False):
        names = {name: f"{prefix}.{name}".lstrip(".") for name in (*owner._parameters, *owner._buffers)}
        try:
            target = converted.get_submodule(prefix)
        except AttributeError:
            continue  # a part that the graph does not read
        for name, full in names.items():
            table, own = (
                (target._parameters, owner._parameters)
                if name in owner._parameters
                else (target._buffers, owner._buffers)
            )
            if full not in cut and name in table:
                table[name] = own[name]
    for name, value in vars(original).items():
        if not name.startswith("_") and name not in vars(converted) and not hasattr(converted, name):
            converted.__dict__[name] = value
    places = [
        (parent, name)
        for parent in list(twin.modules())
        for name, child in parent._modules.items()
        if child is original
    ]
    for parent, name in places:
        parent._modules[name] = converted


def modes(module: nn.Module) -> dict[str, bool]:
    """Train or eval mode by path."""
    return {name: part.training for name, part in module.named_modules()}


@dataclass
class EagerCheck:
    """What the masked original gave: its outputs, and those of the submodules that are to be replaced, call by call."""

    outputs: list[Tensor]
    inner: dict[str, list[Any]]


def run_masked(
    twin: nn.Module, plan: Plan, paths: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> EagerCheck | str:
    """Run ``twin`` in eval mode with the plan's masked weights; a text says why that gives nothing to compare with."""
    held = dict((*twin.named_parameters(remove_duplicate=False), *twin.named_buffers(remove_duplicate=False)))
    masked = {}
    for parameter in plan.parameters:
        if parameter.name in held:
            masked[parameter.name] = masked_tensor(held[parameter.name].detach(), parameter)
        elif parameter.masks:
            return f"{parameter.name} is a constant of a graph, not a parameter of the model"
    inner: dict[str, list[Any]] = {path: [] for path in paths}

    def run(note: bool) -> list[Tensor]:
        hooks = []
        for path in paths if note else ():
            keep = inner[path].append
            hooks.append(
                twin.get_submodule(path).register_forward_hook(lambda m, i, output, keep=keep: keep(_copied(output)))
            )
        try:
            with undisturbed(twin):
                return _copied(tensors_of(torch.func.functional_call(twin, masked, *fresh((args, dict(kwargs))))))  # type: ignore[no-any-return]
        finally:
            for hook in hooks:
                hook.remove()

    flags = modes(twin)
    twin.eval()
    try:
        outputs = run(note=True)
        if any(not _same(a, b) for a, b in zip(outputs, run(note=False), strict=True)):
            return "the model gives another result on every call"
        return EagerCheck(outputs, inner)
    except Exception as error:
        return f"the masked original does not run: {reason(error)}"
    finally:
        for name, module in twin.named_modules():
            module.training = flags[name]


def check_eager(
    expected: EagerCheck, twin: nn.Module, paths: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare the converted whole (``twin``) with the masked original; the result is JSON-ready, for the report.

    Both run as they are, in eager. Where rounding alone sends them apart (a router picks another expert), they are
    compared step by step instead: every converted submodule is compared on what the original's got, what follows gets
    the original's output of it, and the rest must then agree.
    Raises VerifyError, naming the first submodule that differs.
    """
    with undisturbed(twin):
        outputs = _run_converted(twin, args, kwargs)
    error, compared, reshaped = _compare(expected.outputs, outputs)
    tolerance = _tolerance(expected.outputs, outputs)
    result = {"error": error, "tolerance": tolerance, "outputs": compared, "reshaped": reshaped, "in_step": False}
    if error <= tolerance:
        return result
    worst = 0.0

    def forced(path: str, calls: Iterator[Any]) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> Any:
            nonlocal worst
            wanted = next(calls)
            own, _, _ = _compare(tensors_of(wanted), tensors_of(output))
            if not own <= tolerance:
                raise VerifyError(
                    f"submodule {path!r} differs from the masked original in the whole model: relative error "
                    f"{own:.3g}, tolerance {tolerance:.3g}"
                )
            worst = max(worst, own)
            # What carries heads stays as it is: the code around it must do with fewer of them.
            pairs = zip(tensors_of(output), tensors_of(wanted), strict=True)
            return copy.deepcopy(output, {id(a): b if a.shape == b.shape else a for a, b in pairs})

        return hook

    hooks = [twin.get_submodule(path).register_forward_hook(forced(path, iter(expected.inner[path]))) for path in paths]
    try:
        with undisturbed(twin):
            outputs = _run_converted(twin, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    final, _, _ = _compare(expected.outputs, outputs)
    if not final <= tolerance:
        raise VerifyError(
            f"every converted submodule agrees with the masked original, but the model's outputs differ: relative "
            f"error {error:.3g}, tolerance {tolerance:.3g}"
        )
    return {**result, "error": max(worst, final), "free_running_error": error, "in_step": True}


def _run_converted(twin: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    try:
        return tensors_of(twin(*fresh(args), **fresh(dict(kwargs))))
    except VerifyError:
        raise
    except Exception as error:
        raise VerifyError(
            f"the model does not run with its converted submodules: {type(error).__name__}: {str(error)[:300]}"
        ) from error


def _compare(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> tuple[float, int, int]:
    """(largest relative error, tensors compared, tensors of another shape because they carry heads)."""
    if len(expected) != len(actual):
        return float("inf"), 0, 0
    pairs = [(e, a) for e, a in zip(expected, actual, strict=True) if e.shape == a.shape]
    worst = max((distance(e, a) for e, a in pairs), default=0.0 if not expected else float("inf"))
    return worst, len(pairs), len(expected) - len(pairs)


def _tolerance(*outputs: Sequence[Tensor]) -> float:
    dtypes = {t.dtype for group in outputs for t in group if t.is_floating_point()}
    # Float64 outputs may come from float32 arithmetic in the model's own code.
    return max([TOLERANCE[torch.float32], *(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and distance(a, b) == 0.0


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in any nest of containers, data classes and plain objects, in order."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, str | bytes | int | float | complex | nn.Module | type | None) or id(value) in seen:
            return
        else:
            seen.add(id(value))
            if isinstance(value, Mapping):
                children = list(value.values())
            elif isinstance(value, list | tuple | set | frozenset):
                children = list(value)
            else:
                children = list(getattr(value, "__dict__", {}).values())
            for child in children:
                walk(child)

    walk(value)
    return found


def _copied(value: Any) -> Any:
    """A deep copy in which tensors are detached clones."""
    memo: dict[int, Any] = {}
    for tensor in tensors_of(value):
        memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(value, memo)
