"""What a random attention program is made of: a flat, printable specification, and the rules that make it valid."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T")

# Every axis has a size of its own, and none of them is a number of heads, so that swapped axes cannot pass.
BATCH, OTHER_BATCH = 5, 7
LENGTH, OTHER_LENGTH = 11, 16
CONTEXT, OTHER_CONTEXT = 13, 18
IMAGE = (7, 9)
QUERIES = 17
WINDOWS = 7
WIDTH, CONTEXT_WIDTH = 19, 21
HEAD_DIM, VALUE_DIM, ROTARY_DIM = 10, 14, 6
LATENT, LORA, HIDDEN = 15, 20, 22
MEMORY = 9
LONGEST = 80


@dataclass(frozen=True)
class Spec:
    """One program and one request. Every default is the plainest choice."""

    heads: int = 2
    kv_heads: int = 2
    hq: int = 1
    hkv: int = 1
    choice: str = "first"
    merge: str = "mean"
    dtype: str = "float64"
    dynamic: bool = True
    layers: int = 1
    tied: bool = False
    residual: bool = False
    source: str = "self"
    batch_first: bool = True
    windows: bool = False
    fusion: str = "separate"
    maker: str = "linear"
    bias: bool = False
    split: str = "view"
    take: str = "unbind"
    heads_first: bool = True
    value_dim: bool = False
    norm: str = "none"
    rotary: str = "none"
    rows: str = "none"
    value_gate: bool = False
    expansion: str = "none"
    core: str = "sdpa"
    scores: str = "bhlm"
    swap_scores: bool = False
    swap_values: bool = False
    scale: str = "none"
    position: str = "none"
    softcap: bool = False
    mask: str = "none"
    mask_form: str = "add"
    mask_short: bool = False
    sink: bool = False
    softmax: str = "plain"
    dropout: bool = False
    gate: str = "none"
    merge_heads: str = "reshape"
    output: str = "linear"
    seed: int = 0

    def line(self) -> str:
        """The specification as a Python expression that holds what is not a default."""
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Spec({', '.join(told)})"

    @property
    def group(self) -> int:
        """Query heads on one KV head."""
        return self.heads // self.kv_heads

    @property
    def grid(self) -> bool:
        """True when query heads stand on a grid of KV heads and their groups."""
        return self.expansion in ("grid", "grid_tiled")

    @property
    def tiled(self) -> bool:
        """True when query head ``h`` reads KV head ``h % kv_heads`` (else ``h // group``)."""
        return self.expansion in ("tiled", "tiled_cat", "grid_tiled")

    @property
    def decomposed(self) -> bool:
        """True when the attention is spelled out, without scaled_dot_product_attention."""
        return not self.core.startswith("sdpa")

    @property
    def folded(self) -> bool:
        """True when batch and heads are one dimension at the core."""
        return self.core in ("sdpa3", "bmm", "baddbmm")

    @property
    def value_size(self) -> int:
        """Size of one head's values."""
        return VALUE_DIM if self.value_dim else HEAD_DIM

    @property
    def context_width(self) -> int:
        """Features of what keys and values are made of."""
        return WIDTH if self.source == "self" else CONTEXT_WIDTH


Choose = Callable[[str, Sequence[Any]], Any]
# Forms that stand alone are drawn rarely, so that most programs combine forms of which each one is known to work.
SPELLED = ("matmul", "matmul", "einsum", "einsum", "bmm", "baddbmm")
SQUARE = ("3hd", "h3d", "d3h")


def divisors(number: int) -> list[int]:
    """The divisors of ``number``, largest first."""
    return [d for d in range(number, 0, -1) if number % d == 0]


def requests(heads: int, kv_heads: int) -> list[tuple[int, int]]:
    """(hq, hkv) that can be asked for: every group of KV heads must have as many query heads as its new head reads."""
    found = []
    for hq in range(1, heads + 1):
        for hkv in range(1, kv_heads + 1):
            wide = max(hq, hkv)
            if wide % min(hq, hkv) or wide > heads:
                continue
            if kv_heads == heads or (kv_heads // hkv) * (heads // kv_heads) >= wide // hkv:
                found.append((hq, hkv))
    return found


def generate(choose: Choose) -> Spec:
    """Draw a valid program: ``choose(name, options)`` takes one option for each axis; the first ones are plainest."""
    drawn: dict[str, Any] = {}

    def pick(name: str, options: Sequence[T]) -> T:
        drawn[name] = choose(name, options)
        return drawn[name]  # type: ignore[no-any-return]

    def rarely(name: str, *options: T, plain: int) -> T:
        return pick(name, (options[0],) * plain + options[1:])

    heads = pick("heads", (2, 4, 3, 6, 8, 12))
    kv_heads = pick("kv_heads", (heads, *divisors(heads)))
    grouped, source = kv_heads < heads, rarely("source", "self", "cross", "queries", "queries_late", plain=4)
    pick("dtype", ("float64", "float64", "float32"))
    pick("dynamic", (True, True, False))
    if rarely("layers", 1, 2, plain=4) == 2:
        pick("tied", (False, True))
    pick("batch_first", (True, True, False))
    batch_first = drawn["batch_first"]
    if source == "self" and batch_first:
        rarely("windows", False, True, plain=8)
    # projections
    fusion = ["separate", "separate", "separate", "separate", "einsum", "kv", "kv_inner", "mla"]
    if source == "self":
        fusion += ["cat", "grouped", *(() if grouped else SQUARE)]
    pick("fusion", fusion)
    makers = ["linear"] * 6 + ["addmm", "low_rank", "low_rank_norm", "weight_norm", "lora", "conv1d"]
    if source == "self" and not drawn.get("windows"):
        makers.append("conv2d")
    if drawn["fusion"] != "einsum":
        pick("maker", makers)
    pick("bias", (False, True))
    if drawn["fusion"] != "einsum":
        pick("split", ("view", "unflatten", "reshape", "stack"))
        pick("take", ("unbind", "select", "chunk"))
    pick("heads_first", (True, False))
    if drawn["fusion"] in ("separate", "einsum", "kv_inner", "cat", "mla"):
        rarely("value_dim", False, True, plain=2)
    # between projections and core
    core = pick("core", ("sdpa", "sdpa", "sdpa3", *(("sdpa5",) if grouped else ()), *SPELLED))
    spelled = not core.startswith("sdpa")
    rarely("norm", "none", "rms", "layer", "rms_heads", "l2", *(("l2_scores",) if spelled else ()), plain=8)
    rarely("rotary", "none", "half", "interleaved", "complex", "partial", plain=8)
    rarely("rows", "none", "bias_kv", "memory", "zero", plain=9)
    rarely("value_gate", False, True, plain=11)
    # core
    if grouped:
        expansion = ["repeat_interleave", "expand", "tiled", "tiled_cat"]
        if core == "sdpa":
            expansion += ["enable_gqa", "enable_gqa"]
        if core in ("matmul", "einsum"):
            expansion += ["grid", "grid", "grid_tiled"]
        if kv_heads == 1 and core in ("sdpa", "matmul", "einsum"):
            expansion += ["broadcast", "broadcast"]
        if kv_heads == 1 and core == "einsum":
            expansion += ["headless"]
        pick("expansion", ["grid", "grid_tiled"] if core == "sdpa5" else expansion)
    grid = drawn.get("expansion") in ("grid", "grid_tiled")
    if core == "matmul":
        orders = ["bkglm", "bkglm", "bkgml"] if grid else ["bhlm", "bhlm", "bhml", "hblm"]
    elif core == "einsum":
        orders = (
            ["bkglm", "bkgml", "bgklm", "bklgm"] if grid else ["bhlm", "bhlm", "bhml", "blhm", "hblm", "lbhm", "bmhl"]
        )
    else:
        orders = ["nlm", "nlm", "nml"] if core == "bmm" else ["nlm"]
    if spelled:
        pick("scores", orders)
        rarely("swap_scores", False, True, plain=2)
        rarely("swap_values", False, True, plain=2)
        pick("scale", ("after", "query", "key", "both", "divide", "none"))
    else:
        pick("scale", ("none", "none", "argument"))
    rarely("position", "none", "table", "embedding", "alibi", "shaw", plain=8)
    masks = ["none", "none", "none", "none", "causal", "pair", "pair_buffer", "heads_buffer"]
    if not drawn.get("windows"):
        masks += ["key", "full", "heads"]
    elif spelled and drawn["scores"] in ("bhlm", "nlm"):
        masks += ["window", "window", "window", "window"]
    mask = pick("mask", masks)
    if mask == "causal" and core == "sdpa" and drawn["position"] == "none":
        pick("mask_form", ("flag", "bool", "add"))
    elif mask != "none":
        pick("mask_form", ("add", "add_inf", "where", "masked_fill") if spelled else ("add", "bool"))
        pick("mask_short", (False, True))
    if spelled:
        rarely("softcap", False, True, plain=9)
        rarely("sink", False, True, plain=11)
        rare = ("log_exp", "manual", "sigmoid", "top_k")
        rarely("softmax", "plain", *("float32",) * 5, *rare, plain=31)
        rarely("dropout", False, True, plain=3)
    # after the core
    rarely("gate", "none", "heads", "features", "scale", "norm", plain=9)
    pick("merge_heads", ("reshape", "flatten"))
    rarely("output", "linear", "conv1d", "addmm", "einsum_hed", "einsum_dhe", "beside_mlp", "low_rank", plain=6)
    pick("residual", (False, True))
    asked = pick("hq", requests(heads, kv_heads))
    drawn["hq"], drawn["hkv"] = asked
    pick("choice", ("first", "weights"))
    pick("merge", ("mean", "mean", "select"))
    drawn["seed"] = choose("seed", range(1000))
    return Spec(**drawn)


def random_spec(seed: int, without: Mapping[str, Sequence[str]] | None = None) -> Spec:
    """The program of number ``seed``; ``without`` names axis values that are not drawn."""
    source = random.Random(seed)

    def choose(name: str, options: Sequence[Any]) -> Any:
        left = [o for o in options if str(o) not in (without or {}).get(name, ())]
        return left[source.randrange(len(left))]

    return generate(choose)


def near(wanted: Mapping[str, Any]) -> Spec:
    """The valid program nearest to ``wanted`` (field values): what is impossible becomes the plainest option."""

    def choose(name: str, options: Sequence[Any]) -> Any:
        value = (wanted["hq"], wanted["hkv"]) if name == "hq" else wanted[name]
        return value if value in options else options[0]

    return generate(choose)


_REQUEST = ("heads", "kv_heads", "hq", "hkv", "core", "seed")
_CORES = ("sdpa", "matmul", "einsum")


def weight(spec: Spec) -> tuple[int, int, int, int, int]:
    """How far ``spec`` is from the plainest program; smaller is plainer."""
    core = _CORES.index(spec.core) if spec.core in _CORES else len(_CORES)
    return len(_odd(spec)), core, spec.heads, spec.heads - spec.kv_heads, spec.hq * 20 + spec.hkv


def _odd(spec: Spec) -> list[str]:
    """The axes of ``spec`` that are not plain, without those that every program has."""
    return [f.name for f in fields(spec) if getattr(spec, f.name) != f.default and f.name not in _REQUEST]


def simpler(spec: Spec) -> list[Spec]:
    """Plainer programs near ``spec``, the plainest first: many axes made plain at once, then single ones."""
    values = {f.name: getattr(spec, f.name) for f in fields(spec)}
    plain = {f.name: f.default for f in fields(spec)}
    odd = _odd(spec)
    trials: list[dict[str, Any]] = []
    size = len(odd)
    while size >= 1:
        trials += [{n: plain[n] for n in odd[i : i + size]} for i in range(0, len(odd), size)]
        size //= 2
    trials += [{"core": core} for core in _CORES]
    trials += [{"heads": h, "kv_heads": k} for h in (2, 4, 6, 8) if h <= spec.heads for k in divisors(h)]
    trials += [{"hq": a, "hkv": b} for a, b in requests(spec.heads, spec.kv_heads)]
    found = {near({**values, **trial}) for trial in trials}
    return sorted((s for s in found if weight(s) < weight(spec)), key=lambda s: (weight(s), s.line()))
