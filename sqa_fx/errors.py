"""Every error that sqa-fx raises on purpose, with the exit code that the command line gives it.

Exit codes: 0 fine, 1 mismatch (a proof or a comparison failed), 2 usage (bad input), 3 something missing.
"""

from __future__ import annotations


class SqaError(Exception):
    """Base of all errors raised by sqa-fx."""

    exit_code: int = 2


class InputError(SqaError):
    """An argument, input tensor or path that cannot be used; the message says what, the shapes, and the fix."""


class CaptureError(SqaError):
    """torch.export could not capture the model; the message carries torch's reason and what to try."""


class NoAttentionError(SqaError):
    """No convertible attention was found; the message names the nearest miss. ``kinds`` are the kinds of all refusals,
    empty when there was no attention at all."""

    kinds: tuple[str, ...] = ()


class PlanError(SqaError):
    """A request that cannot be met, or a plan that does not fit the model it is applied to."""


class RewriteError(SqaError):
    """A site could not be rewritten although it was found."""


class VerifyError(SqaError):
    """The rewritten graph does not compute what the masked original computes."""

    exit_code = 1


class SurgeryError(SqaError):
    """A model could not be changed in place; it is as it was before. The message says what was tried and why."""


class HealError(SqaError):
    """Healing failed underway (a loss that is not finite, an error in the model); the student is as it was before."""

    exit_code = 1


class MissingError(SqaError):
    """A package, a file or a piece of hardware that is needed is not there."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
