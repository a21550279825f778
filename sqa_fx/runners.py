"""One way to call a model, whatever runs it: eager PyTorch, torch.compile, ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sqa_fx.call_tensors import lay_out, path_name
from sqa_fx.errors import InputError, MissingError
from sqa_fx.onnx_binding import CUDA_PROVIDER, CudaBinding

CPU_PROVIDER = "CPUExecutionProvider"

_ONNX_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(bool)": torch.bool,
    "tensor(int8)": torch.int8,
    "tensor(int16)": torch.int16,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(uint8)": torch.uint8,
}


class Runner(Protocol):
    """Something that takes the arguments of a model and returns its tensors."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def kind(self) -> str:
        """``eager``, ``compiled``, ``onnx`` or another kind of file."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type that it computes in."""
        ...

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The output tensors in pytree order; what is not a tensor is left out."""
        ...


class EagerRunner:
    """Calls the module as it is, without gradients."""

    kind = "eager"

    def __init__(self, module: nn.Module, name: str = "eager") -> None:
        self.module = module
        self.name = name
        self.dtype = module_dtype(module)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """See ``Runner.run``. Raises InputError for outputs that are no pytree of tensors."""
        with torch.no_grad():
            return [tensor for _, tensor in named_outputs(self.module(*args, **kwargs))]


class CompiledRunner:
    """Calls ``torch.compile`` of the module, without gradients; ``options`` go to torch.compile."""

    kind = "compiled"

    def __init__(self, module: nn.Module, name: str = "compiled", **options: Any) -> None:
        self.module = module
        self.name = name
        self.dtype = module_dtype(module)
        self._compiled = torch.compile(module, **options)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """See ``Runner.run``. Raises InputError for outputs that are no pytree of tensors."""
        with torch.no_grad():
            return [tensor for _, tensor in named_outputs(self._compiled(*args, **kwargs))]


class OnnxRunner:
    """An ONNX Runtime session. On the CPU provider tensors go through host memory; on the CUDA provider they stay on
    the GPU, bound to torch's memory, and the session works on a stream of torch's.

    ``providers`` are execution providers by name, and all of them must really be in use: ONNX Runtime lists CUDA even
    on a machine without a GPU. ``cuda_options`` are those of the CUDA provider. Raises MissingError when onnxruntime,
    the file or a provider is missing, and InputError when the model cannot be loaded.
    """

    kind = "onnx"

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str = "onnx",
        *,
        providers: Sequence[str] = (CPU_PROVIDER,),
        session_options: Any = None,
        cuda_options: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import onnxruntime as ort
        except ImportError as e:
            raise MissingError(
                "running an ONNX model needs onnxruntime, which is not installed: pip install onnxruntime"
            ) from e
        self.path = Path(path)
        if not self.path.is_file():
            raise MissingError(f"there is no ONNX model at {self.path}")
        self.name = name
        unknown = [p for p in providers if p not in ort.get_available_providers()]
        if unknown:
            raise MissingError(
                f"onnxruntime was built without {', '.join(unknown)}; it has {', '.join(ort.get_available_providers())}"
            )
        stream = None
        asked: list[Any] = list(providers)
        if CUDA_PROVIDER in providers and torch.cuda.is_available():
            stream = torch.cuda.Stream()
            asked[asked.index(CUDA_PROVIDER)] = CudaBinding.provider(stream, cuda_options)
        try:
            self._session = ort.InferenceSession(str(self.path), session_options, providers=asked)
        except Exception as e:  # onnxruntime's own exception types have no common base
            raise InputError(f"onnxruntime cannot load {self.path}: {e}") from e
        absent = [p for p in providers if p not in self._session.get_providers()]
        if absent:
            raise MissingError(
                f"asked for {', '.join(absent)}, but the session runs on {', '.join(self._session.get_providers())}; "
                "check the driver and install the GPU build of onnxruntime"
            )
        self._inputs = list(self._session.get_inputs())
        self.input_names = tuple(i.name for i in self._inputs)
        self.output_names = tuple(o.name for o in self._session.get_outputs())
        outputs = {o.name: _ONNX_DTYPES[o.type] for o in self._session.get_outputs()}
        self.on_torch_stream = stream is not None
        self._binding = CudaBinding(self._session, outputs, stream) if stream is not None else None
        kinds = [_ONNX_DTYPES.get(x.type) for x in (*self._session.get_outputs(), *self._inputs)]
        self.dtype = next((d for d in kinds if d is not None and d.is_floating_point), torch.float32)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """See ``Runner.run``; keyword tensors go to the inputs of their names, all others to the rest in order.

        Raises InputError when count, dtype, rank or shape of the tensors is not what the model takes.
        """
        tensors = lay_out(self.input_names, args, kwargs, self.path.name)
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self._inputs:
            self._check(spec, tensors[spec.name], sizes)
        if self._binding is not None:
            return self._binding.run(tensors)
        feed = {name: self._array(name, tensor) for name, tensor in tensors.items()}
        return [torch.from_numpy(value) for value in self._session.run(None, feed)]

    def _array(self, name: str, value: Tensor) -> Any:
        if value.dtype == torch.bfloat16:
            raise InputError(
                f"input {name} of {self.path.name} is bfloat16, which has no numpy type to pass it in; export in "
                "float16 or float32, or run on a GPU"
            )
        return value.detach().cpu().contiguous().numpy()

    def _check(self, spec: Any, value: Tensor, sizes: dict[str, tuple[int, str]]) -> None:
        """Raise InputError unless ``value`` fits; ``sizes`` collects what each symbol stands for."""
        where = f"input {spec.name} of {self.path.name}"
        dtype = _ONNX_DTYPES.get(spec.type)
        if dtype != value.dtype:
            raise InputError(f"{where} is {spec.type}, but got {value.dtype}; pass x.to({dtype})")
        if len(spec.shape) != value.dim():
            raise InputError(f"{where} has {len(spec.shape)} axes {spec.shape}, but got shape {list(value.shape)}")
        for axis, (want, have) in enumerate(zip(spec.shape, value.shape, strict=True)):
            if isinstance(want, int) and want != have:
                raise InputError(
                    f"{where} has size {want} at axis {axis} of {spec.shape}, but got shape {list(value.shape)}; "
                    "export with dynamic_shapes to make it free"
                )
            if isinstance(want, str):
                size, first = sizes.setdefault(want, (have, spec.name))
                if size != have:
                    raise InputError(
                        f"{where} has size {have} at axis {axis}, {want!r}, which is {size} in input {first}; "
                        "they must be equal"
                    )


def module_dtype(module: nn.Module) -> torch.dtype:
    """The type of the first floating point parameter or buffer; float32 for a module without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def named_outputs(output: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a model's output in pytree order, each with the keys that lead to it (``output`` for a lone one).

    Raises InputError for an object that pytree cannot look into: what it holds would go unseen.
    """
    try:
        flat = [(path_name(path), leaf) for path, leaf in pytree.tree_flatten_with_path(output)[0]]
    except ValueError:  # a container that was registered without its keys
        flat = [(str(i), leaf) for i, leaf in enumerate(pytree.tree_leaves(output))]
    result = []
    for name, leaf in flat:
        if isinstance(leaf, Tensor):
            result.append((f"output_{name}" if name.isdigit() else name or "output", leaf))
        elif not (leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device))):
            raise InputError(
                f"the model returns a {type(leaf).__name__}, which torch.utils._pytree cannot look into; return "
                "tensors, tuples or dicts, or register the class"
            )
    return result
