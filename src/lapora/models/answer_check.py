"""Self-check of a model: whole answers must have the same scores packed into one sequence and in separate ones.

A packed row needs an attention mask of its own and given positions. Recurrent networks, linear attention and positions
that are counted by the network ignore one or the other. No list of architectures would be complete, so two short rows
are run in both ways.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch

from lapora.errors import AdapterError, LaporaWarning
from lapora.models.batches import PlainAnswer, PlainRow, collate
from lapora.models.outputs import OutputModel

_TOLERANCE = 1e-4
_HALF_TOLERANCE = 1e-2
"""Tolerance: in half precision, kernels round differently for other shapes; a visible answer changes more."""
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
    try:
        with torch.no_grad():
            separate = _scores(output_model, packed=False)
            packed = _scores(output_model, packed=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a network without such an argument, or with an implementation of attention without masks
        return False
    half = output_model.network.dtype in (torch.float16, torch.bfloat16)
    tolerance = _HALF_TOLERANCE if half else _TOLERANCE
    return bool((packed - separate).abs().max() <= tolerance * separate.abs().max())


def _scores(output_model: OutputModel, *, packed: bool) -> torch.Tensor:
    rows = _rows(output_model)
    batch = collate(
        rows,
        range(len(rows)),
        pad_token_id=output_model.pad_token_id,
        padding_side=output_model.padding_side,
        device=output_model.device,
        packed=packed,
    )
    return output_model.logits(batch)


def _rows(output_model: OutputModel) -> list[PlainRow]:
    embeddings = cast(Any, output_model.network).get_input_embeddings()
    vocabulary = int(embeddings.weight.shape[0])
    ids = [token for token in range(1, vocabulary) if token != output_model.pad_token_id]
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
