"""From texts to token ids, cutting the task's ``truncate_field`` and never the cue at a prompt's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lapora.errors import DataError
from lapora.tasks.examples import Example, templates_of
from lapora.tasks.task import Task
from lapora.tasks.templates import render_text


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example.

    Attributes:
        input_ids: Ids, special tokens included, padding not.
        token_type_ids: Segment ids where the tokenizer gives them.
        truncated: Whether something was cut to fit the greatest length.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    truncated: bool


def encode_all(
    examples: Sequence[Example], tokenizer: Any, *, task: Task, kind: str, max_length: int
) -> list[EncodedExample]:
    """Encode examples.

    Raises:
        DataError: A prompt is too long and the task says nothing that may be cut; the row is named.
    """
    if kind == "causal":
        return [_encode_prompt(example, tokenizer, task, max_length) for example in examples]
    return [_encode_inputs(example, tokenizer, task, max_length) for example in examples]


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a prompt as the tokenizer begins one, without an end-of-text token that it may append."""
    ids = list(tokenizer(text).input_ids)
    bare = list(tokenizer(text, add_special_tokens=False).input_ids)
    while len(ids) > len(bare) and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids.pop()
    return ids


def _encode_prompt(example: Example, tokenizer: Any, task: Task, max_length: int) -> EncodedExample:
    ids = prompt_ids(tokenizer, example.texts[0])
    if len(ids) <= max_length:
        return EncodedExample(ids, None, False)
    if example.row is None:
        return EncodedExample(_keep_end(ids, tokenizer, max_length), None, True)
    field = task.truncate_field
    value = example.row.get(field) if field else None
    if not isinstance(value, str):
        raise DataError(
            f"row {example.index}: its prompt is {len(ids)} tokens long, more than {max_length}; raise --max-length, "
            "or name in the task's truncate_field what may be shortened"
        )
    source = templates_of(task, "causal")[0]
    keep = len(value)
    while keep > 0:
        # Each pass removes about the surplus; four characters a token is a step, not an estimate to rely on.
        keep = max(0, keep - max(1, (len(ids) - max_length) * 2))
        shorter = {**example.row, str(field): value[:keep].rstrip()}
        ids = prompt_ids(tokenizer, render_text(source, shorter, f"row {example.index}"))
        if len(ids) <= max_length:
            return EncodedExample(ids, None, True)
    raise DataError(
        f"row {example.index}: its prompt is {len(ids)} tokens long even without {field}; raise --max-length"
    )


def _keep_end(ids: list[int], tokenizer: Any, max_length: int) -> list[int]:
    start = [ids[0]] if ids[0] == tokenizer.bos_token_id else []
    return start + ids[len(ids) - max_length + len(start) :]


def _encode_inputs(example: Example, tokenizer: Any, task: Task, max_length: int) -> EncodedExample:
    strategy: Any = True
    if task.truncate_field and len(example.texts) == 2 and example.row is not None:
        exact = [source.replace(" ", "") == "{{" + task.truncate_field + "}}" for source in task.doc_to_inputs or []]
        if any(exact):
            strategy = "only_first" if exact[0] else "only_second"
    full = len(tokenizer(*example.texts).input_ids)
    coded = tokenizer(*example.texts, truncation=strategy, max_length=max_length)
    return EncodedExample(
        list(coded["input_ids"]),
        list(coded["token_type_ids"]) if "token_type_ids" in coded else None,
        full > max_length,
    )
