"""Rows of a preference: two texts of which the first is better, or one text, as TRL's RewardTrainer reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lapora.errors import DataError, first_line, quoted
from lapora.tasks.targets import CHOSEN, PROMPT, REJECTED
from lapora.tasks.task import Task

TEXT = "text"
"""Field of a row with one text."""


def has_pair(task: Task, values: Mapping[str, Any]) -> bool:
    """Return whether a row has two texts, and not only one in the field ``text``."""
    fields = {name for template in task.prompt_templates("classifier") for name in template.fields}
    return not (values.get(TEXT) is not None and any(values.get(name) is None for name in fields))


def texts_of(task: Task, values: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], bool]:
    """Return the texts of a row, and whether they are chat messages, as JSON.

    Templates render the whole text. Without templates a text is ``prompt`` (where the row has one) and ``chosen`` or
    ``rejected``, each a text or a list of chat messages.

    Raises:
        DataError: A field is missing or of another type, or the two texts are equal.
    """
    if not has_pair(task, values):
        return _joined(values, (TEXT,), where)
    if task.doc_to_inputs == (CHOSEN, REJECTED):
        texts, messages = _joined(values, (CHOSEN, REJECTED), where)
    else:
        texts = tuple(template.text(values, where) for template in task.prompt_templates("classifier"))
        messages = False
    if texts[0] == texts[1]:
        raise DataError(f"{where}: the two texts are equal, so neither is better; remove the row")
    return texts, messages


def _joined(values: Mapping[str, Any], names: tuple[str, ...], where: str) -> tuple[tuple[str, ...], bool]:
    parts = [values.get(name) for name in names]
    prompt = values.get(PROMPT)
    kinds = {type(part) for part in [*parts, *([] if prompt is None else [prompt])]}
    if kinds == {str}:
        return tuple(f"{prompt or ''}{part}" for part in parts), False
    if kinds != {list}:
        given = ", ".join(names if prompt is None else (PROMPT, *names))
        missing = [name for name, part in zip(names, parts, strict=True) if part is None]
        if missing:
            raise DataError(f"{where}: no value for {' and '.join(missing)}; give both texts, or one as {TEXT}")
        raise DataError(f"{where}: {given} must all be texts, or all be lists of chat messages")
    return tuple(_as_json([*(prompt or []), *(part or [])], where) for part in parts), True


def _as_json(messages: list[Any], where: str) -> str:
    for message in messages:
        fields = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None,)
        if not all(isinstance(value, str) for value in fields):
            raise DataError(f"{where}: {quoted(message)} is not a chat message with a text as role and as content")
    return json.dumps(messages, ensure_ascii=False)


def token_ids(task: Task, text: str, tokenizer: Any, *, messages: bool, where: str) -> Any:
    """Encode one text of a preference.

    Messages go through the tokenizer's chat template. A text that no template of the task rendered ends with the
    tokenizer's end-of-text token, as in TRL's RewardTrainer.

    Returns:
        What the tokenizer returns for one text.

    Raises:
        DataError: The tokenizer has no chat template, or it fails.
    """
    if messages:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(f"{where}: chat messages, and the tokenizer has no chat template; give texts")
        try:
            text = tokenizer.apply_chat_template(json.loads(text), tokenize=False)
        except Exception as error:  # a template may raise anything
            raise DataError(f"{where}: the tokenizer's chat template fails: {first_line(error)}") from None
    elif task.doc_to_inputs == (CHOSEN, REJECTED) and tokenizer.eos_token and not text.endswith(tokenizer.eos_token):
        text += tokenizer.eos_token
    return tokenizer(
        text,
        add_special_tokens=not messages,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
