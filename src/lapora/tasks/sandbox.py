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
from jinja2.exceptions import SecurityError, TemplateAssertionError
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from lapora.tasks.filters import (
    MAX_STEPS,
    as_json,
    check_size,
    joined,
    mapping,
    replaced,
    rounded,
    short_range,
    size_of,
    total,
    whole_number,
)

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
