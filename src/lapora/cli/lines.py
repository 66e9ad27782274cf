"""Lines of standard input or a file, as they come: bounded in memory, and with word of when they pause."""

from __future__ import annotations

import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lapora.config import LONGEST_LINE
from lapora.errors import DataError

PATIENCE = 0.2
"""Seconds without a further line after which what has come is answered."""
_CHUNK = 1 << 18


@contextmanager
def binary_lines(source: str) -> Iterator[Iterator[bytes | None]]:
    """Lines of a file, or of standard input for ``-``; see :func:`lines_of`.

    Raises:
        DataError: No such file.
    """
    if source == "-":
        try:
            descriptor = sys.stdin.fileno()
        except (AttributeError, OSError, ValueError):  # closed, or not of the system
            yield iter(getattr(sys.stdin, "buffer", io.BytesIO()))
            return
        yield lines_of(descriptor)
        return
    try:
        descriptor = os.open(source, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from error
    try:
        yield lines_of(descriptor)
    finally:
        os.close(descriptor)


def lines_of(descriptor: int) -> Iterator[bytes | None]:
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
