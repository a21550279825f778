"""ONNX Runtime on a CUDA device with tensors that stay there: inputs and outputs are bound to torch's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CUDA_PROVIDER = "CUDAExecutionProvider"
# TensorProto.DataType; numpy has no bfloat16 to say it with.
_ELEMENT_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}


class CudaBinding:
    """Runs a session on torch's GPU. ``stream`` is the one that the session was made with (see ``provider``)."""

    def __init__(self, session: Any, outputs: Mapping[str, torch.dtype], stream: Any) -> None:
        import onnxruntime as ort

        self._session, self._outputs, self._stream = session, dict(outputs), stream
        self._options = ort.RunOptions()
        # The stream is torch's: waiting for it is the caller's business.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._shapes: dict[tuple[tuple[int, ...], ...], list[tuple[int, ...]]] = {}

    @staticmethod
    def provider(stream: Any, options: Mapping[str, Any] | None = None) -> tuple[str, dict[str, str]]:
        """The CUDA provider, on ``stream``."""
        given = {k: str(v) for k, v in (options or {}).items()}
        return CUDA_PROVIDER, {"device_id": "0", "user_compute_stream": str(stream.cuda_stream), **given}

    def run(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs, as tensors on the GPU, ready on torch's current stream."""
        held = {name: t.detach().to("cuda").contiguous() for name, t in tensors.items()}
        key = tuple(tuple(t.shape) for t in held.values())
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        if key not in self._shapes:
            self._shapes[key] = self._output_shapes(held)
        binding = self._bound(held)
        results = []
        for (name, dtype), shape in zip(self._outputs.items(), self._shapes[key], strict=True):
            result = torch.empty(shape, dtype=dtype, device="cuda")
            binding.bind_output(name, "cuda", 0, _ELEMENT_TYPES[dtype], shape, result.data_ptr())
            results.append(result)
        self._session.run_with_iobinding(binding, self._options)
        current.wait_stream(self._stream)
        for tensor in (*held.values(), *results):
            tensor.record_stream(self._stream)
        return results

    def _output_shapes(self, held: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
        """The sizes of the outputs at these inputs, which only a run tells: ONNX Runtime allocates in this one."""
        binding = self._bound(held)
        for name in self._outputs:
            binding.bind_output(name, "cuda", 0)
        self._session.run_with_iobinding(binding)
        return [tuple(value.shape()) for value in binding.get_outputs()]

    def _bound(self, held: Mapping[str, Tensor]) -> Any:
        binding = self._session.io_binding()
        for name, t in held.items():
            binding.bind_input(name, "cuda", 0, _ELEMENT_TYPES[t.dtype], tuple(t.shape), t.data_ptr())
        return binding
