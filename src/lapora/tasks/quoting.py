"""Values from data and files, as they may stand in an error message."""

from __future__ import annotations


def quoted(value: object, limit: int = 60) -> str:
    """One line, with control characters escaped and long values cut.

    Data decides what is in a value: terminal escapes must not reach a terminal from a message.
    """
    shown = repr(value[:limit] if isinstance(value, str) else value)
    if len(shown) > limit + 2 or (isinstance(value, str) and len(value) > limit):
        shown = shown[:limit] + "..."
    return shown


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error of another library, printable and cut to ``limit`` characters."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return "".join(character if character.isprintable() else " " for character in text)[:limit].rstrip(". ")


def listed(names: list[str] | tuple[str, ...], limit: int = 8) -> str:
    """Names separated by commas, the rest counted."""
    shown = ", ".join(quoted(name, 40).strip("'\"") for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
