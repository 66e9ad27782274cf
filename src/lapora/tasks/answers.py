"""The token of each answer: the one that the tokenizer appends when the answer follows the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lapora.errors import DataError
from lapora.tasks.prompts import PromptEncoder
from lapora.tasks.quoting import quoted

_TAIL = 200


def answer_token_ids(
    tokenizer: Any,
    prompts: Sequence[str],
    choices: Sequence[str],
    *,
    delimiter: str = " ",
    chat_template: bool = False,
    labels: Sequence[str] | None = None,
) -> list[int]:
    """Vocabulary index of each answer.

    Prompt and prompt with answer are both encoded, and the difference is taken: the answer's token depends
    on what precedes it ("A" and " A" differ), on the tokenizer's kind, and on merges across the boundary.
    Checked on the whole first prompt, and on every distinct last word among the others.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompts: Rendered prompts, at least one, as `render` gives them (not wrapped in a chat template).
        choices: The C answers.
        delimiter: The task's ``target_delimiter``; with a chat template there is none, as the template's
            generation prompt ends the context.
        chat_template: Whether the prompts are wrapped in the tokenizer's chat template.
        labels: The prompts' rows, as an error message names them.

    Returns:
        C distinct token ids.

    Raises:
        DataError: An answer is not one token, or unknown to the tokenizer; two share a token; an answer
            merges with the prompt's end, or is another token after another prompt. The answer is named.
    """
    if not prompts:
        raise DataError("no prompt to find the answers' tokens with; give at least one row")
    encoder = PromptEncoder(tokenizer, delimiter=delimiter, chat_template=chat_template)
    first = _appended_ids(encoder, [encoder.context(prompts[0])], choices)[0]
    ids: list[int] = []
    for choice, appended in zip(choices, first, strict=True):
        ids.append(_single_token(tokenizer, choice, appended, delimiter=encoder.delimiter))
    for position, token in enumerate(ids):
        if token in ids[:position]:
            raise DataError(
                f"the answers {quoted(choices[ids.index(token)])} and {quoted(choices[position])} are the "
                f"same token ({token}) to this tokenizer; choose others in doc_to_choice"
            )
    _check_other_prompts(encoder, prompts, choices, ids, labels)
    return ids


def _check_other_prompts(
    encoder: PromptEncoder,
    prompts: Sequence[str],
    choices: Sequence[str],
    ids: list[int],
    labels: Sequence[str] | None,
) -> None:
    tails: dict[tuple[str, str], int] = {}
    for position in range(1, len(prompts)):
        context, between = encoder.context(prompts[position])
        tails.setdefault((_last_word(context), between), position)
    expected: list[list[int] | None] = [[token] for token in ids]
    for position, found in zip(tails.values(), _appended_ids(encoder, list(tails), choices), strict=True):
        if found == expected:
            continue
        # The last word alone may be encoded otherwise than within its prompt: the prompt itself decides.
        whole = _appended_ids(encoder, [encoder.context(prompts[position])], choices)[0]
        for choice, token, appended in zip(choices, ids, whole, strict=True):
            if appended != [token]:
                where = labels[position] if labels is not None else f"prompt {position}"
                raise DataError(
                    f"{where}: the answer {quoted(choice)} is {_described(appended)} there, but token "
                    f"{token} after the first prompt; end every prompt with the same cue, such as 'Answer:'"
                )


def _appended_ids(
    encoder: PromptEncoder, contexts: Sequence[tuple[str, str]], choices: Sequence[str]
) -> list[list[list[int] | None]]:
    """What each answer appends to each context: its ids, or None where the context's own ids change."""
    texts = [context for context, _ in contexts]
    texts += [context + between + choice for context, between in contexts for choice in choices]
    encoded = encoder.encode(texts)
    appended: list[list[list[int] | None]] = []
    for row in range(len(contexts)):
        before = encoded[row]
        start = len(contexts) + row * len(choices)
        appended.append(
            [
                after[len(before) :] if after[: len(before)] == before else None
                for after in encoded[start : start + len(choices)]
            ]
        )
    return appended


def _single_token(tokenizer: Any, choice: str, appended: list[int] | None, *, delimiter: str) -> int:
    if appended is None:
        raise DataError(
            f"the answer {quoted(choice)} merges with the end of the prompt to this tokenizer (delimiter "
            f"{quoted(delimiter)}); change target_delimiter, or how doc_to_text ends"
        )
    if len(appended) != 1:
        raise DataError(
            f"the answer {quoted(choice)} is {_described(appended)} to this tokenizer, not one; choose "
            "single-token answers in doc_to_choice, such as letters, or change target_delimiter"
        )
    if appended[0] == getattr(tokenizer, "unk_token_id", None):
        raise DataError(f"the answer {quoted(choice)} is unknown to this tokenizer; choose another in doc_to_choice")
    return appended[0]


def _described(appended: list[int] | None) -> str:
    if appended is None:
        return "merged with the prompt's end"
    return f"token {appended[0]}" if len(appended) == 1 else f"{len(appended)} tokens"


def _last_word(text: str) -> str:
    """The end of a text from the white space before its last word on."""
    stripped = text.rstrip()
    start = max(stripped.rfind(" "), stripped.rfind("\n"), 0)
    return text[max(start, len(text) - _TAIL) :]
