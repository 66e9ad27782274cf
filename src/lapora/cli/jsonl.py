"""Stream JSON lines from and to files and pipes; never write a partial line."""

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
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from lapora.cli.console import json_text
from lapora.config import LONGEST_LINE
from lapora.errors import DataError, UsageError

PATIENCE = 0.2
"""Seconds without a further line after which the rows read so far are predicted."""
_CHUNK = 1 << 18


@contextmanager
def binary_lines(source: str) -> Iterator[Iterator[bytes | None]]:
    """Open a file, or standard input for ``-``, and yield its lines; see :func:`read_lines`.

    Raises:
        DataError: No such file.
    """
    if source == "-":
        try:
            descriptor = sys.stdin.fileno()
        except (AttributeError, OSError, ValueError):  # closed, or without a file descriptor
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
    """Yield lines with their line ends, and None whenever the writer of a pipe pauses.

    No thread reads ahead, and only the incomplete last line is buffered. Lines longer than
    :data:`lapora.config.LONGEST_LINE` are cut, one byte beyond it, so that they are still recognized as too long.

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
    """Wait at most :data:`PATIENCE` seconds for input or its end; return whether it came."""
    try:
        return bool(select.select([descriptor], [], [], PATIENCE)[0])
    except (OSError, ValueError):  # `select` is not supported here: block instead
        return True


# Bytes that a ready pipe takes without blocking: PIPE_BUF of Linux.
_AT_ONCE = 4096
_PATIENCE = 0.1
"""Timeout of one wait for a reader, in seconds."""


def write_json_lines(records: Iterable[Mapping[str, Any]], target: str, source: str = "-") -> None:
    """Stream records to a file or pipe, one JSON line each, in UTF-8 whatever the locale; never a partial line.

    A file is truncated at the first record, or at the end: a run that fails earlier leaves it unchanged.

    Args:
        records: Records to write.
        target: Path of a file, or ``-`` for standard output. If the reader closes the pipe, as ``| head -1`` does,
            the run ends without an error.
        source: File that the records are made from; it must not be the target.

    Raises:
        UsageError: Source and target are one file.
        DataError: The file cannot be written.
    """
    write_lines((json_text(record).encode("utf-8") + b"\n" for record in records), target, source)


def write_lines(lines: Iterable[bytes], target: str, source: str = "-") -> None:
    """Stream whole lines; see :func:`write_json_lines`."""
    if target == "-" and _only_in_python(sys.stdout):
        for line in lines:
            print(line.decode("utf-8"), end="", flush=True)
        return
    with _descriptor(target) as descriptor:
        if target != "-" and _one_file(source, descriptor):
            raise UsageError(f"--output {target} is the input file; give another")
        begun = target == "-"
        try:
            for line in lines:
                begun = begun or _empty(descriptor)
                _write_line(descriptor, line)
            begun = begun or _empty(descriptor)
        except BrokenPipeError:
            return
        except OSError as error:
            named = "standard output" if target == "-" else target
            raise DataError(f"{named}: cannot be written ({error.strerror})") from error


def _only_in_python(stream: TextIO | None) -> bool:
    """Return whether the stream has no file descriptor, as in a notebook."""
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
    output = os.fstat(descriptor)
    return stat.S_ISREG(output.st_mode) and _is_source(source, output)


def is_one_file(source: str, target: str) -> bool:
    """Return whether the source, a path or ``-`` for standard input, and the target are one regular file."""
    return Path(target).is_file() and _is_source(source, os.stat(target))


def _is_source(source: str, output: os.stat_result) -> bool:
    try:
        if source == "-":
            return sys.stdin is not None and os.path.samestat(os.fstat(sys.stdin.fileno()), output)
        return os.path.samestat(os.stat(source), output)
    except (AttributeError, OSError, ValueError):  # no such file, or a standard input without a descriptor
        return False


def _empty(descriptor: int) -> bool:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.ftruncate(descriptor, 0)
    return True


def _write_line(descriptor: int, line: bytes) -> None:
    """Write a whole line. Ctrl-C takes effect at the end of a started line; a second Ctrl-C at once."""
    with _interruption_held_back() as pressed:
        left = memoryview(line)
        while left and not (pressed and len(left) == len(line)):
            if _takes_more(descriptor):
                with contextlib.suppress(BlockingIOError):
                    left = left[os.write(descriptor, left[:_AT_ONCE]) :]


def _takes_more(descriptor: int) -> bool:
    try:
        return bool(select.select([], [descriptor], [], _PATIENCE)[1])
    except (OSError, ValueError):  # `select` is not supported here: block instead
        return True


@contextlib.contextmanager
def _interruption_held_back() -> Iterator[list[int]]:
    """Postpone Ctrl-C to the end of the block; the list that is yielded is not empty once it was pressed."""
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
