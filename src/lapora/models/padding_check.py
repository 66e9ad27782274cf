"""Self-check of a model: padding must not change the logits of a row.

A mask hides padding from attention, but not from convolutions over tokens, Fourier transforms, or pooling at the last
position. No list of architectures would be complete, so two rows of different length are run alone and together, and
together once more with other embeddings of the padding: at equal shapes, so that it is as strict in half precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lapora.errors import AdapterError, LaporaWarning, NonFiniteRowError
from lapora.models.batches import Batch, Encoded, collate, text_lengths
from lapora.models.outputs import OutputModel, embedding_rows

_TEXTS = ("Yes or no ?", "Is it so that the cows are in the barn and the sheep in the office , or not ?")
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 5e-2
"""Tolerance: in half precision, or with 8-bit inputs, kernels round differently for other shapes."""
_LEAK = 2e-3
"""Tolerance beside other embeddings of the padding: 0 was seen where it is masked, 1.4e-2 with convolutions."""


class _Row(NamedTuple):
    input_ids: list[int]
    token_type_ids: list[int] | None = None
    answers: tuple[()] = ()


def check_padding(output_model: OutputModel, tokenizer: Any, quantized: bool) -> None:
    """Restrict batches to rows of equal length if padding changes the logits, and warn of it.

    Args:
        output_model: The network.
        tokenizer: Its tokenizer, with which two short texts are encoded.
        quantized: Whether the base is quantized.
    """
    if sees_padding(output_model, tokenizer, quantized):
        output_model.equal_lengths = True
        warnings.warn(
            f"{_model_type(output_model)}: padding changes the logits of a row; batches are of rows of equal length, "
            "which is slower",
            LaporaWarning,
            stacklevel=2,
        )


def check_pairs(output_model: OutputModel, encoded: Sequence[Encoded]) -> None:
    """Check that no text is padded to the length of the text that it is compared with, if padding changes the logits.

    Raises:
        AdapterError: It is: both texts of a row run in one batch.
    """
    if output_model.equal_lengths and any(len(set(text_lengths(row))) > 1 for row in encoded):
        raise AdapterError(
            f"{_model_type(output_model)}: pairs of texts are not supported: padding changes its logits, and the "
            "shorter text of a pair is padded; train the reward model on another base, such as BERT or Llama"
        )


def _model_type(output_model: OutputModel) -> str:
    return str(getattr(getattr(output_model.network, "config", None), "model_type", "this base model"))


def sees_padding(output_model: OutputModel, tokenizer: Any, quantized: bool = False) -> bool:
    """Return whether two rows of different length have other logits together than alone."""
    rows = _rows(output_model, tokenizer)
    if len(rows) < 2:
        return False
    try:
        with torch.no_grad():
            alone = torch.cat([_logits(output_model, [row]) for row in rows])
    except (NonFiniteRowError, AdapterError):  # a row of the data will raise the same error, with its name
        return False
    try:
        with torch.no_grad():
            together = _logits(output_model, rows)
    except (NonFiniteRowError, AdapterError):  # for example, an attention window with padding only
        return True
    half = quantized or output_model.network.dtype in (torch.float16, torch.bfloat16)
    tolerance = _HALF_TOLERANCE if half else _TOLERANCE
    largest = float(alone.abs().max())
    if float((together - alone).abs().max()) > tolerance * largest:
        return True
    embeddings = _embeddings(output_model)
    if not half or embeddings is None:
        return False
    try:
        beside_noise = _with_other_padding(output_model, embeddings, rows)
    except NonFiniteRowError:
        return True
    return float((beside_noise - together).abs().max()) > _LEAK * largest


def _embeddings(output_model: OutputModel) -> nn.Module | None:
    """Return the layer of the token embeddings, or None if the network does not say."""
    try:
        return cast(nn.Module, cast(Any, output_model.network).get_input_embeddings())
    except (AttributeError, NotImplementedError):
        return None


def _with_other_padding(output_model: OutputModel, embeddings: nn.Module, rows: list[_Row]) -> torch.Tensor:
    """Return the logits with noise added to the embeddings of the padding."""
    batch = _batch(output_model, rows)

    def add_noise(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor | None:
        if output.shape[:-1] != batch.attention_mask.shape:
            return None
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        padding = (1 - batch.attention_mask).to(output).unsqueeze(-1)
        return output + output.std() * noise * padding

    handle = embeddings.register_forward_hook(add_noise)
    try:
        with torch.no_grad():
            return output_model.logits(batch)
    finally:
        handle.remove()


def _rows(output_model: OutputModel, tokenizer: Any) -> list[_Row]:
    encoded = [_Row(list(tokenizer(text)["input_ids"])) for text in _TEXTS]
    short, long = encoded
    limit = output_model.max_positions
    if limit is not None and len(long.input_ids) > limit:
        return []
    known = embedding_rows(output_model.network)
    if known is not None and max([0, *short.input_ids, *long.input_ids]) >= known:
        return []
    return [] if not short.input_ids or len(short.input_ids) == len(long.input_ids) else encoded


def _logits(output_model: OutputModel, rows: list[_Row]) -> torch.Tensor:
    return output_model.logits(_batch(output_model, rows))


def _batch(output_model: OutputModel, rows: list[_Row]) -> Batch:
    return collate(
        rows,
        range(len(rows)),
        pad_token_id=output_model.pad_token_id,
        padding_side=output_model.padding_side,
        device=output_model.device,
    )
