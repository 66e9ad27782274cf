"""Data on stdout, messages on stderr, progress bars on stderr if it is a terminal."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_stderr = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
_rank = 0
_Record = TypeVar("_Record")


def set_rank(rank: int) -> None:
    """Set this process's rank. Only rank 0 prints; other ranks print only their own errors."""
    global _rank
    _rank = rank


def print_message(message: str) -> None:
    """Print a message on stderr; on a terminal it is wrapped between words."""
    if _rank == 0:
        _stderr.print(_wrapped(_plain(message)), markup=False)


def print_command(label: str, command: str) -> None:
    """Print a command on stderr, on one line that can be copied."""
    if _rank == 0:
        _stderr.print(_plain(f"{label}: {command}" if label.strip() else f"{label}{command}"), markup=False)


_UNBROKEN = re.compile(r"`[^`]*`|\d %")
"""What stays on one line: commands, and numbers with their unit."""


def _wrapped(text: str) -> str:
    if not _stderr.is_terminal:
        return text
    joined = _UNBROKEN.sub(lambda found: found[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(joined, _stderr.width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def on_terminal() -> bool:
    """Return whether stderr is a terminal."""
    return _stderr.is_terminal


def program() -> list[str]:
    """Return the words that started this program, for commands that work as typed.

    ``lapora`` where the shell finds it under that name, else its path, or ``python -m lapora``.
    """
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        found = shutil.which(Path(sys.executable).name)
        same = found is not None and Path(found).absolute() == Path(sys.executable).absolute()
        return [Path(sys.executable).name if same else _from_here(Path(sys.executable)), "-m", "lapora"]
    found = shutil.which(started.name)
    if not started.is_file() or (found is not None and Path(found).absolute() == started.absolute()):
        return [started.name]
    return [_from_here(started)]


def _from_here(path: Path) -> str:
    """Return a path relative to the working directory, if it is inside."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def show(renderable: Any) -> None:
    """Print a table on stderr."""
    if _rank == 0:
        _stderr.print(renderable)


def print_error(message: str, reporting_rank: int = 0) -> None:
    """Print an error in one line on stderr, if this process has the reporting rank."""
    if reporting_rank == _rank:
        _stderr.print(_wrapped(f"error: {_plain(message)}"), markup=False)


def _plain(message: str) -> str:
    """Replace terminal escapes and line breaks, which data may contain, by spaces."""
    return "".join(character if character.isprintable() else " " for character in message)


@contextmanager
def loading() -> Iterator[None]:
    """Show that PyTorch is being imported, which takes seconds; silent unless stderr is a terminal."""
    if _rank != 0 or not _stderr.is_terminal:
        yield
        return
    with _stderr.status("loading PyTorch"):
        yield


class RowProgress:
    """Progress bar with rows and time left; silent unless stderr is a terminal."""

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
        """Update the bar."""
        self._bar.update(self._task, completed=done, total=total)


class RowRate:
    """Progress bar with rows, rows per second and time left, for predictions; silent unless stderr is a terminal.

    Args:
        label: Label of the bar.
        total: Number of rows, if known.
        shown: Whether the bar is shown at all.
    """

    def __init__(self, label: str, total: int | None, shown: bool) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            _TimeLeftColumn(),
            console=_stderr,
            transient=True,
            disable=not shown or _rank != 0 or not _stderr.is_terminal,
        )
        self._task = self._bar.add_task(label, total=total, measured=False)

    def count(self, records: Iterable[_Record]) -> Iterator[_Record]:
        """Yield the records, counted."""
        first = None
        with self._bar:
            for record in records:
                yield record
                first = first or time.monotonic()
                # The rows of the first window are ready together, and say nothing about the rate.
                measured = time.monotonic() - first > _FIRST_WINDOW
                self._bar.update(self._task, advance=1, measured=measured)


_FIRST_WINDOW = 0.5


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Return the rows per second since the first."""
        return Text(f"{task.speed:,.1f} rows/s" if task.speed and task.fields["measured"] else "")


class _TimeLeftColumn(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        """Return the time left, once the rate is known."""
        return super().render(task) if task.fields["measured"] else Text("-:--:--")


# Terminal controls (C1, delete), bidirectional marks, line separators, lone surrogates.
_ESCAPED = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def json_text(content: Any, indent: int | None = None) -> str:
    """Return JSON that is safe to print: control characters are escaped.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot express.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=indent)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found.group()):04x}", text)
