"""Mean and covariance of the logits under the linearised model (Laplace-LoRA, Eqs. 11 and 12).

``f* ~ N(f_MAP, Λ)`` with ``Λ_cc' = Σ_ℓ Σ_ij R_c,ij R_c',ij / (λ_ij + δ)`` and ``R_c = U_gᵀ G_c U_a``, where
``G_c = Σ_t g_tc a_tᵀ`` is the gradient of one logit combination in one layer. Each layer is contracted as
soon as its gradients are there: no (batch x classes x parameters) Jacobian is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapora.errors import NumericalError
from lapora.model.batches import Batch
from lapora.model.bayesian_layers import BayesianLayer
from lapora.posterior.gaussian import EigenBlock


@dataclass(frozen=True)
class LogitMoments:
    """Mean and covariance of the logits of B rows.

    Attributes:
        mean: ``f_MAP``, ``(B, C)``.
        covariance: ``(B, K, K)`` in float64: of the C logits when ``K = C``, of the differences
            ``f_c - f_0`` when ``K = C - 1``.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def of_differences(self) -> bool:
        """Whether the covariance is that of the C-1 differences to the first class."""
        return self.covariance.shape[1] == self.mean.shape[1] - 1


class CovarianceObserver:
    """Adds up Λ over the layers; see :class:`lapora.curvature.linearisation.Observer`.

    Several prior precisions are served at once, since the rotated gradients do not depend on them.

    Args:
        blocks: The posterior of each layer, on the model's device.
        precisions: Prior precision δ of each block under each of D priors: ``(D, number of blocks)``.
        directions: K, how many directions a batch will have; decides which rotation is cheaper.
    """

    def __init__(self, blocks: Sequence[EigenBlock], precisions: Tensor, *, directions: int = 1) -> None:
        self._blocks = {block.name: block for block in blocks}
        self._precisions = {
            block.name: precisions[:, index].double().to(block.eigenvalues.device) for index, block in enumerate(blocks)
        }
        self._variances: dict[str, Tensor] = {}
        self._rotated_inputs: dict[str, Tensor | None] = {}
        self._gradients: dict[str, list[Tensor]] = {}
        self._followers: dict[str, int] = {}
        for block in blocks:
            self._followers[block.leader] = self._followers.get(block.leader, 0) + 1
        self._directions = directions
        self._covariance: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        """Forget the last batch."""
        self._rotated_inputs = {}
        self._gradients = {}
        self._covariance = None

    def covariance(self, rows: int, directions: int) -> Tensor:
        """Λ of the batch just run: ``(D, B, K, K)``, float64."""
        if self._covariance is None:
            depth = len(next(iter(self._precisions.values())))
            return torch.zeros(depth, rows, directions, directions, dtype=torch.float64)
        return self._covariance

    def see_input(self, layer: BayesianLayer, leader: str, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Keep the layer's input, rotated at once where tokens are fewer than the gradient rows to rotate."""
        block = self._blocks[layer.name]
        if not self._shares_basis(layer, leader):
            return inputs
        if leader not in self._rotated_inputs:
            rows_to_rotate = len(block.gradient_basis) * self._directions * self._followers.get(leader, 1)
            early = inputs.shape[1] <= rows_to_rotate
            self._rotated_inputs[leader] = inputs @ block.input_basis if early else None
        rotated = self._rotated_inputs[leader]
        return inputs if rotated is None else rotated

    def see_gradient(self, layer: BayesianLayer, kept: Tensor | None, gradient: Tensor) -> None:
        """Rotate one direction's gradient into the block's eigenbasis: ``R = U_gᵀ (Σ_t g_t a_tᵀ) U_a``."""
        assert kept is not None
        block = self._blocks[layer.name]
        tokens, inputs = gradient.shape[1], kept.shape[2]
        if tokens <= inputs:  # fewer tokens than columns: rotate the gradient's tokens
            rotated = (gradient @ block.gradient_basis).transpose(1, 2) @ kept
        else:
            rotated = block.gradient_basis.T @ (gradient.transpose(1, 2) @ kept)
        leader = block.leader
        if self._rotated_inputs.get(leader) is not kept:
            rotated = rotated @ block.input_basis
        self._gradients.setdefault(layer.name, []).append(rotated.flatten(1))

    def finish(self, layer: BayesianLayer) -> None:
        """Contract the layer's K gradients with its posterior variance, and drop them."""
        gradients = self._gradients.pop(layer.name)
        count, rows = len(gradients), len(gradients[0])
        variance = self._variance(layer.name, gradients[0].dtype)
        depth = variance.shape[1]
        if self._covariance is None:
            self._covariance = torch.zeros(depth, rows, count, count, dtype=torch.float64, device=variance.device)
        for first in range(count):
            for second in range(first, count):
                term = ((gradients[first] * gradients[second]) @ variance).T.double()
                self._covariance[:, :, first, second] += term
                if second != first:
                    self._covariance[:, :, second, first] += term

    def _variance(self, name: str, dtype: torch.dtype) -> Tensor:
        """``1 / (λ + δ)`` of a block under each prior, ``(parameters, D)``."""
        if name not in self._variances:
            precision = self._blocks[name].eigenvalues.reshape(-1, 1) + self._precisions[name]
            if not bool((precision > 0).all()):
                raise NumericalError(f"{name}: the posterior precision is not positive; tune the prior again")
            self._variances[name] = (1.0 / precision).to(dtype)
        return self._variances[name]

    def _shares_basis(self, layer: BayesianLayer, leader: str) -> bool:
        return self._blocks[layer.name].leader == leader
