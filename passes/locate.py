"""Where in the user's source a node comes from, read from the stack trace that torch.export left on it.

torch.export records the ``forward`` frames only (strict export and dynamo record all frames), outermost first. The line
that means something to the user is the innermost one of their own code; torch's own modules (nn.MultiheadAttention)
stand in for it only where the trace holds nothing else.
"""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import fx

_FRAME = re.compile(r'^\s*File "(?P<file>.*)", line (?P<line>\d+), in .*$')
_PACKAGES = re.compile(r"^.*[\\/](?:site|dist)-packages[\\/]")
_TORCH = re.compile(r"^torch[\\/]")
_HELPERS = re.compile(r"^torch[\\/](?:nn[\\/]functional\.py|_|fx[\\/]|utils[\\/]|overrides)")
# Nodes without a trace borrow one from a neighbour; that of a far one would mislead.
_NEIGHBOURS = 64


class Place(NamedTuple):
    """A line of source: ``where`` is "file.py:123" and ``source`` the text of that line; both '' when unknown."""

    where: str = ""
    source: str = ""


def place(node: fx.Node) -> Place:
    """Where ``node`` comes from; a node without a trace of its own (a parameter, an input) answers with the nearest one
    that has one, its users first."""
    try:
        here = os.getcwd()
    except OSError:  # the current directory was removed
        here = ""
    seen = {node}
    queue = deque([node])
    while queue and len(seen) <= _NEIGHBOURS:
        current = queue.popleft()
        found = _of_trace(str(current.meta.get("stack_trace") or ""), here)
        if found.where:
            return found
        inputs, users = list(current.all_input_nodes), [u for u in current.users if u.op != "output"]
        for neighbour in (*users, *inputs) if current.op in ("placeholder", "get_attr") else (*inputs, *users):
            if neighbour not in seen:
                seen.add(neighbour)
                queue.append(neighbour)
    return Place()


def location(node: fx.Node) -> str:
    """ "file.py:123" of ``node``, relative to the current directory or to where packages are installed; '' when
    unknown."""
    return place(node).where


def named(name: str, at: Place) -> str:
    """ "'layers.0' (file.py:123)", as messages name a site."""
    return f"{name!r} ({at.where})" if at.where else repr(name)


def nodes_at(nodes: Sequence[str], locations: Sequence[str], known: str = "") -> str:
    """ "softmax (file.py:123), add", as messages name nodes; a location that is ``known`` is not said again."""
    places = [*locations, *[""] * len(nodes)]
    return ", ".join(
        f"{node} ({where})" if where and where != known else node for node, where in zip(nodes, places, strict=False)
    )


@lru_cache(maxsize=4096)
def _of_trace(trace: str, current_directory: str) -> Place:
    frames: list[tuple[str, int, str]] = []
    lines = trace.splitlines()
    for i, text in enumerate(lines):
        match = _FRAME.match(text)
        if match is None or match["file"].startswith("<eval_with_key>"):
            continue
        following = lines[i + 1] if i + 1 < len(lines) and _FRAME.match(lines[i + 1]) is None else ""
        frames.append((match["file"], int(match["line"]), following))
    known = [(_shown(file, current_directory), line, text) for file, line, text in frames if not _ours(file)]
    theirs = [frame for frame in known if not _TORCH.match(frame[0])]
    chosen = theirs or [frame for frame in known if not _HELPERS.match(frame[0])] or known
    if not chosen:
        return Place()
    file, line, text = chosen[-1]
    return Place(_printable(f"{file}:{line}"), _printable(text.strip()))


def _ours(file: str) -> bool:
    import sqa_fx

    return Path(sqa_fx.__file__).parent in Path(file).parents


def _printable(text: str) -> str:
    """A trace may come from a file, and what it says goes to terminals and into XML."""
    return "".join(c for c in text if c.isprintable())


def _shown(file: str, current_directory: str) -> str:
    """``file`` as short as it stays unique: below site-packages, else below the current directory, else below the
    import path."""
    parent = str(Path(torch.__file__).parents[1])
    if _PACKAGES.match(file) or file.startswith(os.path.join(parent, "torch") + os.sep):
        return _PACKAGES.sub("", file) if _PACKAGES.match(file) else os.path.relpath(file, parent)
    if not os.path.isabs(file):
        return file
    for folder in (current_directory, *sorted((p for p in sys.path if os.path.isabs(p)), key=len, reverse=True)):
        if Path(folder) != Path(folder).parent and Path(folder) in Path(file).parents:
            return os.path.relpath(file, folder)
    return file
