"""Which tensors of a checkpoint are the parameters that a plan names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sqa_fx.checkpoint_format import DTYPES, Entry
from sqa_fx.errors import PlanError
from sqa_fx.plan import ParameterPlan

_SCALES = ("qweight", "qzeros", "scales", "g_idx", "SCB")


def match_names(
    names: Collection[str], keys: Collection[str], tied: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[str]]:
    """The keys of a checkpoint for every parameter in ``names``.

    A key is the name itself, or one of the names ``tied`` to it, all with one common prefix added or taken away, as
    transformers does when a base model is loaded from the checkpoint of a model with a head, or the other way round.

    Raises PlanError, listing the names that have no tensor, when that does not find all of them in just one way.
    """
    held = set(keys)
    alike = {name: [name, *(other for other in (tied or {}).get(name, ()) if other != name)] for name in names}

    def found(added: str, removed: str) -> dict[str, list[str]]:
        return {
            name: [
                key
                for own in own_names
                if own.startswith(removed) and (key := added + own.removeprefix(removed)) in held
            ]
            for name, own_names in alike.items()
        }

    exact = found("", "")
    if all(exact.values()):
        return exact
    complete = [match for change in sorted(_prefixes(alike, held)) if all((match := found(*change)).values())]
    if len(complete) == 1:
        return complete[0]
    if complete:
        raise PlanError(
            f"the checkpoint has {len(complete)} tensors that could be parameter {next(iter(names))!r} of the plan: "
            f"{', '.join(match[next(iter(names))][0] for match in complete)}. Name the tensors as the model does"
        )
    missing = [name for name, own in exact.items() if not own]
    raise PlanError(
        f"{len(missing)} of {len(alike)} parameters of the plan are not in the checkpoint: {', '.join(missing[:8])}"
        + (", ..." if len(missing) > 8 else "")
        + f"; its tensors are named like {', '.join(sorted(held)[:3])}. Make the plan from this model's own "
        "config.json, or save the checkpoint again with save_pretrained of a current transformers"
    )


def _prefixes(alike: Mapping[str, Sequence[str]], held: Collection[str]) -> set[tuple[str, str]]:
    """The changes (prefix added, prefix removed) under which the first parameter has a tensor."""
    changes: set[tuple[str, str]] = set()
    for own in next(iter(alike.values()), ()):
        changes |= {(key.removesuffix(own), "") for key in held if key.endswith("." + own)}
        parts = own.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in held:
                changes.add(("", ".".join(parts[:i]) + "."))
    return changes


def check_entry(plan: ParameterPlan, entry: Entry) -> None:
    """Raise PlanError unless the tensor ``entry`` can be cut as ``plan`` says."""
    if entry.dtype not in DTYPES:
        raise PlanError(
            f"the tensor {entry.name!r} is of dtype {entry.dtype}, which cannot be cut: convert a checkpoint that is "
            "not quantised"
        )
    if plan.axis >= len(entry.shape) or entry.shape[plan.axis] != plan.size[0]:
        raise PlanError(
            f"the tensor {entry.name!r} has shape {list(entry.shape)}, the plan expects {plan.size[0]} entries along "
            f"axis {plan.axis}: the plan was made for another model, or the weights are packed"
        )


def check_scales(cut: Collection[str], entries: Mapping[str, Entry]) -> None:
    """Raise PlanError when a tensor in ``cut`` is quantised with scales of its own, which would have to be cut too."""
    owners = {name.rpartition(".")[0]: name for name in cut}
    for name, entry in entries.items():
        if name in cut or entry.elements <= 1:
            continue
        owner, _, last = name.rpartition(".")
        own = owners.get(owner) if last in _SCALES else _extended(name, cut)
        if own is not None:
            raise PlanError(
                f"{own!r} is quantised: {name!r} of shape {list(entry.shape)} belongs to it and is not in the plan. "
                "Dequantise the checkpoint first (to bfloat16, say), and quantise the result again"
            )


def _extended(name: str, cut: Collection[str]) -> str | None:
    """The tensor in ``cut`` of which ``name`` is a part: ``X_scale_inv`` or ``X.absmax`` of ``X``."""
    ends = [i for i, letter in enumerate(name) if letter in "._"]
    return next((name[:i] for i in reversed(ends) if name[:i] in cut), None)
