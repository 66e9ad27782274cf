"""Kronecker factors computed by laplace-torch's backends, for reproduction and comparison.

With N rows of T positions each and no padding, in the notation of :mod:`lapora.curvature.kfac`:

* ``asdl`` (``AsdlGGN``, used by the paper) returns ``1/N · (Σ a aᵀ) ⊗ (Σ g gᵀ)``: KFAC-expand times T.
* ``curvlinops`` (``CurvlinopsGGN``, laplace-torch's default) divides a batch's ``Σ a aᵀ`` by its rows and
  positions, which laplace-torch rescales to ``1/(N T)``: KFAC-expand. With ``kfac_approx="reduce"`` it returns
  KFAC-reduce.

Both sum the two factors over batches and divide by N, so that for rows of equal length the batch size does not
matter. Padding does: neither library masks it, so that its inputs are included in ``Σ a aᵀ``, and in curvlinops
also in T, the padded length of the batch. Without padding, curvlinops' expand is still
``1/N Σ_n 1/T_n Σ_t a_nt a_ntᵀ``, a mean over rows, where lapora takes the mean over tokens. The factors are returned
as computed, without rescaling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lapora.config import Progress
from lapora.curvature.backward import Linearisation, Observer
from lapora.curvature.kfac import KronFactors
from lapora.errors import NumericalError, UsageError
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

EngineResult = tuple[dict[str, KronFactors], float | None]


def asdl_factors(
    output_model: OutputModel,
    layers: Sequence[BayesianLayer],
    batches: Iterable[Batch],
    targets: Sequence[int | None],
    progress: Progress | None = None,
) -> EngineResult:
    """Sum laplace-torch's ``AsdlGGN.kron`` over the batches.

    Args:
        output_model: The network.
        layers: LoRA factors; other layers are not supported by ASDL.
        batches: The rows.
        targets: Their labels, only for the log-likelihood.
        progress: Progress callback: rows done, rows in total.

    Returns:
        The factors of each layer, with ASDL's scaling, and ``log p(y|X, θ_MAP)`` in nats, or None without labels.

    Raises:
        UsageError: A layer is not a LoRA factor, is read at the answer's position only, or runs several times in a
            pass.
        NumericalError: The logits do not depend on a layer, or the factors have other shapes than the layers.
    """
    return _summed("asdl", "AsdlGGN", output_model, layers, batches, targets, progress, {})


def curvlinops_factors(
    output_model: OutputModel,
    layers: Sequence[BayesianLayer],
    batches: Iterable[Batch],
    targets: Sequence[int | None],
    weight_sharing: Literal["expand", "reduce"] = "expand",
    progress: Progress | None = None,
) -> EngineResult:
    """Sum laplace-torch's ``CurvlinopsGGN.kron`` over the batches.

    Args:
        output_model: The network.
        layers: LoRA factors; other layers are not supported by curvlinops.
        batches: The rows.
        targets: Their labels, only for the log-likelihood.
        weight_sharing: curvlinops' ``kfac_approx``.
        progress: Progress callback: rows done, rows in total.

    Returns:
        The factors of each layer, with laplace-torch's scaling, and ``log p(y|X, θ_MAP)`` in nats, or None without
        labels.

    Raises:
        UsageError: A layer is not a LoRA factor, is read at the answer's position only, or runs several times in a
            pass.
        NumericalError: The logits do not depend on a layer, or the factors have other shapes than the layers.
    """
    options = {"kfac_approx": weight_sharing}
    return _summed("curvlinops", "CurvlinopsGGN", output_model, layers, batches, targets, progress, options)


def _summed(
    engine: str,
    backend_name: str,
    output_model: OutputModel,
    layers: Sequence[BayesianLayer],
    batches: Iterable[Batch],
    targets: Sequence[int | None],
    progress: Progress | None,
    options: dict[str, Any],
) -> EngineResult:
    check_layers_supported(layers, f"--engine {engine}")
    labelled = all(target is not None for target in targets)
    sums: list[list[Tensor]] = []
    log_likelihood, done = 0.0, 0
    with trainable(layers), silence_warnings():
        backend = _backend(backend_name, AdapterNetwork(output_model, layers))

        def run(batch: Batch) -> tuple[Tensor, Any]:
            _refuse_repeated(engine, output_model, layers, batch)
            labels = torch.tensor([cast(int, targets[row]) if labelled else 0 for row in batch.rows])
            try:
                return backend.kron(as_inputs(batch), labels.to(output_model.device), N=len(targets), **options)
            except RuntimeError as error:
                if "not have been used in the graph" not in str(error):
                    raise
                raise NumericalError(
                    f"--engine {engine}: the logits do not depend on every LoRA layer, as this engine requires; "
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
        raise NumericalError(
            f"--engine {engine}: the factors have other shapes than the LoRA layers; use --engine native"
        )
    sums_by_layer = {
        layer.name: KronFactors(input_sum=inputs, gradient_sum=gradients, count=1, input_owner=layer.name)
        for layer, (gradients, inputs) in zip(layers, sums, strict=True)
    }
    return sums_by_layer, log_likelihood if labelled else None


def _refuse_repeated(engine: str, output_model: OutputModel, layers: Sequence[BayesianLayer], batch: Batch) -> None:
    """Refuse layers that the model runs several times in a pass, of which the engines count one call only."""
    with Linearisation(output_model, layers, cast(Observer, None)) as linearisation:
        linearisation.probe(batch)
    for layer in layers:
        calls = len(output_model.layouts[layer.name])
        if calls > 1:
            raise UsageError(
                f"--engine {engine}: {layer.name} runs {calls} times in a pass (shared weights), which this engine "
                "does not support; use --engine native"
            )


def _backend(name: str, network: AdapterNetwork) -> Any:
    import laplace.curvature

    return getattr(laplace.curvature, name)(network, "classification")
