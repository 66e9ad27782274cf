"""``lapora tasks --check``: render and check the first rows of a task before a long run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lapora.config import DataSettings
from lapora.errors import DataError, LaporaWarning, listed
from lapora.models.adapter import fetch_adapter, is_hub_id, read_adapter
from lapora.models.loading import load_tokenizer
from lapora.tasks import Row, Task, check_task
from lapora.tasks.examples import label_source, refuse_missing_labels
from lapora.workflows.contradictions import check_head
from lapora.workflows.rows import read_rows


def check(
    adapter_path: str,
    data: DataSettings,
    *,
    base_model: str | None = None,
    max_length: int | None = None,
    chat_template: bool = False,
) -> dict[str, Any]:
    """Render the first rows, find the answer tokens, count the labels.

    Args:
        adapter_path: The adapter's folder or Hub id.
        data: Task and rows.
        base_model: Base model with the tokenizer, if not the one in the adapter's configuration.
        max_length: Maximum number of tokens of a row; None is the task's.
        chat_template: Wrap prompts in the tokenizer's chat template.

    Returns:
        See :func:`lapora.tasks.check_task`.

    Warns:
        LaporaWarning: Rows have no labels, or an answer is no row's label.
    """
    adapter = read_adapter(fetch_adapter(adapter_path) if is_hub_id(adapter_path) else adapter_path)
    task, rows, _ = read_rows(data, None, "train")
    check_head(task, adapter.head)
    tokenizer = load_tokenizer(adapter, base_model)
    found = check_task(
        task, rows, kind=adapter.kind, tokenizer=tokenizer, max_length=max_length, chat_template=chat_template
    )
    for warning in _warnings(task, rows, found):
        warnings.warn(warning, LaporaWarning, stacklevel=2)
    return found


def _warnings(task: Task, rows: Sequence[Row], found: Mapping[str, Any]) -> list[str]:
    """Return what ``fit`` would refuse or a user would not expect about the labels."""
    count, unlabelled = found["rows"], found["unlabelled"]
    if unlabelled == count:
        try:
            refuse_missing_labels(task, rows)
        except DataError as error:
            return [str(error)]
        return [f"no row has a label ({label_source(task)})"]
    if unlabelled:
        return [f"{unlabelled} of {count} rows have no label ({label_source(task)}), which fit refuses"]
    if absent := [answer for answer, rows_with in found["labels"].items() if rows_with == 0]:
        return [f"no row has the label {listed(absent)}"]
    return []
