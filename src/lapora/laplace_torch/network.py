"""Wrap an adapter as a model for laplace-torch: a dictionary of tensors in, logits out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from lapora.errors import UsageError
from lapora.models.batches import Batch
from lapora.models.lora_layers import BayesianLayer
from lapora.models.outputs import OutputModel


class AdapterNetwork(nn.Module):
    """The network to the logits of the answers, with the Bayesian weights as its only parameters.

    laplace-torch uses a model's parameters in the order of ``parameters()``, and the first one's dtype and device for
    everything. Only the layers' weights are listed here, in the layers' order, so that the dtype and the order of the
    frozen base do not matter.

    Args:
        output_model: The network.
        layers: The Bayesian layers.
    """

    def __init__(self, output_model: OutputModel, layers: Sequence[BayesianLayer]) -> None:
        super().__init__()
        self.network = output_model.network
        self.output_size: int | None = None  # set and read by laplace-torch
        self._logits = output_model.logits
        self._device = output_model.device
        names = {id(parameter): name for name, parameter in super().named_parameters()}
        weights = [cast(nn.Parameter, layer.module.weight) for layer in layers]
        self._bayesian = {names[id(weight)]: weight for weight in weights}

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module alone: layers of a quantized network keep theirs, which turns rounding off."""
        self.training = mode
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the names and Bayesian weights, in the order of the layers."""
        start = f"{prefix}." if prefix else ""
        return ((start + name, weight) for name, weight in self._bayesian.items() if recurse)

    def forward(self, data: Mapping[str, Any]) -> Tensor:
        """Compute the logits of the answers.

        Args:
            data: The result of :func:`as_inputs` or of a tokenizer: ``input_ids`` and, with padding,
                ``attention_mask``, ``(B, T)`` each, and optionally ``token_type_ids``; other keys are ignored. Padding
                may be on either side.

        Returns:
            ``(B, C)``.
        """
        ids = data["input_ids"].to(self._device)
        mask = data.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.to(self._device)
        types = data.get("token_type_ids")
        order = _order_without_left_padding(mask)
        return self._logits(
            Batch(
                input_ids=ids.gather(1, order),
                attention_mask=mask.gather(1, order),
                token_type_ids=None if types is None else types.to(self._device).gather(1, order),
                rows=tuple(data.get("rows", range(len(ids)))),
                has_padding=bool((mask == 0).any()),
            )
        )


def _order_without_left_padding(mask: Tensor) -> Tensor:
    """Return the positions of each row, ``(B, T)``, with the padding on its left moved to its right.

    Models with learned positions give other logits for rows padded on the left.
    """
    padding = (mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) + padding) % mask.shape[1]


def as_inputs(batch: Batch) -> dict[str, Any]:
    """Convert a batch to the dictionary that laplace-torch passes to the model."""
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "rows": batch.rows,
    }
    return inputs if batch.token_type_ids is None else {**inputs, "token_type_ids": batch.token_type_ids}


def check_layers_supported(layers: Sequence[BayesianLayer], what: str) -> None:
    """Check that laplace-torch supports all layers.

    Args:
        layers: The Bayesian layers.
        what: The option or function, for the error message.

    Raises:
        UsageError: A layer is part of a head, or outputs vocabulary logits.
    """
    if any(layer.role == "head" or layer.answer_rows_only for layer in layers):
        raise UsageError(f"{what} supports only LoRA layers below the head; use --subset lora, without LoRA on lm_head")


@contextmanager
def trainable(layers: Sequence[BayesianLayer]) -> Iterator[None]:
    """Make the layers' weights require gradients within the context; laplace-torch selects its parameters by it."""
    weights = [layer.module.weight for layer in layers]
    originals = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, required in zip(weights, originals, strict=True):
            weight.requires_grad_(required)
            weight.grad = None


@contextmanager
def silence_warnings() -> Iterator[None]:
    """Silence library warnings, such as those about ASDL's deprecated torch hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
