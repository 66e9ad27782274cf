"""The paper's own stack: laplace-torch's AsdlGGN on the adapter, for reproduction and comparison.

ASDL's Kronecker factors are KFAC-expand divided by N instead of the number of tokens, and count padding as
tokens: at sequences of T tokens the curvature is T times larger than :mod:`lapora.curvature.kron` has it.
This is the only module that knows laplace-torch and ASDL.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lapora.curvature.kron import KronFactors
from lapora.errors import NumericalError, UsageError
from lapora.model.answers import AnswerModel
from lapora.model.batches import Batch
from lapora.model.bayesian_layers import BayesianLayer


class _DictModel(nn.Module):
    """The network as laplace-torch calls one: a dictionary of tensors in, logits out."""

    def __init__(self, answers: AnswerModel) -> None:
        super().__init__()
        self.network = answers.network
        self._logits = answers.logits

    def forward(self, data: dict[str, Any]) -> Tensor:
        """Logits ``(B, C)``."""
        return self._logits(data["batch"])


def asdl_factors(
    answers: AnswerModel,
    layers: Sequence[BayesianLayer],
    batches: Iterable[Batch],
    targets: Sequence[int | None],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, KronFactors], float | None]:
    """Sum laplace-torch's ``AsdlGGN.kron`` over the batches.

    Args:
        answers: The network.
        layers: LoRA factors; ASDL takes no others here.
        batches: The rows.
        targets: Their labels, for the log-likelihood alone.
        progress: Told of rows done.

    Returns:
        The factors of each layer, with the scaling that ASDL gives them, and ``log p(y|X, θ_MAP)``.

    Raises:
        UsageError: A layer is not a LoRA factor, or is read at the answer's position only.
        NumericalError: ASDL's factors are not those of the layers asked for.
    """
    if any(layer.role == "head" or layer.answer_rows_only for layer in layers):
        raise UsageError("--engine asdl covers LoRA inside the body alone: use --subset lora, without LoRA on lm_head")
    weights = [layer.module.weight for layer in layers]
    labelled = all(target is not None for target in targets)
    sums: list[list[Tensor]] = []
    log_likelihood, done = 0.0, 0
    for weight in weights:
        weight.requires_grad_(True)
    try:
        backend = _backend(answers)
        for batch in batches:
            labels = torch.tensor([cast(int, targets[row]) if labelled else 0 for row in batch.rows])
            # laplace-torch reads the batch size from input_ids; the network reads the batch itself.
            data = {"input_ids": batch.input_ids, "batch": batch}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # ASDL uses hooks that torch is about to retire
                loss, kron = backend.kron(data, labels.to(answers.device), N=len(targets))
            log_likelihood -= float(loss)
            factors = [[factor.detach() for factor in pair] for pair in kron.kfacs]
            if sums:
                factors = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(sums, factors, strict=True)]
            sums = factors
            done += len(batch)
            if progress is not None:
                progress(done, len(targets))
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
    shapes = [tuple(len(factor) for factor in pair) for pair in sums]
    if shapes != [layer.shape for layer in layers]:
        raise NumericalError("ASDL returned factors of other layers than those asked for")
    found = {
        layer.name: KronFactors(input_sum=inputs, gradient_sum=gradients, count=1, leader=layer.name)
        for layer, (gradients, inputs) in zip(layers, sums, strict=True)
    }
    return found, log_likelihood if labelled else None


def _backend(answers: AnswerModel) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from laplace.curvature import AsdlGGN
    return AsdlGGN(_DictModel(answers), "classification")
