"""From examples to token ids, cutting the task's ``truncate_field`` and never the cue at a prompt's end."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lapora.errors import DataError
from lapora.tasks.examples import Example
from lapora.tasks.prompts import PromptEncoder
from lapora.tasks.quoting import quoted
from lapora.tasks.task import Task, TaskKind

_BATCH = 1000
# Tokens below the greatest length at which no more of a text is tried to be kept.
_SLACK = 2


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example.

    Attributes:
        input_ids: T ids, special tokens included, without padding.
        token_type_ids: T segment ids, where the tokenizer gives them.
        truncated: Whether anything was cut to fit.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    truncated: bool


def encode(
    example: Example,
    tokenizer: Any,
    *,
    kind: TaskKind,
    max_length: int,
    task: Task,
    chat_template: bool = False,
) -> EncodedExample:
    """`encode_all` of one example."""
    return encode_all([example], tokenizer, kind=kind, max_length=max_length, task=task, chat_template=chat_template)[0]


def encode_all(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    kind: TaskKind,
    max_length: int,
    task: Task,
    chat_template: bool = False,
) -> list[EncodedExample]:
    """Encode examples, in their order.

    Args:
        examples: Rendered for this kind of model.
        tokenizer: A Hugging Face tokenizer.
        kind: The kind of model.
        max_length: Most tokens of a row, special tokens included.
        task: Says which field may be cut, and the delimiter.
        chat_template: Wrap prompts in the tokenizer's chat template (causal models only).

    Raises:
        DataError: A row is too long and what may be cut is not enough; the row and its length are named.
    """
    if kind == "causal":
        return _encode_prompts(examples, tokenizer, max_length, task, chat_template)
    if chat_template:
        raise DataError("--chat-template is for causal models; a sequence classifier reads plain text")
    encoded: list[EncodedExample | None] = [None] * len(examples)
    for count in (1, 2):
        positions = [index for index, example in enumerate(examples) if len(example.inputs or ()) == count]
        for start in range(0, len(positions), _BATCH):
            part = positions[start : start + _BATCH]
            results = _encode_inputs([examples[index] for index in part], tokenizer, max_length, task)
            for index, result in zip(part, results, strict=True):
                encoded[index] = result
    return cast(list[EncodedExample], encoded)


def _encode_prompts(
    examples: Sequence[Example], tokenizer: Any, max_length: int, task: Task, chat_template: bool
) -> list[EncodedExample]:
    encoder = PromptEncoder(tokenizer, delimiter=task.target_delimiter, chat_template=chat_template)
    encoded: list[EncodedExample] = []
    all_ids = encoder.batch([cast(str, example.text) for example in examples])
    for example, ids in zip(examples, all_ids, strict=True):
        truncated = len(ids) > max_length
        if truncated:
            ids = _shortened(example, ids, encoder, max_length, task)
        if not ids:
            raise DataError(f"{example.where}: its prompt has no tokens")
        encoded.append(EncodedExample(ids, None, truncated))
    return encoded


def _shortened(example: Example, ids: list[int], encoder: PromptEncoder, max_length: int, task: Task) -> list[int]:
    """Ids of the prompt with less in it, at most ``max_length`` of them."""
    too_long = f"{example.where}: its prompt has {len(ids)} tokens, more than the {max_length} of --max-length"
    if example.ready:
        # Of a ready prompt only the end is known to matter.
        text = cast(str, example.text)
        before, _ = encoder.frame(encoder.context(text)[0])
        if not encoder.chat_template:
            if before >= max_length:
                raise DataError(f"{too_long}; raise it")
            return ids[:before] + ids[len(ids) - (max_length - before) :]
        starts = [0, *(end for _, end in _spans(encoder.tokenizer, text))]
        shorter = _fitting(ids, len(starts) - 1, max_length, lambda kept: encoder.ids(text[starts[-1 - kept] :]))
        if shorter is None:
            raise DataError(f"{too_long}, and the chat template alone fills it; raise it")
        return shorter
    name = task.truncate_field
    if name is None:
        raise DataError(f"{too_long}; raise it, or name the field that may be cut as the task's truncate_field")
    value = example.row.get(name)
    if not isinstance(value, str):
        raise DataError(f"{too_long}, and its {quoted(name)} is no text that could be cut; raise it")
    template = task.prompt_templates("causal")[0]
    ends = [0, *(end for _, end in _spans(encoder.tokenizer, value))]

    def with_tokens(kept: int) -> list[int]:
        return encoder.ids(template.text({**example.row, name: value[: ends[kept]]}, example.where))

    shorter = _fitting(ids, len(ends) - 1, max_length, with_tokens)
    if shorter is None:
        raise DataError(f"{too_long}, even without its {quoted(name)}; raise it")
    return shorter


def _fitting(ids: list[int], tokens: int, max_length: int, with_tokens: Callable[[int], list[int]]) -> list[int] | None:
    """The ids with as many of a text's tokens as fit, or None where even none is too many.

    Args:
        ids: Too many ids, those with the whole text.
        tokens: How many tokens the whole text has by itself.
        max_length: How many ids fit.
        with_tokens: The ids with so many of the text's tokens.
    """
    best: list[int] | None = None
    fits, too_many, length = -1, tokens, len(ids)
    kept = tokens
    for attempt in range(64):
        # A template that uses the text once makes the first guess right. One that uses it twice, or changes
        # it, does not: after a few guesses, halve what lies between.
        kept += max_length - length if attempt < 4 else (fits + too_many) // 2 - kept
        kept = min(max(kept, fits + 1), too_many - 1)
        if kept <= fits or kept >= too_many:
            break
        shorter = with_tokens(kept)
        length = len(shorter)
        if length > max_length:
            too_many = kept
            continue
        fits, best = kept, shorter
        if max_length - length <= _SLACK:
            break
    return best


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where the text's tokens begin and end, in characters; its words, for a tokenizer that cannot say."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [(start, end) for start, end in encoded["offset_mapping"] if end > start]
    return [match.span() for match in re.finditer(r"\s*\S+", text)]


def _encode_inputs(examples: Sequence[Example], tokenizer: Any, max_length: int, task: Task) -> list[EncodedExample]:
    """Encode examples that all have one text, or all have two."""
    columns = [list(column) for column in zip(*(example.inputs or () for example in examples), strict=True)]
    whole = tokenizer(*columns, padding=False, truncation=False, return_attention_mask=False, verbose=False)
    types = whole.get("token_type_ids")
    encoded = []
    for index, example in enumerate(examples):
        ids = list(whole["input_ids"][index])
        segments = None if types is None else list(types[index])
        truncated = len(ids) > max_length
        if truncated:
            ids, segments = _truncated(example, len(ids), tokenizer, max_length, task)
        if not ids:
            raise DataError(f"{example.where}: its text has no tokens")
        encoded.append(EncodedExample(ids, segments, truncated))
    return encoded


def _truncated(
    example: Example, length: int, tokenizer: Any, max_length: int, task: Task
) -> tuple[list[int], list[int] | None]:
    texts = example.inputs or ()
    too_long = f"{example.where}: it has {length} tokens, more than the {max_length} of --max-length"
    strategy = "longest_first"
    cut = None if example.ready else _position_of_cut(task)
    reserved = tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
    if cut is not None and len(texts) == 2:
        strategy = ("only_first", "only_second")[cut]
        reserved += len(tokenizer(texts[1 - cut], add_special_tokens=False, verbose=False)["input_ids"])
    if reserved >= max_length:
        raise DataError(f"{too_long}, and {reserved} of them cannot be cut; raise it")
    encoded = tokenizer(*texts, truncation=strategy, max_length=max_length, return_attention_mask=False, verbose=False)
    types = encoded.get("token_type_ids")
    return list(encoded["input_ids"]), None if types is None else list(types)


def _position_of_cut(task: Task) -> int | None:
    """Which of the two texts is the ``truncate_field`` and nothing else."""
    name = task.truncate_field
    if name is None:
        return None
    exact = re.compile(r"\{\{[-+]?\s*" + re.escape(name) + r"\s*[-+]?\}\}")
    matching = [
        position
        for position, source in enumerate(task.doc_to_inputs or ())
        if source == name or exact.fullmatch(source.strip())
    ]
    return matching[0] if len(matching) == 1 else None
