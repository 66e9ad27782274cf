"""``lapora`` with its peak memory, in MiB, as the last line of stderr."""

from __future__ import annotations

import atexit
import resource
import sys

from lapora.__main__ import main

atexit.register(
    lambda: print(f"PEAK {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}", file=sys.stderr, flush=True)
)
main()
