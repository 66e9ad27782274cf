"""Return memory that batches have freed to the operating system.

glibc keeps freed memory in its heap, and on a CPU the tensors of a batch are mostly there. Sums and results that stay
between them cut the free memory into pieces, which are too small for the next batch: the heap would grow.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

from lapora.models.device_map import resident_memory

LARGE = 2**28
"""Bytes below which nothing is returned: small batches would spend more time on it than it saves."""


@dataclass
class _Returned:
    """Memory of the process after its free pages were last returned, or less if it has fallen since."""

    resident: int = 0


_returned = _Returned()


class _Usage(ctypes.Structure):
    """``struct mallinfo2`` of glibc; ``fordblks`` are its free bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@cache
def _glibc() -> ctypes.CDLL | None:
    """Return glibc, 2.33 or later, or None."""
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Usage
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, TypeError, AttributeError):  # another system, or an older or another C library
        return None
    return library


def free_bytes() -> int:
    """Return the free bytes of glibc's heap; 0 with other C libraries."""
    library = _glibc()
    return 0 if library is None else int(library.mallinfo2().fordblks)


def return_freed_memory() -> None:
    """Return free pages of the heap to the system, if many were added; does nothing with other C libraries."""
    library = _glibc()
    if library is None or free_bytes() < LARGE:
        return
    # The heap counts pages as free that it has returned before: what has been added since is seen in the process.
    _returned.resident = min(_returned.resident, resident_memory())
    if resident_memory() - _returned.resident >= LARGE:
        library.malloc_trim(0)
        _returned.resident = resident_memory()
