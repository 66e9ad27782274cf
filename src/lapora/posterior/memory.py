"""How much memory there is to take."""

from __future__ import annotations

from pathlib import Path

import psutil


def available_memory() -> float:
    """Bytes that this process may still take, a container's limit included."""
    free = float(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, float(limit.read_text()) - float(used.read_text()))
    except (OSError, ValueError):  # no such files, or "max"
        return free
