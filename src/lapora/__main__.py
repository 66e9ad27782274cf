"""Entry point of ``lapora`` and ``python -m lapora``."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sys import UnraisableHookArgs
    from types import FrameType


def main() -> None:
    """Run the command line."""
    sys.unraisablehook = interrupt_again
    # PyTorch then aligns large tensors to pages, and glibc's heap keeps less freed memory (docs/scale.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    terminated = end_like_interrupted()
    try:
        from lapora.cli.app import run

        run()
    except KeyboardInterrupt:  # outside of a command: while modules are imported, or at the very end
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if terminated:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or its reader has gone
                sys.stdout.flush()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)  # the caller sees which signal ended the process


def end_like_interrupted() -> list[int]:
    """Let SIGTERM, with which schedulers stop a job, do what Ctrl-C does; the list is not empty once it came.

    Not in a run of several processes: one that waits for another in native code could not be ended.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        at_interrupt = signal.getsignal(signal.SIGINT)
        if callable(at_interrupt):
            at_interrupt(signal.SIGINT, frame)
        else:  # ignored, as in a shell's background jobs
            raise KeyboardInterrupt

    if "WORLD_SIZE" not in os.environ:
        signal.signal(signal.SIGTERM, interrupt)
    return received


def interrupt_again(unraisable: UnraisableHookArgs) -> None:
    """Raise a KeyboardInterrupt once more that Python dropped because it was raised in a destructor."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        import _thread
        import threading

        again = threading.Timer(0.01, _thread.interrupt_main)  # once the destructor has returned
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    main()
