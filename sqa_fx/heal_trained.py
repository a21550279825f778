"""The module that is trained: a copy of the student, seen through the tensors that training may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from sqa_fx.errors import InputError
from sqa_fx.heal_random import mixed
from sqa_fx.heal_sites import with_sites
from sqa_fx.module import ConvertedModule

_HALF = (torch.float16, torch.bfloat16)


class _Master(nn.Module):
    """A half-precision parameter, kept and trained in float32."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(parameter.detach().float())

    @staticmethod
    def combined(base: Tensor, weight: Tensor) -> Tensor:
        """The parameter as the model uses it."""
        return weight.to(base.dtype)


class _LowRank(nn.Module):
    """``base + b @ a``, with ``a`` [rank, columns] random and ``b`` [rows, rank] zero at first; a parameter with more
    axes is seen as [first axis, the others]. arXiv 2106.09685."""

    def __init__(self, parameter: Tensor, rank: int, seed: int) -> None:
        super().__init__()
        rows, columns = parameter.shape[0], parameter[0].numel()
        rank = min(rank, rows, columns)
        noise = torch.randn(rank, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
        self.a = nn.Parameter(noise.to(parameter.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=parameter.device))

    @staticmethod
    def combined(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The parameter as the model uses it."""
        return base + (b @ a).view(base.shape).to(base.dtype)


class Trained(nn.Module):
    """A student whose parameters are frozen but for those that ``train`` names; see `sqa_fx.HealOptions`.

    It is called as ``(args, kwargs, sites)``. With ``sites`` it returns ``{"outputs": ..., "sites": [...]}``, for
    which ``weights`` must name the output projections.
    """

    def __init__(self, base: nn.Module, train: str, rank: int, seed: int, weights: list[str] | None = None) -> None:
        super().__init__()
        self.base = base
        self.over = nn.ModuleList()
        self.over_names: list[str] = []
        chosen = _chosen(base, train)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(False)
            if name not in chosen:
                continue
            if train == "low-rank":
                self._put_over(name, _LowRank(parameter, rank, mixed("low-rank", seed, name)))
            elif parameter.dtype in _HALF:
                self._put_over(name, _Master(parameter))
            else:
                parameter.requires_grad_(True)
        self.__dict__["wide"] = None
        if weights is not None:
            assert isinstance(base, ConvertedModule)
            self.__dict__["wide"] = with_sites(base, weights)

    wide: fx.GraphModule | None

    def _put_over(self, name: str, entry: nn.Module) -> None:
        self.over.append(entry)
        self.over_names.append(name)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], sites: bool = False) -> Any:
        """The student's outputs."""
        model: nn.Module = self.base
        if sites:
            assert self.wide is not None and isinstance(self.base, ConvertedModule)
            floating = next((p.dtype for p in self.base.parameters() if p.is_floating_point()), None)
            args, kwargs = self.base._binder.bind(args, kwargs, floating)
            model = self.wide
        if not self.over_names:
            return model(*args, **kwargs)
        return functional_call(model, self._seen(dict(self.base.named_parameters())), args, kwargs)

    def _seen(self, base: Mapping[str, Tensor], learned: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The parameters that lie over those of ``base``, made from ``learned`` or from this module's own."""
        found = {}
        for index, (name, entry) in enumerate(zip(self.over_names, self.over, strict=True)):
            assert isinstance(entry, _Master | _LowRank)
            own = {
                part: p if learned is None else learned[f"over.{index}.{part}"] for part, p in entry.named_parameters()
            }
            at = next(iter(own.values())).device
            found[name] = entry.combined(base[name].to(at), **own)
        return found

    def learned(self) -> dict[str, Tensor]:
        """Everything that training changes, by name: trained parameters and all buffers."""
        found: dict[str, Tensor] = {n: p for n, p in self.named_parameters() if p.requires_grad}
        return found | dict(self.named_buffers())

    @torch.no_grad()
    def as_student(self, learned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of `learned` as those of a student whose frozen parameters are ``base``."""
        plain = {n.removeprefix("base."): t for n, t in learned.items() if n.startswith("base.")}
        return plain | self._seen(base, learned)


def _chosen(base: nn.Module, train: str) -> set[str]:
    """The names of the parameters that are trained. Raises InputError when there are none."""
    able = {n: p for n, p in base.named_parameters() if p.requires_grad and p.is_floating_point()}
    if train == "all":
        chosen = set(able)
    else:
        plan = getattr(base, "plan", None)
        if plan is None:
            raise InputError(f"train={train!r} needs a converted student; a {type(base).__name__} has no sites")
        cut = {entry.name for entry in plan.parameters}
        owners = {name.rpartition(".")[0] for name in cut}
        beside = {name for name, p in able.items() if name.rpartition(".")[0] in owners and p.dim() == 1}
        chosen = (
            {n for n in cut & set(able) if able[n].dim() > 1} if train == "low-rank" else (cut & set(able)) | beside
        )
    if not chosen:
        raise InputError(
            f"train={train!r}: no parameter of the student can be trained; set requires_grad, or choose another"
        )
    return chosen
