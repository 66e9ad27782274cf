"""Writing so that a kill, a full disk or a link in the way leaves what stood there before, or the new whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lapora.errors import PosteriorError, first_line


def remove_path(path: Path) -> None:
    """Remove a folder, a file or a link, never what a link leads to; what stays will be in the way of its user."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk; some file systems cannot, and need not."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file of JSON under another name, flush it to the disk, and rename it.

    Raises:
        OSError: It cannot be written; what stood there still does.
    """
    partial = file.with_name(f".{file.name}.new")
    try:
        partial.unlink(missing_ok=True)  # of a run that was killed; or a link that leads elsewhere
        with partial.open("x", encoding="utf-8") as stream:
            json.dump(content, stream, indent=2, ensure_ascii=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def os_error_reason(error: Exception) -> str:
    """What the system says of an error, in one line."""
    return getattr(error, "strerror", None) or first_line(error)


@contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a posterior while it is made or changed. Readers need none.

    Args:
        folder: ``ADAPTER/laplace/NAME``; the lock is ``ADAPTER/laplace/.NAME.lock``.

    Raises:
        PosteriorError: Another process holds it, which is named; or the folder cannot be written.
    """
    file = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(file, blocking=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise PosteriorError(
            f"{folder}: {_holder(file)} is writing it; wait until that is done, or give another --name"
        ) from error
    except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
        reason = getattr(error, "strerror", None) or error
        raise PosteriorError(
            f"{folder.parent}: cannot be written ({reason}); give another place with --output-dir"
        ) from error
    try:
        try:
            file.write_text(f"{os.getpid()}\n", encoding="ascii")
        except OSError as error:
            raise PosteriorError(f"{folder.parent}: cannot be written ({error.strerror or error})") from error
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)  # while it is held: who opened it meanwhile sees that it has gone
        lock.release()
        with suppress(OSError):
            file.parent.rmdir()  # only if it is empty, as after a fit that was refused


def _holder(file: Path) -> str:
    try:
        content = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        content = ""
    return f"process {content}" if content.isdigit() else "another process"
