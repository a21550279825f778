"""Where the numbers of a training run go: a JSONL file, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from sqa_fx.errors import InputError, MissingError


class HealLog:
    """Writes entries as they come. A run that goes on from ``step`` keeps what was logged until there.

    Raises InputError for files that cannot be written, MissingError when TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        steps: int,
        *,
        log: str | os.PathLike[str] | None,
        tensorboard: str | os.PathLike[str] | None,
        progress: bool,
        step: int | None,
    ) -> None:
        self._file: IO[str] | None = None
        self._board: Any = None
        self._bar = tqdm(
            total=steps, initial=step or 0, desc="heal", unit="step", disable=not progress, file=sys.stderr
        )
        if tensorboard is not None:
            self._board = _board(tensorboard, step)
        if log is not None:
            self._file = _opened(Path(log), step)

    def write(self, entry: dict[str, Any]) -> None:
        """Log one entry."""
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in entry.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, entry["step"])

    def advance(self, loss: float) -> None:
        """A step is done."""
        self._bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Flush and close."""
        self._bar.close()
        for opened in (self._file, self._board):
            if opened is not None:
                opened.close()


def _opened(path: Path, step: int | None) -> IO[str]:
    kept = []
    try:
        if step is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # cut off when the process died
                if entry["step"] <= step:
                    kept.append(line)
        file = path.open("w", encoding="utf-8")
        file.writelines(line + "\n" for line in kept)
    except (OSError, TypeError, KeyError) as error:
        raise InputError(f"cannot write the log {path}: {error}; give another path") from error
    return file


def _board(folder: str | os.PathLike[str], step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingError("logs for TensorBoard need it: pip install tensorboard, or log to a JSONL file") from error
    return SummaryWriter(os.fspath(folder), purge_step=None if step is None else step + 1)
