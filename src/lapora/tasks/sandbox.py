"""Sandboxed Jinja2 environment for task templates.

Task files may be untrusted, so a template gets a row's values only: no loader, no Python attributes, an allow-list
of filters and string methods, and limits on loops and output size. White space is treated as in
lm-evaluation-harness (`keep_trailing_newline`). An undefined name is an error, not an empty string.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sized
from typing import Any

from jinja2 import StrictUndefined, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateAssertionError, TemplateRuntimeError
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import htmlsafe_json_dumps
from jinja2.visitor import NodeTransformer

from lapora.errors import quoted

MAX_SOURCE = 65_536
"""Maximum number of characters of a template."""
# Not a valid identifier, so that no template can refer to it.
BUDGET = "loop budget"

# fmt: off
_FILTERS = (
    "abs", "capitalize", "d", "default", "dictsort", "first", "float", "items", "last", "length",
    "count", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select",
    "selectattr", "sort", "string", "title", "trim", "truncate", "unique", "upper",
    "wordcount",
)
_STRING_METHODS = frozenset({
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join",
    "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
    "title", "upper",
})
# fmt: on
_SEQUENCE_METHODS = frozenset({"count", "index"})
_MAPPING_METHODS = frozenset({"get", "items", "keys", "values"})
# These statements could produce unbounded output, or read other sources than the row.
_REJECTED_STATEMENTS: dict[type[nodes.Node], str] = {
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "from",
    nodes.Extends: "extends",
    nodes.Block: "block",
    nodes.Macro: "macro",
    nodes.CallBlock: "call",
    nodes.AssignBlock: "set without a value",
}


class LoopBudget:
    """Number of loop iterations left in one rendering."""

    def __init__(self) -> None:
        self.remaining = MAX_STEPS

    def spend(self, steps: int) -> None:
        """Subtract ``steps`` iterations.

        Raises:
            SecurityError: More than `MAX_STEPS` iterations have been counted.
        """
        self.remaining -= steps
        if self.remaining < 0:
            raise SecurityError(f"its loops run more than {MAX_STEPS} times")


@pass_context
def _counted(context: Context, values: Iterable[Any]) -> Iterable[Any]:
    budget: LoopBudget = context[BUDGET]
    if not isinstance(values, Sized):
        values = list(values)
    budget.spend(len(values))
    return values


@pass_context
def _literal(context: Context, value: Any) -> Any:
    """Check the size of a list, tuple or mapping literal of the template."""
    size, visited = size_of(value)
    check_size(size)
    budget: LoopBudget = context[BUDGET]
    budget.spend(visited // 1000)
    return value


def _bounded(value: Any) -> Any:
    if isinstance(value, Sized) and not isinstance(value, Undefined):
        check_size(len(value))
    return value


class _Bounds(NodeTransformer):
    """Adds limits to loops, concatenations and literals, and rejects some statements."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        statement = _REJECTED_STATEMENTS.get(type(node))
        if statement is not None:
            raise TemplateAssertionError(f"statement '{statement}' is not supported in task templates", node.lineno)
        return super().generic_visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateAssertionError("recursive loops are not supported in task templates", node.lineno)
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "lapora_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "lapora_bounded", [], [], None, None, lineno=node.lineno)

    def _visit_literal(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # the target of a loop or of set
            return node
        return nodes.Filter(node, "lapora_literal", [], [], None, None, lineno=node.lineno)

    visit_List = visit_Tuple = visit_Dict = _visit_literal


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja2's immutable sandbox with allow-lists instead of deny-lists, and size limits."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, cache_size=0)
        self.globals = {"range": short_range, "dict": mapping}
        self.filters = {name: self.filters[name] for name in _FILTERS} | {
            "drop_between": without_between,
            "int": whole_number,
            "join": joined,
            "literal": literal,
            "replace": replaced,
            "round": rounded,
            "sum": total,
            "tojson": as_json,
            "lapora_counted": _counted,
            "lapora_literal": _literal,
            "lapora_bounded": _bounded,
        }

    def bounded_ast(self, source: str) -> nodes.Template:
        """Parse ``source`` and add the limits to its syntax tree.

        Raises:
            TemplateSyntaxError: The source is not a valid template, or uses a rejected statement.
        """
        tree = self.parse(source)
        _Bounds().visit(tree)
        tree.set_environment(self)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may read ``obj.attr``: only allow-listed methods of plain values."""
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        if isinstance(obj, (list, tuple)):
            return attr in _SEQUENCE_METHODS
        if isinstance(obj, dict):
            return attr in _MAPPING_METHODS
        if isinstance(obj, LoopContext):
            return super().is_safe_attribute(obj, attr, value)
        return False

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return None: ``str.format`` is not allow-listed."""
        return None

    # Double underscores, as in the base class, avoid clashes with the callee's keyword arguments.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call ``__obj``, with the size-checked versions of ``str.replace`` and ``str.join``."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "replace" and len(args) >= 2:
            return replaced(owner, *args[:3])
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            return joined(args[0], owner)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator, after checking the size of its result.

        Raises:
            SecurityError: The result would be too large, or the operator is ``%`` on text.
        """
        sized = [value for value in (left, right) if isinstance(value, (str, list, tuple))]
        numbers = [value for value in (left, right) if isinstance(value, (int, float))]
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not supported; concatenate with ~")
        if operator == "+":
            check_size(sum(size_of(value)[0] for value in sized))
        elif operator == "*" and sized:
            check_size(size_of(sized[0])[0] * int(max([1, *numbers])))
        elif operator == "**" and (len(numbers) != 2 or abs(right) > 64 or abs(left) > 10**6):
            raise SecurityError("result of ** is too large")
        elif operator == "*" and any(isinstance(number, int) and number.bit_length() > 4096 for number in numbers):
            raise SecurityError("result of * is too large")
        return super().call_binop(context, operator, left, right)


MAX_OUTPUT = 8_000_000
"""Maximum number of characters of a rendering, and of characters and elements of any intermediate value."""
MAX_STEPS = 10_000
"""Maximum number of loop iterations in one rendering."""
_ELEMENT = 16


def check_size(size: int) -> None:
    """Check a number of characters or elements against `MAX_OUTPUT`.

    Raises:
        SecurityError: The number is larger.
    """
    if size > MAX_OUTPUT:
        raise SecurityError(f"it produces more than {MAX_OUTPUT} characters")


def size_of(value: Any) -> tuple[int, int]:
    """Compute the nested size of a value in characters, and the number of elements visited.

    An element counts as `_ELEMENT` characters, for its memory. Counting stops above `MAX_OUTPUT`: nested lists that
    contain the same list twice take little memory, but grow exponentially when printed.
    """
    size = visited = 0
    stack = [value]
    while stack and size <= MAX_OUTPUT:
        element = stack.pop()
        visited += 1
        if isinstance(element, str):
            size += len(element)
        elif isinstance(element, (list, tuple)):
            size += _ELEMENT * len(element)
            stack.extend(element)
        elif isinstance(element, dict):
            size += _ELEMENT * len(element)
            stack.extend(element.keys())
            stack.extend(element.values())
    return size, visited


def whole_number(value: Any, default: Any = None, base: int = 10) -> Any:
    """Convert to an integer like Jinja's ``int``, but raise for values that are not numbers.

    Jinja converts "yes" and "False" to 0, which as a label would be silently wrong. The words True and False, as
    found in CSV files, convert to 1 and 0.

    Raises:
        TemplateRuntimeError: The value is not a whole number, and there is no default.
    """
    if isinstance(value, Undefined):
        # str() raises with the undefined name.
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


def rounded(value: Any, precision: int = 0) -> Any:
    """Round to at most 20 digits."""
    if not isinstance(precision, int) or abs(precision) > 20:
        raise TemplateRuntimeError("round takes at most 20 digits")
    return round(value, precision)


def joined(values: Iterable[Any], separator: str = "", attribute: Any = None) -> str:
    """Join values, as the filter ``join`` and as the string method, with a size check."""
    if attribute is not None:
        raise TemplateRuntimeError("join does not support attribute; use map(attribute=...) before it")
    parts = [str(value) for value in values]
    check_size(sum(map(len, parts)) + len(str(separator)) * len(parts))
    return str(separator).join(parts)


def replaced(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """Replace text, as the filter ``replace`` and as the string method, with a size check."""
    text, old, new = str(text), str(old), str(new)
    check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def without_between(text: Any, start: str, end: str) -> str:
    """Remove every part of a text from ``start`` to the next ``end``, as a regular expression would."""
    parts = str(text).split(end)
    cut = [part.partition(start)[0] if start in part else part + end for part in parts[:-1]]
    return "".join([*cut, parts[-1]])


def literal(text: Any) -> Any:
    """Parse the text of a Python literal, such as a list of mappings in a column of text.

    Raises:
        TemplateRuntimeError: It is not one.
    """
    check_size(len(str(text)))
    try:
        value = ast.literal_eval(str(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise TemplateRuntimeError(f"{quoted(text)} is not a literal") from None
    check_size(size_of(value)[0])
    return value


def mapping(*values: Any, **named: Any) -> dict[Any, Any]:
    """Build a dict; a function because the type ``dict`` itself supports subscripts."""
    result = dict(*values, **named)
    check_size(size_of(result)[0])
    return result


def short_range(*bounds: int) -> range:
    """Build a ``range`` of at most `MAX_STEPS` numbers."""
    result = range(*bounds)
    if len(result) > MAX_STEPS:
        raise SecurityError(f"a range has more than {MAX_STEPS} numbers")
    return result


def total(values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """Sum numbers; summing lists would take quadratic time."""
    if attribute is not None or not isinstance(start, (int, float)):
        raise TemplateRuntimeError("sum supports numbers only; use map(attribute=...) before it")
    return sum(values, start)


def as_json(value: Any) -> str:
    """Convert to JSON like ``tojson``, without indentation, whose size would be unlimited."""
    return htmlsafe_json_dumps(value)
