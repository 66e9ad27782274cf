"""Task templates, compiled once and rendered per row to text or to a value."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import Undefined

from lapora.errors import DataError, first_line, listed, quoted
from lapora.tasks.sandbox import BUDGET, MAX_OUTPUT, MAX_SOURCE, LoopBudget, TemplateEnvironment

_RESULT = "lapora_result"
_GUARDS = frozenset({"defined", "undefined", "none"})
# Errors of template operations on an unexpected row, such as a list without the requested element.
_ROW_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)

_environment = TemplateEnvironment()


class CompiledTemplate:
    """A template, or the bare name of a field as in lm-evaluation-harness.

    Args:
        source: The template's text.

    Attributes:
        source: The template's text.
        fields: Fields that a row must have.
        optional_fields: Fields that the template guards with ``is defined`` or ``default``.

    Raises:
        DataError: The source is not a valid template, or uses an unsupported feature.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.optional_fields: frozenset[str] = frozenset()
        self._text: Template | None = None
        self._value: Template | None = None
        if source and "{{" not in source and "{%" not in source and "{#" not in source:
            self.fields = frozenset({source})
            return
        if len(source) > MAX_SOURCE:
            raise DataError(f"the template has {len(source)} characters; the maximum is {MAX_SOURCE}")
        try:
            tree = _environment.bounded_ast(source)
            names = find_undeclared_variables(tree) - set(_environment.globals)
            guarded = _guarded_names(tree)
            self.fields, self.optional_fields = frozenset(names - guarded), frozenset(names & guarded)
            expression = _sole_expression(tree)
            self._text = _compiled(tree)
            if expression is not None:
                assignment = nodes.Assign(nodes.Name(_RESULT, "store"), expression, lineno=1)
                self._value = _compiled(nodes.Template([assignment], lineno=1))
        except TemplateSyntaxError as error:
            raise DataError(f"{first_line(error)} (line {error.lineno} of the template)") from None
        except (TemplateError, SyntaxError, MemoryError, *_ROW_ERRORS) as error:
            raise DataError(f"the template cannot be compiled: {first_line(error)}") from None

    @property
    def is_field(self) -> bool:
        """Whether this is the bare name of a field."""
        return self._text is None

    def text(self, row: Mapping[str, Any], where: str) -> str:
        """Render to text.

        Args:
            row: The row's values by field name.
            where: Name of the row in error messages.

        Raises:
            DataError: A field is missing or has an unexpected value, or the template exceeds a limit.
        """
        if self._text is None:
            return str(self._field(row, where))
        size = 0
        chunks = []
        try:
            for chunk in self._text.root_render_func(_context(self._text, row)):
                size += len(chunk)
                if size > MAX_OUTPUT:
                    raise SecurityError(f"it produces more than {MAX_OUTPUT} characters")
                chunks.append(chunk)
        except (TemplateError, *_ROW_ERRORS) as error:
            raise self._failure(error, where) from None
        return "".join(chunks)

    def value(self, row: Mapping[str, Any], where: str) -> Any:
        """Return the value of the template's only expression, else the rendered text.

        A list stays a list, without parsing text.

        Args:
            row: The row's values by field name.
            where: Name of the row in error messages.

        Raises:
            DataError: A field is missing or has an unexpected value, or the template exceeds a limit.
        """
        if self._text is None:
            return self._field(row, where)
        if self._value is None:
            return self.text(row, where)
        context = _context(self._value, row)
        try:
            for _ in self._value.root_render_func(context):
                pass
            result = context.vars[_RESULT]
            if isinstance(result, Undefined):
                str(result)  # raises with the undefined name
            if hasattr(result, "__next__"):
                result = list(result)
        except (TemplateError, *_ROW_ERRORS) as error:
            raise self._failure(error, where) from None
        return result

    def _field(self, row: Mapping[str, Any], where: str) -> Any:
        if self.source not in row:
            names = listed([str(name) for name in row]) or "no fields"
            raise DataError(f"{where}: no field {quoted(self.source)}; the row has {names}")
        return row[self.source]

    def _failure(self, error: Exception, where: str) -> DataError:
        problem = "is rejected" if isinstance(error, SecurityError) else "failed on this row"
        return DataError(f"{where}: template {quoted(self.source)} {problem}: {first_line(error)}")


@lru_cache(maxsize=512)
def compiled_template(source: str) -> CompiledTemplate:
    """Return the compiled template of ``source``, cached."""
    return CompiledTemplate(source)


def _compiled(tree: nodes.Template) -> Template:
    tree.set_environment(_environment)
    code = _environment.compile(tree)
    return Template.from_code(_environment, code, _environment.globals)


def _context(template: Template, row: Mapping[str, Any]) -> Any:
    return template.new_context({**row, BUDGET: LoopBudget()})


def _sole_expression(tree: nodes.Template) -> nodes.Expr | None:
    if len(tree.body) != 1 or not isinstance(tree.body[0], nodes.Output):
        return None
    parts = [
        part for part in tree.body[0].nodes if not (isinstance(part, nodes.TemplateData) and not part.data.strip())
    ]
    if len(parts) != 1 or isinstance(parts[0], nodes.TemplateData):
        return None
    return parts[0]


def _guarded_names(tree: nodes.Template) -> set[str]:
    """Return names that are tested with ``is defined`` (or ``none``), or have a ``default``."""
    guards: list[nodes.Expr | None] = [test.node for test in tree.find_all(nodes.Test) if test.name in _GUARDS]
    guards += [found.node for found in tree.find_all(nodes.Filter) if found.name in ("default", "d")]
    return {guard.name for guard in guards if isinstance(guard, nodes.Name)}
