"""Templates: what they give, and what they cannot reach."""

from __future__ import annotations

import os
import random
import re
import string
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapora.errors import DataError
from lapora.tasks.templates import CompiledTemplate

ROW: dict[str, Any] = {
    "question": "Which?",
    "number": 3,
    "answer": True,
    "choices": {"text": ["one", "two"], "label": ["A", "B"]},
}
SECRET = "the-secret-of-this-file"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.text(string.ascii_lowercase, min_size=1, max_size=8).filter(
    # Words of the template language, and names that are its own.
    lambda name: name not in {"in", "is", "if", "else", "not", "and", "or", "true", "false", "none", "range",
                              "dict", "namespace", "self", "loop", "caller", "varargs", "kwargs"}
)  # fmt: skip


def text(source: str, row: dict[str, Any] = ROW) -> str:
    return CompiledTemplate(source).text(row, "row 0")


def value(source: str, row: dict[str, Any] = ROW) -> Any:
    return CompiledTemplate(source).value(row, "row 0")


def test_white_space_stays_as_written() -> None:
    assert text("Q: {{question}}\nA: \n") == "Q: Which?\nA: \n"
    assert text("{% if number %}\nx{% endif %}") == "\nx"


def test_a_sole_expression_keeps_its_type() -> None:
    assert value("{{ choices.label }}") == ["A", "B"]
    assert value(" {{ choices.text | map('upper') }} ") == ["ONE", "TWO"]
    assert value("{{ answer }}") is True
    assert value("{{ number }}{{ number }}") == "33"


@pytest.mark.parametrize(
    ("given_value", "number"),
    [
        (True, 1),
        (False, 0),
        ("True", 1),
        ("false", 0),
        (" TRUE ", 1),
        ("2", 2),
        (2.0, 2),
        ("1.0", 1),
        (-1, -1),
    ],
)
def test_int_of_what_local_files_hold(given_value: object, number: int) -> None:
    assert value("{{ answer | int }}", {"answer": given_value}) == number


@pytest.mark.parametrize("given_value", ["yes", "", "1.5", [1], {}, "nan", "inf"])
def test_int_never_makes_zero_of_a_word(given_value: object) -> None:
    with pytest.raises(DataError, match="is not a whole number"):
        value("{{ answer | int }}", {"answer": given_value})
    assert value("{{ answer | int(9) }}", {"answer": given_value}) == 9


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ choices.nothing }}", "no attribute 'nothing'"),
        ("{{ choices.text[4] }}", "no element 4"),
        ("{{ choices.label.index('E') }}", "'E' is not in list"),
        ("{{ number / 0 }}", "division by zero"),
    ],
)
def test_what_a_row_lacks_is_named(source: str, says: str) -> None:
    for render in (text, value):
        with pytest.raises(DataError, match=r"row 0: template .*failed on this row") as caught:
            render(source)
        assert says in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ question.__class__ }}",
        "{{ question['__class__'] }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ choices.__init__.__globals__ }}",
        "{{ range.__globals__ }}",
        "{{ dict.__base__ }}",
        "{{ dict.mro() }}",
        "{{ self._TemplateReference__context }}",
        "{{ question.format(question) }}",
        "{{ '{0.__class__}'.format(question) }}",
        "{{ '{0.__class__}'.format_map(choices) }}",
        "{{ '%s' % question }}",
        "{{ question | attr('__class__') }}",
        "{{ [question] | map(attribute='__class__') | join }}",
        "{{ [question] | map('attr', '__class__') | list }}",
        "{{ choices.text.append('x') }}",
        "{{ choices.clear() }}",
        "{{ choices.pop('text') }}",
        "{{ question.encode() }}",
        "{{ number.to_bytes(99999999999, 'big') }}",
        "{{ lipsum(n=100) }}",
        "{{ cycler('a').__init__ }}",
        "{{ get_flashed_messages() }}",
        "{% for x in [1] %}{{ loop.__class__ }}{% endfor %}",
        "{% set n = namespace(x=1) %}",
    ],
)
def test_python_cannot_be_reached(source: str) -> None:
    before = repr(ROW)
    with pytest.raises(DataError):
        text(source)
    assert repr(ROW) == before


@pytest.mark.parametrize(
    "source",
    [
        "{% include PATH %}",
        "{% import PATH as x %}",
        "{% from PATH import x %}",
        "{% extends PATH %}",
        "{{ open(PATH).read() }}",
        "{{ PATH | read }}",
        "{{ self.environment.get_template(PATH) }}",
    ],
)
def test_files_cannot_be_read(tmp_path: Path, source: str) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    with pytest.raises(DataError) as caught:
        text(source.replace("PATH", repr(str(secret))))
    assert SECRET not in str(caught.value)


def grown(start: str, step: str) -> str:
    """A value that grows at each of many steps, written out at the end."""
    return "{% set x = " + start + " %}" + ("{% set x = " + step + " %}") * 99 + "{{ x }}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**12 }}",
        "{{ [0] * 10**12 }}",
        "{{ 2 ** 999999999 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 1000000 }}{% endfor %}",
        "{% for i in 'x' recursive %}{{ loop('x') }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set x %}{{ question }}{% endset %}{{ x }}",
        grown("'aa'", "x ~ x"),
        grown("'aa'", "x + x"),
        grown("'aa'", "x.replace('a', x)"),
        grown("'aa'", "x | replace('a', x)"),
        grown("'aa'", "x.join(x)"),
        grown("'aa'", "x | join(x)"),
        grown("[1]", "x + x"),
        grown("9", "x * x"),
        grown("[1]", "[x, x]"),
        grown("[1]", "(x, x)"),
        grown("[1]", "{'a': x, 'b': x}"),
        grown("[1]", "dict(a=x, b=x)"),
        grown("['a' * 8000]", "x * 8000"),
        "{{ [[1]] * 4000000 | sum(start=[]) }}",
        "{{ choices | tojson(indent=999999999) }}",
        "{{ question.center(999999999) }}",
        "{{ question.ljust(999999999) }}",
        "{{ question.zfill(999999999) }}",
        "{{ question | center(999999999) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 1.5 | round(999999999) }}",
        "{{ range(999999999) | list }}",
        "{{ " + "(" * 5000 + " }}",
        "{{ question }}" * 10_000,
    ],
)
def test_no_template_runs_away(source: str) -> None:
    started = time.perf_counter()
    with pytest.raises(DataError):
        text(source)
    assert time.perf_counter() - started < 5


@given(row=st.dictionaries(names, json_values, min_size=1, max_size=4))
def test_a_field_renders_as_its_text_and_its_value(row: dict[str, Any]) -> None:
    for name, held in row.items():
        source = "{{ " + name + " }}"
        assert text(source, row) == str(held)
        assert value(source, row) == held
        assert value(name, row) == held
        assert CompiledTemplate(source).fields == CompiledTemplate(name).fields == {name}


@given(around=st.text(st.characters(exclude_characters="{}%#\r"), max_size=20), inside=st.text(max_size=30))
def test_data_is_never_read_as_a_template(around: str, inside: str) -> None:
    hostile = "{{ 1 + 1 }}{% for x in [1, 2] %}" + inside
    assert text(around + "{{ field }}" + around, {"field": hostile}) == around + hostile + around


underscored = st.from_regex(r"_{1,2}[a-z]{1,10}_{0,2}", fullmatch=True) | st.sampled_from(
    [
        "__class__",
        "__globals__",
        "__builtins__",
        "__subclasses__",
        "__import__",
        "__code__",
        "mro",
        "gi_frame",
        "f_back",
    ]
)
targets = st.sampled_from(
    ["question", "choices", "choices.text", "number", "answer", "range", "dict", "''", "[]", "self"]
)


@given(path=st.lists(underscored, min_size=1, max_size=4), target=targets, subscript=st.booleans())
def test_no_underscored_attribute_is_ever_reached(path: list[str], target: str, subscript: bool) -> None:
    steps = "".join(f"[{name!r}]" if subscript else f".{name}" for name in path)
    with pytest.raises(DataError):
        text("{{ " + target + steps + " }}")


PIECES = """
    {{ }} {% %} {# #} for x in if endif endfor set question choices .text [0] | int join map ~ * ** + ( ) 'a'
    10 range dict __class__ . , is defined loop include macro
"""
pieces = st.sampled_from(PIECES.split())


@settings(max_examples=400, deadline=5000)
@given(parts=st.lists(pieces, max_size=15))
def test_any_source_gives_text_or_a_data_error(parts: list[str]) -> None:
    source = " ".join(parts)
    try:
        result = text(source, {**ROW, source: "field"})
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(result, str) and os.getcwd() not in result


def test_parts_between_marks_are_dropped_as_by_a_regular_expression() -> None:
    template = CompiledTemplate("{{ text | drop_between('[', ']') }}")
    source = random.Random(0)
    for _ in range(300):
        text = "".join(source.choices("ab [] ", k=source.randint(0, 20)))
        assert template.text({"text": text}, "row 0") == re.sub(r"\[.*?\]", "", text)


def test_a_column_may_hold_the_text_of_a_list() -> None:
    template = CompiledTemplate("{{ (problems | literal)[-1]['options'] }}")
    assert template.value({"problems": "[{'options': ['a', 'b']}]"}, "row 0") == ["a", "b"]
    for text in ("__import__('os')", "[", "[" * 10_000):
        with pytest.raises(DataError, match="is not a literal"):
            template.value({"problems": text}, "row 0")
