"""Run a program that torch_tensorrt compiled and saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqa_fx.call_tensors import lay_out
from sqa_fx.exporters.sidecar import Sidecar
from sqa_fx.exporters.tensorrt_library import require_gpu
from sqa_fx.exporters.to_torch_tensorrt import torch_tensorrt_library
from sqa_fx.runners import named_outputs


class TorchTensorRtRunner:
    """A saved torch_tensorrt program, on torch's current stream of the GPU that it was built for.

    Raises MissingError without the library, a GPU, the file or its sidecar, and InputError for one of another GPU.
    """

    kind = "torch-tensorrt"
    on_torch_stream = True

    def __init__(self, path: str | os.PathLike[str], name: str = "torch-tensorrt") -> None:
        self.path, self.name = Path(path), name
        self.sidecar = Sidecar.read(self.path)
        torch_tensorrt_library()  # registers the operators that the file holds
        require_gpu(self.path.name, self.sidecar.built_for)
        self._module = torch.export.load(self.path).module()
        self.dtype = self.sidecar.floating_dtype

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """See ``Runner.run``. Raises InputError for tensors outside of the profile."""
        names = [s.name for s in self.sidecar.inputs]
        given = lay_out(names, args, kwargs, self.path.name)
        self.sidecar.check_inputs(given)
        with torch.no_grad():
            return [t for _, t in named_outputs(self._module(*(given[n].to("cuda") for n in names)))]
