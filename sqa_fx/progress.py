"""Progress of a command on a terminal; silent everywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def steps(*names: str) -> Iterator[Callable[[], None]]:
    """A bar over named steps on stderr; each call of what is yielded begins the next one."""
    with tqdm(total=len(names), file=sys.stderr, disable=hidden(), leave=False, unit="step") as bar:
        remaining = iter(names)
        begun = False

        def begin() -> None:
            nonlocal begun
            if begun:
                bar.update()
            begun = True
            bar.set_description(next(remaining))

        yield begin


def hidden() -> bool:
    """True where a progress bar would only be in the way: stderr is no terminal."""
    return not sys.stderr.isatty()
