"""Entry point of ``lapora`` and ``python -m lapora``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from lapora.cli.app import run

        run()
    except KeyboardInterrupt:  # outside of a command: while modules are imported, or at the very end
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
