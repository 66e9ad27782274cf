"""Logits of the C answers for a batch, for both kinds of model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from lapora.errors import NonFiniteRowError, NumericalError
from lapora.models.adapter import ModelKind
from lapora.models.batches import Batch, PaddingSide
from lapora.models.device_map import entry_device, is_offloaded
from lapora.models.lora_layers import BayesianLayer


class OutputModel:
    """The network ``f``: maps token ids to C logits.

    A sequence classifier returns its own logits. A causal language model returns the logits of the answer tokens at
    the last real token of the prompt; its head runs only at that position. Rows are padded on the right, and positions
    are left to the model: real tokens then have the positions that they have alone, however the model counts them.

    Args:
        model: The PEFT model, in eval mode.
        kind: ``causal`` or ``classifier``.
        pad_token_id: Padding id of the batches.
        answer_token_ids: Token id of each answer, for a causal model.
        recompute_blocks: Store only the inputs of transformer blocks, and recompute the blocks in the backward pass
            (gradient checkpointing). Always on for offloaded models.

    Attributes:
        equal_lengths: Whether only rows of equal length share a batch, because padding would change the logits; see
            :func:`lapora.models.padding_check.sees_padding`.

    Raises:
        ValueError: A causal model without ``answer_token_ids``.
    """

    def __init__(
        self,
        model: PeftModel,
        kind: ModelKind,
        pad_token_id: int,
        answer_token_ids: Sequence[int] | None = None,
        *,
        recompute_blocks: bool = False,
    ) -> None:
        if kind == "causal" and answer_token_ids is None:
            raise ValueError("a causal model requires answer_token_ids")
        self.model = model
        self.kind = kind
        self.pad_token_id = pad_token_id
        self.network = cast(nn.Module, model.get_base_model())
        # A graph would keep offloaded weights alive on the device.
        self.recompute_blocks = recompute_blocks or is_offloaded(self.network)
        self.device = entry_device(self.network)
        self.answer_token_ids = None if answer_token_ids is None else torch.tensor(answer_token_ids, device=self.device)
        self.equal_lengths = False
        accepted = inspect.signature(self.network.forward).parameters
        self._accepts = {name: name in accepted for name in ("attention_mask", "token_type_ids", "use_cache")}

    @property
    def max_positions(self) -> int | None:
        """Maximum number of positions of the network, or None if its configuration has none."""
        config = getattr(self.network, "config", None)
        text = config.get_text_config() if config is not None else None
        return cast("int | None", getattr(text, "max_position_embeddings", None))

    @property
    def padding_side(self) -> PaddingSide:
        """Right, for both kinds of model: on the left, padding would shift learned positions."""
        return "right"

    def logits(self, batch: Batch) -> Tensor:
        """Compute the logits ``f`` of the answers.

        Args:
            batch: B rows.

        Returns:
            ``(B, C)``, float32 or float64.

        Raises:
            NonFiniteRowError: A logit is NaN or infinite; the error has the first such row.
        """
        arguments: dict[str, Any] = {"input_ids": batch.input_ids}
        if self._accepts["attention_mask"]:
            arguments["attention_mask"] = batch.attention_mask
        if batch.token_type_ids is not None and self._accepts["token_type_ids"]:
            arguments["token_type_ids"] = batch.token_type_ids
        if self._accepts["use_cache"]:
            arguments["use_cache"] = False
        if self.kind == "classifier":
            logits = self.network(**arguments).logits
        else:
            logits = self._answer_logits(batch, arguments)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        finite = torch.isfinite(logits.detach()).all(dim=1)
        if not bool(finite.all()):
            row = batch.rows[int((~finite).nonzero()[0])]
            raise NonFiniteRowError(row, "the model's logits are not finite; try --dtype float32, or check the adapter")
        return logits

    def _answer_logits(self, batch: Batch, arguments: dict[str, Any]) -> Tensor:
        last = batch.last_positions()
        with _head_at(self.network, last, batch.input_ids.shape[1]):
            logits = self.network(**arguments).logits
        return _at(logits, last).index_select(1, cast(Tensor, self.answer_token_ids).to(logits.device))

    def token_view(self, layer: BayesianLayer, values: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Select the token positions of a layer that contribute to the logits.

        Args:
            layer: The layer.
            values: Input of the layer, or gradient of its output: ``(B, T, features)``, or ``(B, features)`` after
                the model has pooled the tokens.
            batch: The current batch.

        Returns:
            ``(B, T', features)``, and a ``(B, T')`` boolean mask of real tokens, or None without padding. A head that
            reads only the answer's position has ``T' = 1``.

        Raises:
            NumericalError: The shape does not identify rows and tokens.
        """
        if values.dim() == 2 and values.shape[0] == len(batch):
            return values.unsqueeze(1), None
        if values.dim() != 3 or values.shape[0] != len(batch):
            raise NumericalError(
                f"{layer.name}: its input has shape {tuple(values.shape)}, not (rows, tokens, features); "
                "this architecture is not supported"
            )
        if layer.reads_answer_only:
            return _at(values, self._head_positions(batch)).unsqueeze(1), None
        if values.shape[1] != batch.attention_mask.shape[1]:
            raise NumericalError(
                f"{layer.name}: {values.shape[1]} positions for {batch.attention_mask.shape[1]} tokens, so padding "
                "cannot be masked; this architecture is not supported"
            )
        return values, batch.attention_mask.to(values.device).bool() if batch.has_padding else None

    def _head_positions(self, batch: Batch) -> Tensor:
        if self.kind == "causal":
            return batch.last_positions()
        # A decoder with a classification head reads the last token whose id is not the padding id.
        positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        return ((batch.input_ids != self.pad_token_id) * positions).argmax(dim=1)


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """Select one position of each row: ``(B, T, F)`` to ``(B, F)``; with T = 1 it has been selected already."""
    if values.shape[1] == 1:
        return values[:, 0]
    return values[torch.arange(len(values), device=values.device), positions.to(values.device)]


@contextmanager
def _head_at(network: nn.Module, positions: Tensor, tokens: int) -> Iterator[None]:
    """Give the language-model head only one position of each row, so that it returns ``(B, 1, V)``.

    ``logits_to_keep`` would do so only where all rows have the same length. A head that is not a module, or that is
    not called on ``(B, T, features)``, returns the logits of all positions.

    Args:
        network: The base model.
        positions: Position for each row, ``(B,)``.
        tokens: T, with padding.
    """
    find = getattr(network, "get_output_embeddings", None)
    head = None if find is None else find()

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments or not isinstance(arguments[0], Tensor) or arguments[0].dim() != 3:
            return None
        if arguments[0].shape[:2] != (len(positions), tokens):
            return None
        return _at(arguments[0], positions).unsqueeze(1), *arguments[1:]

    if not isinstance(head, nn.Module):
        yield
        return
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
