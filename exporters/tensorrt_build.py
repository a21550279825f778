"""An ONNX file to a serialized TensorRT engine: strongly typed network, one profile from the axis ranges, and fused
attention kernels wherever the library has one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqa_fx.errors import InputError, SqaError
from sqa_fx.exporters.sidecar import AxisRange, TensorSpec
from sqa_fx.exporters.tensorrt_library import capability_name, library, logger

_UNSUPPORTED = "not supported by a dedicated kernel"


class EngineBuildError(SqaError):
    """TensorRT could not build the engine; the message carries what its logger said."""


@dataclass(frozen=True)
class AttentionLayer:
    """One attention of the network: the ONNX node's name, what distinguishes it for the choice of kernels, and whether
    a fused kernel computes it."""

    name: str
    signature: tuple[Any, ...]
    causal: bool
    fused: bool


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine, the attentions in it, and the builder's timing cache afterwards, if it has one."""

    data: bytes
    attentions: tuple[AttentionLayer, ...]
    timing_cache: bytes | None


def build_engine(
    onnx_path: Path,
    flavour: str,
    inputs: Sequence[TensorSpec],
    *,
    compute_capability: str | None = None,
    workspace_bytes: int | None = None,
    timing_cache: bytes | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> BuiltEngine:
    """Build an engine for ``inputs``, whose AxisRanges give the profile (min, opt, max).

    ``compute_capability`` ("sm_89") names the GPU to build for where the library can do that without one; None is the
    GPU that is here. Attention keeps its fused kernel where there is one. Where there is none, the build fails with a
    message that does not name the layer: attentions of one signature (shapes, dtype, causal, mask) stand or fall
    together, so that one build per signature finds those that must be decomposed.

    Raises InputError for inputs that are not the network's, EngineBuildError when parsing or building fails, and
    MissingError when the library is not there.
    """
    trt = library(flavour)
    # None is: everything fused. Trials go from there to all decomposed.
    build = _Build(trt, onnx_path, inputs, compute_capability, workspace_bytes, timing_cache)
    progress("building with fused attention")
    attempt = build.run(decomposed=())
    layers = attempt.layers
    if attempt.data is None:
        if not layers or not attempt.lacks_kernel:
            raise EngineBuildError(f"{flavour} could not build {onnx_path.name}: {attempt.said}")
        signatures = list(dict.fromkeys(layer.signature for layer in layers))
        without = set(signatures)
        for signature in signatures if len(signatures) > 1 else ():
            progress("looking for attentions with a fused kernel")
            others = set(signatures) - {signature}
            if build.run(decomposed=others).data is not None:
                without.discard(signature)
        progress("building with decomposed attention")
        attempt = build.run(decomposed=without)
        if attempt.data is None:
            raise EngineBuildError(f"{flavour} could not build {onnx_path.name}: {attempt.said}")
    return BuiltEngine(attempt.data, attempt.layers, attempt.timing_cache)


@dataclass(frozen=True)
class _Attempt:
    data: bytes | None
    layers: tuple[AttentionLayer, ...]
    said: str
    lacks_kernel: bool
    timing_cache: bytes | None


@dataclass(frozen=True)
class _Build:
    trt: Any
    onnx_path: Path
    inputs: Sequence[TensorSpec]
    compute_capability: str | None
    workspace_bytes: int | None
    timing_cache: bytes | None

    def run(self, decomposed: Collection[tuple[Any, ...]]) -> _Attempt:
        trt = self.trt
        log = logger(trt)
        builder = trt.Builder(log)
        flags = 0
        # Newer versions type every network strongly and lack the flag.
        strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        if strongly is not None:
            flags |= 1 << int(strongly)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(self.onnx_path)):
            told = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise EngineBuildError(f"{trt.__name__} cannot read {self.onnx_path.name}: {told or log.errors()}")
        config = builder.create_builder_config()
        if self.compute_capability is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(capability_name(trt, self.compute_capability), 0)
        if self.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace_bytes)
        cache = self._cache(config)
        self._profile(builder, network, config)
        layers = tuple(self._attentions(network, decomposed))
        serialized = builder.build_serialized_network(network, config)
        errors = log.errors()
        after = bytes(cache.serialize()) if cache is not None and serialized is not None else None
        return _Attempt(
            None if serialized is None else bytes(serialized),
            layers,
            " | ".join(errors) or "its logger said nothing",
            any(_UNSUPPORTED in e for e in errors),
            after,
        )

    def _cache(self, config: Any) -> Any:
        if not hasattr(config, "create_timing_cache"):
            return None
        cache = config.create_timing_cache(self.timing_cache or b"")
        # A cache of another version or GPU is refused; the build is right without it, only slower.
        return cache if cache is not None and config.set_timing_cache(cache, False) else None

    def _profile(self, builder: Any, network: Any, config: Any) -> None:
        expected = {spec.name: spec for spec in self.inputs}
        names = [network.get_input(i).name for i in range(network.num_inputs)]
        # TensorRT accepts a profile for a name that does not exist, and then fails far from here.
        if set(names) != set(expected):
            raise InputError(f"the network takes {', '.join(names)}, but ranges are given for {', '.join(expected)}")
        profile = builder.create_optimization_profile()
        for name in names:
            spec = expected[name]
            if any(isinstance(n, AxisRange) for n in spec.shape):
                profile.set_shape(name, *(spec.sizes(which) for which in ("min", "opt", "max")))
        if config.add_optimization_profile(profile) < 0:
            shapes = "; ".join(f"{s.name} {s.sizes('min')} {s.sizes('opt')} {s.sizes('max')}" for s in self.inputs)
            raise InputError(f"TensorRT refuses the profile (min, opt, max): {shapes}")

    def _attentions(self, network: Any, decomposed: Collection[tuple[Any, ...]]) -> list[AttentionLayer]:
        kind = getattr(self.trt.LayerType, "ATTENTION_INPUT", None)
        found = []
        for index in range(network.num_layers if kind is not None else 0):
            layer = network.get_layer(index)
            if layer.type != kind:
                continue
            layer.__class__ = self.trt.IAttentionInputLayer  # the bindings hand out the base class
            attention = layer.attention
            operands = [attention.get_input(i) for i in range(attention.num_inputs)]
            # The batch plays no part in the choice of a kernel; heads and head dim do.
            shapes = tuple((str(t.dtype), tuple(t.shape)[1:]) for t in operands if t is not None)
            signature = (shapes, bool(attention.causal), attention.mask is not None)
            fused = signature not in decomposed
            attention.decomposable = not fused
            found.append(AttentionLayer(attention.name or layer.name, signature, bool(attention.causal), fused))
        return found
