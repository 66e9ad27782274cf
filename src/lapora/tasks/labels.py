"""The label of a row: an index into the answers, or the text of one, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lapora.errors import DataError
from lapora.tasks.quoting import listed, quoted
from lapora.tasks.task import Task
from lapora.tasks.templates import compiled_template

_NO_LABEL = (None, "")


def label_source(task: Task) -> str:
    """Where the task takes a label from, for an error message."""
    if task.doc_to_target is None:
        return f"task {quoted(task.task)} has no doc_to_target"
    template = compiled_template(str(task.doc_to_target))
    return f"it is read from {listed(sorted(template.fields | template.optional_fields))}"


def target_of(task: Task, values: Mapping[str, Any], answers: tuple[str, ...], where: str) -> int | None:
    """Index of the right answer; None where the row has no label.

    Raises:
        DataError: The label is not one of the answers.
    """
    if task.doc_to_target is None:
        return None
    if isinstance(task.doc_to_target, int):
        return _index(task.doc_to_target, answers, where)
    template = compiled_template(task.doc_to_target)
    if template.fields and any(values.get(name) in _NO_LABEL for name in template.fields):
        return None
    result = template.value(values, where)
    if not template.is_field and isinstance(result, bool):
        result = str(result)  # as rendered; a bare boolean field counts as 0 or 1, as in the harness
        if result not in answers:
            result = int(result == "True")
    if isinstance(result, bool):
        return _index(int(result), answers, where)
    if isinstance(result, float) and result.is_integer():
        result = int(result)
    if isinstance(result, int):
        return None if result == -1 else _index(result, answers, where)
    if isinstance(result, str):
        return _index_of_text(result, answers, where, rendered=not template.is_field)
    if result is None:
        return None
    raise _unknown_label(result, answers, where)


def _index(number: int, answers: tuple[str, ...], where: str) -> int:
    if not 0 <= number < len(answers):
        raise _unknown_label(number, answers, where)
    return number


def _index_of_text(text: str, answers: tuple[str, ...], where: str, *, rendered: bool) -> int | None:
    text = text if text in answers else text.strip()
    if text in ("", "-1"):
        return None
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
    if text in answers:
        position = answers.index(text)
        if rendered and number is not None and number != position:
            # The harness takes digits for an index; who wrote the file may have meant the answer's text.
            raise DataError(
                f"{where}: the label {quoted(text)} is an answer, and also an index of another one; write "
                "doc_to_target as a field's bare name for the answer, or with `| int` for the index"
            )
        return position
    if number is not None:
        return _index(number, answers, where)
    raise _unknown_label(text, answers, where)


def _unknown_label(label: object, answers: tuple[str, ...], where: str) -> DataError:
    return DataError(
        f"{where}: unknown label {quoted(label)}: the {len(answers)} answers are {listed(answers)}, by text "
        "or by index from 0; correct the row, or the task's doc_to_target"
    )
