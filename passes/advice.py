"""The kinds of refusal, and for each what would make the site convertible."""

from __future__ import annotations

from typing import Literal

RefusalKind = Literal[
    "norm across heads",
    "talking heads",
    "channel attention",
    "one head",
    "no output projection",
    "cache input",
    "compiled output",
    "heads combined",
    "data-dependent routing",
    "head mixing",
    "opaque op",
    "layout",
    "shared weights",
    "data-dependent size",
    "other",
]

ADVICE: dict[RefusalKind, str] = {
    "norm across heads": (
        "allow_inexact=True (--allow-inexact), which lets the norm or mean run over the kept heads only; or normalise "
        "every head by itself, over head_dim only"
    ),
    "talking heads": (
        "take out the weight that mixes the scores or probabilities of the heads, and fine-tune; every head must "
        "attend by itself"
    ),
    "channel attention": (
        "nothing to gain: it attends over channels, and its cost grows with the sequence only linearly"
    ),
    "one head": "there is no head to spare; only a model with more, smaller heads can be converted",
    "no output projection": (
        "put a linear layer between the heads' output and its first use (its input columns are what is cut)"
    ),
    "cache input": (
        "keep all KV heads (hkv of the original), convert ahead of time (sqa_fx.convert makes the cache smaller), or "
        "call the model without a KV cache that enters as an input (use_cache=False)"
    ),
    "compiled output": (
        "convert ahead of time, sqa_fx.convert(model, ...), which changes the shape of that output and says so"
    ),
    "heads combined": (
        "heads work in pairs or groups here (differential attention, for one); only heads that meet nowhere but in the "
        "output projection can be dropped"
    ),
    "data-dependent routing": "which head or expert is used hangs on the data; use the same ones for every input",
    "head mixing": "keep the heads apart from the scores to the values, and fine-tune",
    "opaque op": (
        "write the operator with plain tensor operators, or give it a decomposition, so that heads can be followed "
        "through it"
    ),
    "layout": (
        "give the heads a dimension of their own, view(batch, length, heads, head_dim), or capture with static shapes "
        "(dynamic_shapes=None, --static)"
    ),
    "shared weights": "untie the parameter (one copy for each use), or keep all KV heads that it makes",
    "data-dependent size": "make the size independent of the data: pad to a fixed one, or compute it from input shapes",
    "other": "not known; if this is ordinary attention, please report it with this line",
}
