"""Atomic file operations: after a kill or on a full disk, a file is either the old one or the complete new one."""

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
    """Remove a file, folder or symlink, without following the symlink; errors inside a folder are ignored."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk; does nothing where the file system does not support it."""
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


def json_bytes(content: Mapping[str, Any], indent: int | None = None) -> bytes:
    """Return JSON in UTF-8, with escapes for lone surrogates, as in a path that is not UTF-8."""
    return json.dumps(content, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as :func:`write_bytes` does.

    Raises:
        OSError: The file cannot be written; an existing file is unchanged.
    """
    write_bytes(file, json_bytes(content, indent=2) + b"\n")


def write_bytes(file: Path, content: bytes, *, follow_symlink: bool = False) -> None:
    """Write a file atomically: to a temporary name, flushed to the disk and renamed; a pipe or device directly.

    Args:
        file: The file.
        content: Its new content.
        follow_symlink: Write the file that a symlink points to; by default the symlink is replaced.

    Raises:
        OSError: The file cannot be written; an existing file is unchanged.
    """
    if file.exists() and not file.is_file():
        file.write_bytes(content)
        return
    if follow_symlink:
        file = file.resolve()
    partial = file.with_name(f".{file.name}.new")
    try:
        partial.unlink(missing_ok=True)  # left by a killed run, or a symlink
        with partial.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def os_error_reason(error: Exception) -> str:
    """Return the operating system's reason for an error, in one line."""
    return getattr(error, "strerror", None) or first_line(error)


@contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    """Hold the write lock of a posterior. Readers need no lock.

    Args:
        folder: ``ADAPTER/laplace/NAME``; the lock is ``ADAPTER/laplace/.NAME.lock``.

    Raises:
        PosteriorError: Another process holds the lock (it is named), or the folder cannot be written.
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
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
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
            file.unlink(missing_ok=True)  # before the release, so that a waiting process notices that it is deleted
        lock.release()
        with suppress(OSError):
            file.parent.rmdir()  # fails unless empty, as after a refused fit


def _holder(file: Path) -> str:
    try:
        content = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        content = ""
    return f"process {content}" if content.isdigit() else "another process"
