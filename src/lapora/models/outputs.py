"""From a batch to the logits of the C answers, for both kinds of model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
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
    """The network ``f``: token ids in, C logits out.

    A sequence classifier's logits are its own. A causal language model's are those of the answer tokens at
    the last real token of the prompt; where the architecture allows, its head runs at that position alone.

    Args:
        model: The PEFT model, in eval mode.
        kind: ``causal`` or ``classifier``.
        pad_token_id: The id that batches are padded with.
        answer_token_ids: Vocabulary index of each answer, for a causal model.
        rerun_blocks: Keep a transformer block's inputs alone for the backward pass, and run it again then.
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
            raise ValueError("a causal model needs the token ids of its answers")
        self.model = model
        self.kind = kind
        self.pad_token_id = pad_token_id
        self.network = cast(nn.Module, model.get_base_model())
        # Where weights come and go, a graph would hold on to those that went.
        self.recompute_blocks = recompute_blocks or is_offloaded(self.network)
        self.device = entry_device(self.network)
        self.answer_token_ids = None if answer_token_ids is None else torch.tensor(answer_token_ids, device=self.device)
        accepted = inspect.signature(self.network.forward).parameters
        self._accepts = {name: name in accepted for name in ("position_ids", "token_type_ids", "use_cache")}
        self._keeps_positions = kind == "causal" and "logits_to_keep" in accepted

    @property
    def max_positions(self) -> int | None:
        """How many positions the network has, where its configuration says."""
        config = getattr(self.network, "config", None)
        text = config.get_text_config() if config is not None else None
        return cast("int | None", getattr(text, "max_position_embeddings", None))

    @property
    def padding_side(self) -> PaddingSide:
        """Left for a causal model, so that every row's last token stands in one column."""
        return "left" if self.kind == "causal" else "right"

    def logits(self, batch: Batch) -> Tensor:
        """Logits ``f`` of the answers, ``(B, C)``, in float32 at least.

        Raises:
            NonFiniteRowError: A logit is NaN or infinite; the message names the first such row.
        """
        arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
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
        if self._accepts["position_ids"]:
            # Left padding must not move the tokens: positions count real tokens only.
            arguments["position_ids"] = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        kept, columns = self._answer_columns(batch)
        if self._keeps_positions:
            arguments["logits_to_keep"] = kept
        logits = self.network(**arguments).logits
        rows = torch.arange(len(batch), device=logits.device)
        return logits[rows, columns.to(logits.device)][:, cast(Tensor, self.answer_token_ids).to(logits.device)]

    def _answer_columns(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Positions at which the head runs, and the column of each row's answer among them."""
        last = batch.last_positions()
        if not self._keeps_positions:
            return last, last
        return torch.unique(last, return_inverse=True)

    def token_view(self, layer: BayesianLayer, values: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The tokens that a layer really serves.

        Args:
            layer: The layer.
            values: Its input or the gradient of its output: ``(B, T, features)``, or ``(B, features)``
                where the model has pooled its tokens already.
            batch: The batch that is being run.

        Returns:
            ``(B, T', features)`` with the positions that count, and a ``(B, T')`` boolean mask of real
            tokens, or None when all are. A head that reads the answer's position alone has ``T' = 1``.

        Raises:
            NumericalError: The layer's input has a layout that cannot be told apart into rows and tokens.
        """
        if values.dim() == 2 and values.shape[0] == len(batch):
            return values.unsqueeze(1), None
        if values.dim() != 3 or values.shape[0] != len(batch):
            raise NumericalError(
                f"{layer.name}: its input has shape {tuple(values.shape)}, not (rows, tokens, features); "
                "lapora cannot tell which token belongs to which row here"
            )
        if layer.reads_answer_only:
            columns = self._head_columns(batch).to(values.device)
            rows = torch.arange(len(batch), device=values.device)
            return values[rows, columns].unsqueeze(1), None
        if values.shape[1] != batch.attention_mask.shape[1]:
            raise NumericalError(
                f"{layer.name}: {values.shape[1]} positions for {batch.attention_mask.shape[1]} tokens; "
                "lapora cannot tell which of them are padding"
            )
        return values, batch.attention_mask.to(values.device).bool() if batch.has_padding else None

    def _head_columns(self, batch: Batch) -> Tensor:
        if self.kind == "causal":
            return self._answer_columns(batch)[1]
        # A decoder with a classification head reads the last token that is not the padding token.
        positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        return ((batch.input_ids != self.pad_token_id) * positions).argmax(dim=1)
