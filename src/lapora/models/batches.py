"""Padded batches of token ids with attention masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

PaddingSide = Literal["left", "right"]


class Encoded(Protocol):
    """One encoded row, as collated into batches."""

    @property
    def input_ids(self) -> list[int]:
        """Token ids, without padding."""

    @property
    def token_type_ids(self) -> list[int] | None:
        """Segment ids, or None."""


@dataclass(frozen=True)
class Batch:
    """Token ids of B rows, padded to T tokens.

    Attributes:
        input_ids: ``(B, T)`` int64; ``(2B, T)`` for rows of two texts.
        attention_mask: The same shape, one at real tokens.
        token_type_ids: The same shape, or None.
        rows: Position of each row in the sequence that the batches were made from.
        has_padding: Whether any position is padding.
        texts: Number of texts of a row that are compared, which then stand one after another: ``texts B`` sequences.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    rows: tuple[int, ...]
    has_padding: bool
    texts: int = 1

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
) -> Batch:
    """Pad rows to one length and stack them; a row that is compared with a second text is followed by it.

    Args:
        encoded: B encoded rows.
        rows: Their positions in the caller's sequence.
        pad_token_id: Id at padding positions; these are masked, so any valid id gives the same result.
        padding_side: ``left`` or ``right``.
        device: Device of the tensors.
        pad_to: Minimum T; by default the length of the longest row.
    """
    texts = texts_of(encoded[0])
    if texts == 2:
        encoded = [text for row in encoded for text in (row, _second(row))]
    length = max(pad_to or 0, *(len(row.input_ids) for row in encoded))
    ids = torch.full((len(encoded), length), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(encoded), length), dtype=torch.long)
    with_types = any(row.token_type_ids is not None for row in encoded)
    types = torch.zeros((len(encoded), length), dtype=torch.long) if with_types else None
    for index, row in enumerate(encoded):
        count = len(row.input_ids)
        span = slice(length - count, length) if padding_side == "left" else slice(0, count)
        ids[index, span] = torch.tensor(row.input_ids, dtype=torch.long)
        mask[index, span] = 1
        if types is not None and row.token_type_ids is not None:
            types[index, span] = torch.tensor(row.token_type_ids, dtype=torch.long)
    return Batch(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        token_type_ids=None if types is None else types.to(device),
        rows=tuple(rows),
        has_padding=bool((mask == 0).any()),
        texts=texts,
    )


def _second(row: Encoded) -> Encoded:
    return cast(Encoded, getattr(row, "second", None))


def texts_of(row: Encoded) -> int:
    """Return the number of texts of a row: two if it is compared with a second one."""
    return 1 if _second(row) is None else 2


def length_of(row: Encoded) -> int:
    """Return the number of tokens of a row's longest text."""
    return max(len(row.input_ids), len(_second(row).input_ids) if texts_of(row) == 2 else 0)
