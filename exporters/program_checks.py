"""What every exporter asks of an exported program before it translates it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from sqa_fx.errors import InputError
from sqa_fx.exporters.program_names import user_inputs

# Where a training-mode flag sits among the arguments of the operators that have one.
_TRAINING_FLAGS = {
    torch.ops.aten.dropout.default: ("train", 2),
    torch.ops.aten.feature_dropout.default: ("train", 2),
    torch.ops.aten.native_dropout.default: ("train", 2),
    torch.ops.aten.batch_norm.default: ("training", 5),
    torch.ops.aten.scaled_dot_product_attention.default: ("dropout_p", 4),
}


def precision_of(program: torch.export.ExportedProgram) -> str | None:
    """The floating point types of the parameters, most numerous first ("bfloat16"); of the inputs where there are no
    parameters, None where nothing is floating point."""
    values = {n.name: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
    parameters = [program.state_dict[name] for name in program.graph_signature.parameters]
    arguments = [values[s.arg.name] for s in user_inputs(program)]
    for candidates in (parameters, arguments):
        tensors = [t for t in candidates if isinstance(t, Tensor) and t.is_floating_point()]
        counts = Counter(str(t.dtype).removeprefix("torch.") for t in tensors)
        if counts:
            return ", ".join(name for name, _ in counts.most_common())
    return None


def refuse_training_mode(program: torch.export.ExportedProgram) -> None:
    """Raise InputError for a graph that drops values at random or takes statistics of its batch."""
    for node in program.graph.nodes:
        name, position = _TRAINING_FLAGS.get(node.target, (None, 0))
        if name is None:
            continue
        flag = node.kwargs.get(name, node.args[position] if len(node.args) > position else False)
        if flag:
            raise InputError(
                f"the model was captured in training mode ({node.name}: {node.target} with {name}={flag}); call "
                "model.eval() first"
            )


def root_cause(error: BaseException) -> str:
    """The first line of the innermost error: torch wraps the reason in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
