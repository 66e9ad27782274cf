"""laplace-torch's own Kronecker factors of an adapter, for reproduction and comparison.

With N rows, sequences of T positions each and no padding, in the terms of :mod:`lapora.curvature.kfac`:

* ``asdl`` (``AsdlGGN``, the paper's stack) gives ``1/N · (Σ a aᵀ) ⊗ (Σ g gᵀ)``: KFAC-expand times T.
* ``curvlinops`` (``CurvlinopsGGN``, laplace-torch's default) divides a batch's ``Σ a aᵀ`` by its rows and its
  positions, which laplace-torch turns into ``1/(N T)``: KFAC-expand itself. With ``kfac_approx="reduce"`` it
  gives KFAC-reduce itself.

Both sum the factors of the batches, A with A and B with B; since both divide by N, not by the batch, how equally
long rows are cut into batches does not matter. What does is padding: to both libraries it is a position like
any other, so its inputs enter ``Σ a aᵀ``, and in curvlinops also T, which is the batch's. Even without padding,
curvlinops' expand is ``1/N Σ_n 1/T_n Σ_t a_nt a_ntᵀ``, a mean over rows, where lapora takes one over tokens.
The factors are handed on as they come, unscaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lapora.config import Progress
from lapora.curvature.kfac import KronFactors
from lapora.errors import NumericalError
from lapora.laplace_torch.network import (
    AdapterNetwork,
    as_inputs,
    check_layers_supported,
    silence_warnings,
    trainable,
)
from lapora.models.batches import Batch
from lapora.models.batching import run_batches
from lapora.models.lora_layers import BayesianLayer
from lapora.models.outputs import OutputModel

Found = tuple[dict[str, KronFactors], float | None]


def asdl_factors(
    answers: OutputModel,
    layers: Sequence[BayesianLayer],
    batches: Iterable[Batch],
    targets: Sequence[int | None],
    progress: Progress | None = None,
) -> Found:
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
        NumericalError: The logits do not depend on a layer, or the factors are not those of the layers.
    """
    return _summed("asdl", "AsdlGGN", answers, layers, batches, targets, progress, {})


def curvlinops_factors(
    answers: OutputModel,
    layers: Sequence[BayesianLayer],
    batches: Iterable[Batch],
    targets: Sequence[int | None],
    weight_sharing: Literal["expand", "reduce"] = "expand",
    progress: Progress | None = None,
) -> Found:
    """Sum laplace-torch's ``CurvlinopsGGN.kron`` over the batches.

    Args:
        answers: The network.
        layers: LoRA factors; curvlinops takes no others here.
        batches: The rows.
        targets: Their labels, for the log-likelihood alone.
        weight_sharing: curvlinops' ``kfac_approx``.
        progress: Told of rows done.

    Returns:
        The factors of each layer, with the scaling that laplace-torch gives them, and ``log p(y|X, θ_MAP)``.

    Raises:
        UsageError: A layer is not a LoRA factor, or is read at the answer's position only.
        NumericalError: The logits do not depend on a layer, or the factors are not those of the layers.
    """
    options = {"kfac_approx": weight_sharing}
    return _summed("curvlinops", "CurvlinopsGGN", answers, layers, batches, targets, progress, options)


def _summed(
    engine: str,
    backend_name: str,
    answers: OutputModel,
    layers: Sequence[BayesianLayer],
    batches: Iterable[Batch],
    targets: Sequence[int | None],
    progress: Progress | None,
    options: dict[str, Any],
) -> Found:
    check_layers_supported(layers, f"--engine {engine}")
    labelled = all(target is not None for target in targets)
    sums: list[list[Tensor]] = []
    log_likelihood, done = 0.0, 0
    with trainable(layers), silence_warnings():
        backend = _backend(backend_name, AdapterNetwork(answers, layers))

        def run(batch: Batch) -> tuple[Tensor, Any]:
            labels = torch.tensor([cast(int, targets[row]) if labelled else 0 for row in batch.rows])
            try:
                return backend.kron(as_inputs(batch), labels.to(answers.device), N=len(targets), **options)
            except RuntimeError as error:
                if "not have been used in the graph" not in str(error):
                    raise
                raise NumericalError(
                    f"--engine {engine}: a LoRA layer has no part in the logits, and this engine needs all to have; "
                    "use --engine native"
                ) from error

        for batch, (loss, kron) in run_batches(batches, run):
            log_likelihood -= float(loss)
            factors = [[factor.detach() for factor in pair] for pair in kron.kfacs]
            if sums:
                factors = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(sums, factors, strict=True)]
            sums = factors
            done += len(batch)
            if progress is not None:
                progress(done, len(targets))
    shapes = [tuple(len(factor) for factor in pair) for pair in sums]
    if shapes != [layer.shape for layer in layers]:
        raise NumericalError(f"--engine {engine} returned factors of other layers than those asked for")
    found = {
        layer.name: KronFactors(input_sum=inputs, gradient_sum=gradients, count=1, input_owner=layer.name)
        for layer, (gradients, inputs) in zip(layers, sums, strict=True)
    }
    return found, log_likelihood if labelled else None


def _backend(name: str, network: AdapterNetwork) -> Any:
    import laplace.curvature

    return getattr(laplace.curvature, name)(network, "classification")
