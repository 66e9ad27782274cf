"""From a row to what a model reads and the right answer."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lapora.errors import DataError, listed, quoted
from lapora.tasks.rows import Row, keeps
from lapora.tasks.task import Task, TaskKind, checked_choices
from lapora.tasks.templates import CompiledTemplate, compiled_template

Labels = Literal["required", "optional", "ignore"]


@dataclass(frozen=True)
class Example:
    """One row, rendered.

    Attributes:
        task: The task that rendered it.
        index: The row's number in its source, from 0.
        id: The row's own ``id``, handed through.
        row: The row's values.
        text: A causal model's prompt.
        inputs: A sequence classifier's one or two texts.
        choices: The answers.
        target: Index of the right answer, or None where it is not known.
        ready: Whether the row was a ready ``text`` rather than the task's fields.
        where: The row, as an error message names it.
    """

    task: Task = field(repr=False)
    index: int
    id: Any
    row: Mapping[str, Any] = field(repr=False)
    text: str | None
    inputs: tuple[str, ...] | None
    choices: tuple[str, ...]
    target: int | None
    ready: bool = False
    where: str = ""


def required_fields(task: Task, kind: TaskKind) -> tuple[str, ...]:
    """Fields that a row must have to be read by a model of this kind, sorted; its label is not among them."""
    names: set[str] = set()
    for template in task.prompt_templates(kind):
        names |= template.fields
    return tuple(sorted(names))


def render(
    task: Task,
    row: Row | Mapping[str, Any],
    *,
    kind: TaskKind,
    index: int | None = None,
    require_target: bool = False,
    labels: Labels | None = None,
    num_choices: int | None = None,
    choices: Sequence[str] | None = None,
    where: str | None = None,
) -> Example:
    """Render one row.

    A row without the task's fields but with a ``text`` is a ready prompt, taken as it is.

    Args:
        task: The task.
        row: The row.
        kind: The kind of model that reads it.
        index: Its number; by default the row's own, or 0.
        require_target: Whether a row without a label is an error; the same as ``labels="required"``.
        labels: ``required``, ``optional`` (None where there is none) or ``ignore`` (not looked at).
        num_choices: How many answers the model has.
        choices: The recorded answers, which a row's own must equal; they stand in where a row yields none.
        where: The row, as an error message names it; by default ``row INDEX``.

    Raises:
        DataError: A missing field, a row that ``keep_if`` leaves out, an unknown label, or other answers.
    """
    values = row.values if isinstance(row, Row) else row
    number = index if index is not None else row.index if isinstance(row, Row) else 0
    where = where or f"row {number}"
    labels = labels or ("required" if require_target else "optional")
    templates = task.prompt_templates(kind)
    needed = required_fields(task, kind)
    lacking = [name for name in needed if values.get(name) is None]
    ready = bool(lacking) and isinstance(values.get("text"), str)
    if lacking and not ready:
        raise DataError(
            f"{where}: no value for {listed(lacking)}, which task {quoted(task.task)} needs; the row has "
            f'{listed([str(name) for name in values]) or "no fields"}; give what lacks, or a ready "text"'
        )
    if ready:
        texts: tuple[str, ...] = (values["text"],)
    else:
        if _left_out(task, values, where):
            raise DataError(f"{where}: task {quoted(task.task)} does not take it: keep_if {quoted(task.keep_if)}")
        texts = tuple(template.text(values, where) for template in templates)
    if not any(text.strip() for text in texts):
        raise DataError(f"{where}: its text is empty; there is nothing to read")
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can write it, a tokenizer cannot read it
            raise DataError(
                f"{where}: character {error.start} of its text is half of a surrogate pair; remove it"
            ) from None
    answers = _choices_of(task, values, where, None if choices is None else tuple(choices))
    if num_choices is not None and num_choices != len(answers):
        raise DataError(
            f"task {quoted(task.task)} has {len(answers)} answers ({listed(answers)}), the model "
            f"{num_choices}; use the task that the adapter was trained on"
        )
    target = None if labels == "ignore" else target_of(task, values, answers, where)
    if target is None and labels == "required":
        raise DataError(f"{where}: no label: {label_source(task)}; give rows with labels")
    return Example(
        task=task,
        index=number,
        id=values.get("id"),
        row=values,
        text=texts[0] if kind == "causal" else None,
        inputs=texts if kind == "classifier" else None,
        choices=answers,
        target=target,
        ready=ready,
        where=where,
    )


def render_all(
    task: Task,
    rows: Iterable[Row | Mapping[str, Any]],
    *,
    kind: TaskKind,
    labels: Labels = "required",
    num_choices: int | None = None,
    choices: Sequence[str] | None = None,
) -> list[Example]:
    """Render rows, all with the same answers.

    Raises:
        DataError: As `render`; or a row's answers are not those of the first.
    """
    examples: list[Example] = []
    for position, row in enumerate(rows):
        example = render(
            task,
            row,
            kind=kind,
            index=None if isinstance(row, Row) else position,
            labels=labels,
            num_choices=num_choices,
            choices=choices,
        )
        # From the first row on, its answers are everyone's: a row with others is refused, by name.
        choices = choices or example.choices
        examples.append(example)
    return examples


def resolve_choices(task: Task, rows: Iterable[Row | Mapping[str, Any]] = ()) -> tuple[str, ...]:
    """The task's answers; where a template yields them, the same for every row.

    Raises:
        DataError: A row's answers differ from the first row's; the row is named.
    """
    if isinstance(task.doc_to_choice, tuple):
        return task.doc_to_choice
    answers: tuple[str, ...] | None = None
    for position, row in enumerate(rows):
        values = row.values if isinstance(row, Row) else row
        number = row.index if isinstance(row, Row) else position
        answers = _choices_of(task, values, f"row {number}", answers)
    if answers is None:
        raise DataError(f"task {quoted(task.task)}: its answers come from the rows, and there is none")
    return answers


def data_fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 of what the examples say and in which order: prompts, inputs, answers and labels."""
    digest = hashlib.sha256()
    for example in examples:
        content = [example.text, example.inputs, example.choices, example.target]
        digest.update(json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode("ascii"))
        digest.update(b"\n")
    return digest.hexdigest()


def _left_out(task: Task, values: Mapping[str, Any], where: str) -> bool:
    """Whether ``keep_if`` leaves the row out, as far as the row's fields tell."""
    if task.keep_if is None or not compiled_template(task.keep_if).fields <= set(values):
        return False
    return not keeps(task, values, where)


def _choices_of(task: Task, values: Mapping[str, Any], where: str, expected: tuple[str, ...] | None) -> tuple[str, ...]:
    if isinstance(task.doc_to_choice, tuple):
        answers = task.doc_to_choice
    else:
        template = compiled_template(task.doc_to_choice)
        if expected is not None and any(values.get(name) is None for name in template.fields):
            return expected
        answers = _evaluated_choices(template, values, where)
    if expected is not None and answers != expected:
        raise DataError(
            f"{where}: its answers are {listed(answers)}, not {listed(expected)}: all rows must have "
            "the same; correct doc_to_choice, or leave such rows out with keep_if"
        )
    return answers


def _evaluated_choices(template: CompiledTemplate, values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    answers = template.value(values, where)
    if isinstance(answers, str):
        try:  # the harness reads the rendered text as a Python literal
            answers = ast.literal_eval(answers.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise DataError(f"{where}: doc_to_choice gives {quoted(answers)}, which is no list") from None
    if isinstance(answers, Mapping):
        answers = list(answers.values())
    if not isinstance(answers, (list, tuple)):
        raise DataError(f"{where}: doc_to_choice gives {quoted(answers)}, which is no list")
    try:
        return checked_choices(answers)
    except DataError as error:
        raise DataError(f"{where}: doc_to_choice: {error}") from None


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
