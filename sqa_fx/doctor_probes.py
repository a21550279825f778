"""Small real computations, one for each backend: ``python -m sqa_fx.doctor_probes NAME`` does one and prints an answer.

Each is meant for a process of its own, since an import may abort and a compiler may hang; ``sqa_fx.doctor`` runs them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import sys
import tempfile
from base64 import b64decode
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

MARK = "sqa-fx-doctor: "
"""What the line with the answer starts with: libraries print to the same place."""

# y[2, 2] = x[2, 2] @ x[2, 2] in float32 at opset 17; as bytes, so that it needs no onnx.
_MATMUL_ONNX = b64decode(
    "CAgSADpAChEKAXgKAXgSAXkiBk1hdE11bBIBZ1oTCgF4Eg4KDAgBEggKAggCCgIIAmITCgF5Eg4KDAgBEggKAggCCgIIAkIECgAQEQ=="
)
_NAMED_CAPABILITY = "SM89"


@dataclass(frozen=True)
class Answer:
    """What a probe found.

    ``usable``: it computed, and rightly. ``importable``: it is here, but cannot run, and ``detail`` says why.
    ``missing``: it is not installed. ``broken``: it does not even import. ``fix`` is the command that helps, where
    there is one.
    """

    status: Literal["usable", "importable", "missing", "broken"]
    detail: str
    fix: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


class Attention(nn.Module):
    """Attention over ``[batch, heads, seq, head_dim]``, scaled by a number of its own that no cache has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = random.uniform(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` attending to itself; the same shape."""
        return nn.functional.scaled_dot_product_attention(x, x, x) * self.scale


def main(arguments: list[str]) -> int:
    """Run the probe that is named and print its answer; 2 for another name."""
    if len(arguments) != 1 or arguments[0] not in PROBES:
        print(f"give one of {', '.join(PROBES)}", file=sys.stderr)
        return 2
    answer = PROBES[arguments[0]]()
    print(f"\n{MARK}{json.dumps(asdict(answer))}", flush=True)
    return 0


# --- torch -----------------------------------------------------------------------------------------------------------


def _eager() -> Answer:
    x = torch.randn(2, 3, 5, 7)
    scores = torch.softmax(x @ x.mT / 7**0.5, -1) @ x
    _require_close(nn.functional.scaled_dot_product_attention(x, x, x), scores)
    return Answer("usable", f"CPU, {torch.backends.cpu.get_cpu_capability()}", versions=_versions("torch"))


def _cuda() -> Answer:
    found = _versions("torch")
    if torch.version.cuda is None:
        fix = "pip install --force-reinstall torch, in the CUDA build that pytorch.org names for your driver"
        return Answer("missing", f"torch {torch.__version__} was built without CUDA", fix, found)
    found["cuda"] = torch.version.cuda
    if not torch.cuda.is_available():
        return Answer("importable", "no GPU, or no driver that fits: see nvidia-smi", None, found)
    x = torch.randn(64, 64)
    _require_close((x.cuda() @ x.cuda()).cpu(), x @ x, 0.1)
    return Answer("usable", _gpu(), versions=found)


def _compile() -> Answer:
    device = _device()
    compiler = _no_compiler()
    if compiler is not None and device.type == "cpu":
        return compiler
    found = _versions("torch", "triton")
    if device.type == "cuda" and "triton" not in found:
        return Answer("importable", "compiling for a GPU needs Triton", "pip install triton", found)
    module, x = Attention().eval().to(device), torch.randn(2, 3, 5, 7, device=device)
    with torch.no_grad():
        _require_close(torch.compile(module)(x), module(x), 1e-2)
    return Answer("usable", _where(device), versions=found)


def _aoti() -> Answer:
    compiler = _no_compiler()
    if compiler is not None:
        return compiler
    from sqa_fx.aoti_runner import AotiRunner
    from sqa_fx.exporters.to_aoti import export_aoti

    device = _device()
    module, x = Attention().eval().to(device), torch.randn(2, 3, 5, 7, device=device)
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        path = Path(directory) / "probe.pt2"
        export_aoti(torch.export.export(module, (x,)), path)
        _require_close(AotiRunner(path).run((x,), {})[0], module(x), 1e-2)
    return Answer("usable", _where(device), versions=_versions("torch"))


def _no_compiler() -> Answer | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return Answer("importable", "no C++ compiler", "apt-get install g++ (or name one in CXX)", _versions("torch"))
    return None


# --- ONNX ------------------------------------------------------------------------------------------------------------


def _onnx() -> Answer:
    fix = "pip install 'sqa-fx[onnx]'"
    for name in ("onnx", "onnxscript"):
        absent = _absent(name, fix)
        if absent is not None:
            return absent
    from sqa_fx.exporters.to_onnx import export_onnx

    with tempfile.TemporaryDirectory() as directory:
        artifact = export_onnx(Attention().eval(), Path(directory) / "probe.onnx", args=(torch.randn(2, 3, 5, 7),))
    return Answer("usable", f"opset {artifact.opset}", versions=_versions("onnx", "onnxscript", "onnx-ir"))


def _onnxruntime() -> Answer:
    return _absent("onnxruntime", "pip install onnxruntime") or _matmul_in_onnxruntime("CPUExecutionProvider", "CPU")


def _onnxruntime_cuda() -> Answer:
    fix = "pip uninstall -y onnxruntime; pip install onnxruntime-gpu"
    absent = _absent("onnxruntime", "pip install onnxruntime-gpu")
    if absent is not None:
        return absent
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return Answer("missing", f"onnxruntime {ort.__version__} was built without CUDA", fix, _onnxruntime_versions())
    if not torch.cuda.is_available() and torch.version.cuda is not None:
        return Answer("importable", "no GPU, or no driver that fits: see nvidia-smi", None, _onnxruntime_versions())
    return _matmul_in_onnxruntime("CUDAExecutionProvider", _gpu())


def _onnxruntime_versions() -> dict[str, str]:
    return _versions("onnxruntime", "onnxruntime-gpu")


def _matmul_in_onnxruntime(provider: str, where: str) -> Answer:
    import onnxruntime as ort

    if provider == "CUDAExecutionProvider" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds the CUDA libraries that came with torch or from PyPI
    session = ort.InferenceSession(_MATMUL_ONNX, providers=[provider])
    if provider not in session.get_providers():  # it falls back to the CPU with a log line only
        return Answer(
            "importable",
            f"the session runs on {', '.join(session.get_providers())} instead: no GPU, or no CUDA or cuDNN library",
            None,
            _onnxruntime_versions(),
        )
    x = torch.randn(2, 2)
    _require_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), x @ x, 1e-2)
    return Answer("usable", where, versions=_onnxruntime_versions())


# --- TensorRT --------------------------------------------------------------------------------------------------------


def _tensorrt() -> Answer:
    fix = "pip install 'sqa-fx[tensorrt]'"
    absent = _absent("tensorrt", fix)
    if absent is not None:
        return absent
    found = _versions("tensorrt")
    if not _has_gpu():
        importlib.import_module("tensorrt")
        return Answer("importable", f"no GPU that torch {torch.__version__} sees, and it builds engines on one only",
                      None, found)  # fmt: skip
    return _run_engine(importlib.import_module("tensorrt"), found)


def _tensorrt_rtx() -> Answer:
    names = [n for n in ("tensorrt_rtx", "tensorrt_rtx_bindings") if importlib.util.find_spec(n) is not None]
    if not names:
        return Answer("missing", "tensorrt_rtx is not installed", "pip install 'sqa-fx[tensorrt-rtx]'")
    found = _versions("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings")
    trt = importlib.import_module(names[0])
    if _has_gpu():
        return _run_engine(trt, found)
    size = len(bytes(_build_engine(trt, _NAMED_CAPABILITY)))
    return Answer(
        "importable",
        f"no GPU: it builds engines for a named capability ({size} bytes for {_NAMED_CAPABILITY}), but runs none",
        None,
        found,
    )


def _torch_tensorrt() -> Answer:
    release = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    fix = f"pip install 'torch_tensorrt=={release}.*' (beside a CUDA build of torch)"
    absent = _absent("torch_tensorrt", fix)
    if absent is not None:
        return absent
    found = _versions("torch_tensorrt", "tensorrt")
    try:
        torch_tensorrt: Any = importlib.import_module("torch_tensorrt")
    except (AssertionError, ImportError, OSError) as e:  # what it raises beside a CPU-only or another torch
        lines = str(e).strip().splitlines()
        reason = f"its import raises {type(e).__name__}: {lines[-1] if lines else 'no message'}"
        return Answer("broken", f"{reason} (torch {torch.__version__})", fix, found)
    if not _has_gpu():
        return Answer("importable", f"no GPU that torch {torch.__version__} sees", None, found)
    module, x = nn.Linear(64, 32).eval().cuda(), torch.randn(8, 64, device="cuda")
    with torch.no_grad():
        compiled = torch_tensorrt.compile(module, ir="dynamo", inputs=[x], min_block_size=1)
        _require_close(compiled(x), module(x), 1e-2)
    return Answer("usable", _gpu(), versions=found)


def _build_engine(trt: ModuleType | Any, capability: str | None) -> Any:
    """An engine for ``y[3, 5] = x[3, 5] + x[3, 5]``, for the GPU that is here or the ``capability`` named."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    x = network.add_input("x", trt.float32, (3, 5))
    y = network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(f"{trt.__name__} built no engine")
    return engine


def _run_engine(trt: Any, found: dict[str, str]) -> Answer:
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(_build_engine(trt, None))
    context = engine.create_execution_context()
    x = torch.randn(3, 5, device="cuda")
    y = torch.empty_like(x)
    context.set_tensor_address("x", x.data_ptr())
    context.set_tensor_address("y", y.data_ptr())
    torch.cuda.synchronize()
    if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
        raise RuntimeError(f"{trt.__name__} did not run its engine")
    torch.cuda.synchronize()
    _require_close(y, x + x, 1e-3)
    return Answer("usable", _gpu(), versions=found)


# --- shared ----------------------------------------------------------------------------------------------------------


def _absent(name: str, fix: str) -> Answer | None:
    if importlib.util.find_spec(name) is not None:
        return None
    return Answer("missing", f"{name} is not installed", fix)


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = torch.__version__ if package == "torch" else metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _device() -> torch.device:
    return torch.device("cuda" if _has_gpu() else "cpu")


def _where(device: torch.device) -> str:
    return _gpu() if device.type == "cuda" else "CPU"


def _gpu() -> str:
    if not _has_gpu():
        return "CUDA"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}"


def _require_close(have: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    error = float((have.double() - want.double()).abs().max())
    if not error <= tolerance:
        raise RuntimeError(f"the result is wrong: error {error:.3g} > {tolerance:g}")


PROBES: dict[str, Callable[[], Answer]] = {
    "eager": _eager,
    "cuda": _cuda,
    "torch.compile": _compile,
    "aoti": _aoti,
    "onnx": _onnx,
    "onnxruntime": _onnxruntime,
    "onnxruntime-cuda": _onnxruntime_cuda,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
    "torch-tensorrt": _torch_tensorrt,
}
"""By backend, in the order of reports."""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
