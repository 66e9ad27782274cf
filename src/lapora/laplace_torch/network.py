"""The adapter as laplace-torch wants a model: a dictionary of tensors in, logits out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lapora.errors import UsageError
from lapora.models.batches import Batch
from lapora.models.lora_layers import BayesianLayer
from lapora.models.outputs import OutputModel


class AdapterNetwork(nn.Module):
    """The network to answer logits, with the Bayesian weights as its only parameters.

    laplace-torch takes a model's parameters in the order in which the model lists them, and its first one for
    the type and device of everything. Here they are the layers' weights, in the layers' order: a frozen base
    in another type or order does not matter.

    Args:
        answers: The network.
        layers: The Bayesian layers.
    """

    def __init__(self, answers: OutputModel, layers: Sequence[BayesianLayer]) -> None:
        super().__init__()
        self.network = answers.network
        self.output_size: int | None = None  # laplace-torch sets and reads it
        self._logits = answers.logits
        self._device = answers.device
        names = {id(parameter): name for name, parameter in super().named_parameters()}
        weights = [cast(nn.Parameter, layer.module.weight) for layer in layers]
        self._bayesian = {names[id(weight)]: weight for weight in weights}

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and Bayesian weights, in the layers' order."""
        start = f"{prefix}." if prefix else ""
        return ((start + name, weight) for name, weight in self._bayesian.items() if recurse)

    def forward(self, data: Mapping[str, Any]) -> Tensor:
        """Logits of the answers.

        Args:
            data: What :func:`as_inputs` makes, or what a tokenizer returns: ``input_ids`` and, where there is
                padding, ``attention_mask``, ``(B, T)`` each; other keys but ``token_type_ids`` are ignored.

        Returns:
            ``(B, C)``.
        """
        ids = data["input_ids"].to(self._device)
        mask = data.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.to(self._device)
        types = data.get("token_type_ids")
        return self._logits(
            Batch(
                input_ids=ids,
                attention_mask=mask,
                token_type_ids=None if types is None else types.to(self._device),
                rows=tuple(data.get("rows", range(len(ids)))),
                has_padding=bool((mask == 0).any()),
            )
        )


def as_inputs(batch: Batch) -> dict[str, Any]:
    """A batch as the dictionary that laplace-torch passes around."""
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "rows": batch.rows,
    }
    return inputs if batch.token_type_ids is None else {**inputs, "token_type_ids": batch.token_type_ids}


def check_layers_supported(layers: Sequence[BayesianLayer], what: str) -> None:
    """Say that laplace-torch cannot hold a layer's posterior as lapora does.

    Raises:
        UsageError: A layer is part of a head, or writes vocabulary logits.
    """
    if any(layer.role == "head" or layer.answer_rows_only for layer in layers):
        raise UsageError(f"{what} covers LoRA inside the body alone: use --subset lora, without LoRA on lm_head")


@contextmanager
def trainable(layers: Sequence[BayesianLayer]) -> Iterator[None]:
    """Let the layers' weights require gradients for a while; laplace-torch finds its parameters by that."""
    weights = [layer.module.weight for layer in layers]
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
            weight.grad = None


@contextmanager
def silence_warnings() -> Iterator[None]:
    """Without the warnings of libraries about each other: ASDL uses hooks that torch is about to retire."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
