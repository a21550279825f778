"""Run an exported TensorRT engine on the GPU that it was built for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqa_fx.call_tensors import lay_out
from sqa_fx.errors import InputError, MissingError
from sqa_fx.exporters.sidecar import Sidecar
from sqa_fx.exporters.tensorrt_library import library, logger, require_gpu
from sqa_fx.whole_file import write_whole

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorRtRunner:
    """An engine of ``tensorrt`` or ``tensorrt_rtx``, on torch's current stream; inputs and outputs stay on the GPU.

    ``runtime_cache`` keeps the kernels that TensorRT-RTX compiles on first use in a file, read now and written by
    :meth:`save_runtime_cache`. Raises MissingError without the library, a GPU, the file or its sidecar, and InputError
    for an engine of another GPU or version.
    """

    on_torch_stream = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        runtime_cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise MissingError(f"there is no engine at {self.path}")
        self.sidecar = Sidecar.read(self.path)
        self.kind = self.sidecar.format
        self.name = name or self.kind
        trt = library(self.kind)
        require_gpu(self.path.name, self.sidecar.built_for)
        self._log = logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is None:
            raise InputError(f"{self.path.name} does not load: {'; '.join(self._log.errors()) or 'no reason given'}")
        self._cache_path = Path(runtime_cache) if runtime_cache is not None else None
        self._cache: Any = None
        self._context = self._make_context(trt)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = {n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
        self._outputs = [s.name for s in self.sidecar.outputs]
        if inputs != {s.name for s in self.sidecar.inputs} or set(names) - inputs != set(self._outputs):
            raise InputError(f"{self.path.name} has tensors {', '.join(names)}, and its sidecar names others")
        self.dtype = self.sidecar.floating_dtype

    def _make_context(self, trt: Any) -> Any:
        if not hasattr(self._engine, "create_runtime_config"):
            context = self._engine.create_execution_context()
        else:
            config = self._engine.create_runtime_config()
            strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
            if strategies is not None:
                # Kernels for a shape are compiled before its first run, so that what is validated is what is measured.
                config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            if hasattr(config, "create_runtime_cache"):
                self._cache = config.create_runtime_cache()
                if self._cache_path is not None and self._cache_path.is_file():
                    self._cache.deserialize(self._cache_path.read_bytes())
                config.set_runtime_cache(self._cache)
            context = self._engine.create_execution_context(config)
        if context is None:
            raise InputError(f"{self.path.name}: no execution context ({'; '.join(self._log.errors())})")
        return context

    def save_runtime_cache(self) -> None:
        """Write the kernels compiled so far to the ``runtime_cache`` file. Raises InputError when none was named."""
        if self._cache_path is None or self._cache is None:
            raise InputError("no runtime cache: give runtime_cache=FILE, with an engine of tensorrt-rtx")
        write_whole(self._cache_path, bytes(self._cache.serialize()), overwrite=True)

    def device_memory(self) -> int:
        """Bytes of GPU memory that the engine takes for its activations, which torch does not see."""
        return int(self._engine.device_memory_size_v2)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """See ``Runner.run``. Raises InputError for tensors that do not fit the engine, or when it fails."""
        names = [s.name for s in self.sidecar.inputs]
        given = lay_out(names, args, kwargs, self.path.name)
        self.sidecar.check_inputs(given)
        held = {n: t.detach().to("cuda").contiguous() for n, t in given.items()}
        for name, tensor in held.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise InputError(
                    f"{self.path.name} refuses {name} {list(tensor.shape)}: {'; '.join(self._log.errors())}"
                )
            self._context.set_tensor_address(name, tensor.data_ptr())
        results = []
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            dtype = _DTYPES[str(self._engine.get_tensor_dtype(name)).rsplit(".", 1)[-1]]
            results.append(torch.empty(shape, dtype=dtype, device="cuda"))
            self._context.set_tensor_address(name, results[-1].data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise InputError(f"{self.path.name} failed to run: {'; '.join(self._log.errors()) or 'no reason given'}")
        return results
