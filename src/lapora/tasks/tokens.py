"""From examples to token ids, cutting the task's ``truncate_field`` and never the cue at a prompt's end."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lapora.errors import DataError, first_line, quoted
from lapora.tasks.examples import Example
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
    example: Example, tokenizer: Any, *, kind: TaskKind, max_length: int, chat_template: bool = False
) -> EncodedExample:
    """Encode one example; see :func:`encode_all`."""
    return encode_all([example], tokenizer, kind=kind, max_length=max_length, chat_template=chat_template)[0]


def encode_all(
    examples: Sequence[Example], tokenizer: Any, *, kind: TaskKind, max_length: int, chat_template: bool = False
) -> list[EncodedExample]:
    """Encode examples, in their order; each is truncated as its own task says.

    Args:
        examples: Examples rendered for this kind of model, of one task or of several.
        tokenizer: A Hugging Face tokenizer.
        kind: The kind of model.
        max_length: Maximum number of tokens of an example, special tokens included.
        chat_template: Wrap prompts in the tokenizer's chat template (causal models only).

    Raises:
        DataError: An example is too long and cannot be truncated enough; the example and its length are named.
    """
    if kind == "classifier" and chat_template:
        raise DataError("--chat-template is for causal models; a sequence classifier reads plain text")
    alike: dict[Any, list[int]] = {}
    for index, example in enumerate(examples):
        key = example.task.target_delimiter if kind == "causal" else len(example.inputs or ())
        alike.setdefault(key, []).append(index)
    encoded: list[EncodedExample | None] = [None] * len(examples)
    for key, positions in alike.items():
        for start in range(0, len(positions), _BATCH):
            part = positions[start : start + _BATCH]
            batch = [examples[index] for index in part]
            if kind == "causal":
                encoder = PromptEncoder(tokenizer, delimiter=key, chat_template=chat_template)
                results = _encode_prompts(batch, encoder, max_length)
            else:
                results = _encode_inputs(batch, tokenizer, max_length)
            for index, result in zip(part, results, strict=True):
                encoded[index] = result
    return cast(list[EncodedExample], encoded)


def _encode_prompts(examples: Sequence[Example], encoder: PromptEncoder, max_length: int) -> list[EncodedExample]:
    encoded: list[EncodedExample] = []
    all_ids = encoder.batch([cast(str, example.text) for example in examples])
    for example, ids in zip(examples, all_ids, strict=True):
        truncated = len(ids) > max_length
        if truncated:
            ids = _shortened(example, ids, encoder, max_length)
        if not ids:
            raise DataError(f"{example.where}: its prompt has no tokens")
        encoded.append(EncodedExample(ids, None, truncated))
    return encoded


def _shortened(example: Example, ids: list[int], encoder: PromptEncoder, max_length: int) -> list[int]:
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
    name = example.task.truncate_field
    if name is None:
        raise DataError(f"{too_long}; raise it, or name the field that may be cut as the task's truncate_field")
    value = example.row.get(name)
    if not isinstance(value, str):
        raise DataError(f"{too_long}, and its {quoted(name)} is no text that could be cut; raise it")
    template = example.task.prompt_templates("causal")[0]
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


def _encode_inputs(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[EncodedExample]:
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
            ids, segments = _truncated(example, len(ids), tokenizer, max_length)
        if not ids:
            raise DataError(f"{example.where}: its text has no tokens")
        encoded.append(EncodedExample(ids, segments, truncated))
    return encoded


def _truncated(example: Example, length: int, tokenizer: Any, max_length: int) -> tuple[list[int], list[int] | None]:
    texts = example.inputs or ()
    too_long = f"{example.where}: it has {length} tokens, more than the {max_length} of --max-length"
    strategy = "longest_first"
    cut = None if example.ready else _position_of_cut(example.task)
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


_PROMPTS_AT_A_TIME = 1000


class PromptEncoder:
    """Turns prompts into ids in the one way that both the answers and the examples are encoded in.

    Args:
        tokenizer: A Hugging Face tokenizer.
        delimiter: What will stand between prompt and answer. Where that is nothing, spaces at the prompt's
            end are taken for the delimiter, as lm-evaluation-harness does: left in the prompt they would be
            a token of their own, and the answer's token (with its space) could not follow.
        chat_template: Whether to wrap each prompt as a user's message in the tokenizer's chat template. Its
            generation prompt then stands before the answer, in place of the delimiter.
    """

    def __init__(self, tokenizer: Any, *, delimiter: str, chat_template: bool = False) -> None:
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise DataError("this tokenizer has no chat template; leave out --chat-template")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.delimiter = "" if chat_template else delimiter
        self._frame: tuple[int, int] | None = None

    def context(self, text: str) -> tuple[str, str]:
        """The prompt as encoded, and what stands between it and the answer.

        Raises:
            DataError: The tokenizer's chat template does not take it.
        """
        if self.chat_template:
            messages = [{"role": "user", "content": text}]
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template may raise anything
                raise DataError(
                    f"the tokenizer's chat template does not take a user's message: {first_line(error)}; "
                    "leave out --chat-template"
                ) from None
        if self.delimiter:
            return text, self.delimiter
        bare = text.rstrip(" ")
        return bare, text[len(bare) :]

    def ids(self, text: str) -> list[int]:
        """Token ids of one prompt, with the special tokens that begin it and without those that end it."""
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`ids` of many prompts."""
        return self.encode([self.context(text)[0] for text in texts])

    def encode(self, contexts: Sequence[str]) -> list[list[int]]:
        """Token ids of contexts, as `context` returns them."""
        encoded: list[list[int]] = []
        for start in range(0, len(contexts), _PROMPTS_AT_A_TIME):
            # A chat template writes the special tokens itself.
            encoded += _plain_ids(
                self.tokenizer, contexts[start : start + _PROMPTS_AT_A_TIME], special_tokens=not self.chat_template
            )
        _, behind = self.frame(contexts[0]) if contexts else (0, 0)
        return [ids[: len(ids) - behind] for ids in encoded] if behind else encoded

    def frame(self, context: str) -> tuple[int, int]:
        """How many special tokens the tokenizer puts before and behind a text.

        Raises:
            DataError: It changes the text's own tokens along with them.
        """
        if self.chat_template:
            return 0, 0
        if self._frame is None:
            whole = _plain_ids(self.tokenizer, [context], special_tokens=True)[0]
            bare = _plain_ids(self.tokenizer, [context], special_tokens=False)[0]
            before = next(
                (start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare),
                None,
            )
            if before is None or not bare:
                raise DataError(
                    "this tokenizer encodes a prompt differently with and without special tokens, so that "
                    "the answer's place cannot be told; use the base model's own tokenizer"
                )
            self._frame = before, len(whole) - before - len(bare)
        return self._frame


def _plain_ids(tokenizer: Any, texts: Sequence[str], *, special_tokens: bool) -> list[list[int]]:
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]


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
