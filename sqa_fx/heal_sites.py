"""What each converted site adds to its model: the output of its output projection, in the student and in the teacher.

Both are captured graphs in which the projection's weight has the same name, so that the node that consumes it is the
same value in both; the teacher is captured again with all of its heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from sqa_fx.errors import InputError, SqaError, first_line
from sqa_fx.model_calls import on_device
from sqa_fx.module import ConvertedModule
from sqa_fx.passes.capture import clone_graph
from sqa_fx.passes.hints import is_tensor, value_of


def output_weights(student: nn.Module) -> list[str]:
    """The names of the output projections' weights of all converted sites.

    Raises InputError where ``student`` is not one converted graph, or has sites without such a parameter.
    """
    if not isinstance(student, ConvertedModule):
        raise InputError(
            f"site_warmup needs the outputs of the converted sites, which a {type(student).__name__} does not show: "
            "leave it out, or convert the model as a whole"
        )
    found: list[str] = []
    named: set[str] = set()
    for cut in student.plan.parameters:
        if any(block.role == "o" for block in cut.blocks) and student.get_parameter(cut.name).dim() > 1:
            found.append(cut.name)
            named.update(cut.sites)
    missing = [site.name for site in student.plan.sites if site.name not in named and not site.identity]
    if missing or not found:
        raise InputError(
            f"site_warmup: no output projection of {', '.join(missing) or 'any site'} is a parameter of the graph; "
            "leave site_warmup out"
        )
    return found


def with_sites(module: ConvertedModule, weights: Sequence[str]) -> fx.GraphModule:
    """The graph of ``module``, over its very parameters, that returns ``{"outputs": what it returns, "sites": [the
    output of every use of each of the weights, in the order of the graph]}``.

    Raises InputError when a weight is not used in a projection of its own.
    """
    shown = clone_graph(module.graph_module)
    nodes = [node for weight in weights for node in _consumers(shown, weight)]
    output = shown.graph.output_node()
    returned = output.args[0]
    assert isinstance(returned, tuple | list)
    output.args = ((*returned, *nodes),)
    codegen: Any = shown.graph._codegen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sites = pytree.tree_structure(list(range(len(nodes))))
        spec = pytree.treespec_dict({"outputs": codegen.pytree_info.out_spec, "sites": sites})
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    shown.recompile()
    shown._parameters, shown._buffers, shown._modules = module._parameters, module._buffers, module._modules
    return shown


def teacher_with_sites(teacher: nn.Module, student: ConvertedModule) -> ConvertedModule:
    """``teacher`` captured with all of its heads, over its very parameters.

    Raises InputError when it cannot be captured as one graph.
    """
    import sqa_fx

    device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
    args, kwargs = on_device((student.example_args, dict(student.example_kwargs)), device)
    try:
        twin = sqa_fx.convert(teacher, hq=1.0, hkv=1.0, args=args, kwargs=kwargs, verify=False, allow_inexact=True)
    except SqaError as error:
        raise InputError(
            f"site_warmup: the teacher cannot be captured with the student's example inputs: {first_line(error)}"
        ) from error
    if not isinstance(twin, ConvertedModule):
        raise InputError("site_warmup: the teacher cannot be captured as one graph; leave site_warmup out")
    held = dict(teacher.named_parameters(remove_duplicate=False))
    for path, part in twin.named_modules(remove_duplicate=False):
        for name, parameter in part._parameters.items():
            own = held.get(f"{path}.{name}".lstrip("."))
            if own is not None and parameter is not None and own.shape == parameter.shape:
                part._parameters[name] = own
    return twin.eval() if twin.training else twin


def _consumers(module: fx.GraphModule, weight: str) -> list[fx.Node]:
    """The projections by ``weight``: it is followed through whatever only re-arranges or casts it."""
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    waiting = [n for n in module.graph.nodes if n.op == "get_attr" and n.target == weight]
    found: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        size = value_of(node).numel()
        for user in node.users:
            tensors = [n for n in user.all_input_nodes if is_tensor(n)]
            if is_tensor(user) and tensors == [node] and value_of(user).numel() == size:
                waiting.append(user)
            elif is_tensor(user):
                found.add(user)
    if not found:
        raise InputError(f"site_warmup: {weight} is not used as it is in the graph; leave site_warmup out")
    return sorted(found, key=order.__getitem__)


def check_same_sites(own: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Raise InputError when the sites of both graphs are not the same."""
    shapes = [[list(t.shape) for t in side] for side in (own, wanted)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"site_warmup: the sites of student and teacher return other shapes, {shapes[0]} and {shapes[1]}: "
            "the teacher must be the model that the student was converted from"
        )
