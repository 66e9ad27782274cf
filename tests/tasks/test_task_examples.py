"""Rendering one row: missing fields, ready prompts, answers of rows, labels, the fingerprint."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapora.errors import DataError
from lapora.tasks import (
    Task,
    data_fingerprint,
    load_task,
    render,
    render_all,
    required_fields,
    resolve_choices,
)
from lapora.tasks.rows import Row


def task_with(**keys: Any) -> Task:
    return Task.from_dict(
        {"task": "mine", "doc_to_text": "{{question}} Answer:", "doc_to_choice": ["no", "yes"], **keys}
    )


def target_of(task: Task, **row: Any) -> int | None:
    return render(task, {"question": "q", **row}, kind="causal").target


def test_a_missing_field_is_named_with_its_row() -> None:
    boolq = load_task("boolq")
    with pytest.raises(DataError) as caught:
        render(boolq, {"question": "is it", "id": 3}, kind="causal", index=12)
    assert "row 12: no value for passage, required by task 'boolq'; the row has question, id" in str(caught.value)
    with pytest.raises(DataError, match="line 13: no value for passage, question"):
        render(boolq, {}, kind="classifier", where="line 13")
    with pytest.raises(DataError, match="no value for passage"):
        render(boolq, {"question": "is it", "passage": None}, kind="causal")
    assert required_fields(boolq, "causal") == ("passage", "question")
    assert required_fields(load_task("arc-c"), "causal") == ("choices", "question")


def test_what_to_do_about_a_missing_value_depends_on_the_tasks_own_fields() -> None:
    boolq, own = (
        load_task("boolq"),
        Task.from_dict({"task": "t", "doc_to_text": "{{text}}", "doc_to_choice": ["a", "b"]}),
    )
    with pytest.raises(DataError, match=r"passage is null; give a value, or give a ready prompt as .text. in a row"):
        render(boolq, {"question": "is it", "passage": None}, kind="causal")
    # A row with `text` alone would be rendered again.
    with pytest.raises(
        DataError, match=r"the row has prompt; add the field, or give a ready prompt as {.prompt.: ..., "
    ):
        render(own, {"prompt": "p"}, kind="causal")
    with pytest.raises(DataError, match=r"text is null; give a value$"):
        render(load_task("ag_news"), {"text": None}, kind="classifier")


@pytest.mark.parametrize(
    "row", [{"text": "t", "label": 1}, {"text": "t", "sentence": "s"}, {"text": "t", "passage": "p"}]
)
def test_a_template_is_not_skipped_for_the_text_of_a_row_with_other_fields(row: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"no value for .*a row without other fields"):
        render(load_task("boolq"), row, kind="causal")


def test_a_ready_text_is_taken_as_it_is() -> None:
    ready = "Answer yourself: {{ no template }} "
    example = render(load_task("boolq"), {"text": ready, "id": "q1"}, kind="causal", index=4)
    assert (example.text, example.ready, example.id, example.index) == (ready, True, "q1", 4)
    assert render(load_task("boolq"), {"text": ready}, kind="classifier").inputs == (ready,)
    # keep_if is about the task's own fields.
    assert render(load_task("arc-c"), {"text": ready}, kind="causal").choices == ("A", "B", "C", "D")
    # A task whose own field is `text` renders it.
    assert not render(load_task("ag_news"), {"text": "Stocks fell."}, kind="classifier").ready
    with pytest.raises(DataError, match="the rendered text is empty"):
        render(load_task("boolq"), {"text": " \n"}, kind="causal")
    with pytest.raises(DataError, match="no value for passage"):
        render(load_task("boolq"), {"text": 3}, kind="causal")


def test_a_kind_that_the_task_does_not_serve() -> None:
    with pytest.raises(DataError, match="task 'rte' supports only classifier models: its YAML has no doc_to_text"):
        render(load_task("rte"), {"sentence1": "a", "sentence2": "b"}, kind="causal")
    with pytest.raises(DataError, match="supports only causal models: its YAML has no doc_to_inputs"):
        render(load_task("obqa"), {}, kind="classifier")


def test_a_model_with_another_number_of_answers() -> None:
    row = {"question": "q", "passage": "p"}
    assert render(load_task("boolq"), row, kind="classifier", num_choices=2)
    with pytest.raises(DataError, match=r"task 'boolq' has 2 answers \(False, True\), but the model has 3"):
        render(load_task("boolq"), row, kind="classifier", num_choices=3)


@pytest.mark.parametrize(
    ("doc_to_target", "label", "expected"),
    [
        ("label", 1, 1),
        ("label", True, 1),
        ("label", "yes", 1),
        ("label", "1", 1),
        ("label", " no ", 0),
        ("label", 1.0, 1),
        ("label", None, None),
        ("label", "", None),
        ("label", -1, None),
        ("{{label}}", 1, 1),
        ("{{label}}", "yes", 1),
        ("{{label}}", "0", 0),
        ("{{label}}", True, 1),
        ("{{ label | int }}", "True", 1),
        ("{{ label + 1 }}", -1, 0),
        ("{% if label == 'good' %}yes{% else %}no{% endif %}", "good", 1),
        ("{{ ['no', 'yes'][label] }}", 1, 1),
        (1, "anything", 1),
    ],
)
def test_labels(doc_to_target: str | int, label: object, expected: int | None) -> None:
    assert target_of(task_with(doc_to_target=doc_to_target), label=label) == expected


@pytest.mark.parametrize(
    ("doc_to_target", "label"),
    [("label", 2), ("label", -2), ("label", "maybe"), ("label", 0.5), ("label", ["yes"]),
     ("{{label}}", "YES"), ("{{label}}", "7"), ("{{ label | int }}", 9)],
)  # fmt: skip
def test_an_unknown_label_is_named_with_the_answers(doc_to_target: str, label: object) -> None:
    task = task_with(doc_to_target=doc_to_target)
    row = {"question": "q", "label": label}
    with pytest.raises(DataError, match=r"row 5: unknown label .*; the 2 answers are no, yes \(or an index"):
        render(task, row, kind="causal", index=5)
    assert render(task, row, kind="causal", labels="ignore").target is None


def test_a_label_that_is_both_an_answer_and_an_index_is_refused() -> None:
    stars = task_with(doc_to_choice=["1", "2", "3"], doc_to_target="{{label}}")
    with pytest.raises(DataError, match="label '1' is ambiguous: it is an answer and the index of another one"):
        target_of(stars, label="1")
    with pytest.raises(DataError, match="label 1 is ambiguous"):
        target_of(stars, label=1)
    assert target_of(stars, label=3) == 2 and target_of(stars, label=0) == 0
    assert target_of(replace(stars, doc_to_target="{{ label | string }}"), label=1) == 0
    codes = task_with(doc_to_choice=["1", "2", "5", "9"], doc_to_target="label")
    assert [target_of(codes, label=label) for label in (1, 2, 5, 9, "1", "9")] == [0, 1, 2, 3, 0, 3]
    assert target_of(replace(stars, doc_to_target="label"), label="1") == 0
    assert target_of(replace(stars, doc_to_target="{{ label | int }}"), label="1") == 1


def test_labels_may_be_required_optional_or_ignored() -> None:
    task = task_with(doc_to_target="label")
    rows = [{"question": "a", "label": 0}, {"question": "b"}]
    assert [example.target for example in render_all(task, rows, kind="causal", labels="optional")] == [
        0,
        None,
    ]
    assert [example.target for example in render_all(task, rows, kind="causal", labels="ignore")] == [
        None,
        None,
    ]
    with pytest.raises(DataError, match="row 1: no label: it is read from label; give rows with labels"):
        render_all(task, rows, kind="causal")
    with pytest.raises(DataError, match="task 'mine' has no doc_to_target"):
        render(task_with(), rows[0], kind="causal", require_target=True)


def test_answers_of_the_rows_must_all_be_the_same() -> None:
    task = task_with(doc_to_choice="{{choices.label}}")
    letters = {"question": "q", "choices": {"label": ["A", "B"]}}
    digits = {"question": "q", "choices": {"label": ["1", "2"]}}
    assert resolve_choices(task, [letters, letters]) == ("A", "B")
    with pytest.raises(DataError, match="row 9: its answers are 1, 2, not A, B; all rows must have the same"):
        resolve_choices(task, [Row(3, letters), Row(9, digits)])
    with pytest.raises(DataError, match="row 9: its answers are 1, 2, not A, B"):
        render_all(task, [Row(3, letters), Row(9, digits)], kind="causal", labels="ignore")
    with pytest.raises(DataError, match="its answers are read from rows; give at least one row"):
        resolve_choices(task, [])
    assert resolve_choices(load_task("boolq")) == ("False", "True")


def test_recorded_answers_stand_in_where_a_row_yields_none() -> None:
    task = task_with(doc_to_choice="{{choices.label}}")
    ready = render(task, {"text": "A or B?"}, kind="causal", choices=("A", "B"))
    assert ready.choices == ("A", "B")
    with pytest.raises(DataError, match=r"doc_to_choice|'choices' is undefined"):
        render(task, {"text": "A or B?"}, kind="causal")
    with pytest.raises(DataError, match="its answers are 1, 2, not A, B"):
        render(task, {"question": "q", "choices": {"label": ["1", "2"]}}, kind="causal", choices=("A", "B"))


@pytest.mark.parametrize(
    ("template", "row", "says"),
    [
        ("{{ c }}", {"c": "no list"}, "doc_to_choice returned 'no list', which is not a list"),
        ("{{ c }}", {"c": "__import__('os').getcwd()"}, "which is not a list"),
        ("{{ c }}", {"c": "[" * 300}, "which is not a list"),
        ("{{ c }}", {"c": 3}, "doc_to_choice returned 3"),
        ("{{ c }}", {"c": ["A"]}, "at least two answers are required, not 1"),
        ("{{ c }}", {"c": ["A", "A"]}, "duplicate answer 'A'"),
        ("{{ c }}", {"c": ["A", None]}, "an answer must be non-empty text, not None"),
    ],
)
def test_answers_that_are_no_list(template: str, row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        render(task_with(doc_to_choice=template), {"question": "q", **row}, kind="causal", index=2)
    assert "row 2" in str(caught.value) and says in str(caught.value)


def test_a_rendered_literal_is_a_list_as_in_the_harness() -> None:
    task = task_with(doc_to_choice="['{{a}}', '{{b}}']")
    assert render(task, {"question": "q", "a": "x", "b": "y"}, kind="causal").choices == ("x", "y")


def test_terminal_escapes_do_not_reach_a_message() -> None:
    row = {"question": "q", "\x1b[31mred": 1, "label": "\x1b]0;title\x07"}
    for task, kind in ((load_task("boolq"), "causal"), (task_with(doc_to_target="label"), "causal")):
        with pytest.raises(DataError) as caught:
            render(task, row, kind=kind)  # type: ignore[arg-type]
        assert "\x1b" not in str(caught.value) and "\x07" not in str(caught.value)


def test_half_a_surrogate_pair_is_refused() -> None:
    for row in ({"text": "ab\ud800"}, {"question": "ab\ud800", "passage": "p"}):
        with pytest.raises(DataError, match=r"row 3: character \d+ of the text is an unpaired surrogate"):
            render(load_task("boolq"), row, kind="causal", index=3)


BOOLQ_ROW = {"question": "is it", "passage": "It is", "answer": True}


def fingerprint(*rows: dict[str, Any]) -> str:
    return data_fingerprint(render_all(load_task("boolq"), rows, kind="causal", labels="optional"))


def test_the_fingerprint_is_of_what_is_read_and_in_which_order() -> None:
    other = {**BOOLQ_ROW, "question": "was it"}
    first = fingerprint(BOOLQ_ROW, other)
    assert len(first) == 64 and int(first, 16)
    assert first == fingerprint({**BOOLQ_ROW, "title": "unread", "id": 3}, other)
    changed = [
        fingerprint(other, BOOLQ_ROW),
        fingerprint(BOOLQ_ROW),
        fingerprint(BOOLQ_ROW, {**other, "answer": False}),
        fingerprint(BOOLQ_ROW, {**other, "answer": None}),
        fingerprint(BOOLQ_ROW, {**other, "passage": "It is "}),
    ]
    assert first not in changed and len(set(changed)) == len(changed)


@given(question=st.text(min_size=1), passage=st.text())
def test_any_text_goes_through_a_prompt_unchanged(question: str, passage: str) -> None:
    row = {"question": question, "passage": passage, "answer": False}
    example = render(load_task("boolq"), row, kind="causal")
    expected = f"Answer the question with only True or False: {question} Context: {passage}."
    assert example.text == expected and example.target == 0


def test_a_boolean_that_is_an_answer_and_the_index_of_another_one() -> None:
    content = {"task": "t", "doc_to_text": "{{q}}", "doc_to_target": "label"}
    in_order = Task.from_dict({**content, "doc_to_choice": ["False", "True"]})
    assert render(in_order, {"q": "x", "label": True}, kind="causal").target == 1
    reversed_order = Task.from_dict({**content, "doc_to_choice": ["True", "False"]})
    with pytest.raises(DataError, match="label True is ambiguous"):
        render(reversed_order, {"q": "x", "label": True}, kind="causal")
    assert render(reversed_order, {"q": "x", "label": "True"}, kind="causal").target == 0


@pytest.mark.parametrize(
    ("answers", "value", "expected"),
    [
        (["false", "true"], True, 1),
        (["no", "yes"], True, 1),
        (["no", "yes"], False, 0),
        (["True", "False"], True, "| string` in"),
        (["true", "false"], True, "| string | lower`"),
        (["TRUE", "FALSE"], False, "| string | upper`"),
        (["yes", "true"], False, "unknown label False"),
        (["yes", "true"], True, 1),
    ],
)
@pytest.mark.parametrize("target", ["label", "{{ label if label is boolean else label }}"])
def test_a_boolean_is_the_answer_of_its_name_or_an_index(answers, value, expected, target) -> None:
    row = {"question": "a", "label": value}
    task = task_with(doc_to_choice=answers, doc_to_target=target)
    if isinstance(expected, int):
        assert render(task, row, kind="causal").target == expected
    elif target != "label" and str(value) in answers:  # rendered, it is that text
        assert render(task, row, kind="causal").target == answers.index(str(value))
    else:
        with pytest.raises(DataError, match=re.escape(expected)):
            render(task, row, kind="causal")
    named = task_with(doc_to_choice=["true", "false"], doc_to_target="{{ label | string | lower }}")
    assert render(named, row, kind="causal").target == int(not value)
