"""JSON lines in and out: read a file or a pipe as it comes, write whole lines only."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import stat
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from lapora.cli.console import json_text
from lapora.config import LONGEST_LINE
from lapora.errors import DataError, UsageError

PATIENCE = 0.2
"""Seconds without a further line after which what has come is answered."""
_CHUNK = 1 << 18


@contextmanager
def binary_lines(source: str) -> Iterator[Iterator[bytes | None]]:
    """Lines of a file, or of standard input for ``-``; see :func:`read_lines`.

    Raises:
        DataError: No such file.
    """
    if source == "-":
        try:
            descriptor = sys.stdin.fileno()
        except (AttributeError, OSError, ValueError):  # closed, or not of the system
            yield iter(getattr(sys.stdin, "buffer", io.BytesIO()))
            return
        yield read_lines(descriptor)
        return
    try:
        descriptor = os.open(source, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from error
    try:
        yield read_lines(descriptor)
    finally:
        os.close(descriptor)


def read_lines(descriptor: int) -> Iterator[bytes | None]:
    """Lines with their ends, and None whenever the writer of a pipe pauses.

    No thread reads ahead and nothing is buffered but the line that is not complete yet. Of a line longer than
    :data:`lapora.config.LONGEST_LINE` the rest is dropped; what is left is still too long to be a row.

    Raises:
        DataError: Reading fails.
    """
    pauses = not stat.S_ISREG(os.fstat(descriptor).st_mode)
    pending = bytearray()
    told = True
    while True:
        if pauses and not told and not _ready(descriptor):
            told = True
            yield None
        try:
            chunk = os.read(descriptor, _CHUNK)
        except OSError as error:
            raise DataError(f"the input cannot be read further ({error.strerror})") from error
        if not chunk:
            break
        *complete, rest = chunk.split(b"\n")
        for part in complete:
            yield _within(pending, part) + b"\n"
            pending.clear()
            told = False
        pending += rest[: max(0, LONGEST_LINE + 1 - len(pending))]
    if pending:
        yield bytes(pending)


def _within(pending: bytearray, part: bytes) -> bytes:
    return bytes(pending) + part[: max(0, LONGEST_LINE + 1 - len(pending))]


def _ready(descriptor: int) -> bool:
    """Whether there is something to read, or the end, within our patience."""
    try:
        return bool(select.select([descriptor], [], [], PATIENCE)[0])
    except (OSError, ValueError):  # what cannot be asked is waited for
        return True


# What a pipe that is ready takes without waiting (POSIX's least PIPE_BUF is smaller, Linux's is this).
_AT_ONCE = 4096
_PATIENCE = 0.1
"""Seconds after which a reader that takes nothing is asked about again."""


def write_json_lines(records: Iterable[Mapping[str, Any]], target: str, source: str = "-") -> None:
    """Write records as they come, one JSON line each in UTF-8 whatever the locale, each handed on whole.

    A file is emptied when its first record is there, or the end: a run that fails before leaves it as it was.

    Args:
        records: What to write.
        target: A file's path, or ``-`` for standard output. A reader that has gone, as with ``| head -1``, ends
            the run quietly: it has had what it wanted.
        source: The file that the records are made from, which cannot be the one to write.

    Raises:
        UsageError: Source and target are one file.
        DataError: The file cannot be written.
    """
    if target == "-" and _only_in_python(sys.stdout):
        for record in records:
            print(json_text(record), flush=True)
        return
    with _descriptor(target) as descriptor:
        if source != "-" and _one_file(source, descriptor):
            raise UsageError(f"--output {target} is the file that is read; give another")
        begun = target == "-"
        try:
            for record in records:
                begun = begun or _empty(descriptor)
                _write_line(descriptor, json_text(record).encode("utf-8") + b"\n")
            begun = begun or _empty(descriptor)
        except BrokenPipeError:
            return
        except OSError as error:
            named = "standard output" if target == "-" else target
            raise DataError(f"{named}: cannot be written ({error.strerror})") from error


def _only_in_python(stream: TextIO | None) -> bool:
    """Whether a stream is none of the system's, as in a notebook."""
    try:
        return stream is not None and stream.fileno() < 0
    except (AttributeError, OSError, ValueError):
        return not getattr(stream, "closed", False)


@contextlib.contextmanager
def _descriptor(target: str) -> Iterator[int]:
    if target == "-":
        if sys.stdout is None:
            raise DataError("standard output is closed; give --output FILE")
        sys.stdout.flush()
        yield sys.stdout.fileno()
        return
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); give another --output") from error
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _one_file(source: str, descriptor: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode) and os.path.samestat(os.stat(source), os.fstat(descriptor))
    except OSError:
        return False


def _empty(descriptor: int) -> bool:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.ftruncate(descriptor, 0)
    return True


def _write_line(descriptor: int, line: bytes) -> None:
    """Write a line whole. Ctrl-C waits for the end of a line that has begun; a second one does not."""
    with _interruption_held_back() as pressed:
        left = memoryview(line)
        while left and not (pressed and len(left) == len(line)):
            if _takes_more(descriptor):
                with contextlib.suppress(BlockingIOError):
                    left = left[os.write(descriptor, left[:_AT_ONCE]) :]


def _takes_more(descriptor: int) -> bool:
    try:
        return bool(select.select([], [descriptor], [], _PATIENCE)[1])
    except (OSError, ValueError):  # what cannot be asked is written to
        return True


@contextlib.contextmanager
def _interruption_held_back() -> Iterator[list[int]]:
    """Note Ctrl-C and raise it at the end; yields the list that is no longer empty then."""
    pressed: list[int] = []
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed
        return

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt
