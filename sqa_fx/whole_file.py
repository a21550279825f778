"""Files and directories that appear complete or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sqa_fx.errors import InputError


def write_whole(path: str | os.PathLike[str], content: bytes, *, overwrite: bool = False) -> Path:
    """Write ``content`` beside ``path`` under a temporary name, and rename it; returns the path.

    Raises InputError when ``path`` exists (unless ``overwrite``) or cannot be written; what was there stays then.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists already; pass overwrite=True to replace it, or give another path")
    try:
        descriptor, staged = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as e:
        raise InputError(f"cannot write in {target.parent}: {e}; give a path in a directory that you may write") from e
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(staged, 0o644)  # mkstemp keeps it to its owner
        os.replace(staged, target)
    except OSError as e:
        raise InputError(f"cannot write {target}: {e}; free some space or give another path") from e
    finally:
        if os.path.exists(staged):
            os.unlink(staged)
    return target


def replace_directory(staged: Path, target: Path, aside: Path) -> None:
    """Give the directory ``staged`` the name ``target``. What was there is ``aside`` then, or back in its place when
    that fails. Raises OSError."""
    if target.exists():
        os.rename(target, aside)
    try:
        os.rename(staged, target)
    except OSError:
        if aside.exists():
            os.rename(aside, target)
        raise
