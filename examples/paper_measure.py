"""One row of the paper's table: a variant at one size, converted in two ways and written by hand, beside MHA."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measured_rows import Row, failure
from paper_model import VARIANTS, DenseModel, Sizes
from small_training import language_loss
from timed_ways import alone, attention_in_model, timed
from torch import Tensor, nn

import sqa_fx
from sqa_fx.attention_flops import AttentionCall, attention_calls
from sqa_fx.errors import MissingError, SqaError, first_line
from sqa_fx.export import PRECISIONS

MODES = ["forward", "training"]
WAYS = ["MHA", "converted", "backend", "by hand"]
SMALL = (2, 64)
"""Batch and length at which models are converted: both stay dynamic."""


class PaperBench:
    """The models of one process: MHA for each mode, and the variant that is measured now."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sizes: Sizes = options.sizes
        self.device: str = options.device
        self.dtype = PRECISIONS[options.dtype]
        self.bases: dict[str, nn.Module] = {}
        self.calls: dict[tuple[str, str, str], Callable[..., Any]] = {}
        self.in_model: dict[tuple[str, int, int], Row] = {}
        self.variants: dict[tuple[str, str], dict[str, Any]] = {}
        self.layers: dict[str, torch.export.ExportedProgram] = {}
        self.loss = self.compiled(language_loss)

    def compiled(self, what: Any, backend: Any = "inductor") -> Any:
        """``what`` under torch.compile, unless all is eager."""
        if not self.options.eager:
            return torch.compile(what, backend=backend, dynamic=False if self.options.static else None)
        return what if backend == "inductor" else torch.compile(what, backend=backend)

    def base(self, mode: str) -> nn.Module:
        """MHA; training has one of its own, since steps change it."""
        if mode not in self.bases:
            torch.manual_seed(0)
            self.bases[mode] = DenseModel(self.sizes, *VARIANTS["MHA"]).to(self.device, self.dtype)
        return self.bases[mode]

    def models(self, mode: str, variant: str) -> dict[str, Any]:
        """The modules by way, and "refused" where the conversion was; only those of one variant are kept."""
        if (mode, variant) not in self.variants:
            self.variants.clear()
            self.calls = {key: call for key, call in self.calls.items() if key[1] == "MHA"}
            self.variants[mode, variant] = variant_models(self.base(mode), self.sizes, variant, self.small_ids())
        return self.variants[mode, variant]

    def small_ids(self) -> Tensor:
        """Token ids to convert with."""
        return torch.randint(self.sizes.vocabulary, SMALL, device=self.device)

    def call(self, mode: str, variant: str, way: str) -> Callable[..., Any]:
        """What runs one way: ids to logits, or ids and targets to a training step."""
        key = (mode, "MHA" if way == "MHA" else variant, way)
        if key in self.calls:
            return self.calls[key]
        backend: Any = "inductor"
        base = self.base(mode)
        module = {"MHA": base, "backend": base}.get(way) or self.models(mode, variant)[way]
        if way == "backend":
            hq, hkv = VARIANTS[variant]
            # What the rewrite computes was proved ahead of time, and is compared once more in every row.
            how = {"hq": hq, "hkv": hkv, "on_refused": "raise", "verify": False}
            backend = sqa_fx.backend(**how, inner="eager" if self.options.eager else "inductor")
        model = self.compiled(module, backend)
        self.calls[key] = step_of(model, module, self.loss) if mode == "training" else inference_of(model)
        return self.calls[key]

    def row(self, mode: str, variant: str, length: int, batch: int) -> Row:
        """What one row holds besides its key; see `paper_report` for what is made of it."""
        models = self.models(mode, variant)
        generator = torch.Generator(device=self.device).manual_seed(1)
        ids, targets = (
            torch.randint(self.sizes.vocabulary, (batch, length), device=self.device, generator=generator)
            for _ in range(2)
        )
        self.mark(ids, targets)
        args = (ids, targets) if mode == "training" else (ids,)
        names = [w for w in self.options.ways if w in ("MHA", "by hand") or "refused" not in models]
        result: Row = {"heads": list(VARIANTS[variant])}
        if "refused" in models:
            result["refused"] = models["refused"]
        result |= timed(
            {name: self.call(mode, variant, name) for name in names},
            args,
            self.dtype,
            self.options.row_seconds,
            self.options.turns,
        )
        parts: dict[str, Callable[[], Row]] = {"attention": lambda: self.attention(mode, variant, ids)}
        if "converted" in models:
            parts["graph"] = lambda: converted_attention(models["converted"], ids)
            if mode == "forward" and not self.options.static:
                parts["errors"] = lambda: {"errors": self.errors(variant, names, min(batch, SMALL[0]))}
        if "MHA" in result["milliseconds"]:
            parts["attention in the model"] = lambda: self.baseline_attention(mode, args, length, batch)
        for name, part in parts.items():
            try:
                result |= part()
            except Exception as error:  # the times stay, whatever else there is no memory for
                result["failed"][name] = failure(error)
        return result

    def mark(self, *inputs: Tensor) -> None:
        """One compilation for all sizes; a batch of one is always one of its own."""
        for tensor in inputs:
            for axis in (0, 1):
                if not self.options.static and tensor.shape[axis] > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)

    def errors(self, variant: str, names: list[str], batch: int) -> Row:
        """How far each way is from the converted model in eager, relative to its logits' norm, at a small size.

        The model written by hand has the converted weights: all ways compute one function.
        """
        ids = torch.randint(self.sizes.vocabulary, (batch, SMALL[1]), device=self.device)
        self.mark(ids)
        found: Row = {}
        with torch.no_grad():
            expected = self.models("forward", variant)["converted"](ids).float()
            for name in names:
                if name != "MHA":
                    try:
                        actual = self.call("forward", variant, name)(ids).float()
                        found[name] = float((actual - expected).norm() / expected.norm())
                    except Exception as error:  # it failed when it was timed, too
                        found[name] = failure(error)
        return found

    def attention(self, mode: str, variant: str, ids: Tensor) -> Row:
        """Milliseconds of one layer's attention alone, MHA's and the variant's."""
        forms = {"MHA": self.attention_call("MHA", ids), variant: self.attention_call(variant, ids)}
        ways = {name: alone(form, mode == "training") for name, form in forms.items()}
        found = timed(ways, (ids,), self.dtype, self.options.row_seconds / 4, self.options.turns)
        return {"attention_ms": found["milliseconds"]}

    def attention_call(self, variant: str, ids: Tensor) -> AttentionCall:
        """One layer's attention as a graph of the model has it, at the size of ``ids``."""
        if variant not in self.layers:
            one = Sizes(self.sizes.width, 1, self.sizes.heads, self.sizes.hidden, vocabulary=8)
            model = DenseModel(one, *VARIANTS[variant]).to(self.device, self.dtype)
            free = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
            small = torch.zeros(SMALL, dtype=torch.int64, device=self.device)
            self.layers[variant] = torch.export.export(model, (small,), dynamic_shapes=free)
        return attention_calls(self.layers[variant], ((ids,), {}))[0]

    def baseline_attention(self, mode: str, args: tuple[Tensor, ...], length: int, batch: int) -> Row:
        """Milliseconds of MHA's attention kernels inside the model, where there is a GPU to see them on."""
        key = (mode, length, batch)
        if key not in self.in_model:
            try:
                spent, total = attention_in_model(self.call(mode, "MHA", "MHA"), args, self.dtype)
                self.in_model[key] = {"attention_in_model_ms": spent, "kernels_ms": total}
            except MissingError:
                self.in_model[key] = {}
        return self.in_model[key]


def variant_models(base: nn.Module, sizes: Sizes, variant: str, small: Tensor) -> dict[str, Any]:
    """The conversion of ``base``, and the same architecture written by hand with the weights of the conversion."""
    hq, hkv = VARIANTS[variant]
    parameter = next(base.parameters())
    hand = DenseModel(sizes, hq, hkv).to(parameter.device, parameter.dtype)
    try:
        converted = sqa_fx.convert(base, hq=hq, hkv=hkv, args=(small,))
    except SqaError as error:
        return {"by hand": hand, "refused": first_line(error)}
    assert isinstance(converted, sqa_fx.ConvertedModule)
    hand.load_state_dict(converted.state_dict())
    return {"converted": converted, "by hand": hand}


def converted_attention(converted: sqa_fx.ConvertedModule, ids: Tensor) -> Row:
    """What attends in the converted graph: a mask would be as large as the scores, and keep the fast kernels away."""
    calls = attention_calls(converted, ((ids,), {}))
    return {
        "converted_attention": {
            "sites": len(calls),
            "causal": all(call.fused and call.causal for call in calls),
            "masks": sum(call.mask is not None for call in calls),
        }
    }


def inference_of(model: Any) -> Callable[[Tensor], Tensor]:
    """``model`` without gradients."""

    def call(ids: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(ids)
            return out

    return call


def step_of(model: Any, module: nn.Module, loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], None]:
    """Forward, backward and AdamW on the parameters of ``module``, which ``model`` runs."""
    fused = next(module.parameters()).is_cuda
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=fused)

    def step(ids: Tensor, targets: Tensor) -> None:
        loss(model(ids), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
