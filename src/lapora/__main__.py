"""Entry point of ``lapora`` and ``python -m lapora``."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sys import UnraisableHookArgs


def main() -> None:
    """Run the command line."""
    sys.unraisablehook = interrupt_again
    # PyTorch then aligns large tensors to pages, and glibc's heap keeps less freed memory (docs/scale.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        from lapora.cli.app import run

        run()
    except KeyboardInterrupt:  # outside of a command: while modules are imported, or at the very end
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


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
