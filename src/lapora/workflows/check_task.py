"""``lapora tasks --check``: render and check the first rows of a task before a long run."""

from __future__ import annotations

from typing import Any

from lapora.config import DataSettings
from lapora.models.adapter import fetch_adapter, is_hub_id, read_adapter
from lapora.models.loading import load_tokenizer
from lapora.tasks import check_task
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
    """
    adapter = read_adapter(fetch_adapter(adapter_path) if is_hub_id(adapter_path) else adapter_path)
    task, rows, _ = read_rows(data, None, "train")
    check_head(task, adapter.head)
    tokenizer = load_tokenizer(adapter, base_model)
    return check_task(
        task, rows, kind=adapter.kind, tokenizer=tokenizer, max_length=max_length, chat_template=chat_template
    )
