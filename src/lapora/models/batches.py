"""Padded batches of token ids with attention masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from lapora.models.answers import AnswerLayout, AnswerTokens, layout_of, longest_sequence, packed_length

PaddingSide = Literal["left", "right"]


class Encoded(Protocol):
    """One encoded row, as collated into batches."""

    @property
    def input_ids(self) -> list[int]:
        """Token ids, without padding."""

    @property
    def token_type_ids(self) -> list[int] | None:
        """Segment ids, or None."""

    @property
    def answers(self) -> Sequence[AnswerTokens]:
        """The answers that follow ``input_ids``, if whole answers are scored; else none."""


@dataclass(frozen=True)
class PlainAnswer:
    """Tokens of an artificial answer, for checks and estimates."""

    ids: Sequence[int]
    scored: int
    weight: float = 1.0


@dataclass(frozen=True)
class PlainRow:
    """Tokens of an artificial row, for checks and estimates."""

    input_ids: list[int]
    answers: Sequence[PlainAnswer] = ()
    token_type_ids: list[int] | None = None
    second: PlainRow | None = None


@dataclass(frozen=True)
class Batch:
    """Token ids of B rows, padded to T tokens; S sequences, where the answers of a row are in separate ones.

    Attributes:
        input_ids: ``(B, T)`` int64; ``(S, T)`` for rows of several sequences.
        attention_mask: The same shape, one at real tokens, int64.
        token_type_ids: The same shape, or None.
        rows: Position of each row in the sequence that the batches were made from.
        has_padding: Whether any position is padding.
        texts: Number of texts of a row that are compared; they follow one another in ``texts B`` sequences.
        answers: Layout of the answers, if whole answers are scored.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    rows: tuple[int, ...]
    has_padding: bool
    texts: int = 1
    answers: AnswerLayout | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def last_positions(self) -> Tensor:
        """Return the position of each row's last real token, ``(B,)``, for either padding side."""
        positions = torch.arange(self.attention_mask.shape[1], device=self.attention_mask.device)
        return (self.attention_mask * positions).argmax(dim=1)


def collate(
    encoded: Sequence[Encoded],
    rows: Sequence[int],
    *,
    pad_token_id: int,
    padding_side: PaddingSide,
    device: torch.device | str = "cpu",
    pad_to: int | None = None,
    packed: bool = True,
) -> Batch:
    """Pad rows to one length and stack them; a row that is compared with a second text is followed by it.

    Args:
        encoded: B encoded rows, all with the same number of answers, or all with none.
        rows: Their positions in the caller's sequence.
        pad_token_id: Id at padding positions; these are masked, so any valid id gives the same result.
        padding_side: ``left`` or ``right``.
        device: Device of the tensors.
        pad_to: Minimum T; by default the length of the longest row.
        packed: Put the answers of a row into one sequence, padded on the right.
    """
    texts = texts_of(encoded[0])
    encoded = [text for row in encoded for text in _texts(row)]
    length = max(pad_to or 0, *(network_length(row, packed=packed) for row in encoded))
    sequences = [row.input_ids for row in encoded]
    answers = None
    if encoded[0].answers:
        sequences, answers = layout_of([(row.input_ids, row.answers) for row in encoded], length, packed=packed)
        answers = answers.on_device(device)
        padding_side = "right"
    ids = torch.full((len(sequences), length), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), length), dtype=torch.long)
    with_types = any(row.token_type_ids is not None for row in encoded)
    types = torch.zeros((len(encoded), length), dtype=torch.long) if with_types else None
    for index, sequence in enumerate(sequences):
        count = len(sequence)
        span = slice(length - count, length) if padding_side == "left" else slice(0, count)
        ids[index, span] = torch.tensor(sequence, dtype=torch.long)
        mask[index, span] = 1
        if types is not None and (segments := encoded[index].token_type_ids) is not None:
            types[index, span] = torch.tensor(segments, dtype=torch.long)
    return Batch(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        token_type_ids=None if types is None else types.to(device),
        rows=tuple(rows),
        has_padding=bool((mask == 0).any()),
        texts=texts,
        answers=answers,
    )


def _texts(row: Encoded) -> list[Encoded]:
    second = cast("Encoded | None", getattr(row, "second", None))
    return [row] if second is None else [row, second]


def texts_of(row: Encoded) -> int:
    """Return the number of texts of a row: two if it is compared with a second one."""
    return len(_texts(row))


def text_lengths(row: Encoded) -> list[int]:
    """Return the number of tokens of each text of a row."""
    return [len(text.input_ids) for text in _texts(row)]


def network_length(row: Encoded, *, packed: bool = True) -> int:
    """Return the number of tokens of a row's longest sequence.

    Args:
        row: The row.
        packed: Whether its answers are in one sequence.
    """
    if not row.answers:
        return max(text_lengths(row))
    return (packed_length if packed else longest_sequence)(len(row.input_ids), row.answers)
