"""``lapora`` with its peak memory, in MiB, as the last line of stderr."""

from __future__ import annotations

import atexit
import resource
import sys

from lapora.__main__ import main


def print_peak() -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"PEAK {peak:.0f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    atexit.register(print_peak)
    main()
