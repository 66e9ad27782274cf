"""Kronecker-factored curvature as laplace-torch's own objects, both ways.

laplace-torch holds one Kronecker product per layer by the eigenvectors and eigenvalues of its two factors:
``(Q_g ⊗ Q_a) diag(l_g ⊗ l_a + δ) (Q_g ⊗ Q_a)ᵀ``, of W's elements row by row.
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
    """The curvature of one layer's weight W (o x i), without a prior.

    Attributes:
        gradient_basis: ``Q_g``, ``(o, o)``, columns are eigenvectors.
        gradient_values: ``l_g``, ``(o,)``.
        input_basis: ``Q_a``, ``(i, i)``.
        input_values: ``l_a``, ``(i,)``.
    """

    gradient_basis: Tensor
    gradient_values: Tensor
    input_basis: Tensor
    input_values: Tensor


def kron_decomposed(blocks: Sequence[KroneckerBlock], precisions: Tensor | None = None) -> KronDecomposed:
    """The blocks as a ``KronDecomposed``, with one prior precision each (by default 0: the curvature alone)."""
    with silence_warnings():
        from laplace.utils.matrix import KronDecomposed

    # laplace-torch's own annotations say tuples of one; its code makes and reads lists of two.
    bases: list[Any] = [[block.gradient_basis, block.input_basis] for block in blocks]
    values: list[Any] = [[block.gradient_values, block.input_values] for block in blocks]
    return KronDecomposed(bases, values, deltas=precisions)


def kron_laplace(
    answers: OutputModel,
    layers: Sequence[BayesianLayer],
    blocks: Sequence[KroneckerBlock],
    precisions: Sequence[float],
    *,
    classes: int,
    rows: int,
    log_likelihood: float,
) -> KronLaplace:
    """A ``KronLaplace`` that stands where its own ``fit`` would have left it.

    Args:
        answers: The network.
        layers: Its Bayesian layers.
        blocks: Their curvature, in the weights' type and on their device.
        precisions: Prior precision δ of each layer; one that all share is handed on as a scalar.
        classes: Number of answers C.
        rows: N.
        log_likelihood: ``log p(y|X, θ_MAP)``, or 0 where the rows had no labels.
    """
    with silence_warnings():
        from laplace import KronLaplace
        from laplace.utils.matrix import Kron

    network = AdapterNetwork(answers, layers)
    network.output_size = classes
    network.eval()
    shared = len(set(precisions)) == 1
    prior = float(precisions[0]) if shared else torch.tensor(list(precisions), dtype=torch.float64)
    with trainable(layers):
        laplace = KronLaplace(network, "classification", prior_precision=prior)
        # The backend lists its parameters when it is made: those that require gradients now.
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
    """The curvature that a laplace-torch object holds; a prior that has been added is left out.

    Raises:
        UsageError: The object has not been fitted, is damped, or holds something besides Kronecker products.
    """
    with silence_warnings():
        from laplace import KronLaplace
        from laplace.utils.matrix import Kron

    if isinstance(source, KronLaplace):
        if source.H_facs is None:
            raise UsageError("this KronLaplace has not been fitted")
        source = source.posterior_precision  # its temperature is in the eigenvalues, its prior in the deltas
    if isinstance(source, Kron):
        source = source.decompose()
    if source.damping:
        raise UsageError("laplace-torch's damping is not a prior precision, and lapora has nothing of the kind")
    pairs: Iterable[Any] = zip(source.eigenvectors, source.eigenvalues, strict=True)
    blocks = []
    for bases, values in pairs:
        if len(bases) != 2:
            raise UsageError(
                "laplace-torch holds the curvature of a bias, or of a layer of one weight, apart; "
                "lapora's blocks are Kronecker products of weights alone"
            )
        blocks.append(KroneckerBlock(bases[0], values[0].detach(), bases[1], values[1].detach()))
    return blocks


def _matrix(basis: Tensor, values: Tensor) -> Tensor:
    return (basis * values) @ basis.T
