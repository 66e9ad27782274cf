"""The Gaussian posterior, one block per layer, in the eigenbasis of its curvature.

A block's precision is ``curvature + δ I``; in the basis ``U_g ⊗ U_a`` the curvature is diagonal with entries
``λ_ij``, so that every later computation is elementwise in δ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapora.curvature.kron import KronFactors
from lapora.errors import NumericalError
from lapora.model.bayesian_layers import BayesianLayer, Role

# Eigenvalues of a sum of squares are >= 0; round-off may push them below by a few units of float32.
_NEGATIVE_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class EigenBlock:
    """The posterior of one layer's weight W (o x i).

    Attributes:
        name: The layer's name.
        role: ``A``, ``B`` or ``head``.
        shape: ``(o, i)`` of the whole weight.
        leader: Name of the layer whose input basis this block shares.
        input_basis: ``U_a``, ``(i, i)``, columns are eigenvectors.
        gradient_basis: ``U_g``, ``(o', o')``; ``o' < o`` where only the answers' rows have curvature.
        eigenvalues: ``λ``, ``(o', i)`` in float64, the curvature's scale included.
        squared_norm: ``‖θ‖²`` of the whole weight at the MAP.
    """

    name: str
    role: Role
    shape: tuple[int, int]
    leader: str
    input_basis: Tensor
    gradient_basis: Tensor
    eigenvalues: Tensor
    squared_norm: float

    def to(self, device: torch.device, dtype: torch.dtype) -> EigenBlock:
        """The block with its bases on a device and in a type; eigenvalues stay in float64."""
        return EigenBlock(
            self.name,
            self.role,
            self.shape,
            self.leader,
            self.input_basis.to(device, dtype),
            self.gradient_basis.to(device, dtype),
            self.eigenvalues.to(device),
            self.squared_norm,
        )


def decompose(layers: Sequence[BayesianLayer], factors: Mapping[str, KronFactors]) -> list[EigenBlock]:
    """Turn each layer's Kronecker sums into an eigenbasis and ``λ_ij = scale · λ^g_i λ^a_j``.

    Shared input sums are decomposed once. Decompositions run in float64.

    Raises:
        NumericalError: A sum holds NaN or infinity, or is not positive semi-definite; the layer is named.
    """
    input_bases: dict[str, tuple[Tensor, Tensor]] = {}
    blocks = []
    for layer in layers:
        layer_factors = factors[layer.name]
        leader = layer_factors.leader
        if leader not in input_bases:
            input_bases[leader] = _eigen(layer_factors.input_sum, f"{leader} (inputs)")
        input_values, input_basis = input_bases[leader]
        gradient_values, gradient_basis = _eigen(layer_factors.gradient_sum, f"{layer.name} (gradients)")
        blocks.append(
            EigenBlock(
                name=layer.name,
                role=layer.role,
                shape=layer.shape,
                leader=leader,
                input_basis=input_basis,
                gradient_basis=gradient_basis,
                eigenvalues=layer_factors.scale * torch.outer(gradient_values, input_values),
                squared_norm=layer.squared_norm,
            )
        )
    return blocks


def _eigen(matrix: Tensor, where: str) -> tuple[Tensor, Tensor]:
    wide = matrix.double()
    if not bool(torch.isfinite(wide).all()):
        raise NumericalError(f"{where}: the curvature is not finite; try --dtype float32")
    values, vectors = torch.linalg.eigh(wide)
    largest = float(values[-1]) if len(values) else 0.0
    if float(values[0]) < -_NEGATIVE_TOLERANCE * max(largest, 0.0) - 1e-30:
        raise NumericalError(
            f"{where}: the curvature is not positive semi-definite "
            f"(least eigenvalue {float(values[0]):.3g}, greatest {largest:.3g})"
        )
    return values.clamp(min=0.0), vectors
