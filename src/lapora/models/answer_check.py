"""Self-check of a model: whole answers must have the same scores packed into one sequence and in separate ones.

A packed row needs an attention mask of its own and given positions. Recurrent networks, linear attention and positions
that are counted by the network ignore one or the other. No list of architectures would be complete, so two short rows
are run in both ways, and packed once more with other tokens in one of the answers, which must not move the scores of
the others. The second comparison is of equal shapes, so that it is as strict in half precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from lapora.errors import AdapterError, LaporaWarning
from lapora.models.batches import PlainAnswer, PlainRow, collate
from lapora.models.outputs import OutputModel

_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2
"""Tolerance of the scores packed and separate: in half precision, kernels round differently for other shapes.

SmolLM2-135M and Gemma 3 270M differ by 4e-3 and 8e-3 in bfloat16."""
_LEAK = 1e-4
"""Tolerance beside other tokens; 0 was seen where attention alone joins tokens."""
_LENGTHS = ((7, (5, 1, 3)), (4, (2, 4, 2)))
"""Tokens of the prompt and of each answer of two rows; a second answer would be affected by the first, longer one."""


def check_answers(output_model: OutputModel) -> None:
    """Check whether the answers of a row can be packed into one sequence, and warn if they cannot.

    Raises:
        AdapterError: They cannot, and padding changes the logits of the model.
    """
    if output_model.packs_answers is not None:
        return
    output_model.packs_answers = packs_answers(output_model)
    if output_model.packs_answers:
        return
    name = getattr(getattr(output_model.network, "config", None), "model_type", "this base model")
    if output_model.equal_lengths:
        raise AdapterError(
            f"{name}: answers of several tokens are not supported: padding changes its logits, and it takes no "
            "attention mask of its own; use answers of one token, such as letters"
        )
    warnings.warn(
        f"{name}: the answers of a row run as separate sequences, which is slower: it has no attention mask for "
        "several answers in one",
        LaporaWarning,
        stacklevel=2,
    )


def packs_answers(output_model: OutputModel) -> bool:
    """Return whether two rows have the same scores packed and in separate sequences."""
    if not output_model.takes_positions:
        return False
    rows = _rows(output_model)
    try:
        with torch.no_grad():
            separate = _scores(output_model, rows, packed=False)
            packed = _scores(output_model, rows, packed=True)
            moved = [_moved(output_model, rows, packed, answer) for answer in (0, len(_LENGTHS[0][1]) - 1)]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a network without such an argument, or with an implementation of attention without masks
        return False
    half = output_model.network.dtype in (torch.float16, torch.bfloat16)
    tolerance = _HALF_TOLERANCE if half else _TOLERANCE
    largest = float(separate.abs().max())
    return float((packed - separate).abs().max()) <= tolerance * largest and max(moved) <= _LEAK * largest


def _moved(output_model: OutputModel, rows: Sequence[PlainRow], packed: torch.Tensor, answer: int) -> float:
    """Return the largest change of the scores of the other answers if one has other tokens."""
    tokens = _tokens(output_model)
    following = dict(zip(tokens, [*tokens[1:], tokens[0]], strict=True))
    changed = []
    for row in rows:
        answers = list(row.answers)
        answers[answer] = replace(answers[answer], ids=[following[token] for token in answers[answer].ids])
        changed.append(replace(row, answers=answers))
    others = [index for index in range(packed.shape[1]) if index != answer]
    return float((_scores(output_model, changed, packed=True) - packed)[:, others].abs().max())


def _scores(output_model: OutputModel, rows: Sequence[PlainRow], *, packed: bool) -> torch.Tensor:
    batch = collate(
        rows,
        range(len(rows)),
        pad_token_id=output_model.pad_token_id,
        padding_side=output_model.padding_side,
        device=output_model.device,
        packed=packed,
    )
    return output_model.logits(batch)


def _tokens(output_model: OutputModel) -> list[int]:
    embeddings = cast(Any, output_model.network).get_input_embeddings()
    vocabulary = int(embeddings.weight.shape[0])
    return [token for token in range(1, vocabulary) if token != output_model.pad_token_id]


def _rows(output_model: OutputModel) -> list[PlainRow]:
    ids = _tokens(output_model)
    spread = [ids[(17 * index + 5) % len(ids)] for index in range(64)]
    rows = []
    for prompt, lengths in _LENGTHS:
        taken, spread = spread[:prompt], spread[prompt:]
        answers = []
        for length in lengths:
            answers.append(PlainAnswer(spread[:length], length))
            spread = spread[length:]
        rows.append(PlainRow(taken, answers))
    return rows
