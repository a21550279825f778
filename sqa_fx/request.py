"""What the user asked for: hq and hkv as numbers, fractions, variant names, or a mapping from site patterns to
these."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

from sqa_fx.errors import PlanError

HeadCount = int | float | str
Request = HeadCount | Mapping[str, HeadCount] | None
HeadChoice = Literal["first", "weights"] | Mapping[str, Sequence[int]]

# Source: the variants named in arXiv 2510.01817, as fractions of the site's own H query heads. lSQA and rSQA leave one
# number open there: lSQA takes hkv = hq/3 (a quarter of H), rSQA a quarter of the queries over half of the KV heads.
VARIANTS: dict[str, tuple[Fraction, Fraction | int]] = {
    "SQA": (Fraction(1, 2), Fraction(1, 4)),
    "sSQA": (Fraction(1, 2), Fraction(1, 2)),
    "xSQA": (Fraction(1, 4), Fraction(1, 4)),
    "xSMQA": (Fraction(1, 4), 1),
    "lSQA": (Fraction(3, 4), Fraction(1, 4)),
    "rSQA": (Fraction(1, 4), Fraction(1, 2)),
}


def resolve(name: str, heads: int, kv_heads: int, hq: Request, hkv: Request) -> tuple[int, int] | None:
    """(hq, hkv) for site ``name`` with ``heads`` query and ``kv_heads`` KV heads; None when no pattern names the site.

    A variant name in ``hq`` sets both unless ``hkv`` is given. hkv left out means as many KV heads as the request for
    hq allows: min(kv_heads, hq). Raises PlanError, naming the site and its shapes, when the request is impossible.
    """
    query, both = _lookup(hq, name)
    pair, paired = _lookup(hkv, name)
    if not both and not paired:
        return None
    shape = f"site {name!r} has {heads} query heads and {kv_heads} KV heads"
    default_kv: HeadCount | None = None
    if isinstance(query, str):
        variant = VARIANTS.get(query)
        if variant is None:
            raise PlanError(f"unknown variant {query!r}; known: {', '.join(VARIANTS)}")
        new_hq = _times(variant[0], heads, query, shape)
        kv = variant[1]
        # The variant's hkv is stated over H; a GQA model may hold fewer KV heads already, and keeps those.
        wanted = kv if isinstance(kv, int) else _times(kv, heads, query, shape)
        default_kv = min(wanted, kv_heads) if wanted <= new_hq else wanted
    else:
        new_hq = heads if query is None else _count(query, heads, "hq", shape)
    if pair is None:
        new_hkv = int(default_kv) if default_kv is not None else min(kv_heads, new_hq)
    elif isinstance(pair, str):
        raise PlanError(f"hkv={pair!r}: a variant name goes into hq")
    else:
        new_hkv = _count(pair, kv_heads, "hkv", shape)
    check(name, heads, kv_heads, new_hq, new_hkv)
    return new_hq, new_hkv


def check(name: str, heads: int, kv_heads: int, hq: int, hkv: int) -> None:
    """Raise PlanError when a site of (heads, kv_heads) cannot become (hq, hkv)."""
    shape = f"site {name!r} has {heads} query heads and {kv_heads} KV heads"
    if not 1 <= hq <= heads:
        raise PlanError(f"{shape}: hq={hq} is not between 1 and {heads}")
    if not 1 <= hkv <= kv_heads:
        raise PlanError(f"{shape}: hkv={hkv} is not between 1 and {kv_heads}")
    if hq % hkv and hkv % hq:
        raise PlanError(
            f"{shape}: hq={hq} and hkv={hkv} do not divide one another; one must be a multiple of the other"
        )


def _lookup(request: Request, name: str) -> tuple[HeadCount | None, bool]:
    if request is None:
        return None, False
    if isinstance(request, Mapping):
        for pattern, value in request.items():
            if pattern == name or fnmatch.fnmatchcase(name, pattern):
                return value, True
        return None, False
    return request, True


def _times(fraction: Fraction, count: int, text: object, shape: str) -> int:
    exact = fraction * count
    if exact.denominator != 1 or exact < 1:
        raise PlanError(f"{shape}: {text} asks for {fraction} of {count}, which is not a whole number of heads")
    return int(exact)


def _count(value: HeadCount, available: int, what: str, shape: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f"{what}={value!r} is not a number of heads, a fraction in (0, 1], or a variant name")
    if isinstance(value, int):
        return value
    if not 0 < value <= 1:
        raise PlanError(f"{what}={value}: a fraction must be in (0, 1]; whole numbers of heads are integers")
    return _times(Fraction(value).limit_denominator(1024), available, f"{what}={value}", shape)


def check_patterns(request: Request, names: Sequence[str], what: str) -> None:
    """Raise PlanError when a pattern of a mapping names no site."""
    if isinstance(request, Mapping):
        for pattern in request:
            if not any(pattern == n or fnmatch.fnmatchcase(n, pattern) for n in names):
                raise PlanError(f"{what} pattern {pattern!r} matches no site; sites are: {', '.join(names)}")
