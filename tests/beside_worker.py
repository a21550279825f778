"""What other processes run in test_huggingface_checkpoint.py: a module of its own, so that they start without torch."""

from __future__ import annotations

import os
import time
from pathlib import Path


def start_another(file: Path) -> None:
    """Have a process write its id to ``file``, and wait for it."""
    from sqa_fx import cli_checkpoint

    with cli_checkpoint._beside(write_own_id, file) as answer:
        answer()


def write_own_id(file: Path) -> None:
    """Write it all at once, and stay."""
    file.with_suffix(".new").write_text(str(os.getpid()))
    file.with_suffix(".new").rename(file)
    time.sleep(600)
