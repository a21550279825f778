"""Where an exporter writes: checks of the path, a directory to prepare files in, and moving them into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sqa_fx.errors import InputError


def check_target(path: Path, overwrite: bool, *, beside: Sequence[Path] = (), suffix: str | None = None) -> Path:
    """``path`` made absolute, when a file may be written there, and at each path of ``beside``.

    Raises InputError for a directory, a missing directory, another suffix than ``suffix`` (None: any), and for a file
    that exists unless ``overwrite``.
    """
    if path.is_dir():
        example = path / f"model{suffix or '.onnx'}"
        raise InputError(f"{path} is a directory; give the path of the file to write, such as {example}")
    if suffix is not None and path.suffix != suffix:
        raise InputError(f"{path}: the name must end in {suffix}, such as {path.with_suffix(suffix)}")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: {path.parent} is not a directory; create it first")
    for existing in (path, *beside):
        if existing.exists() and not overwrite:
            raise InputError(f"{existing} exists already; pass overwrite=True to replace it, or give another path")
    return path.absolute()


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A directory beside the target, so that moving out of it is a rename; gone afterwards, whatever happens.

    Raises InputError when none can be made there.
    """
    try:
        directory = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as e:
        raise InputError(f"cannot write in {target.parent}: {e}; give a path in a directory that you may write") from e
    try:
        yield Path(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(staged: Path, target: Path, beside: Sequence[Path] = ()) -> None:
    """Move ``staged`` to ``target``, and from its directory the files of the names in ``beside`` to there.

    A file of ``beside`` that was not prepared is taken away: it belonged to what is replaced. The target comes last,
    and a failure puts back what was there. Raises InputError then.
    """
    kept = staged.with_name("replaced")
    placed: list[Path] = []
    try:
        kept.mkdir()
        for path in beside:
            if path.exists():
                os.replace(path, kept / path.name)
            new = staged.with_name(path.name)
            if new.exists():
                os.replace(new, path)
                placed.append(path)
        os.replace(staged, target)
    except OSError as e:
        for path in placed:
            path.unlink(missing_ok=True)
        for path in beside:
            if (kept / path.name).exists():
                os.replace(kept / path.name, path)
        raise InputError(f"cannot write {target}: {e}; give another path") from e
