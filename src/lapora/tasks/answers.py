"""Which token stands for each answer of a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lapora.errors import DataError
from lapora.tasks.encoding import prompt_ids

_TAIL = 24


def answer_token_ids(tokenizer: Any, prompts: Sequence[str], choices: Sequence[str], *, delimiter: str) -> list[int]:
    """The token that the tokenizer appends when an answer follows the prompt.

    Found by encoding the prompt with and without the answer and taking the difference; checked in full on
    the first prompt, and on every other ending among the rest.

    Raises:
        DataError: An answer is not one token, two share one, or prompts disagree; the answer is named.
    """
    ids = [_appended(tokenizer, prompts[0], delimiter, choice) for choice in choices]
    for first in range(len(choices)):
        for second in range(first + 1, len(choices)):
            if ids[first] == ids[second]:
                raise DataError(
                    f"answers {choices[first]!r} and {choices[second]!r} are the same token to this tokenizer; "
                    "choose answers that begin differently"
                )
    for tail in {prompt[-_TAIL:] for prompt in prompts[1:]}:
        for choice, expected in zip(choices, ids, strict=True):
            if _appended(tokenizer, tail, delimiter, choice) != expected:
                raise DataError(f"answer {choice!r} is another token after {tail!r} than after the first prompt")
    return ids


def _appended(tokenizer: Any, prompt: str, delimiter: str, choice: str) -> int:
    before = prompt_ids(tokenizer, prompt)
    after = prompt_ids(tokenizer, prompt + delimiter + choice)
    if after[: len(before)] != before:
        raise DataError(f"answer {choice!r} merges with the end of the prompt; set the task's target_delimiter")
    added = after[len(before) :]
    if len(added) != 1:
        raise DataError(
            f"answer {choice!r} is {len(added)} tokens to this tokenizer; lapora scores answers of one token"
        )
    return added[0]
