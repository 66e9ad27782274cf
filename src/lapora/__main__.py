"""Entry point of ``lapora`` and ``python -m lapora``."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from lapora.cli.app import run

    run()


if __name__ == "__main__":
    main()
