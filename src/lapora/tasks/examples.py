"""From a row to an example: the text a model reads, its answers, and the right one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lapora.errors import DataError
from lapora.tasks.task import Task
from lapora.tasks.templates import fields_of, render_text, render_value

Labels = Literal["required", "optional", "ignore"]


@dataclass(frozen=True)
class Example:
    """One row, rendered.

    Attributes:
        index: Number of the row among those read, from 0.
        id: The row's own ``id``, handed through.
        row: The row, or None for a ready text.
        texts: The prompt of a causal model, or the one or two texts of a classifier.
        target: Index of the right answer, or None where the row has no label.
    """

    index: int
    id: Any
    row: dict[str, Any] | None
    texts: tuple[str, ...]
    target: int | None


def templates_of(task: Task, kind: str) -> list[str]:
    """The templates that a kind of model reads.

    Raises:
        DataError: The task does not serve that kind of model.
    """
    if kind == "causal":
        if not task.doc_to_text:
            raise DataError(f"task {task.task} has no doc_to_text, which a causal language model needs")
        return [_as_template(task.doc_to_text)]
    if not task.doc_to_inputs:
        raise DataError(f"task {task.task} has no doc_to_inputs, which a sequence classifier needs")
    return [_as_template(source) for source in task.doc_to_inputs]


def _as_template(source: str) -> str:
    """A bare field name, as the harness allows, stands for that field."""
    return "{{" + source + "}}" if source.isidentifier() else source


def resolve_choices(task: Task, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The answers, which must be the same for every row.

    Raises:
        DataError: They differ between rows, or are fewer than two; the row is named.
    """
    if isinstance(task.doc_to_choice, list):
        return tuple(task.doc_to_choice)
    first: tuple[str, ...] | None = None
    for index, row in enumerate(rows):
        value = render_value(_as_template(task.doc_to_choice), row, f"row {index}")
        if not isinstance(value, list | tuple) or len(value) < 2:
            raise DataError(f"row {index}: doc_to_choice yields {value!r}, not a list of two answers or more")
        choices = tuple(str(item) for item in value)
        if first is not None and choices != first:
            raise DataError(f"row {index}: its answers {choices} are not those of row 0, {first}; see keep_if")
        first = choices
    if first is None:
        raise DataError("no rows to read the answers from")
    return first


def render(
    task: Task,
    row: Mapping[str, Any],
    *,
    kind: str,
    index: int,
    choices: Sequence[str],
    labels: Labels = "ignore",
) -> Example:
    """Render one row.

    A row that lacks the task's fields but has ``text`` is a ready prompt.

    Raises:
        DataError: A field is missing, or the label is none of the answers; the row is named.
    """
    where = f"row {index}"
    sources = templates_of(task, kind)
    needed = set().union(*(fields_of(source) for source in sources))
    missing = sorted(needed - row.keys())
    if missing and not isinstance(row.get("text"), str):
        raise DataError(f"{where}: the field {', '.join(missing)} is missing (task {task.task})")
    if missing:
        return Example(index, row.get("id"), None, (row["text"],), None)
    texts = tuple(render_text(source, row, where) for source in sources)
    target = None if labels == "ignore" else _target(task, row, where, choices, labels)
    return Example(index, row.get("id"), dict(row), texts, target)


def render_all(
    task: Task, rows: Sequence[Mapping[str, Any]], *, kind: str, choices: Sequence[str], labels: Labels
) -> list[Example]:
    """Render every row; see :func:`render`."""
    return [render(task, row, kind=kind, index=index, choices=choices, labels=labels) for index, row in enumerate(rows)]


def _target(task: Task, row: Mapping[str, Any], where: str, choices: Sequence[str], labels: Labels) -> int | None:
    source = task.doc_to_target
    template = _as_template(str(source)) if source is not None else ""
    missing = sorted(fields_of(template) - row.keys()) if source is not None else ["doc_to_target"]
    if missing:
        if labels == "optional":
            return None
        raise DataError(f"{where}: no label: {', '.join(missing)} is missing (task {task.task})")
    text = render_text(template, row, where).strip()
    if text in choices:
        return list(choices).index(text)
    if text.lstrip("-").isdigit() and 0 <= int(text) < len(choices):
        return int(text)
    if labels == "optional" and text in ("-1", "None", ""):
        return None
    raise DataError(f"{where}: the label {text!r} is neither an answer {tuple(choices)} nor an index into them")


def data_fingerprint(examples: Sequence[Example], choices: Sequence[str]) -> str:
    """SHA-256 over what a model is shown and told: texts, targets and answers, in order."""
    content = [list(choices), [[list(example.texts), example.target] for example in examples]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
