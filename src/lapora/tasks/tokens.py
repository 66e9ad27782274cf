"""Encode examples to token ids, truncating the task's ``truncate_field`` but never the end of a prompt or an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast

from lapora.errors import DataError, SeveralTokensError, first_line, quoted
from lapora.tasks.examples import Example, prompt_of
from lapora.tasks.preferences import token_ids
from lapora.tasks.task import AnswerScore, Task, TaskKind

_BATCH = 1000
# Truncation is accepted when the result is at most this many tokens below the maximum.
_SLACK = 2


@dataclass(frozen=True)
class EncodedAnswer:
    """Token ids of one answer, behind those that all answers of its row share.

    Attributes:
        ids: A token ids.
        scored: Number of them, at the end, whose log-probabilities are summed.
        weight: Factor of the sum.
        merged: Whether the prompt's last token changes when this answer follows. The tokens are then cut at the
            prompt's length, as in lm-evaluation-harness.
    """

    ids: tuple[int, ...]
    scored: int
    weight: float
    merged: bool = False


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example.

    Attributes:
        input_ids: T token ids, special tokens included, without padding.
        token_type_ids: T segment ids, or None if the tokenizer has none.
        truncated: Whether the example was truncated.
        second: The text that the first is compared with, or None.
        answers: The answers, if whole answers are scored; else none.
        choices: Their texts.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    truncated: bool
    second: EncodedExample | None = None
    answers: tuple[EncodedAnswer, ...] = ()
    choices: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of tokens of prompt and longest answer that the network reads: all but the last."""
        return len(self.input_ids) + max((len(answer.ids) - 1 for answer in self.answers), default=0)


def encode(
    example: Example,
    tokenizer: Any,
    *,
    kind: TaskKind,
    max_length: int,
    chat_template: bool = False,
    answer_score: AnswerScore | None = None,
) -> EncodedExample:
    """Encode one example; see :func:`encode_all`."""
    return encode_all(
        [example],
        tokenizer,
        kind=kind,
        max_length=max_length,
        chat_template=chat_template,
        answer_score=answer_score,
    )[0]


def encode_all(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    kind: TaskKind,
    max_length: int,
    chat_template: bool = False,
    answer_score: AnswerScore | None = None,
) -> list[EncodedExample]:
    """Encode examples, in their order; each is truncated as its own task says.

    Args:
        examples: Examples rendered for this kind of model, of one task or of several.
        tokenizer: A Hugging Face tokenizer.
        kind: The kind of model.
        max_length: Maximum number of tokens of an example, special tokens included; with whole answers of the prompt
            and the longest of them.
        chat_template: Wrap prompts in the tokenizer's chat template (causal models only).
        answer_score: How whole answers are scored; None encodes the prompt alone, unless the row has its own answers.

    Raises:
        DataError: An example is too long and cannot be truncated enough, or an answer has no tokens or those of
            another one; the example is named.
    """
    if kind == "classifier" and chat_template:
        raise DataError("--chat-template is for causal models; a sequence classifier reads plain text")
    alike: dict[Any, list[int]] = {}
    for index, example in enumerate(examples):
        score = answer_score or (example.task.answer_score if example.given else None)
        key: Any = (example.task.target_delimiter, score) if kind == "causal" else len(example.inputs or ())
        if example.task.likelihood == "preference":
            key = example.task.likelihood
        alike.setdefault(key, []).append(index)
    encoded: list[EncodedExample | None] = [None] * len(examples)
    for key, positions in alike.items():
        for start in range(0, len(positions), _BATCH):
            part = positions[start : start + _BATCH]
            batch = [examples[index] for index in part]
            if key == "preference":
                results = [_encode_preference(example, tokenizer, max_length) for example in batch]
            elif kind == "causal":
                delimiter, score = key
                encoder = PromptEncoder(tokenizer, delimiter=delimiter, chat_template=chat_template)
                if score is None:
                    results = _encode_prompts(batch, encoder, max_length)
                else:
                    results = _encode_answers(batch, encoder, max_length, score)
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


class _Sized(Protocol):
    def __len__(self) -> int: ...


Ids = TypeVar("Ids", bound=_Sized)


def _shortened(example: Example, ids: list[int], encoder: PromptEncoder, max_length: int) -> list[int]:
    """Return the ids of the truncated prompt, at most ``max_length``."""
    too_long = f"{example.where}: its prompt has {len(ids)} tokens, more than the maximum of {max_length}"
    if example.ready and not encoder.chat_template:
        # A ready prompt is truncated on the left: its end is the cue for the answer.
        before, _ = encoder.frame(encoder.context(cast(str, example.text))[0])
        if before >= max_length:
            raise DataError(f"{too_long}; fit with a larger --max-length")
        return ids[:before] + ids[len(ids) - (max_length - before) :]
    return _with_less_text(example, ids, encoder, max_length, encoder.ids, too_long)


def _with_less_text(
    example: Example,
    ids: Ids,
    encoder: PromptEncoder,
    max_length: int,
    encoded: Callable[[str], Ids],
    too_long: str,
) -> Ids:
    """Return the ids of the prompt with a truncated ``truncate_field``; a ready prompt is truncated on the left.

    Args:
        example: The example.
        ids: Ids of the whole prompt.
        encoder: The encoder.
        max_length: Maximum number of ids.
        encoded: Returns the ids of a prompt.
        too_long: Beginning of the error message.

    Raises:
        DataError: It cannot be truncated enough.
    """
    if example.ready:
        text = cast(str, example.text)
        starts = [0, *(end for _, end in _spans(encoder.tokenizer, text))]
        shorter = _fitting(ids, len(starts) - 1, max_length, lambda kept: encoded(text[starts[-1 - kept] :]))
        if shorter is None:
            raise DataError(
                f"{too_long}, and what cannot be truncated alone exceeds it; fit with a larger --max-length"
            )
        return shorter
    name = example.task.truncate_field
    if name is None:
        raise DataError(
            f"{too_long}; fit with a larger --max-length, or set the task's truncate_field to the field to truncate"
        )

    def of_row(row: Mapping[str, Any]) -> Ids:
        return encoded(prompt_of(example.task, row, example.where))

    return _with_shorter_field(example, name, ids, encoder.tokenizer, max_length, of_row, too_long)


def _with_shorter_field(
    example: Example,
    name: str,
    ids: Ids,
    tokenizer: Any,
    max_length: int,
    encoded: Callable[[Mapping[str, Any]], Ids],
    too_long: str,
) -> Ids:
    """Return the ids of the row with as many tokens of a field as fit; the rest of the row is whole.

    Args:
        example: The example.
        name: The field.
        ids: Ids of the whole row.
        tokenizer: The tokenizer.
        max_length: Maximum number of ids.
        encoded: Returns the ids of a row.
        too_long: Beginning of the error message.

    Raises:
        DataError: The field is not text, or the rest is too long.
    """
    value = example.row.get(name)
    if not isinstance(value, str):
        raise DataError(
            f"{too_long}, and field {quoted(name)} is not text and cannot be truncated; fit with a larger --max-length"
        )
    ends = [0, *(end for _, end in _spans(tokenizer, value))]
    shorter = _fitting(ids, len(ends) - 1, max_length, lambda kept: encoded({**example.row, name: value[: ends[kept]]}))
    if shorter is None:
        raise DataError(f"{too_long}, even without field {quoted(name)}; fit with a larger --max-length")
    return shorter


def _fitting(ids: Ids, tokens: int, max_length: int, with_tokens: Callable[[int], Ids]) -> Ids | None:
    """Return the ids with as many tokens of a text as fit, or None if the rest alone is too long.

    Args:
        ids: Token ids with the whole text; more than ``max_length``.
        tokens: Number of tokens of the text alone.
        max_length: Maximum number of ids.
        with_tokens: Returns the ids with the given number of the text's tokens.
    """
    best: Ids | None = None
    fits, too_many, length = -1, tokens, len(ids)
    kept = tokens
    for attempt in range(64):
        # If the template uses the text once, the first guess is right. If it uses the text twice or changes it,
        # switch to bisection after a few guesses.
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


def _encode_answers(
    examples: Sequence[Example], encoder: PromptEncoder, max_length: int, score: AnswerScore
) -> list[EncodedExample]:
    """Encode prompts with whole answers."""
    found = []
    for example, encoded in zip(examples, _with_answers(examples, encoder, score), strict=True):
        if len(encoded) > max_length:
            encoded = replace(_with_room(example, encoded, encoder, max_length, score), truncated=True)
        _check_answers(example, encoded, encoder.tokenizer)
        found.append(encoded)
    return found


def _with_answers(examples: Sequence[Example], encoder: PromptEncoder, score: AnswerScore) -> list[EncodedExample]:
    """Encode each context alone and with what follows it; the tokens beyond the context's number are scored.

    White space at the end of a context belongs to what follows it, and an empty context is the tokenizer's BOS or EOS
    token: the rules of lm-evaluation-harness.
    """
    pairs = [[encoder.split(*pair) for pair in _scored_texts(example)] for example in examples]
    contexts = list(dict.fromkeys(context for row in pairs for context, _ in row if context))
    known = dict(zip(contexts, encoder.encode(contexts), strict=True))
    whole = encoder.encode([context + text for row in pairs for context, text in row if context])
    alone = encoder.bare([text for row in pairs for context, text in row if not context])
    behind, unprompted = iter(whole), iter(alone)
    found = []
    for example, row in zip(examples, pairs, strict=True):
        before = [known[context] if context else [encoder.prefix(example.where)] for context, _ in row]
        after = [
            next(behind) if context else [*start, *next(unprompted)]
            for (context, _), start in zip(row, before, strict=True)
        ]
        sequences = [start + ids[len(start) :] for start, ids in zip(before, after, strict=True)]
        shared = _common(before)
        texts = example.choices if example.continuation is None else [example.continuation] * len(row)
        answers = []
        for text, start, ids, sequence in zip(texts, before, after, sequences, strict=True):
            scored = len(sequence) - len(start)
            weight = {"sum": 1.0, "per_token": 1.0 / max(1, scored), "per_byte": 1.0 / len(text.encode())}[score]
            merged = ids[: len(start)] != start
            answers.append(EncodedAnswer(tuple(sequence[shared:]), scored, weight, merged))
        found.append(EncodedExample(before[0][:shared], None, False, answers=tuple(answers), choices=example.choices))
    return found


def _scored_texts(example: Example) -> list[tuple[str, str]]:
    """Return for each answer the text before the delimiter, and the text behind it."""
    prompt = cast(str, example.text)
    if example.continuation is None:
        return [(prompt, choice) for choice in example.choices]
    return [(prompt + choice, example.continuation) for choice in example.choices]


def _common(sequences: Sequence[list[int]]) -> int:
    """Return the number of tokens that all sequences begin with."""
    shortest = min(len(sequence) for sequence in sequences)
    different = (index for index in range(shortest) if len({sequence[index] for sequence in sequences}) > 1)
    return next(different, shortest)


def _with_room(
    example: Example, encoded: EncodedExample, encoder: PromptEncoder, max_length: int, score: AnswerScore
) -> EncodedExample:
    """Shorten the prompt, so that the longest answer follows it in ``max_length`` tokens; answers are never cut."""
    where, longest = example.where, max(encoded.answers, key=lambda answer: len(answer.ids))
    room = max_length - (len(longest.ids) - 1)
    if room < 1:
        text = encoded.choices[encoded.answers.index(longest)]
        raise DataError(
            f"{where}: answer {quoted(text)} has {len(longest.ids)} tokens, which leaves no room for the prompt in the "
            f"maximum of {max_length}; fit with a larger --max-length"
        )
    too_long = (
        f"{where}: its prompt and longest answer have {len(encoded)} tokens, more than the maximum of {max_length}"
    )
    if example.ready and not encoder.chat_template:
        before, _ = encoder.frame(encoder.split(cast(str, example.text), "")[0])
        if before >= room:
            raise DataError(f"{too_long}; fit with a larger --max-length")
        ids = encoded.input_ids
        return replace(encoded, input_ids=ids[:before] + ids[len(ids) - (room - before) :])
    return _with_less_text(
        example,
        encoded,
        encoder,
        max_length,
        lambda text: _with_answers([replace(example, text=text)], encoder, score)[0],
        too_long,
    )


def _check_answers(example: Example, encoded: EncodedExample, tokenizer: Any) -> None:
    """Check that every answer has tokens, known ones, and other ones than the other answers."""
    seen: dict[tuple[int, ...], str] = {}
    unknown = getattr(tokenizer, "unk_token_id", None)
    shared = _common([list(answer.ids) for answer in encoded.answers])  # such as the space before an answer
    for choice, answer in zip(encoded.choices, encoded.answers, strict=True):
        if not answer.scored or (not encoded.input_ids and answer.scored == len(answer.ids)):
            raise DataError(
                f"{example.where}: answer {quoted(choice)} has no tokens of its own behind the prompt; change "
                "doc_to_choice"
            )
        if unknown is not None and unknown in answer.ids[max(shared, len(answer.ids) - answer.scored) :]:
            raise DataError(
                f"{example.where}: answer {quoted(choice)} has text that is not in the tokenizer's vocabulary; change "
                "doc_to_choice"
            )
        if answer.ids in seen:
            raise DataError(
                f"{example.where}: answers {quoted(seen[answer.ids])} and {quoted(choice)} have the same tokens in "
                "this tokenizer; change doc_to_choice"
            )
        seen[answer.ids] = choice


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Return the character span of each token, or of each word for a tokenizer without offsets."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [(start, end) for start, end in encoded["offset_mapping"] if end > start]
    return [match.span() for match in re.finditer(r"\s*\S+", text)]


def _encode_inputs(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[EncodedExample]:
    """Encode examples that all have one text, or all have two."""
    columns = [list(column) for column in zip(*(example.inputs or () for example in examples), strict=True)]
    whole = tokenizer(*columns, padding=False, truncation=False, return_attention_mask=False, verbose=False)
    types = whole.get("token_type_ids") or [None] * len(examples)
    encoded = []
    for example, ids, segments in zip(examples, whole["input_ids"], types, strict=True):
        found = _Inputs(list(ids), None if segments is None else list(segments))
        truncated = len(found) > max_length
        if truncated:
            found = _truncated(example, found, tokenizer, max_length)
        if not found.ids:
            raise DataError(f"{example.where}: the text has no tokens; check the row's fields")
        encoded.append(EncodedExample(found.ids, found.segments, truncated))
    return encoded


def _encode_preference(example: Example, tokenizer: Any, max_length: int) -> EncodedExample:
    """Encode each text of a preference by itself; the texts are not truncated."""
    encoded: EncodedExample | None = None
    for text in reversed(example.inputs or ()):
        found = token_ids(example.task, text, tokenizer, messages=example.messages, where=example.where)
        ids, types = list(found["input_ids"]), found.get("token_type_ids")
        if not ids or len(ids) > max_length:
            remedy = "fit with a larger --max-length, or exclude the row"
            too_long = f"{len(ids)} tokens, more than the maximum of {max_length}; {remedy}"
            raise DataError(f"{example.where}: a text has {too_long if ids else 'no tokens'}")
        encoded = EncodedExample(ids, None if types is None else list(types), False, encoded)
    return cast(EncodedExample, encoded)


@dataclass(frozen=True)
class _Inputs:
    """Token ids of one or two texts, and their segments if the tokenizer has them."""

    ids: list[int]
    segments: list[int] | None

    @classmethod
    def of(cls, encoded: Mapping[str, Any]) -> _Inputs:
        types = encoded.get("token_type_ids")
        return cls(list(encoded["input_ids"]), None if types is None else list(types))

    def __len__(self) -> int:
        return len(self.ids)


def _truncated(example: Example, whole: _Inputs, tokenizer: Any, max_length: int) -> _Inputs:
    texts, task = example.inputs or (), example.task
    too_long = f"{example.where}: it has {len(whole)} tokens, more than the maximum of {max_length}"
    strategy = "longest_first"
    cut = None if example.ready else _position_of_cut(task)
    templates = () if example.ready else task.prompt_templates("classifier")
    name = task.truncate_field
    if name is not None and any(name in each.fields for at, each in enumerate(templates) if at != cut):

        def of_row(row: Mapping[str, Any]) -> _Inputs:
            inputs = [template.text(row, example.where) for template in templates]
            return _Inputs.of(tokenizer(*inputs, truncation=False, return_attention_mask=False, verbose=False))

        return _with_shorter_field(example, name, whole, tokenizer, max_length, of_row, too_long)
    reserved = tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
    if cut is not None and len(texts) == 2:
        strategy = ("only_first", "only_second")[cut]
        reserved += len(tokenizer(texts[1 - cut], add_special_tokens=False, verbose=False)["input_ids"])
    if reserved >= max_length:
        raise DataError(f"{too_long}, and {reserved} of them cannot be truncated; fit with a larger --max-length")
    options = {"truncation": strategy, "max_length": max_length, "return_attention_mask": False, "verbose": False}
    return _Inputs.of(tokenizer(*texts, **options))


def _position_of_cut(task: Task) -> int | None:
    """Return the position of the text that consists of ``truncate_field`` only, or None."""
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
    """Encodes prompts to token ids, identically for examples and for finding the answers' tokens.

    Args:
        tokenizer: A Hugging Face tokenizer.
        delimiter: Text between prompt and answer. If it is empty, spaces at the end of a prompt are the delimiter,
            as in lm-evaluation-harness: left in the prompt they would be a token of their own, and the answer's
            token (with its space) could not follow.
        chat_template: Wrap each prompt as a user message in the tokenizer's chat template; its generation prompt
            replaces the delimiter.

    Raises:
        DataError: ``chat_template`` is set, and the tokenizer has none.
    """

    def __init__(self, tokenizer: Any, *, delimiter: str, chat_template: bool = False) -> None:
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise DataError("the tokenizer has no chat template; omit --chat-template")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.delimiter = "" if chat_template else delimiter
        self._frame: tuple[int, int] | None = None

    def context(self, text: str) -> tuple[str, str]:
        """Return the prompt text to encode, and the text between it and the answer.

        Raises:
            DataError: The tokenizer's chat template fails on a user message.
        """
        text = self._wrapped(text)
        if self.delimiter:
            return text, self.delimiter
        bare = text.rstrip(" ")
        return bare, text[len(bare) :]

    def split(self, text: str, following: str) -> tuple[str, str]:
        """Return the prompt text to encode, without white space at its end, and that space with what follows it."""
        text = self._wrapped(text)
        bare = text.rstrip()
        return bare, text[len(bare) :] + self.delimiter + following

    def prefix(self, where: str) -> int:
        """Return the token that stands for an empty prompt: BOS, or EOS of a tokenizer without it.

        Raises:
            DataError: The tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise DataError(f"{where}: its prompt is empty, and the tokenizer has no token of the beginning or end of text")

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts without special tokens."""
        return _plain_ids(self.tokenizer, texts, special_tokens=False) if texts else []

    def _wrapped(self, text: str) -> str:
        if self.chat_template:
            messages = [{"role": "user", "content": text}]
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template may raise anything
                raise DataError(
                    f"the tokenizer's chat template fails on a user message: {first_line(error)}; omit --chat-template"
                ) from None
        return text

    def ids(self, text: str) -> list[int]:
        """Return the token ids of one prompt, with leading and without trailing special tokens."""
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of many prompts; see :meth:`ids`."""
        return self.encode([self.context(text)[0] for text in texts])

    def encode(self, contexts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of contexts, the first values that :meth:`context` returns."""
        encoded: list[list[int]] = []
        for start in range(0, len(contexts), _PROMPTS_AT_A_TIME):
            # A chat template writes the special tokens itself.
            encoded += _plain_ids(
                self.tokenizer, contexts[start : start + _PROMPTS_AT_A_TIME], special_tokens=not self.chat_template
            )
        _, behind = self.frame(contexts[0]) if contexts else (0, 0)
        return [ids[: len(ids) - behind] for ids in encoded] if behind else encoded

    def frame(self, context: str) -> tuple[int, int]:
        """Return the numbers of special tokens that the tokenizer adds before and after a text.

        Raises:
            DataError: Adding special tokens changes the text's own tokens.
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
                    "the tokenizer encodes a prompt differently with and without special tokens, so the "
                    "answer's position is unknown; use the base model's own tokenizer"
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


@dataclass(frozen=True)
class AnswerEncoding:
    """How the answers of a task become outputs of a model.

    Attributes:
        token_ids: Token of each answer, for a causal model whose answers are single tokens.
        answer_score: How whole answers are scored, for other causal models.
        note: Why whole answers are scored, or empty.
    """

    token_ids: list[int] | None = None
    answer_score: AnswerScore | None = None
    note: str = ""


def resolve_answers(
    tokenizer: Any, task: Task, examples: Sequence[Example], choices: Sequence[str], *, chat_template: bool = False
) -> AnswerEncoding:
    """Find the token of each answer for a causal model, or that whole answers are scored.

    Args:
        tokenizer: A Hugging Face tokenizer.
        task: The task.
        examples: Its rows.
        choices: The answers that all rows have; empty where each has its own.
        chat_template: Wrap the prompts in the tokenizer's chat template.

    Raises:
        DataError: An answer is not a known token, or two answers share one.
    """
    reason = _whole_answers_needed(task, examples, choices)
    if not reason:
        try:
            ids = answer_token_ids(
                tokenizer,
                [example.text or "" for example in examples],
                choices,
                delimiter=task.target_delimiter,
                chat_template=chat_template,
                labels=[example.where for example in examples],
            )
        except SeveralTokensError as error:
            reason = str(error).partition("; ")[0]
        else:
            return AnswerEncoding(token_ids=ids)
    return AnswerEncoding(answer_score=task.answer_score, note=f"whole answers are scored: {reason}")


def _whole_answers_needed(task: Task, examples: Sequence[Example], choices: Sequence[str]) -> str:
    """Return why whole answers must be scored, independent of their tokens, or an empty text."""
    if not choices:
        return "the rows have answers of their own"
    if task.doc_to_continuation is not None:
        return "the text behind the answer is scored"
    if task.answer_score == "per_byte":
        return "answer_score is per_byte"
    return "the prompt is empty" if any(not (example.text or "").strip() for example in examples) else ""


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
    """Return the token id of each answer.

    The prompt is encoded with and without the answer, and the difference is the answer's token: it depends on the
    preceding text ("A" and " A" differ), on the tokenizer, and on merges across the boundary. It is checked on the
    whole first prompt, and on every distinct last word of the other prompts.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompts: Rendered prompts, at least one, without chat template.
        choices: The C answers.
        delimiter: The task's ``target_delimiter``; ignored with a chat template, whose generation prompt ends the
            context.
        chat_template: Wrap the prompts in the tokenizer's chat template.
        labels: Names of the prompts' rows in error messages.

    Returns:
        C distinct token ids.

    Raises:
        SeveralTokensError: An answer is not one token, merges with the end of the prompt, or its token depends on the
            prompt. The message names the answer.
        DataError: An answer is not a known token, or two answers share one.
    """
    if not prompts:
        raise DataError("finding the answers' tokens requires a prompt; give at least one row")
    encoder = PromptEncoder(tokenizer, delimiter=delimiter, chat_template=chat_template)
    first = _appended_ids(encoder, [encoder.context(prompts[0])], choices)[0]
    ids: list[int] = []
    for choice, appended in zip(choices, first, strict=True):
        ids.append(_single_token(tokenizer, choice, appended, delimiter=encoder.delimiter))
    for position, token in enumerate(ids):
        if token in ids[:position]:
            raise DataError(
                f"answers {quoted(choices[ids.index(token)])} and {quoted(choices[position])} have the same token "
                f"({token}) in this tokenizer; change doc_to_choice"
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
        # The last word alone may be encoded differently than within its prompt: check the whole prompt.
        whole = _appended_ids(encoder, [encoder.context(prompts[position])], choices)[0]
        for choice, token, appended in zip(choices, ids, whole, strict=True):
            if appended != [token]:
                where = labels[position] if labels is not None else f"prompt {position}"
                raise SeveralTokensError(
                    f"{where}: answer {quoted(choice)} is {_described(appended)}, but token {token} after the "
                    "first prompt; end every prompt with the same text, such as 'Answer:'"
                )


def _appended_ids(
    encoder: PromptEncoder, contexts: Sequence[tuple[str, str]], choices: Sequence[str]
) -> list[list[list[int] | None]]:
    """Return the ids that each answer appends to each context, or None if the context's own ids change."""
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
        raise SeveralTokensError(
            f"answer {quoted(choice)} merges with the end of the prompt in this tokenizer (delimiter "
            f"{quoted(delimiter)}); change target_delimiter, or the end of doc_to_text"
        )
    if len(appended) != 1:
        raise SeveralTokensError(
            f"answer {quoted(choice)} is {_described(appended)} in this tokenizer, not one; use "
            "single-token answers in doc_to_choice, such as letters, or change target_delimiter"
        )
    if appended[0] == getattr(tokenizer, "unk_token_id", None):
        raise DataError(f"answer {quoted(choice)} is not in the tokenizer's vocabulary; change doc_to_choice")
    return appended[0]


def _described(appended: list[int] | None) -> str:
    if appended is None:
        return "merged with the end of the prompt"
    return f"token {appended[0]}" if len(appended) == 1 else f"{len(appended)} tokens"


def _last_word(text: str) -> str:
    """Return the last word of a text with the white space before it."""
    stripped = text.rstrip()
    start = max(stripped.rfind(" "), stripped.rfind("\n"), 0)
    return text[max(start, len(text) - _TAIL) :]
