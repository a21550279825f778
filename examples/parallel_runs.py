"""One script run by several processes at once, each with a share of the work and results of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measured_rows import merged

from sqa_fx.whole_file import write_whole


def in_processes(script: str, options: argparse.Namespace, given: Sequence[str], flag: str, work: Sequence[str],
                 report: Callable[[Mapping[str, Any]], str]) -> int:  # fmt: skip
    """Run ``script`` with its own arguments ``given`` in ``options.jobs`` processes: ``flag`` names the share of
    ``work`` that each one does, STEM_0, STEM_1, .. are their results. GPUs are taken in turn. Afterwards all rows are
    one file. Returns the largest exit code."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = seen if seen != [""] else [str(n) for n in range(torch.cuda.device_count())]
    files, processes = [], []
    for job in range(min(options.jobs, len(work))):
        stem = options.out.with_name(f"{options.out.name}_{job}")
        own = [*given, "--jobs", "1", flag, *work[job :: options.jobs], "--out", str(stem)]
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": devices[job % len(devices)]} if devices else {})}
        processes.append(subprocess.Popen([sys.executable, script, *own], env=environment))
        files.append(stem.with_suffix(".json"))
    codes = [process.wait() for process in processes]
    merge(options.out, [file for file in files if file.exists()], report)
    return max(codes)


def merge(stem: Path, files: Sequence[Path], report: Callable[[Mapping[str, Any]], str]) -> None:
    """One table of several files. Raises InputError where they were not measured alike."""
    if files:
        content = merged([json.loads(path.read_text(encoding="utf-8")) for path in files])
        write_whole(stem.with_suffix(".json"), (json.dumps(content, indent=1) + "\n").encode(), overwrite=True)
        write_whole(stem.with_suffix(".md"), report(content).encode(), overwrite=True)
