"""Make the changes for good, prove the model as it is then, and put everything back if anything goes wrong."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from torch import Tensor, nn

from sqa_fx.errors import SurgeryError
from sqa_fx.surgery_proof import Comparison, SurgeryProof
from sqa_fx.surgery_record import Surgery, assign, assignments, layer_sizes, read


def commit(model: nn.Module, surgery: Surgery, cut: Mapping[str, Tensor], comparison: Comparison) -> SurgeryProof:
    """Put the cut tensors and the attributes of ``surgery`` into ``model``.

    Raises SurgeryError when the model as it is then does not compute what the converted graph computes, or when
    anything else of it changed. Whatever is raised, KeyboardInterrupt included, the model is as it was.
    """
    before = _identities(model, cut)
    with ExitStack() as undo:
        for module, name, value in [
            *assignments(model, surgery.attributes),
            *layer_sizes(model, surgery.parameters),
        ]:
            undo.callback(assign(module, name, value))
        for change in surgery.classes:
            for path in change.modules:
                module = model.get_submodule(path)
                undo.callback(setattr, module, "__class__", type(module))
                module.__class__ = change.classes()[1]
        for name, tensor in cut.items():
            held = read(model, name)
            undo.callback(setattr, held, "data", held.data)
            held.data = tensor
        proof = comparison.prove(model)
        if isinstance(proof, str):
            raise SurgeryError(f"the model cannot be converted in place; it is as it was: {proof}")
        if _identities(model, cut) != before:
            raise SurgeryError("running the model changed parameters that the plan does not name; they are kept as are")
        for name in cut:
            read(model, name).grad = None
        undo.pop_all()
    return proof


def _identities(model: nn.Module, cut: Mapping[str, Tensor]) -> list[tuple[str, int, int, int]]:
    """Which tensor every parameter outside of the plan is, and whether it was written to."""
    taken = {id(read(model, name)) for name in cut}
    return [
        (name, id(p), p.data_ptr(), -1 if p.is_inference() else p._version)
        for name, p in model.named_parameters(remove_duplicate=False)
        if id(p) not in taken
    ]
