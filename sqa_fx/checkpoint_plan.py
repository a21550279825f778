"""Make a plan for a model whose weights are not in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from torch import nn

from sqa_fx.checkpoint_layout import CheckpointFiles, read_checkpoint
from sqa_fx.checkpoint_model import has_weights, model_of_config, on_meta, tied_names, unstored, without_weights
from sqa_fx.checkpoint_names import match_names
from sqa_fx.checkpoint_weights import Energy, energy_of_files, energy_of_module, scored, weighed
from sqa_fx.convert_graph import NothingRewritten
from sqa_fx.errors import CaptureError, InputError, PlanError
from sqa_fx.inputs import example_inputs
from sqa_fx.passes.capture import capture
from sqa_fx.passes.capture_ways import DynamicShapes
from sqa_fx.passes.locate import location, nodes_at
from sqa_fx.passes.pipeline import Analysis, find_sites, make_plan
from sqa_fx.passes.rewrite import rewrite
from sqa_fx.passes.site import Refused
from sqa_fx.plan import Plan
from sqa_fx.request import WITHOUT_DATA, HeadChoice, KvMerge, Request


@dataclass(frozen=True)
class Planned:
    """A plan, the names in the state dict that are one tensor with each name, the parameters that no checkpoint holds,
    and what else is to be said of it."""

    plan: Plan
    tied: Mapping[str, Sequence[str]]
    unstored: tuple[str, ...]
    notes: tuple[str, ...]


def plan(
    model: nn.Module | str | os.PathLike[str],
    *,
    hq: Request = None,
    hkv: Request = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    heads: HeadChoice | None = None,
    kv_merge: KvMerge = "mean",
    dynamic_shapes: DynamicShapes = "auto",
    allow_inexact: bool = False,
) -> Plan:
    """The plan of a conversion, made without running the model and without its weights in memory.

    ``model`` is a module (on the meta device, of FakeTensors, or with weights; it is not changed), a ``config.json``,
    or a directory with one, as transformers saves it. The graph is captured on the meta device, where a model of 70
    billion parameters takes no memory, and rewritten there; nothing is computed, so nothing is proved:
    ``convert(model, plan=plan)`` proves it where the weights are.

    ``hq``, ``hkv``, ``kv_merge``, ``dynamic_shapes`` and ``allow_inexact`` are those of :func:`sqa_fx.convert`;
    ``dynamic_shapes=None`` is several times faster, and gives another plan only where a site can be rewritten for some
    sizes and not for all. ``args`` and ``kwargs`` are example inputs (on any device) for models that say nothing of
    theirs. ``heads`` is "weights", "first", or lists of heads by site pattern. "weights" reads the value and output
    projections of every site once, in pieces of 8 MB, from the safetensors files beside the config or from the module's
    own tensors; it is the default where there are weights, and "first" is where there are none (with a warning).

    Raises InputError (arguments, files), MissingError (no such file, no transformers), CaptureError (torch.export
    cannot take the whole model on the meta device), NoAttentionError, and PlanError (an impossible request).
    """
    made = planned(
        model,
        hq=hq,
        hkv=hkv,
        args=args,
        kwargs=kwargs,
        heads=heads,
        kv_merge=kv_merge,
        dynamic_shapes=dynamic_shapes,
        allow_inexact=allow_inexact,
    )
    for note in made.notes:
        warnings.warn(note, stacklevel=2)
    return made.plan


def planned(
    model: nn.Module | str | os.PathLike[str],
    *,
    hq: Request = None,
    hkv: Request = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    heads: HeadChoice | None = None,
    kv_merge: KvMerge = "mean",
    dynamic_shapes: DynamicShapes = "auto",
    allow_inexact: bool = False,
) -> Planned:
    """:func:`plan`, with what is known of the model besides. Raises as it does."""
    _check(hq, hkv, heads, kv_merge)
    files: CheckpointFiles | None = None
    live: nn.Module | None = None
    if isinstance(model, nn.Module):
        live = model if has_weights(model) else None
        bare = without_weights(model)
        where = type(model).__name__
    else:
        folder = Path(model)
        bare = model_of_config(folder)
        where = str(folder)
        if heads != "first" and folder.is_dir() and any(folder.glob("*.safetensors*")):
            files = read_checkpoint(folder)
    if heads == "weights" and files is None and live is None:
        raise InputError(
            f"heads='weights' needs weights, and {where} has none here: put the safetensors files beside the config, "
            "or choose heads='first' or lists of heads"
        )
    inputs = (tuple(args), dict(kwargs or {})) if args or kwargs else example_inputs(bare)
    if inputs is None:
        raise InputError(f"{where} says nothing of its inputs: pass args= or kwargs= as you would call it")
    analysis = _analysed(bare, pytree.tree_map(on_meta, inputs), dynamic_shapes, allow_inexact)
    tied = tied_names(bare)
    notes: list[str] = []
    energy = _energy(analysis, files, live, tied)
    if heads is None:
        heads = "weights" if energy is not None else "first"
        if energy is None:
            notes.append(f"{where} has no weights here: the first heads of every group stay (heads='first')")
    plans = make_plan(weighed(analysis, energy) if energy is not None else analysis, hq, hkv, heads, kv_merge)
    if not plans:
        raise PlanError(f"no site is named by the request; sites are: {', '.join(s.name for s in analysis.sites)}")
    try:
        done = rewrite(analysis.facts, analysis.sites, plans)
    except Refused as refused:
        raise PlanError(
            f"the request cannot be carried out: {refused.reason} "
            f"(node {nodes_at(refused.nodes, [location(n) for n in refused.at])})"
        ) from refused
    gone = {r.name for r in done.refused}
    kept = tuple(entry for name, entry in plans.items() if name not in gone)
    if not kept:
        raise NothingRewritten(done.refused)
    notes.extend(f"site {r.name!r} stays as it is: {r.reason}" for r in (*analysis.refusals, *done.refused))
    notes.extend(analysis.notes)
    made = Plan(kept, done.parameters, done.inputs)
    return Planned(made, tied, tuple(unstored(bare, [p.name for p in made.parameters])), tuple(notes))


def _check(hq: Request, hkv: Request, heads: HeadChoice | None, kv_merge: str) -> None:
    if hq is None and hkv is None:
        raise InputError("say how many heads to keep: hq= or hkv=")
    if isinstance(heads, str) and heads not in WITHOUT_DATA:
        raise InputError(
            f"heads={heads!r}: without data, heads are chosen by {' or '.join(map(repr, WITHOUT_DATA))}, or named by a "
            "mapping from site patterns to lists"
        )
    if kv_merge not in ("mean", "select"):
        raise InputError(f"kv_merge={kv_merge!r}: without data, KV heads are merged by 'mean' or 'select'")


def _analysed(
    model: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: DynamicShapes, allow_inexact: bool
) -> Analysis:
    args, kwargs = inputs
    try:
        captured = capture(model, args, kwargs, dynamic_shapes)
    except CaptureError as error:
        raise CaptureError(
            f"on the meta device, {error}. Where the model fits into memory, make the plan with convert(...).plan"
        ) from error
    analysis = find_sites(captured.graph_module, allow_inexact)
    analysis.require_sites()
    return analysis


def _energy(
    analysis: Analysis, files: CheckpointFiles | None, live: nn.Module | None, tied: Mapping[str, Sequence[str]]
) -> Energy | None:
    if live is not None:
        return energy_of_module(live)
    if files is None:
        return None
    names = list(dict.fromkeys(str(use.node.target) for site in analysis.sites for use in scored(site)))
    return energy_of_files(files, match_names([name for name in names if name in tied], files.entries, tied))
