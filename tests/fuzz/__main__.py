"""Run random attention programs through convert: ``python -m fuzz --programs 2000 --seed 0 --report fuzz.json``.

Prints every distinct outcome with its count and the plainest program that gives it, and how often each axis value was
drawn and passed. Exit code 1 when a program found a fault (a wrong result, a failed proof, a foreign exception, or a
conversion that changed nothing), else 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import sqa_fx
from fuzz.campaign import Tally, campaign, plainer, prepare


def main(argv: list[str] | None = None) -> int:
    """Run the campaign. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=2000, metavar="N", help="how many (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="number of the first program (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="processes (default: 1)")
    parser.add_argument("--seconds", type=float, default=0, help="stop drawing after this time (default: never)")
    parser.add_argument(
        "--shrink", type=float, default=30, metavar="SECONDS", help="for each kind of outcome but ok (default: 30)"
    )
    parser.add_argument(
        "--without", action="append", default=[], metavar="AXIS=VALUE", help="an axis value that is not drawn"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write everything as JSON")
    options = parser.parse_args(argv)
    without: dict[str, list[str]] = {}
    for text in options.without:
        axis, _, value = text.partition("=")
        without.setdefault(axis, []).append(value)
    start = time.monotonic()
    print(f"sqa_fx {sqa_fx.__file__}, torch {torch.__version__}, seeds {options.seed}..", flush=True)
    tally = Tally()
    for count, (seed, spec, outcome) in enumerate(
        campaign(range(options.seed, options.seed + options.programs), options.jobs, without), 1
    ):
        tally.add(seed, spec, outcome)
        if outcome.failed:
            print(f"seed {seed}: {outcome.kind}: {outcome.detail[:200]}\n  {spec.line()}", flush=True)
        if options.seconds and time.monotonic() - start > options.seconds:
            print(f"stopped after {count} programs")
            break
    prepare()
    if options.shrink:
        plainer(tally, options.jobs, options.shrink)
    if options.report:
        options.report.write_text(json.dumps(tally.to_json(), indent=1) + "\n", encoding="utf-8")
    _print(tally, time.monotonic() - start)
    return 1 if tally.failures else 0


def _print(tally: Tally, seconds: float) -> None:
    total = sum(tally.outcomes.values())
    print(f"\n{total} programs in {seconds:.0f} s: " + ", ".join(f"{k} {n}" for k, n in tally.outcomes.most_common()))
    print("checks: " + ", ".join(f"{k} {n}" for k, n in sorted(tally.checks.items())))
    print("\ncoverage (drawn/passed):")
    axes: dict[str, list[str]] = {}
    for (axis, value), n in tally.drawn.items():
        axes.setdefault(axis, []).append(f"{value} {n}/{tally.passed[axis, value]}")
    for axis, values in axes.items():
        print(f"  {axis}: " + ", ".join(sorted(values)))
    print("\noutcomes:")
    for sign, n in tally.signatures.most_common():
        print(f"{n:6d}  {sign}\n        seeds {tally.seeds[sign][:5]}, plainest {tally.plainest[sign].line()}")


if __name__ == "__main__":
    sys.exit(main())
