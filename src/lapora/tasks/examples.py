"""Render rows to prompts or input texts, answer choices and labels."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lapora.errors import DataError, listed, quoted
from lapora.tasks.preferences import texts_of
from lapora.tasks.rows import Row, keeps
from lapora.tasks.targets import Target, labels_of, numbers_of
from lapora.tasks.task import Task, TaskKind, checked_choices, kind_of
from lapora.tasks.templates import CompiledTemplate, compiled_template

Labels = Literal["required", "optional", "ignore"]


@dataclass(frozen=True)
class Example:
    """One row, rendered.

    Attributes:
        task: The task that rendered it.
        index: The row's number in its source, from 0.
        id: The row's own ``id``, passed through.
        row: The row's values by field name.
        text: Prompt, for a causal model.
        inputs: One or two input texts, for a sequence classifier; of a preference, the better text first.
        choices: The C answers.
        target: Index of the right answer, or the numbers of the outputs; None without a label.
        continuation: Text behind the answer that is scored in its place, or None.
        ready: Whether the row contains a ready prompt (``text``, or ``prompt``) instead of the task's fields.
        given: Whether it contains its answers, too (``prompt`` and ``answers``).
        messages: Whether the inputs are lists of chat messages, as JSON.
        where: Name of the row in error messages.
    """

    task: Task = field(repr=False)
    index: int
    id: Any
    row: Mapping[str, Any] = field(repr=False)
    text: str | None
    inputs: tuple[str, ...] | None
    choices: tuple[str, ...]
    target: Target | None
    continuation: str | None = None
    ready: bool = False
    given: bool = False
    where: str = ""
    messages: bool = False


def required_fields(task: Task, kind: TaskKind) -> tuple[str, ...]:
    """Return the fields that a row must have for a kind of model, sorted, without the label."""
    names: set[str] = set()
    for template in task.prompt_templates(kind):
        names |= template.fields
    if kind == "causal" and task.doc_to_continuation is not None:
        names |= compiled_template(task.doc_to_continuation).fields
    return tuple(sorted(names))


def prompt_of(task: Task, values: Mapping[str, Any], where: str) -> str:
    """Render the prompt of a row for a causal model."""
    texts = [template.text(values, where) for template in task.prompt_templates("causal")]
    if not task.gen_prefix:
        return "".join(texts)
    *prompt, prefix = texts
    text = "".join(prompt)
    apart = bool(prefix) and bool(prompt[-1]) and not (prompt[-1][-1].isspace() or prefix[0].isspace())
    return text + (task.target_delimiter if apart else "") + prefix


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

    A row with a ``text`` and nothing else (but an ``id``) is a ready prompt, used unchanged. For a causal model a row
    with a ``prompt`` and ``answers`` and nothing else is a ready prompt with answers of its own.

    Args:
        task: The task.
        row: The row.
        kind: Kind of model.
        index: Row number; by default the row's own, or 0.
        require_target: Whether a row without a label is an error; the same as ``labels="required"``.
        labels: ``required``, ``optional`` (None without a label) or ``ignore`` (not read).
        num_choices: Number of answers of the model.
        choices: The recorded answers: a row's own answers must equal them, and a row without any gets them. Empty or
            None: each row has its own.
        where: Name of the row in error messages; by default ``row INDEX``.

    Raises:
        DataError: A field is missing, ``keep_if`` excludes the row, its label is unknown, or its answers differ.
    """
    values = row.values if isinstance(row, Row) else row
    number = index if index is not None else row.index if isinstance(row, Row) else 0
    where = where or (row.where if isinstance(row, Row) and index is None else f"row {number}")
    labels = labels or ("required" if require_target else "optional")
    if task.likelihood == "preference":
        task.prompt_templates(kind)  # raises for other kinds of model
        return _render_preference(task, values, number, labels, where)
    needed = required_fields(task, kind)
    missing = [name for name in needed if values.get(name) is None]
    # A row with other fields lacks one of the task's: without the template it would be another prompt.
    others = [name for name, value in values.items() if value is not None and name not in _BESIDE_A_READY_PROMPT]
    if kind == "causal" and set(others) == {"prompt", "answers"} and (missing or not needed):
        return _given(task, values, number, where)
    ready = bool(missing) and not others and isinstance(values.get("text"), str)
    if missing and not ready:
        raise _missing_value(task, values, missing, needed, kind, where)
    if ready:
        texts: tuple[str, ...] = (values["text"],)
    else:
        if _is_excluded(task, values, where):
            raise DataError(f"{where}: excluded by keep_if {quoted(task.keep_if)} of task {quoted(task.task)}")
        if kind == "causal":
            texts = (prompt_of(task, values, where),)
        else:
            texts = tuple(template.text(values, where) for template in task.prompt_templates(kind))
    if kind == "classifier" or task.doc_to_text:
        _refuse_empty(texts, where)
    answers = _choices_of(task, values, where, tuple(choices) if choices else None)
    continuation = None
    if kind == "causal" and task.doc_to_continuation is not None:
        continuation = compiled_template(task.doc_to_continuation).text(values, where)
        if not continuation.strip():
            raise DataError(f"{where}: doc_to_continuation is empty; check the row's fields")
    _require_text((*texts, *answers, continuation or ""), where)
    if num_choices is not None and num_choices != len(answers):
        raise DataError(
            f"task {quoted(task.task)} has {len(answers)} answers ({listed(answers)}), but the model has "
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
        continuation=continuation,
        ready=ready,
        where=where,
    )


def _missing_value(
    task: Task, values: Mapping[str, Any], missing: Sequence[str], needed: Sequence[str], kind: TaskKind, where: str
) -> DataError:
    """Return the error of a row without a value of a field of the task's."""
    null = [name for name in missing if name in values]
    found = f"{listed(null)} {'is' if len(null) == 1 else 'are'} null; " if null else ""
    ready = 'or give a ready prompt as "text" in a row without other fields'
    if "text" in needed:  # is a field of the task itself
        ready = 'or give a ready prompt as {"prompt": ..., "answers": [...]}' if kind == "causal" else ""
    if set(values) == {"data"} and isinstance(values["data"], list):
        ready = "or give the list of rows alone, in a file whose name ends in .json"
    return DataError(
        f"{where}: no value for {listed(missing)}, required by task {quoted(task.task)}; "
        + (found or f"the row has {listed([str(name) for name in values]) or 'no fields'}; ")
        + ", ".join(part for part in ("give a value" if null else "add the field", ready) if part)
    )


def _given(task: Task, values: Mapping[str, Any], number: int, where: str) -> Example:
    """Return the example of a row with a prompt and answers of its own."""
    prompt, answers = values["prompt"], values["answers"]
    if not isinstance(prompt, str):
        raise DataError(f"{where}: its prompt is {kind_of(prompt)}, not text")
    if not isinstance(answers, (list, tuple)):
        raise DataError(f"{where}: its answers are {kind_of(answers)}, not a list of texts")
    try:
        choices = checked_choices(answers)
    except DataError as error:
        raise DataError(f"{where}: answers: {error}") from None
    _require_text((prompt, *choices), where)
    return Example(task, number, values.get("id"), values, prompt, None, choices, None, None, True, True, where)


def _refuse_empty(texts: Sequence[str], where: str) -> None:
    if not any(text.strip() for text in texts):
        raise DataError(f"{where}: the rendered text is empty; check the row's fields")


def _require_text(texts: Iterable[str], where: str) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # valid in JSON, but not for a tokenizer
            raise DataError(
                f"{where}: character {error.start} of the text is an unpaired surrogate; remove it"
            ) from None


def _render_preference(task: Task, values: Mapping[str, Any], index: int, labels: Labels, where: str) -> Example:
    if _is_excluded(task, values, where):
        raise DataError(f"{where}: excluded by keep_if {quoted(task.keep_if)} of task {quoted(task.task)}")
    texts, messages = texts_of(task, values, where)
    if labels != "ignore" and len(texts) < 2:
        raise DataError(f"{where}: one text, and likelihood preference is fitted and scored on pairs; give two")
    _refuse_empty(texts, where)
    _require_text(texts, where)
    return Example(
        task=task,
        index=index,
        id=values.get("id"),
        row=values,
        text=None,
        inputs=texts,
        choices=resolve_choices(task),
        target=None if labels == "ignore" else 0,
        ready=len(texts) < 2,
        where=where,
        messages=messages,
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
    """Render rows; the arguments are those of :func:`render`.

    Without ``choices`` all rows must have the answers of the first one; with empty ``choices`` each has its own.

    Raises:
        DataError: As `render`, or the answers of a row differ from those of the first row.
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
        # The answers of the first row are required of all others.
        choices = example.choices if choices is None else choices
        examples.append(example)
    return examples


def resolve_choices(
    task: Task, rows: Iterable[Row | Mapping[str, Any]] = (), *, kind: TaskKind = "classifier"
) -> tuple[str, ...]:
    """Return the task's answers; none for a causal model if a template returns other ones for some rows.

    Raises:
        DataError: The answers of a row differ from those of the first row, for a classifier; or there are no rows.
    """
    if isinstance(task.doc_to_choice, tuple):
        return task.doc_to_choice
    answers: tuple[str, ...] | None = None
    for position, row in enumerate(rows):
        values = row.values if isinstance(row, Row) else row
        where = row.where if isinstance(row, Row) else f"row {position}"
        found = _choices_of(task, values, where, answers, may_differ=kind == "causal")
        if answers is not None and found != answers:
            return ()
        answers = found
    if answers is None:
        raise DataError(f"task {quoted(task.task)}: its answers are read from rows; give at least one row")
    return answers


def data_fingerprint(examples: Iterable[Example]) -> str:
    """Compute the SHA-256 of the examples' prompts, inputs, answers and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        content = [example.text, example.inputs, example.choices, example.target]
        content += [] if example.continuation is None else [example.continuation]
        digest.update(json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode("ascii"))
        digest.update(b"\n")
    return digest.hexdigest()


def _is_excluded(task: Task, values: Mapping[str, Any], where: str) -> bool:
    """Return whether ``keep_if`` excludes the row; False if the row lacks its fields."""
    if task.keep_if is None or not compiled_template(task.keep_if).fields <= set(values):
        return False
    return not keeps(task, values, where)


def _choices_of(
    task: Task,
    values: Mapping[str, Any],
    where: str,
    expected: tuple[str, ...] | None,
    *,
    may_differ: bool = False,
) -> tuple[str, ...]:
    if isinstance(task.doc_to_choice, tuple):
        answers = task.doc_to_choice
    else:
        template = compiled_template(task.doc_to_choice)
        missing = sorted(name for name in template.fields if values.get(name) is None)
        if missing and expected is not None:
            return expected
        if missing:
            raise DataError(
                f"{where}: no value for {listed(missing)}, from which doc_to_choice of task {quoted(task.task)} takes "
                'the answers; add the field, or write the answers as a list, as in ["no", "yes"]'
            )
        answers = _evaluated_choices(template, values, where)
    if expected is not None and answers != expected and not may_differ:
        raise DataError(
            f"{where}: its answers are {listed(answers)}, not {listed(expected)}; all rows must have the same "
            "answers: fix doc_to_choice, or exclude such rows with keep_if"
        )
    return answers


def _evaluated_choices(template: CompiledTemplate, values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    answers = template.value(values, where)
    if isinstance(answers, str):
        try:  # lm-evaluation-harness parses the rendered text as a Python literal
            answers = ast.literal_eval(answers.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise DataError(f"{where}: doc_to_choice returned {quoted(answers)}, which is not a list") from None
    if isinstance(answers, Mapping):
        answers = list(answers.values())
    if not isinstance(answers, (list, tuple)):
        raise DataError(f"{where}: doc_to_choice returned {quoted(answers)}, which is not a list")
    try:
        return checked_choices(answers)
    except DataError as error:
        raise DataError(f"{where}: doc_to_choice: {error}") from None


_BESIDE_A_READY_PROMPT = ("text", "id", "adapter", "task")
_NO_LABEL = (None, "")
_IS_FIELD = re.compile(r"\s*(\{\{\s*\w+\s*\}\}|\w+)\s*")
_IS_TEXT = re.compile(r"\|\s*string\b")


def missing_label_fields(task: Task, rows: Iterable[Row | Mapping[str, Any]]) -> list[str]:
    """Return the fields of ``doc_to_target`` that no row has."""
    if not isinstance(task.doc_to_target, str):
        return []
    wanted = set(compiled_template(task.doc_to_target).fields)
    for row in rows:
        wanted -= set(row.values if isinstance(row, Row) else row)
        if not wanted:
            break
    return sorted(wanted)


def refuse_missing_labels(task: Task, rows: Sequence[Row | Mapping[str, Any]]) -> None:
    """Check that some row has the fields that labels are read from.

    Raises:
        DataError: No row has a field of ``doc_to_target``.
    """
    if missing := missing_label_fields(task, rows):
        first = rows[0].values if isinstance(rows[0], Row) else rows[0]
        raise DataError(
            f"doc_to_target of task {quoted(task.task)}: no row has {listed(missing)}; the first row has "
            f"{listed(list(first))}; name the field with the label, or give --unlabelled for rows without labels"
        )


def label_source(task: Task) -> str:
    """Return where the task reads labels from, for error messages."""
    if task.doc_to_target is None:
        return f"task {quoted(task.task)} has no doc_to_target"
    template = compiled_template(str(task.doc_to_target))
    return f"it is read from {listed(sorted(template.fields | template.optional_fields))}"


def target_of(task: Task, values: Mapping[str, Any], answers: tuple[str, ...], where: str) -> Target | None:
    """Return the index of the right answer, or the numbers of the outputs; None if the row has no label.

    Raises:
        DataError: The label is not one of the answers, or not a number.
    """
    if task.likelihood == "preference":
        return 0  # the first text is the better one
    if task.doc_to_target is None:
        return None
    if task.likelihood in ("gaussian", "multilabel"):
        template = compiled_template(str(task.doc_to_target))
        if any(values.get(name) in _NO_LABEL for name in template.fields):
            return None
        parse = numbers_of if task.likelihood == "gaussian" else labels_of
        return parse(template.value(values, where), answers, where)
    if isinstance(task.doc_to_target, int):
        return _index(task.doc_to_target, answers, where)
    template = compiled_template(task.doc_to_target)
    if template.fields and any(values.get(name) in _NO_LABEL for name in template.fields):
        return None
    result = template.value(values, where)
    if isinstance(result, bool):
        # Rendered, it is the text True or False; a bare field is 0 or 1, as in lm-evaluation-harness.
        if not template.is_field and str(result) in answers:
            return answers.index(str(result))
        return _index_of_boolean(result, answers, where)
    if isinstance(result, float) and result.is_integer():
        result = int(result)
    if isinstance(result, int):
        if result == -1:
            return None
        return (
            _index_of_number(result, answers, where)
            if _IS_FIELD.fullmatch(template.source)
            else _index(result, answers, where)
        )
    if isinstance(result, str):
        return _index_of_text(
            result, answers, where, rendered=not (template.is_field or _IS_TEXT.search(str(task.doc_to_target)))
        )
    if result is None:
        return None
    raise _unknown_label(result, answers, where)


def _index_of_boolean(value: bool, answers: tuple[str, ...], where: str) -> int:
    """Return 0 or 1; if answers are called true or false, in any case, the index must be that of the value's name."""
    words = [answer.strip().casefold() for answer in answers]
    name = str(value).casefold()
    if name in words and words.index(name) != int(value):
        case = "" if (answer := answers[words.index(name)]) == str(value) else f" | {_CASES.get(answer, 'lower')}"
        raise DataError(
            f"{where}: label {value} is ambiguous: it is an answer and the index of another one; use `| string{case}` "
            "in doc_to_target for the answer, or `| int` for the index"
        )
    if name not in words and str(not value).casefold() in words:
        raise _unknown_label(value, answers, where)
    return _index(int(value), answers, where)


_CASES = {"TRUE": "upper", "FALSE": "upper"}


def _index(number: int, answers: tuple[str, ...], where: str) -> int:
    if not 0 <= number < len(answers):
        raise _unknown_label(number, answers, where)
    return number


def _index_of_number(number: int, answers: tuple[str, ...], where: str) -> int:
    """Return the answer whose text a number is, else the answer whose index it is."""
    if str(number) not in answers:
        return _index(number, answers, where)
    position = answers.index(str(number))
    # Answers such as 1, 2, 5, 9 number nothing, so that labels are their texts.
    are_numbering = all(int(answer) <= len(answers) for answer in answers if answer.isdecimal())
    if number != position and number < len(answers) and are_numbering:
        raise DataError(
            f"{where}: label {number} is ambiguous: it is an answer and the index of another one; use `| string` in "
            "doc_to_target for the answer, or `| int` for the index"
        )
    return position


def _index_of_text(text: str, answers: tuple[str, ...], where: str, *, rendered: bool) -> int | None:
    text = text if text in answers else text.strip()
    if text in ("", "-1"):
        return None
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
    if text in answers:
        position = answers.index(text)
        if rendered and number is not None and number != position:
            # lm-evaluation-harness reads digits as an index, but the task's author may mean the answer's text.
            raise DataError(
                f"{where}: label {quoted(text)} is ambiguous: it is an answer and the index of another one; set "
                "doc_to_target to the field's bare name, or use `| string`, for the answer, or `| int` for the index"
            )
        return position
    if number is not None:
        return _index(number, answers, where)
    raise _unknown_label(text, answers, where)


def _unknown_label(label: object, answers: tuple[str, ...], where: str) -> DataError:
    return DataError(
        f"{where}: unknown label {quoted(label)}; the {len(answers)} answers are {listed(answers)} (or an index "
        "from 0); fix the row, or the task's doc_to_target"
    )
