"""``lapora`` with its peak memory, in MiB, as the last line of stderr."""

from __future__ import annotations

import atexit
import sys

from benchmarks.peak import peak_memory
from lapora.__main__ import main


def print_peak() -> None:
    print(f"PEAK {peak_memory():.0f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    atexit.register(print_peak)
    main()
