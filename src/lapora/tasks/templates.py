"""Jinja2 templates in a sandbox, strict about missing fields."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lapora.errors import DataError

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


@cache
def _compiled(source: str) -> Template:
    try:
        return _ENVIRONMENT.from_string(source)
    except TemplateError as error:
        raise DataError(f"template {source!r} is not valid Jinja2: {error}") from error


def fields_of(source: str) -> set[str]:
    """Names of the row fields that a template reads."""
    _compiled(source)
    return meta.find_undeclared_variables(_ENVIRONMENT.parse(source))


def render_text(source: str, row: Mapping[str, Any], where: str) -> str:
    """Render a template.

    Raises:
        DataError: A field is missing or the template fails; ``where`` names the row.
    """
    template = _compiled(source)
    try:
        return template.render(**row)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise DataError(f"{where}: template {source!r} cannot be filled ({error})") from error


def render_value(source: str, row: Mapping[str, Any], where: str) -> Any:
    """Render a template and read the text as a Python literal where it is one (numbers, lists, booleans)."""
    text = render_text(source, row, where)
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
