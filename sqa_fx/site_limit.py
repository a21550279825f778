"""``SQA_FX_MAX_SITES=N``: only the first N sites are converted, to find by bisection the one that spoils a result."""

from __future__ import annotations

import os
from collections.abc import Mapping

from sqa_fx.errors import InputError
from sqa_fx.plan import SitePlan

VARIABLE = "SQA_FX_MAX_SITES"


def site_limit() -> int | None:
    """The number in the environment, or None. Raises InputError when it is not a number of sites."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    if not text.isdecimal():
        raise InputError(f"{VARIABLE}={text!r} in the environment is not a number of sites")
    return int(text)


def limited(plans: Mapping[str, SitePlan], before: int = 0) -> tuple[dict[str, SitePlan], list[str]]:
    """``plans`` without the sites beyond the limit, of which ``before`` were converted already; and the names of
    those that stay as they are."""
    limit = site_limit()
    if limit is None:
        return dict(plans), []
    changing = [name for name, plan in plans.items() if not plan.identity]
    left = changing[max(0, limit - before) :]
    return {name: plan for name, plan in plans.items() if name not in left}, left
