"""What a program in torch.export's JSON form may hold before torch reads it.

torch evaluates parts of that JSON: size expressions go through ``sympy.sympify`` (which is ``eval``), guards are
compiled and run, node targets are looked up by dotted name from ``torch``, and pytree contexts may name modules to
import. A file from a stranger is therefore held to a short list of what exported programs really contain.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sqa_fx.errors import InputError, MissingError
from sqa_fx.passes.capture_ways import is_cache_class, register_class

# Sizes are made of symbols (s0, u12, s77) and of what torch prints size expressions with: sympy's repr, or plain infix.
_SYMBOL = re.compile(r"[a-z]{1,6}_?\d+")
_FUNCTIONS = frozenset(
    "Symbol Integer Rational Float Add Mul Pow Max Min Mod Abs sqrt floor ceiling"
    " Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan Eq Ne Lt Le Gt Ge And Or Not"
    " FloorDiv CleanDiv CeilDiv PythonMod ModularIndexing PowByNatural IntTrueDiv FloatTrueDiv FloatPow Where ToFloat"
    " TruncToInt TruncToFloat CeilToInt FloorToInt RoundToInt RoundDecimal LShift RShift".split()
)
_CONSTANTS = frozenset({"True", "False", "true", "false", "oo", "int_oo"})
_EXPRESSION_NODES = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword),
    *(ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop),
)
# Operators are looked up as torch.ops.<namespace>.<name>[.<overload>]; scalars as functions of these modules.
_OPERATOR = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?")
_SYMBOLIC = re.compile(r"torch\.(sym_\w+|_sym_\w+)")
_SCALAR = frozenset(
    "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ lshift rshift getitem".split()
)
_GRAD_SWITCH = frozenset({"torch._C._set_grad_enabled", "torch.amp.autocast_mode._enter_autocast"})
_DEFAULT_FACTORIES = frozenset({"list", "dict", "int", "float", "set", "tuple"})
# Libraries whose modules register their own output types when they are imported.
_TYPE_LIBRARIES = ("transformers", "diffusers")
_PLAIN_CLASSES = ("builtins:tuple", "builtins:set", "builtins:frozenset", "collections:OrderedDict")


def check_program_json(program: object, where: str) -> None:
    """Refuse a program that holds anything which reading or running it would evaluate beyond tensor operators.

    Raises:
        InputError: with ``where`` and the offending text.
        MissingError: the program returns or takes a type that no imported library has registered.
    """
    if not isinstance(program, dict) or "graph_module" not in program:
        raise InputError(f"{where}: this is not a program in torch.export's JSON form")
    for key, value in _walk(program):
        if key == "expr_str":
            _check_expression(value, where)
        elif key == "target" and isinstance(value, str):
            _check_target(value, where)
        elif key in ("in_spec", "out_spec") and isinstance(value, str) and value:
            _check_treespec(value, where)
    if program.get("guards_code"):
        raise InputError(f"{where}: it holds guards as Python code, which are never run; save it again with sqa-fx")


def _walk(value: object) -> Iterator[tuple[str, Any]]:
    stack = [value]
    while stack:
        top = stack.pop()
        if isinstance(top, dict):
            yield from top.items()
            stack.extend(top.values())
        elif isinstance(top, list):
            stack.extend(top)


def _check_expression(text: object, where: str) -> None:
    try:
        nodes = list(ast.walk(ast.parse(str(text), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{where}: {str(text)[:80]!r} is not a size expression") from error
    for node in nodes:
        allowed = isinstance(node, _EXPRESSION_NODES)
        if isinstance(node, ast.Name):
            allowed = bool(_SYMBOL.fullmatch(node.id)) or node.id in _FUNCTIONS or node.id in _CONSTANTS
        elif isinstance(node, ast.Call):
            allowed = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        elif isinstance(node, ast.keyword):
            allowed = isinstance(node.value, ast.Constant)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Strings are the names of symbols and the digits of floats; sympy would evaluate any other.
            allowed = bool(_SYMBOL.fullmatch(node.value) or re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", node.value))
        elif isinstance(node, ast.Constant):
            allowed = isinstance(node.value, int | float)
        if not allowed:
            raise InputError(
                f"{where}: {str(text)[:80]!r} is not a size expression; sizes hold symbols and numbers only"
            )


def _check_target(target: str, where: str) -> None:
    module, _, name = target.rpartition(".")
    if _OPERATOR.fullmatch(target) or _SYMBOLIC.fullmatch(target) or target in _GRAD_SWITCH:
        return
    if module == "_operator" and name in _SCALAR:
        return
    if module == "math" and callable(getattr(math, name, None)):
        return
    # A target also names parameters, buffers and graph outputs: only what torch would resolve to code matters.
    if target.startswith(("_operator", "torch", "math", "#")):
        raise InputError(f"{where}: {target!r} is not an operator; exported programs call operators only")


def _check_treespec(text: str, where: str) -> None:
    try:
        _, root = json.loads(text)
        stack = [root]
        while stack:
            spec = stack.pop()
            stack.extend(spec["children_spec"])
            name, context = spec["type"], spec["context"]
            if name is None:
                continue
            if not isinstance(context, str | dict | list | None) or "__enum__" in json.dumps(context):
                raise InputError(f"{where}: the structure of inputs or outputs names code to import")
            if name == "collections.defaultdict":
                factory: Any = json.loads(context) if isinstance(context, str) else context
                if factory["default_factory_module"] != "builtins" or (
                    factory["default_factory_name"] not in _DEFAULT_FACTORIES
                ):
                    raise InputError(f"{where}: a defaultdict names code to import")
            _check_classes(json.loads(context) if isinstance(context, str) else context, where)
            _require_type(name, where)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: the structure of inputs or outputs cannot be read") from error


def _check_classes(context: Any, where: str) -> None:
    """Refuse a context (of a KV cache) that names a class other than those of caches and their layers: it would be
    called when inputs or outputs are put together."""
    if isinstance(context, list):
        for entry in context:
            _check_classes(entry, where)
    elif isinstance(context, dict):
        path = context.get("p")
        if isinstance(path, str) and "_t" in context and path not in _PLAIN_CLASSES:
            cls = _library_class(path, where)
            if not (isinstance(cls, type) and (cls.__module__.endswith("cache_utils") or is_cache_class(cls))):
                raise InputError(f"{where}: the structure of inputs or outputs names {path!r}, which is no KV cache")
        for entry in context.values():
            _check_classes(entry, where)


def _library_class(name: str, where: str) -> Any:
    """What ``name`` ("module:Class" or "module.Class") is in one of the libraries of known types; None elsewhere."""
    module, _, own = name.rpartition(":" if ":" in name else ".")
    library = module.partition(".")[0]
    if library not in _TYPE_LIBRARIES or not re.fullmatch(r"[\w.]+", module):
        return None
    try:
        return getattr(importlib.import_module(module), own, None)
    except ImportError as error:
        raise MissingError(f"{where} uses {name}: pip install {library}") from error


def _require_type(name: str, where: str) -> None:
    """Make sure that pytree knows the container type ``name``; the libraries of known types are imported for it."""
    if name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        return
    cls = _library_class(name, where)
    if isinstance(cls, type) and is_cache_class(cls):
        register_class(cls)
    if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        raise MissingError(
            f"{where} takes or returns {name}, which is not registered with torch.utils._pytree here; "
            "import the module that registers it first"
        )


def check_targets(program: torch.export.ExportedProgram, where: str) -> None:
    """Refuse a loaded program with a call that is not an operator, whatever its JSON called it.

    Raises:
        InputError: with ``where`` and the node.
    """
    operators = (torch._ops.OpOverload, torch._ops.HigherOrderOperator)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if node.op == "call_function" and not isinstance(node.target, operators):
                name = getattr(node.target, "__name__", "")
                home = getattr(node.target, "__module__", "")
                if home not in ("_operator", "math", "torch", "torch._C", "torch.amp.autocast_mode") or (
                    home == "torch" and not name.lstrip("_").startswith("sym_")
                ):
                    raise InputError(f"{where}: node {node.name} calls {home}.{name}, which is not an operator")
