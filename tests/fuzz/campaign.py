"""Many trials: counts of outcomes, coverage of every axis value, and the plainest program behind each outcome."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from fuzz.check import FAILURES, Outcome, trial
from fuzz.spec import Spec, random_spec, simpler, weight

Without = Mapping[str, Sequence[str]]


@dataclass
class Tally:
    """What a campaign found so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    signatures: Counter[str] = field(default_factory=Counter)
    plainest: dict[str, Spec] = field(default_factory=dict)
    seeds: dict[str, list[int]] = field(default_factory=dict)
    checks: Counter[str] = field(default_factory=Counter)
    drawn: Counter[tuple[str, str]] = field(default_factory=Counter)
    passed: Counter[tuple[str, str]] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)

    def add(self, seed: int, spec: Spec, outcome: Outcome) -> None:
        """Count one trial."""
        sign = outcome.signature
        self.outcomes[outcome.kind] += 1
        self.signatures[sign] += 1
        self.checks.update(outcome.checks)
        self.seeds.setdefault(sign, []).append(seed)
        if sign not in self.plainest or weight(spec) < weight(self.plainest[sign]):
            self.plainest[sign], self.details[sign] = spec, outcome.detail
        for f in fields(spec):
            if f.name != "seed":
                entry = (f.name, str(getattr(spec, f.name)))
                self.drawn[entry] += 1
                self.passed[entry] += outcome.kind == "ok"

    @property
    def failures(self) -> int:
        """Trials that found a fault."""
        return sum(self.outcomes[kind] for kind in FAILURES)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-ready data."""
        return {
            "outcomes": dict(self.outcomes),
            "checks": dict(self.checks),
            "signatures": [
                {"signature": s, "count": n, "plainest": self.plainest[s].line(), "detail": self.details[s],
                 "seeds": self.seeds[s][:20]}
                for s, n in self.signatures.most_common()
            ],
            "coverage": {f"{a}={v}": [n, self.passed[a, v]] for (a, v), n in sorted(self.drawn.items())},
        }  # fmt: skip


def prepare() -> None:
    """One thread, no warnings of torch.export."""
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)


def attempt(seed: int, without: Without) -> tuple[int, Spec, Outcome]:
    """The trial of number ``seed``."""
    spec = random_spec(seed, without)
    return seed, spec, trial(spec)


def campaign(seeds: Iterable[int], jobs: int, without: Without) -> Iterator[tuple[int, Spec, Outcome]]:
    """Run trials, in ``jobs`` processes."""
    one = functools.partial(attempt, without=without)
    if jobs <= 1:
        prepare()
        yield from map(one, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, prepare, maxtasksperchild=200) as pool:
        yield from pool.imap_unordered(one, seeds, chunksize=4)


def plainer(tally: Tally, jobs: int, seconds: float) -> None:
    """Put the plainest program that can be found within ``seconds`` behind every outcome but ok."""
    work = [(spec, sign, seconds) for sign, spec in tally.plainest.items() if not sign.startswith("ok")]
    if jobs <= 1:
        found = [shrink(*w) for w in work]
    else:
        with multiprocessing.get_context("spawn").Pool(jobs, prepare) as pool:
            found = pool.starmap(shrink, work, chunksize=1)
    for (_, sign, _), spec in zip(work, found, strict=True):
        tally.plainest[sign] = spec


def shrink(spec: Spec, signature: str, seconds: float) -> Spec:
    """The plainest program that gives the same outcome, as far as it is found within ``seconds``."""
    stop = time.monotonic() + seconds
    tried: set[Spec] = {spec}
    moved = True
    while moved:
        moved = False
        for candidate in simpler(spec):
            if time.monotonic() > stop:
                return spec
            if candidate in tried:
                continue
            tried.add(candidate)
            if trial(candidate).signature == signature:
                spec, moved = candidate, True
                break
    return spec
