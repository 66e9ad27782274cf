"""Values from data and files, as they may stand in an error message."""

from __future__ import annotations

from collections.abc import Sequence


def quoted(value: object, limit: int = 60) -> str:
    """One line, with control characters escaped and long values cut.

    Data decides what is in a value: terminal escapes must not reach a terminal from a message.
    """
    try:
        shown = repr(value[:limit] if isinstance(value, str) else value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        shown = f"a {type(value).__name__}"
    if len(shown) > limit + 2 or (isinstance(value, str) and len(value) > limit):
        shown = shown[:limit] + "..."
    return shown


def printable(text: object, limit: int = 200) -> str:
    """A name as it may be printed without quotes: control characters blanked, cut to ``limit``."""
    return "".join(character if character.isprintable() else " " for character in str(text)[:limit])


def listed(names: Sequence[object], limit: int = 8) -> str:
    """Names separated by commas, the rest counted."""
    shown = ", ".join(printable(name, 40) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
