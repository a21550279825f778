"""Importing this makes the modules of the examples importable."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "examples"
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))
