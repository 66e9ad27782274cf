"""Data goes to stdout; messages and progress go to stderr, progress only to a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lapora.errors import DataError

_stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print a message for people."""
    _stderr.print(_plain(message), markup=False)


def complain(message: str) -> None:
    """Print an error: one line."""
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
            disable=not _stderr.is_terminal,
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
    """Write records as they come, one JSON line each, flushed.

    Args:
        records: What to write.
        target: A file's path, or ``-`` for standard output. A reader that has gone, as with ``| head -1``, ends
            the run quietly: it has had what it wanted.

    Raises:
        DataError: The file cannot be written.
    """
    try:
        stream = sys.stdout if target == "-" else open(target, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); give another --output") from error
    try:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            stream.flush()
    except BrokenPipeError:
        # What is buffered has nowhere to go; without this Python complains of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        if stream is not sys.stdout:
            stream.close()


@contextmanager
def binary_lines(source: str) -> Iterator[BinaryIO]:
    """Standard input, or a file.

    Raises:
        DataError: No such file.
    """
    if source == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from error
    with stream:
        yield stream
