"""Scores of whole answers: ``f_c = w_c Σ_t log p(y_ct | prompt, y_c,<t)`` for the C answers of a prompt.

The network reads the T tokens of the prompt and all but the last token of each answer, ``T + Σ_c (A_c - 1)`` tokens of
a row, in one of two ways:

* packed: one sequence, the answers one after another behind the prompt. Each answer's positions continue the prompt's,
  and a 4-D attention mask restricts its attention to the prompt and itself.
* separate: C sequences of the prompt and one answer, for networks without such masks. An activation of the prompt is
  then computed C times, and the gradients of these copies are summed.

Both give every layer the same inputs, gradients and number of tokens: a token of the prompt counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


class AnswerTokens(Protocol):
    """The tokens of one answer."""

    @property
    def ids(self) -> Sequence[int]:
        """A token ids, which follow those that all answers of the row share."""

    @property
    def scored(self) -> int:
        """Number of them, at the end, whose log-probabilities are summed."""

    @property
    def weight(self) -> float:
        """Factor of the sum: 1, or one over the number of tokens or bytes."""


@dataclass(frozen=True)
class Copies:
    """Positions of separate sequences that are one token of a row.

    Attributes:
        first: For each token of a row, its first position among the S·T positions of the sequences, ``(B, P)``.
        token: For each position of the sequences, its token among the B·P, or B·P for padding, ``(S T,)``.
        mask: Which of the P tokens of a row are real, ``(B, P)``.
    """

    first: Tensor
    token: Tensor
    mask: Tensor

    def on_device(self, device: torch.device | str) -> Copies:
        """Return the copies with all tensors on a device."""
        return Copies(self.first.to(device), self.token.to(device), self.mask.to(device))

    def inputs(self, values: Tensor) -> Tensor:
        """Select the activation of each token: ``(S, T, F)`` to ``(B, P, F)``."""
        return values.flatten(0, 1)[self.first.to(values.device)]

    def gradients(self, values: Tensor) -> Tensor:
        """Sum the gradients of each token's copies: ``(S, T, F)`` to ``(B, P, F)``."""
        rows, tokens = self.first.shape
        summed = values.new_zeros(rows * tokens + 1, values.shape[2])
        summed.index_add_(0, self.token.to(values.device), values.flatten(0, 1))
        return summed[:-1].unflatten(0, (rows, tokens))


@dataclass(frozen=True)
class AnswerLayout:
    """Positions of the answers of a batch of B rows in the S sequences that the network reads.

    Attributes:
        rows: B.
        answers: C, the same for all rows of a batch.
        position_ids: ``(S, T)``, or None for the network's default.
        attention_mask: ``(S, 1, T, T)``, true where a token attends to another, or None for causal attention.
        head: Positions at which the head runs, ``(S, Q)``.
        head_mask: Which of them are needed, ``(S, Q)``.
        source: Index of the head's output that predicts each scored token, among S·Q; ``(M,)``.
        target: Id of each scored token, ``(M,)``.
        answer: Index of its answer, among B·C, ``(M,)``.
        weight: Factor of its log-probability, ``(M,)``.
        tokens: Copies of each token, for separate sequences.
        heads: Copies of the positions at which the head runs.
    """

    rows: int
    answers: int
    position_ids: Tensor | None
    attention_mask: Tensor | None
    head: Tensor
    head_mask: Tensor
    source: Tensor
    target: Tensor
    answer: Tensor
    weight: Tensor
    tokens: Copies | None = None
    heads: Copies | None = None

    def on_device(self, device: torch.device | str) -> AnswerLayout:
        """Return the layout with all tensors on a device."""
        moved: dict[str, Any] = {
            name: value.on_device(device) if isinstance(value, Copies) else value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Copies | Tensor)
        }
        return replace(self, **moved)

    def additive_mask(self, dtype: torch.dtype) -> Tensor | None:
        """Return the attention mask as numbers to add to attention scores: 0, or the lowest number of the type."""
        if self.attention_mask is None:
            return None
        hidden = torch.zeros(self.attention_mask.shape, dtype=dtype, device=self.attention_mask.device)
        return hidden.masked_fill_(~self.attention_mask, torch.finfo(dtype).min)

    def scores(self, logits: Tensor) -> Tensor:
        """Compute ``f`` from vocabulary logits.

        Args:
            logits: ``(S, Q, V)``.

        Returns:
            ``(B, C)``, float32 or float64.
        """
        flat = logits.flatten(0, 1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        source = self.source.to(flat.device)
        log_p = flat[source, self.target.to(flat.device)] - torch.logsumexp(flat, dim=1)[source]
        summed = log_p.new_zeros(self.rows * self.answers)
        summed = summed.index_add(0, self.answer.to(flat.device), log_p * self.weight.to(log_p))
        return summed.unflatten(0, (self.rows, self.answers))


@dataclass(frozen=True)
class _Sequence:
    """One sequence of the network: its tokens, their positions in the row, and the predicted tokens.

    Attributes:
        ids: Token ids.
        places: Position of each among the tokens of the row, counted as in the packed sequence.
        scored: For each scored token its id, answer, weight, and the position of the token that predicts it.
    """

    ids: list[int]
    places: list[int]
    scored: list[tuple[int, int, float, int]]


def packed_length(prompt: int, answers: Sequence[AnswerTokens]) -> int:
    """Return the number of tokens of a row that the network reads."""
    return prompt + sum(len(answer.ids) - 1 for answer in answers)


def longest_sequence(prompt: int, answers: Sequence[AnswerTokens]) -> int:
    """Return the number of tokens of the prompt and the longest answer that the network reads."""
    return prompt + max(len(answer.ids) - 1 for answer in answers)


def sequences_of(prompt: Sequence[int], answers: Sequence[AnswerTokens], *, packed: bool) -> list[_Sequence]:
    """Return the sequences of a row: one if packed, else one for each answer."""
    start, found = len(prompt), []
    for number, answer in enumerate(answers):
        read = list(answer.ids[:-1])
        places = list(range(start, start + len(read)))
        start += len(read)
        before = [len(prompt) - 1, *places]  # position of the token that predicts each token of the answer
        first = len(answer.ids) - answer.scored
        scored = [(answer.ids[index], number, answer.weight, before[index]) for index in range(first, len(answer.ids))]
        found.append(_Sequence([*prompt, *read], [*range(len(prompt)), *places], scored))
    if not packed:
        return found
    ids, places = list(prompt), list(range(len(prompt)))
    for each in found:
        ids += each.ids[len(prompt) :]
        places += each.places[len(prompt) :]
    return [_Sequence(ids, places, [token for each in found for token in each.scored])]


def layout_of(
    rows: Sequence[tuple[Sequence[int], Sequence[AnswerTokens]]], length: int, *, packed: bool
) -> tuple[list[list[int]], AnswerLayout]:
    """Arrange the answers of B rows with C answers each.

    Args:
        rows: The prompt's tokens and the answers of each row.
        length: T, the number of tokens of a sequence with padding.
        packed: One sequence per row.

    Returns:
        The token ids of the S sequences, without padding; and the layout of the answers in them.
    """
    answers = len(rows[0][1])
    sequences, owners = [], []
    for row, (prompt, given) in enumerate(rows):
        found = sequences_of(prompt, given, packed=packed)
        sequences += found
        owners += [row] * len(found)
    prompts = [len(rows[row][0]) for row in owners]
    # The head runs at the prompt's last token and at all tokens behind it.
    begins = [max(0, prompt - 1) for prompt in prompts]
    width = max(len(each.ids) - begin for each, begin in zip(sequences, begins, strict=True))
    width += width == length  # never T, because the number of positions shows whether they have been selected
    head = torch.zeros(len(sequences), width, dtype=torch.long)
    head_mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    scored: list[tuple[int, int, int, float]] = []
    for number, (each, begin) in enumerate(zip(sequences, begins, strict=True)):
        count = len(each.ids) - begin
        head[number, :count] = torch.arange(begin, begin + count)
        head_mask[number, :count] = True
        at = {place: number * width + index for index, place in enumerate(each.places[begin:])}
        scored += [
            (at[place], token, owners[number] * answers + answer, weight)
            for token, answer, weight, place in each.scored
        ]
    source, target, answer, weight = zip(*scored, strict=True)
    layout = AnswerLayout(
        rows=len(rows),
        answers=answers,
        position_ids=None,
        attention_mask=None,
        head=head,
        head_mask=head_mask,
        source=torch.tensor(source),
        target=torch.tensor(target),
        answer=torch.tensor(answer),
        weight=torch.tensor(weight, dtype=torch.float64),
    )
    ids = [each.ids for each in sequences]
    if packed:
        return ids, _with_mask(layout, rows, length)
    return ids, _with_copies(layout, sequences, owners, begins, length)


def _with_mask(
    layout: AnswerLayout, rows: Sequence[tuple[Sequence[int], Sequence[AnswerTokens]]], length: int
) -> AnswerLayout:
    """Add positions and attention mask of packed sequences."""
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    part = torch.full((len(rows), length), -1, dtype=torch.long)  # 0 the prompt, c the c-th answer, -1 padding
    for row, (prompt, answers) in enumerate(rows):
        end = len(prompt)
        positions[row, :end] = torch.arange(end)
        part[row, :end] = 0
        for number, answer in enumerate(answers, start=1):
            span = slice(end, end := end + len(answer.ids) - 1)
            positions[row, span] = len(prompt) + torch.arange(len(answer.ids) - 1)
            part[row, span] = number
    seen = (part.unsqueeze(1) == 0) | (part.unsqueeze(1) == part.unsqueeze(2))
    seen &= torch.ones(length, length, dtype=torch.bool).tril() & (part >= 0).unsqueeze(1)
    seen |= torch.eye(length, dtype=torch.bool)  # padding attends to itself: an empty softmax is NaN
    return replace(layout, position_ids=positions, attention_mask=seen.unsqueeze(1))


def _with_copies(
    layout: AnswerLayout, sequences: Sequence[_Sequence], owners: Sequence[int], begins: Sequence[int], length: int
) -> AnswerLayout:
    """Add the copies of each token in separate sequences."""
    places = [each.places for each in sequences]
    behind = [
        [place - begin for place in each[begin:]] for each, begin in zip(places, begins, strict=True)
    ]  # places among the positions of the head
    return replace(
        layout,
        tokens=_copies(places, owners, layout.rows, length),
        heads=_copies(behind, owners, layout.rows, layout.head.shape[1]),
    )


def _copies(places: Sequence[Sequence[int]], owners: Sequence[int], rows: int, length: int) -> Copies:
    count = 1 + max(max(each) for each in places)
    first = torch.zeros(rows, count, dtype=torch.long)
    mask = torch.zeros(rows, count, dtype=torch.bool)
    token = torch.full((len(places), length), rows * count, dtype=torch.long)
    for number, (each, row) in reversed(list(enumerate(zip(places, owners, strict=True)))):
        where = torch.tensor(list(each), dtype=torch.long)
        first[row, where] = number * length + torch.arange(len(each))
        mask[row, where] = True
        token[number, : len(each)] = row * count + where
    return Copies(first, token.flatten(), mask)
