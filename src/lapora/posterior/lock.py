"""One writer at a time: a lock on a posterior's name, which the system releases when its holder ends, however."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lapora.errors import PosteriorError


@contextmanager
def writing(folder: Path) -> Iterator[None]:
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


def _holder(file: Path) -> str:
    try:
        content = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        content = ""
    return f"process {content}" if content.isdigit() else "another process"
