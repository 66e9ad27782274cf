"""Filters and functions of templates, in place of Jinja2's own: stricter, and bounded in what they make."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.runtime import Undefined
from jinja2.utils import htmlsafe_json_dumps

from lapora.tasks.quoting import quoted

MAX_OUTPUT = 8_000_000
"""Characters of a rendering; characters and elements of any value that a template makes on the way."""
MAX_STEPS = 10_000
"""Passes through loop bodies in one rendering."""
_ELEMENT = 16


def check_size(size: int) -> None:
    """Refuse more than `MAX_OUTPUT` characters or elements.

    Raises:
        SecurityError: There are more.
    """
    if size > MAX_OUTPUT:
        raise SecurityError(f"it produces more than {MAX_OUTPUT} characters")


def size_of(value: Any) -> tuple[int, int]:
    """How much there is in a value, all the way down, and how many elements were looked at.

    An element counts as `_ELEMENT` characters, for the memory it takes. Counting ends above `MAX_OUTPUT`:
    lists that hold each other twice are small, and endless when written out.
    """
    size = looked_at = 0
    waiting = [value]
    while waiting and size <= MAX_OUTPUT:
        held = waiting.pop()
        looked_at += 1
        if isinstance(held, str):
            size += len(held)
        elif isinstance(held, (list, tuple)):
            size += _ELEMENT * len(held)
            waiting.extend(held)
        elif isinstance(held, dict):
            size += _ELEMENT * len(held)
            waiting.extend(held.keys())
            waiting.extend(held.values())
    return size, looked_at


def whole_number(value: Any, default: Any = None, base: int = 10) -> Any:
    """Jinja's ``int``, except that what is not a number is an error.

    Jinja makes 0 of "yes" and of "False" alike: as a label, a wrong one that nobody sees. The words True and
    False count as 1 and 0, as they come from CSV files.
    """
    if isinstance(value, Undefined):
        # Raises, naming what is undefined, unless a default was given.
        return default if default is not None else str(value)
    word = value.strip().lower() if isinstance(value, str) else None
    if word in ("true", "false"):
        return int(word == "true")
    try:
        if isinstance(value, str):
            try:
                return int(value, base)
            except ValueError:
                number = float(value)
                if number.is_integer():
                    return int(number)
                raise
        if isinstance(value, (int, float)):
            return int(value)
    except (ValueError, OverflowError):
        pass
    if default is not None:
        return default
    raise TemplateRuntimeError(f"{quoted(value)} is not a whole number")


def _mapping(*values: Any, **named: Any) -> dict[Any, Any]:
    """``dict`` as a function: the type itself would answer to subscripts."""
    return dict(*values, **named)


def rounded(value: Any, precision: int = 0) -> Any:
    """``round`` to at most 20 digits."""
    if not isinstance(precision, int) or abs(precision) > 20:
        raise TemplateRuntimeError("round takes at most 20 digits")
    return round(value, precision)


def joined(values: Iterable[Any], separator: str = "", attribute: Any = None) -> str:
    """``join``, both the filter and the method of text."""
    if attribute is not None:
        raise TemplateRuntimeError("join takes no attribute here; use map(attribute=...) before it")
    parts = [str(value) for value in values]
    check_size(sum(map(len, parts)) + len(str(separator)) * len(parts))
    return str(separator).join(parts)


def replaced(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """``replace``, both the filter and the method of text."""
    text, old, new = str(text), str(old), str(new)
    check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def mapping(*values: Any, **named: Any) -> dict[Any, Any]:
    """``dict`` as a function: the type itself would answer to subscripts."""
    made = dict(*values, **named)
    check_size(size_of(made)[0])
    return made


def short_range(*bounds: int) -> range:
    """``range``, of at most `MAX_STEPS` numbers."""
    made = range(*bounds)
    if len(made) > MAX_STEPS:
        raise SecurityError(f"a range has more than {MAX_STEPS} numbers")
    return made


def total(values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """``sum`` of numbers; adding lists up would take a time that grows with the square of their number."""
    if attribute is not None or not isinstance(start, (int, float)):
        raise TemplateRuntimeError("sum adds numbers only; use map(attribute=...) before it")
    return sum(values, start)


def as_json(value: Any) -> str:
    """``tojson`` without its indentation, which has no bound."""
    return htmlsafe_json_dumps(value)
