"""Search the fewest attributes to change so that a cut model computes what the masked original does.

The masked original (whole weights, dropped heads silenced) says what every attention module must give. A trial run of
the cut model stops at the first module that fails or gives something else, so that it costs little and tells where to
look: numbers read in that module come first. States with fewer changes are tried first; a change after which the
module gets further than before costs less.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sqa_fx.passes.capture_ways import reason
from sqa_fx.passes.eager_widened import EagerWidened
from sqa_fx.surgery_candidates import Owners, Variable
from sqa_fx.surgery_record import AttributeChange, assign, assignments
from sqa_fx.surgery_run import Inputs, nearest, output_tensors, run, tolerance_of

TRIALS = 600
"""Trial runs after which the search for one fault gives up."""
_STEP, _FURTHER = 1.0, 0.3


class _Diverged(Exception):
    """A module gave something else than the masked original's."""


@dataclass(frozen=True)
class Fault:
    """How far a trial run got: attention modules passed, operations since the last one, and what went wrong in the
    module ``where`` (None: outside of all). ``why`` is empty for a run that came through."""

    passed: int
    operations: int
    where: str | None
    why: str
    diverged: bool = False


Assignment = tuple[AttributeChange, ...]


class Trial:
    """Runs the cut model with some attributes changed, and compares module by module."""

    def __init__(self, model: nn.Module, groups: Sequence[Owners], inputs: Inputs, wide: bool) -> None:
        self.model, self.inputs, self.wide = model, inputs, wide
        self.owners = {path: i for i, group in enumerate(groups) for path in group.paths}
        self.expected: list[tuple[str, list[Tensor]]] = []
        """What the attention modules of the masked original gave, in order."""
        self.unchecked: frozenset[str] = frozenset()
        self.runs = 0

    def learn(self) -> None:
        """Note what the model gives now, with its masked weights. Raises whatever it raises."""
        self.expected.clear()

        def leave(path: str, output: Any) -> None:
            self.expected.append((path, [t.detach().clone() for t in output_tensors(output)]))

        with self._hooks(lambda path: None, leave):
            run(self.model, self.inputs, EagerWidened(self.wide))

    def run(self, changes: Assignment) -> Fault:
        """One trial; the attributes are put back."""
        self.runs += 1
        mode = EagerWidened(self.wide)
        stack: list[str] = []
        passed, since = 0, 0

        def enter(path: str) -> None:
            stack.append(path)

        def leave(path: str, output: Any) -> None:
            nonlocal passed, since
            wanted, tensors = self.expected[passed] if passed < len(self.expected) else (None, [])
            if wanted != path:
                raise _Diverged(f"{path} is called where {wanted} was")
            if path not in self.unchecked:
                error = nearest(tensors, output_tensors(output))
                if not error <= tolerance_of(tensors):
                    raise _Diverged(f"the output of {path} differs: relative error {error:.1e}")
            passed, since = passed + 1, mode.count
            while stack and stack.pop() != path:
                pass

        with changed(self.model, changes), self._hooks(enter, leave):
            try:
                run(self.model, self.inputs, mode)
            except Exception as error:  # whatever the model's own code raises for numbers that do not fit
                why = str(error) if isinstance(error, _Diverged) else reason(error)
                where = stack[-1] if stack else None
                return Fault(passed, mode.count - since, where, why, isinstance(error, _Diverged))
        return Fault(passed, mode.count - since, None, "")

    @contextmanager
    def _hooks(self, enter: Callable[[str], None], leave: Callable[[str, Any], None]) -> Iterator[None]:
        handles = []
        try:
            for path in self.owners:
                module = self.model.get_submodule(path)
                handles.append(module.register_forward_pre_hook(lambda m, given, path=path: enter(path)))
                handles.append(module.register_forward_hook(lambda m, given, output, path=path: leave(path, output)))
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def changed(model: nn.Module, changes: Assignment) -> Iterator[None]:
    """The model's attributes are changed within."""
    with ExitStack() as undo:
        for module, name, value in assignments(model, changes):
            undo.callback(assign(module, name, value))
        yield


@dataclass(frozen=True)
class Found:
    """The changes that were found, or the fault that nothing mends."""

    changes: Assignment
    fault: Fault | None
    runs: int


def search(trial: Trial, choices: Sequence[Variable], proves: Callable[[Assignment], str]) -> Found:
    """The changes under which the model gives what it should; ``proves`` says of a run that came through what is still
    wrong with it, '' for nothing."""
    known: dict[Assignment, Fault] = {}

    def judged(changes: Assignment) -> Fault:
        changes = tuple(sorted(changes, key=str))
        if changes not in known:
            fault = trial.run(changes)
            if not fault.why and (why := proves(changes)):
                fault = Fault(fault.passed, fault.operations, None, why, True)
            known[changes] = fault
        return known[changes]

    changes: Assignment = ()
    fault = judged(changes)
    while fault.why:
        better = _mended(changes, fault, _pool(trial, choices, fault), judged)
        if better is None:
            # What got farthest says most about what is in the way.
            changes, fault = max(known.items(), key=lambda k: (k[1].passed, k[1].operations, -len(k[0])))
            return Found(changes, fault, trial.runs)
        changes = better
        fault = judged(changes)
    return Found(_fewest(changes, judged), None, trial.runs)


def _pool(trial: Trial, choices: Sequence[Variable], fault: Fault) -> list[Variable]:
    """The numbers that may mend ``fault``: those of the module where it is, then others outside of attention, then
    those of attention modules before it."""
    own = trial.owners.get(fault.where) if fault.where is not None else None
    inner = [v for v in choices if v.group is not None and v.group == own]
    outside = [v for v in choices if v.group is None]
    before = {trial.owners[path] for path, _ in trial.expected[: fault.passed]}
    rest = [v for v in choices if v.group is not None and v.group != own and (v.group in before or own is None)]
    return [*inner, *outside, *rest]


def _mended(
    start: Assignment, fault: Fault, pool: Sequence[Variable], judged: Callable[[Assignment], Fault]
) -> Assignment | None:
    """``start`` with further changes that get a run past ``fault``, or None."""
    order = itertools.count()
    queue: list[tuple[float, int, int, tuple[tuple[int, int], ...], Fault]] = []
    heapq.heappush(queue, (0.0, 0, next(order), (), fault))
    seen: set[frozenset[tuple[int, int]]] = set()
    trials = 0
    while queue:
        cost, _, _, chosen, last = heapq.heappop(queue)
        taken = {position for position, _ in chosen}
        for position, variable in enumerate(pool):
            if position in taken:
                continue
            for option in variable.options:
                more = (*chosen, (position, option))
                if frozenset(more) in seen:
                    continue
                seen.add(frozenset(more))
                if trials >= TRIALS:
                    return None
                trials += 1
                changes = (*start, *(pool[p].becomes(new) for p, new in more))
                found = judged(changes)
                if not found.why or found.passed > fault.passed:
                    return changes
                # A number that changes nothing was not read before the fault: with others it would not matter either.
                if found.passed == last.passed and found != last:
                    further = found.operations > last.operations and not found.diverged
                    step = _FURTHER if further else _STEP
                    heapq.heappush(queue, (cost + step, -found.operations, next(order), more, found))
    return None


def _fewest(changes: Assignment, judged: Callable[[Assignment], Fault]) -> Assignment:
    """``changes`` without those that the proof does not need."""
    for change in changes:
        fewer = tuple(c for c in changes if c is not change)
        if not judged(fewer).why:
            return _fewest(fewer, judged)
    return changes
