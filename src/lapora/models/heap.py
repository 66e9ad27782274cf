"""Return memory that batches have freed to the operating system.

glibc keeps freed memory in its heap, and on a CPU the tensors of a batch are mostly there. Sums and results that stay
between them cut the free memory into pieces, which are too small for the next batch: the heap would grow.
"""

from __future__ import annotations

import ctypes
from functools import cache

LARGE = 2**28
"""Free bytes of the heap below which nothing is returned: small batches would spend more time on it than it saves."""


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
    """Return free pages of the heap to the system, if they are many; does nothing with other C libraries."""
    library = _glibc()
    if library is not None and free_bytes() >= LARGE:
        library.malloc_trim(0)
