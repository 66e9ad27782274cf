"""Exception classes, one per exit status, and formatting of values in error messages.

A message is one line: what is wrong, where, and what to do. An error is raised once and printed once, by the
command line; it is not logged in between.
"""

from __future__ import annotations

from collections.abc import Sequence


class LaporaError(Exception):
    """Base class of all expected errors.

    Attributes:
        exit_status: Exit status of the command line.
        reporting_rank: Rank of the process that prints the message, in a run of several processes.
    """

    exit_status: int = 1
    reporting_rank: int = 0


class UsageError(LaporaError):
    """An option is invalid, or options cannot be combined."""

    exit_status = 2


class NoSuchLayersError(UsageError):
    """The adapter has none of the layers that ``--subset`` names."""


class AdapterError(LaporaError):
    """The adapter or its base model cannot be read or is not supported."""

    exit_status = 3


class PosteriorError(LaporaError):
    """The saved posterior is missing, damaged, or belongs to another adapter."""

    exit_status = 4


class DataError(LaporaError):
    """A task, a data file, a row or a JSONL line is invalid."""

    exit_status = 5


class MissingSplitError(DataError):
    """The requested split has no local file and is not on the Hub."""


class UnreadableSourceError(MissingSplitError):
    """The folder of the rows does not exist, or the Hub cannot be reached: whether it has the split is unknown."""


class SeveralTokensError(DataError):
    """An answer is not one token, the same behind every prompt: whole answers are scored instead."""


class UnlabelledError(DataError):
    """None of the rows has a label, and labels are required."""


class NoRowsLeftError(DataError):
    """All rows of a split were used to tune the prior."""


class NumericalError(LaporaError):
    """A value is NaN or infinite, or a matrix is not positive semi-definite."""

    exit_status = 6


class NonFiniteRowError(NumericalError):
    """The model output for one row is NaN or infinite.

    Args:
        row: Position of the row in the sequence that the batches were made from.
        reason: The problem and its remedy.
    """

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row = row
        self.reason = reason


class GateError(LaporaError):
    """A threshold of ``eval --fail-if`` was violated."""

    exit_status = 7


class SeveralError(LaporaError):
    """Several adapters were requested and some failed; each failure has been reported.

    Args:
        message: Number of failures.
        exit_status: Exit status of the first failure.
    """

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class ProcessError(LaporaError):
    """Another process of the same run failed or exited.

    Args:
        message: The other process's error, or that it exited.
        exit_status: Exit status of the other process.
        reporting_rank: Rank of the process that prints the message.
    """

    exit_status = 8

    def __init__(self, message: str, exit_status: int = 8, reporting_rank: int = 0) -> None:
        super().__init__(message)
        self.exit_status = exit_status
        self.reporting_rank = reporting_rank


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of a third-party error, printable and cut to ``limit`` characters.

    An error without a message gives the name of its class.
    """
    lines = str(error).strip().splitlines()
    line = (lines[0] if lines else type(error).__name__)[:limit]
    return "".join(character if character.isprintable() else " " for character in line).rstrip(". ")


class LaporaWarning(UserWarning):
    """A warning that the command line prints as one line, once."""


def quoted(value: object, limit: int = 60) -> str:
    """Return the ``repr`` of a value on one line, cut to ``limit`` characters.

    Values may come from untrusted data: control characters are escaped, so that no terminal escape is printed.
    """
    try:
        shown = repr(value[:limit] if isinstance(value, str) else value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer with too many digits
        shown = f"a {type(value).__name__}"
    if len(shown) > limit + 2 or (isinstance(value, str) and len(value) > limit):
        shown = shown[:limit] + "..."
    return shown


def printable(text: object, limit: int = 200) -> str:
    """Return a name with control characters replaced by spaces, cut to ``limit`` characters."""
    return "".join(character if character.isprintable() else " " for character in str(text)[:limit])


def listed(names: Sequence[object], limit: int = 8) -> str:
    """Join up to ``limit`` names with commas, and count the rest."""
    shown = ", ".join(printable(name, 40) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
