"""Convert Kronecker-factored curvature to and from laplace-torch's classes.

laplace-torch stores one Kronecker product per layer as the eigenvectors and eigenvalues of its two factors:
``(Q_g ⊗ Q_a) diag(l_g ⊗ l_a + δ) (Q_g ⊗ Q_a)ᵀ``, for the elements of W in row-major order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lapora.errors import UsageError
from lapora.laplace_torch.network import AdapterNetwork, silence_warnings, trainable
from lapora.models.lora_layers import BayesianLayer
from lapora.models.outputs import OutputModel

if TYPE_CHECKING:
    from laplace import KronLaplace
    from laplace.utils.matrix import Kron, KronDecomposed


@dataclass(frozen=True, eq=False)
class KroneckerBlock:
    """The curvature of one layer's weight W ``(o, i)``, without a prior.

    Attributes:
        gradient_basis: ``Q_g``, ``(o, o)``, eigenvectors in columns.
        gradient_values: ``l_g``, ``(o,)``.
        input_basis: ``Q_a``, ``(i, i)``.
        input_values: ``l_a``, ``(i,)``.
    """

    gradient_basis: Tensor
    gradient_values: Tensor
    input_basis: Tensor
    input_values: Tensor


def kron_decomposed(blocks: Sequence[KroneckerBlock], precisions: Tensor | None = None) -> KronDecomposed:
    """Convert blocks to a ``KronDecomposed``.

    Args:
        blocks: The curvature of each layer.
        precisions: Prior precision of each layer; None is 0, the curvature alone.
    """
    with silence_warnings():
        from laplace.utils.matrix import KronDecomposed

    # laplace-torch annotates tuples of one element, but its code creates and reads lists of two.
    bases: list[Any] = [[block.gradient_basis, block.input_basis] for block in blocks]
    values: list[Any] = [[block.gradient_values, block.input_values] for block in blocks]
    return KronDecomposed(bases, values, deltas=precisions)


def kron_laplace(
    output_model: OutputModel,
    layers: Sequence[BayesianLayer],
    blocks: Sequence[KroneckerBlock],
    precisions: Sequence[float],
    *,
    classes: int,
    rows: int,
    log_likelihood: float,
) -> KronLaplace:
    """Build a ``KronLaplace`` in the state in which its ``fit`` would leave it.

    Args:
        output_model: The network.
        layers: The Bayesian layers.
        blocks: Their curvature, in the weights' dtype and on their device.
        precisions: Prior precision δ of each layer; equal ones become a scalar.
        classes: Number of answers C.
        rows: Number of rows N.
        log_likelihood: ``log p(y|X, θ_MAP)`` in nats, or 0 without labels.
    """
    with silence_warnings():
        from laplace import KronLaplace
        from laplace.utils.matrix import Kron

    network = AdapterNetwork(output_model, layers)
    network.output_size = classes
    network.eval()
    shared = len(set(precisions)) == 1
    prior = float(precisions[0]) if shared else torch.tensor(list(precisions), dtype=torch.float64)
    with trainable(layers):
        laplace = KronLaplace(network, "classification", prior_precision=prior)
        # The backend collects the parameters that require gradients when it is created.
        assert laplace.backend is not None
    laplace.mean = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    laplace.loss = -log_likelihood
    laplace.n_data, laplace.n_outputs = rows, classes
    laplace.H = kron_decomposed(blocks)
    factors: list[Any] = [
        [_matrix(block.gradient_basis, block.gradient_values), _matrix(block.input_basis, block.input_values)]
        for block in blocks
    ]
    laplace.H_facs = Kron(factors)
    return laplace


def kronecker_blocks(source: KronLaplace | KronDecomposed | Kron) -> list[KroneckerBlock]:
    """Extract the curvature of a laplace-torch object, without the prior.

    Args:
        source: A fitted ``KronLaplace``, or its curvature.

    Raises:
        UsageError: The object has not been fitted, is damped, or contains blocks that are not Kronecker products.
    """
    with silence_warnings():
        from laplace import KronLaplace
        from laplace.utils.matrix import Kron

    if isinstance(source, KronLaplace):
        if source.H_facs is None:
            raise UsageError("this KronLaplace has not been fitted; call its fit method first")
        source = source.posterior_precision  # the temperature is in the eigenvalues, the prior in the deltas
    if isinstance(source, Kron):
        source = source.decompose()
    if source.damping:
        raise UsageError("laplace-torch's damping is not supported; fit the KronLaplace without it")
    pairs: Iterable[Any] = zip(source.eigenvectors, source.eigenvalues, strict=True)
    blocks = []
    for bases, values in pairs:
        if len(bases) != 2:
            raise UsageError(
                "the curvature of a bias, or of a layer with a single weight, is not a Kronecker product and is not "
                "supported; fit the weights of linear layers only"
            )
        blocks.append(KroneckerBlock(bases[0], values[0].detach(), bases[1], values[1].detach()))
    return blocks


def _matrix(basis: Tensor, values: Tensor) -> Tensor:
    return (basis * values) @ basis.T
