"""Data goes to stdout; messages and progress go to stderr, progress only to a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lapora.errors import DataError

_stderr = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
_rank = 0


def speak_as(rank: int) -> None:
    """Say what this process of a run has to say: all but the first are silent, but for their own errors."""
    global _rank
    _rank = rank


def say(message: str) -> None:
    """Print a message for people."""
    if _rank == 0:
        _stderr.print(_plain(message), markup=False)


def on_terminal() -> bool:
    """Whether messages go to a terminal."""
    return _stderr.is_terminal


def show(renderable: Any) -> None:
    """Print a table for people."""
    if _rank == 0:
        _stderr.print(renderable)


def complain(message: str, said_by: int = 0) -> None:
    """Print an error, one line, if it is this process that says it."""
    if said_by == _rank:
        _stderr.print(f"error: {_plain(message)}", markup=False)


def _plain(message: str) -> str:
    """Terminal escapes and line breaks that came with the data are not passed on."""
    return "".join(character if character.isprintable() else " " for character in message)


class RowProgress:
    """A progress bar of rows with the time left; silent unless stderr is a terminal."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=_stderr,
            transient=True,
            disable=_rank != 0 or not _stderr.is_terminal,
        )
        self._task = self._bar.add_task(label, total=None)

    def __enter__(self) -> RowProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is."""
        self._bar.update(self._task, completed=done, total=total)


def write_json_lines(records: Iterable[Mapping[str, Any]], target: str) -> None:
    """Write records as they come, one JSON line each in UTF-8 whatever the locale, each handed on whole.

    Args:
        records: What to write.
        target: A file's path, or ``-`` for standard output. A reader that has gone, as with ``| head -1``, ends
            the run quietly: it has had what it wanted.

    Raises:
        DataError: The file cannot be written.
    """
    if target == "-" and sys.stdout is None:
        raise DataError("standard output is closed; give --output FILE")
    try:
        stream = sys.stdout.buffer if target == "-" else open(target, "wb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); give another --output") from error
    try:
        for record in records:
            stream.write(json_text(record).encode("utf-8") + b"\n")
            stream.flush()
    except BrokenPipeError:
        _drop_what_is_buffered(stream)
    except OSError as error:
        _drop_what_is_buffered(stream)
        raise DataError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        if target != "-":
            with contextlib.suppress(OSError):
                stream.close()


def _drop_what_is_buffered(stream: BinaryIO) -> None:
    """It has nowhere to go; without this Python complains of it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# Terminal controls (C1, delete), marks that turn the direction of text, line separators, halves of a surrogate pair.
_ESCAPED = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def json_text(content: Any, indent: int | None = None) -> str:
    """JSON that a terminal may be shown: what is no text for people is escaped, as JSON allows.

    Raises:
        ValueError: A number is NaN or infinite, which JSON has no word for.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=indent)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found.group()):04x}", text)
