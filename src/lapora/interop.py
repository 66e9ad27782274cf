"""Convert posteriors to and from laplace-torch's classes.

A posterior of structure ``kron`` corresponds to laplace-torch's ``KronDecomposed`` and, with the model, to its
``KronLaplace``. ::


    precision = to_laplace_torch("my-adapter")       # posterior precision, one Kronecker product per layer
    fitted = open_fitted(ModelSettings("my-adapter"), "default")
    laplace = to_kron_laplace(fitted)                # laplace-torch's own class, ready to predict
    probabilities = laplace(tokenizer(texts, return_tensors="pt", padding=True))
    blocks = from_laplace_torch(laplace, fitted.layers)

Curvature that is not a Kronecker product (EKFAC, diagonal, low-rank, the answers' rows of a language-model head, a
head's bias as an additional input) is not supported by these classes, and is refused. A truncated basis is completed:
``d²`` numbers for a side of dimension d.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lapora.errors import LaporaWarning, UsageError
from lapora.laplace_torch import kron_laplace as room
from lapora.laplace_torch.kron_laplace import KroneckerBlock
from lapora.models.lora_layers import BayesianLayer
from lapora.models.outputs import OutputModel
from lapora.posterior.gaussian import BlockPosterior, EigenBlock
from lapora.storage.saved import SavedPosterior, posterior_folder

if TYPE_CHECKING:
    from lapora.laplace_torch.kron_laplace import Kron, KronDecomposed, KronLaplace
    from lapora.workflows.task_model import Fitted

# Relative tolerance: eigenvalues of a Kronecker product are an outer product up to rounding in float64.
_RANK_ONE_TOLERANCE = 1e-9


def to_laplace_torch(
    posterior: SavedPosterior | Path | str, name: str = "default", dtype: torch.dtype = torch.float64
) -> KronDecomposed:
    """Convert the posterior precision of a saved posterior, prior included.

    Args:
        posterior: The posterior, or the folder that contains ``laplace/``: the adapter's, or ``--output-dir``.
        name: Name of the posterior, if a folder is given.
        dtype: Dtype of the tensors.

    Returns:
        One Kronecker product per layer, in the saved order; ``deltas`` are the layers' prior precisions. Of a
        regression with a noise scale s both are divided by s².

    Raises:
        UsageError: The structure is not ``kron``.
        PosteriorError: The posterior is missing or damaged.
    """
    if not isinstance(posterior, SavedPosterior):
        posterior = SavedPosterior(posterior_folder(Path(posterior), name))
    blocks, precisions = _read(posterior)
    kronecker = _kronecker_blocks(blocks, torch.device("cpu"), dtype)
    return room.kron_decomposed(kronecker, torch.tensor(precisions, dtype=dtype))


def to_kron_laplace(fitted: Fitted) -> KronLaplace:
    """Return the posterior of a fitted adapter as a ``KronLaplace``; see :func:`kron_laplace`.

    Raises:
        UsageError: The structure is not ``kron``, or the likelihood is not categorical.
    """
    manifest = fitted.posterior.manifest
    likelihood = manifest.task.get("likelihood", "categorical")
    if likelihood != "categorical":
        raise UsageError(f"likelihood {likelihood} is not converted to a KronLaplace; only categorical is")
    if manifest.answers.score is not None:
        raise UsageError("to_kron_laplace: laplace-torch has no scores of whole answers; use lapora's own predictions")
    blocks, precisions = _read(fitted.posterior)
    return kron_laplace(
        fitted.model.outputs,
        fitted.layers,
        blocks,
        precisions,
        classes=len(fitted.model.choices),
        rows=manifest.data.n,
        log_likelihood=manifest.log_likelihood,
    )


def kron_laplace(
    answers: OutputModel,
    layers: Sequence[BayesianLayer],
    blocks: Sequence[EigenBlock],
    prior_precision: float | Sequence[float],
    *,
    classes: int,
    rows: int,
    log_likelihood: float | None = None,
) -> KronLaplace:
    """Build a ``KronLaplace`` over an adapter's weights with a given posterior.

    It predicts, samples, and computes and optimizes its marginal likelihood as after its own ``fit``. To call ``fit``
    again, make the layers' weights require gradients first. Its input is the result of a tokenizer, or of
    :func:`lapora.laplace_torch.network.as_inputs` for a batch. It computes Jacobians by ``torch.func``:
    ``(rows, C, parameters)`` in memory, and not supported for a base quantized by bitsandbytes.

    Args:
        answers: The network.
        layers: Its Bayesian layers.
        blocks: Their posterior.
        prior_precision: δ, or one for each layer.
        classes: Number of answers C.
        rows: Number of rows N that the posterior was fitted to.
        log_likelihood: ``log p(y|X, θ_MAP)`` in nats; without it the marginal likelihood lacks this constant.

    Raises:
        UsageError: A block is not a Kronecker product.
    """
    weight = layers[0].module.weight
    precisions = [prior_precision] * len(blocks) if isinstance(prior_precision, int | float) else prior_precision
    return room.kron_laplace(
        answers,
        layers,
        _kronecker_blocks(blocks, weight.device, weight.dtype),
        precisions,
        classes=classes,
        rows=rows,
        log_likelihood=log_likelihood or 0.0,
    )


def from_laplace_torch(
    source: KronLaplace | KronDecomposed | Kron, layers: Sequence[BayesianLayer]
) -> list[EigenBlock]:
    """Convert laplace-torch's curvature to blocks that can be saved, tuned and used for predictions.

    The blocks do not include the prior precision (``deltas``, ``prior_precision``); they include a temperature.

    Args:
        source: A fitted ``KronLaplace`` of the adapter, its posterior precision, or a ``Kron``.
        layers: The Bayesian layers, in the order of the model's parameters.

    Returns:
        One block per layer; layers that share an input basis in the source share it here.

    Raises:
        UsageError: The source's blocks are not Kronecker products, or do not match the layers.
    """
    blocks = room.kronecker_blocks(source)
    shapes = [(len(block.gradient_values), len(block.input_values)) for block in blocks]
    if shapes != [layer.shape for layer in layers]:
        raise UsageError(
            f"laplace-torch's {len(blocks)} blocks do not match the {len(layers)} layers given, in their order"
        )
    input_owners: dict[int, str] = {}
    return [
        EigenBlock(
            name=layer.name,
            role=layer.role,
            shape=layer.shape,
            input_owner=input_owners.setdefault(id(block.input_basis), layer.name),
            input_basis=block.input_basis,
            gradient_basis=block.gradient_basis,
            eigenvalues=torch.outer(block.gradient_values.double(), block.input_values.double()),
            squared_norm=layer.squared_norm,
        )
        for layer, block in zip(layers, blocks, strict=True)
    ]


def _read(posterior: SavedPosterior) -> tuple[list[EigenBlock], list[float]]:
    """Return a saved posterior's blocks and the prior precision of each, divided by s² of a regression's noise."""
    structure = posterior.manifest.structure
    if structure != "kron":
        raise UsageError(
            f"{posterior.folder}: structure {structure} cannot be converted to laplace-torch; only kron can"
        )
    prior = posterior.prior
    pruned = None if prior.averaged is None else prior.averaged.pruned()
    if pruned is not None and (len(pruned.precisions) > 1 or pruned.temperatures != [1.0]):
        warnings.warn(
            f"{posterior.folder}: predictions average over prior precisions and temperatures; laplace-torch has one "
            f"precision and no temperature, and gets {prior.precisions.describe()} and undivided logits "
            "(`lapora tune-prior --method marglik` or `validation` chooses one precision)",
            LaporaWarning,
            stacklevel=3,
        )
    variance = prior.noise_scale**2
    blocks = cast(BlockPosterior, posterior.gaussian()).blocks
    deltas = prior.precisions.per_layer(posterior.manifest.parameters)
    return (
        [replace(block, eigenvalues=block.eigenvalues / variance) for block in blocks],
        [float(delta) / variance for delta in deltas],
    )


def _kronecker_blocks(blocks: Sequence[EigenBlock], device: torch.device, dtype: torch.dtype) -> list[KroneckerBlock]:
    """Factor every block's eigenvalues; layers that share an input basis still share one tensor."""
    input_bases: dict[str, Tensor] = {}
    found = []
    for block in blocks:
        gradient_basis, input_basis = _full_bases(block)
        gradient_values, input_values = _outer_factors(block)
        if block.input_owner not in input_bases:
            input_bases[block.input_owner] = input_basis.to(device, dtype)
        found.append(
            KroneckerBlock(
                gradient_basis=gradient_basis.to(device, dtype),
                gradient_values=gradient_values.to(device, dtype),
                input_basis=input_bases[block.input_owner],
                input_values=input_values.to(device, dtype),
            )
        )
    return found


def _full_bases(block: EigenBlock) -> tuple[Tensor, Tensor]:
    """Return ``U_g`` and ``U_a`` completed to square matrices, as laplace-torch requires."""
    found = []
    for basis, size in zip((block.gradient_basis, block.input_basis), block.shape, strict=True):
        if basis is None or len(basis) != size:
            raise UsageError(
                f"{block.name}: its curvature is not a Kronecker product over the whole weight (it is diagonal, or of "
                "the answers' rows alone), which laplace-torch's Kronecker classes require"
            )
        complement = torch.linalg.qr(basis.double(), mode="complete").Q[:, basis.shape[1] :]
        found.append(torch.cat([basis, complement.to(basis)], dim=1))
    return found[0], found[1]


def _outer_factors(block: EigenBlock) -> tuple[Tensor, Tensor]:
    """Return ``l_g`` and ``l_a`` with ``λ = l_g l_aᵀ``, from the row and column of the largest eigenvalue.

    The last eigenvalue of a truncated side is repeated for all directions outside its basis.
    """
    eigenvalues = block.eigenvalues.double()
    largest = eigenvalues.max()
    if float(largest) <= 0:
        return eigenvalues.new_zeros(block.shape[0]), eigenvalues.new_zeros(block.shape[1])
    row, column = divmod(int(eigenvalues.argmax()), eigenvalues.shape[1])
    gradient_values = eigenvalues[:, column] / largest.sqrt()
    input_values = eigenvalues[row] / largest.sqrt()
    errors = (torch.outer(gradient_values, input_values) - eigenvalues).abs()
    if not bool((errors <= _RANK_ONE_TOLERANCE * eigenvalues + 1e-15 * largest).all()):
        raise UsageError(
            f"{block.name}: its eigenvalues are not an outer product (EKFAC's are not), as laplace-torch requires; "
            "fit with --structure kron"
        )
    repeated = [
        torch.cat([values, values[-1:].expand(size - len(values))])
        for values, size in zip((gradient_values, input_values), block.shape, strict=True)
    ]
    return repeated[0], repeated[1]
