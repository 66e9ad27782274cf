"""Peak memory of the running process."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> float:
    """Return the most physical memory that this program has held since it started, in MiB (Linux).

    ``getrusage`` is not used: its peak also counts what the parent process held when it started this one.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def restart_peak() -> None:
    """Let the peak start from what is held now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
