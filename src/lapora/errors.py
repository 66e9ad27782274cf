"""Every error a user can cause or meet, each with the exit status that scripts rely on.

A message is one line: what is wrong, where, and what to do next. An error is raised once and
printed once, by the command line; nothing logs it on the way.
"""

from __future__ import annotations

from collections.abc import Sequence


class LaporaError(Exception):
    """Base of all expected errors.

    Attributes:
        exit_status: The process's exit status.
        said_by: In a run of several processes, the rank of the one that prints the message.
    """

    exit_status: int = 1
    reporting_rank: int = 0


class UsageError(LaporaError):
    """A wrong option or an impossible combination of options."""

    exit_status = 2


class AdapterError(LaporaError):
    """The adapter or its base model cannot be read, or the mathematics does not cover it."""

    exit_status = 3


class PosteriorError(LaporaError):
    """The saved posterior is missing, damaged, or belongs to another adapter."""

    exit_status = 4


class DataError(LaporaError):
    """A task, a data file, a row or a JSONL line is not what it should be."""

    exit_status = 5


class MissingSplitError(DataError):
    """There is no such split to be read: no file, or nothing on the Hub."""


class UnlabelledError(DataError):
    """Rows of which none has a label, where labels are needed."""


class NumericalError(LaporaError):
    """NaN, infinity or a matrix that is not positive semi-definite."""

    exit_status = 6


class NonFiniteRowError(NumericalError):
    """What the model makes of one row is NaN or infinite.

    Args:
        row: Its position in the sequence that the batches were cut from.
        reason: What is wrong with it, and what to do.
    """

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row = row
        self.reason = reason


class GateError(LaporaError):
    """An ``eval --fail-if`` gate failed."""

    exit_status = 7


class SeveralError(LaporaError):
    """Some of several things that were asked for could not be done; each has been said.

    Args:
        message: How many.
        exit_status: Of the first.
    """

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class ProcessError(LaporaError):
    """A run of several processes ends because of another one of them.

    Args:
        message: What the other one met, or that it is no more.
        exit_status: The other one's.
        said_by: Rank of the process that prints the message.
    """

    exit_status = 8

    def __init__(self, message: str, exit_status: int = 8, reporting_rank: int = 0) -> None:
        super().__init__(message)
        self.exit_status = exit_status
        self.reporting_rank = reporting_rank


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error of another library, printable and cut to ``limit`` characters; else its class."""
    lines = str(error).strip().splitlines()
    line = (lines[0] if lines else type(error).__name__)[:limit]
    return "".join(character if character.isprintable() else " " for character in line).rstrip(". ")


class LaporaWarning(UserWarning):
    """Something the user should know that is no error; the command line prints it as one line, once."""


def quoted(value: object, limit: int = 60) -> str:
    """One line, with control characters escaped and long values cut.

    Data decides what is in a value: terminal escapes must not reach a terminal from a message.
    """
    try:
        shown = repr(value[:limit] if isinstance(value, str) else value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        shown = f"a {type(value).__name__}"
    if len(shown) > limit + 2 or (isinstance(value, str) and len(value) > limit):
        shown = shown[:limit] + "..."
    return shown


def printable(text: object, limit: int = 200) -> str:
    """A name as it may be printed without quotes: control characters blanked, cut to ``limit``."""
    return "".join(character if character.isprintable() else " " for character in str(text)[:limit])


def listed(names: Sequence[object], limit: int = 8) -> str:
    """Names separated by commas, the rest counted."""
    shown = ", ".join(printable(name, 40) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
