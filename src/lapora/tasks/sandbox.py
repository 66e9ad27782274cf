"""The Jinja2 environment that a task's templates run in.

A template is a program written by whoever wrote the task file, so it gets a row's values and nothing else:
no loader, no Python attributes, only the filters and string methods listed here, and bounds on what it may
produce. White space is treated as lm-evaluation-harness does (`keep_trailing_newline`), and a name that the
row lacks is an error rather than an empty string.
"""

from __future__ import annotations

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
"""Characters of a template."""
# Not an identifier: no template can name it.
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
# Each of these could produce output without end, or reads something besides the row.
_REFUSED_STATEMENTS: dict[type[nodes.Node], str] = {
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
    """Passes through loop bodies that a rendering has left."""

    def __init__(self) -> None:
        self.left = MAX_STEPS

    def spend(self, steps: int) -> None:
        """Count ``steps`` passes.

        Raises:
            SecurityError: There were more than `MAX_STEPS` of them.
        """
        self.left -= steps
        if self.left < 0:
            raise SecurityError(f"its loops run more than {MAX_STEPS} times")


@pass_context
def _counted(context: Context, values: Iterable[Any]) -> Iterable[Any]:
    budget: LoopBudget = context[BUDGET]
    if not isinstance(values, Sized):
        values = list(values)
    budget.spend(len(values))
    return values


@pass_context
def _made(context: Context, value: Any) -> Any:
    """A list, tuple or mapping that the template itself writes."""
    size, looked_at = size_of(value)
    check_size(size)
    budget: LoopBudget = context[BUDGET]
    budget.spend(looked_at // 1000)
    return value


def _bounded(value: Any) -> Any:
    if isinstance(value, Sized) and not isinstance(value, Undefined):
        check_size(len(value))
    return value


class _Bounds(NodeTransformer):
    """Counts every loop's passes and checks every concatenation, and refuses some statements."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        statement = _REFUSED_STATEMENTS.get(type(node))
        if statement is not None:
            raise TemplateAssertionError(f"the statement '{statement}' is not offered in task templates", node.lineno)
        return super().generic_visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateAssertionError("recursive loops are not offered in task templates", node.lineno)
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "lapora_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "lapora_bounded", [], [], None, None, lineno=node.lineno)

    def _visit_literal(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # what a loop or a set assigns to
            return node
        return nodes.Filter(node, "lapora_made", [], [], None, None, lineno=node.lineno)

    visit_List = visit_Tuple = visit_Dict = _visit_literal


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja2's immutable sandbox with allow-lists in place of deny-lists, and bounds."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, cache_size=0)
        self.globals = {"range": short_range, "dict": mapping}
        self.filters = {name: self.filters[name] for name in _FILTERS} | {
            "int": whole_number,
            "join": joined,
            "replace": replaced,
            "round": rounded,
            "sum": total,
            "tojson": as_json,
            "lapora_counted": _counted,
            "lapora_made": _made,
            "lapora_bounded": _bounded,
        }

    def bounded_ast(self, source: str) -> nodes.Template:
        """Parse ``source`` and put the bounds into it.

        Raises:
            TemplateSyntaxError: It is not a template, or uses a statement that is refused.
        """
        tree = self.parse(source)
        _Bounds().visit(tree)
        tree.set_environment(self)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read ``obj.attr``: the listed methods of plain values, and no more."""
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
        """``str.format`` is not offered at all, so there is nothing to wrap."""
        return None

    # The names of the base class, which keep the callee's keyword arguments free.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call ``__obj``, after checking the size of what it would return."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "replace" and len(args) >= 2:
            return replaced(owner, *args[:3])
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            return joined(args[0], owner)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator that can make much out of little, within bounds."""
        sized = [value for value in (left, right) if isinstance(value, (str, list, tuple))]
        numbers = [value for value in (left, right) if isinstance(value, (int, float))]
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not offered; join with ~")
        if operator == "+":
            check_size(sum(size_of(value)[0] for value in sized))
        elif operator == "*" and sized:
            check_size(size_of(sized[0])[0] * int(max([1, *numbers])))
        elif operator == "**" and (len(numbers) != 2 or abs(right) > 64 or abs(left) > 10**6):
            raise SecurityError("a power is too large")
        elif operator == "*" and any(isinstance(number, int) and number.bit_length() > 4096 for number in numbers):
            raise SecurityError("a product is too large")
        return super().call_binop(context, operator, left, right)


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
