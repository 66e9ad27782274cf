"""A causal model's prompt as token ids: what stands before the answer, and nothing after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lapora.errors import DataError, first_line

_BATCH = 1000


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
        for start in range(0, len(contexts), _BATCH):
            # A chat template writes the special tokens itself.
            encoded += _plain_ids(
                self.tokenizer, contexts[start : start + _BATCH], special_tokens=not self.chat_template
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
