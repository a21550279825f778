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
HeadScore = Literal["first", "weights", "reconstruct", "importance", "activation", "wifv", "taylor", "fisher"]
HeadChoice = HeadScore | Mapping[str, Sequence[int]]
KvMerge = Literal["mean", "select", "aligned", "joint"]
Repairs = bool | Literal["outputs"]
"""Whether projections are fitted again; "outputs": output projections only, values stay."""
MERGED_BY_DATA = ("aligned", "joint")
"""Ways of merging KV heads that need calibration data."""
WITHOUT_DATA = ("first", "weights")
"""Head choices that need no calibration data."""

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
    hq allows: min(kv_heads, hq). Fractions and variants take the nearest whole number of heads (half a head counts as
    one), and for KV heads the nearest that divides hq or that hq divides, since models have stages with 3 or 5 heads;
    :func:`rounding` says where that happened. Raises PlanError, naming the site and its shapes, when the request is
    impossible.
    """
    asked = _asked(name, heads, kv_heads, hq, hkv)
    if asked is None:
        return None
    query, kv, query_free, kv_free = asked
    new_hq = _nearest(query, range(1, heads + 1)) if query_free else int(query)
    if kv_free:
        fitting = [n for n in range(1, kv_heads + 1) if new_hq % n == 0 or n % new_hq == 0]
        # More KV heads than query heads only where that was asked for.
        new_hkv = _nearest(kv, [n for n in fitting if n <= new_hq or kv > query] or fitting)
    else:
        new_hkv = int(kv)
    check(name, heads, kv_heads, new_hq, new_hkv)
    return new_hq, new_hkv


def rounding(name: str, heads: int, kv_heads: int, hq: Request, hkv: Request) -> str:
    """What :func:`resolve` rounded for this site, as a sentence; empty when the request was met exactly."""
    asked, got = _asked(name, heads, kv_heads, hq, hkv), resolve(name, heads, kv_heads, hq, hkv)
    if asked is None or got is None or (asked[0] == got[0] and asked[1] == got[1]):
        return ""
    wanted = " and ".join(f"{float(n):g} {what} heads" for n, what in zip(asked[:2], ("query", "KV"), strict=True))
    return (
        f"site {name!r} has {heads} query heads and {kv_heads} KV heads: the request comes to {wanted}, "
        f"made {got[0]} and {got[1]}"
    )


def _asked(
    name: str, heads: int, kv_heads: int, hq: Request, hkv: Request
) -> tuple[Fraction, Fraction, bool, bool] | None:
    """The exact (hq, hkv) of a request, and which of the two may be rounded."""
    query, both = _lookup(hq, name)
    pair, paired = _lookup(hkv, name)
    if not both and not paired:
        return None
    default_kv: Fraction | None = None
    if isinstance(query, str):
        variant = VARIANTS.get(query)
        if variant is None:
            raise PlanError(f"unknown variant {query!r}; known: {', '.join(VARIANTS)}")
        wanted_q = variant[0] * heads
        # The variant's hkv is stated over H; a GQA model may hold fewer KV heads already, and keeps those.
        kv = Fraction(variant[1]) if isinstance(variant[1], int) else variant[1] * heads
        default_kv = min(kv, Fraction(kv_heads)) if kv <= wanted_q else kv
    else:
        wanted_q = Fraction(heads) if query is None else _count(query, heads, "hq")
    query_free = isinstance(query, str | float)
    if pair is None:
        wanted_kv = default_kv if default_kv is not None else min(Fraction(kv_heads), wanted_q)
    elif isinstance(pair, str):
        raise PlanError(f"hkv={pair!r}: a variant name goes into hq")
    else:
        wanted_kv = _count(pair, kv_heads, "hkv")
    return wanted_q, wanted_kv, query_free, isinstance(pair, float) or (pair is None and query_free)


def _nearest(wanted: Fraction, counts: Sequence[int]) -> int:
    """The count nearest to ``wanted``; of two equally near ones the larger."""
    return min(counts, key=lambda n: (abs(n - wanted), -n))


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
            if matches(pattern, name):
                return value, True
        return None, False
    return request, True


def _count(value: HeadCount, available: int, what: str) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f"{what}={value!r} is not a number of heads, a fraction in (0, 1], or a variant name")
    if isinstance(value, int):
        return Fraction(value)
    if not 0 < value <= 1:
        raise PlanError(f"{what}={value}: a fraction must be in (0, 1]; whole numbers of heads are integers")
    return Fraction(value).limit_denominator(1024) * available


def matches(pattern: str, name: str) -> bool:
    """True when ``pattern`` (a site's name, or a glob) names the site ``name``."""
    return pattern == name or fnmatch.fnmatchcase(name, pattern)


def check_patterns(request: Request, names: Sequence[str], what: str) -> None:
    """Raise PlanError when a pattern of a mapping names no site."""
    if isinstance(request, Mapping):
        for pattern in request:
            if not any(matches(pattern, n) for n in names):
                raise PlanError(f"{what} pattern {pattern!r} matches no site; sites are: {', '.join(names)}")
