"""Mean and covariance of the logits under the linearised model (Laplace-LoRA, Eqs. 11 and 12).

``f* ~ N(f_MAP, Λ)`` with ``Λ_cc' = Σ_ℓ Σ_ij R_c,ij R_c',ij / (λ_ij + δ)`` and ``R_c = U_gᵀ G_c U_a``, where
``G_c = Σ_t g_tc a_tᵀ`` is the gradient of one logit combination in one layer. Directions outside a truncated basis
share one eigenvalue, and enter by the inner product of the components there. With independent layers each is
contracted as soon as its gradients are available: no (batch x classes x parameters) Jacobian is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from lapora.curvature.backward import Linearisation
from lapora.curvature.per_example import JacobianObserver, LayerGradient, PerExampleObserver
from lapora.errors import NumericalError
from lapora.likelihoods.base import LogitMoments, class_columns, difference_columns, no_columns
from lapora.models.batches import Batch
from lapora.models.lora_layers import BayesianLayer
from lapora.models.outputs import OutputModel
from lapora.posterior.gaussian import BlockPosterior, EigenBlock, JointPosterior, Posterior

_BASIS_ROWS = 64
"""Number of rows of a joint basis converted to float64 at a time."""


def covariance_observer(
    posterior: Posterior,
    precisions: Tensor,
    layers: Sequence[BayesianLayer],
    *,
    classes: int,
    directions: int,
) -> BlockCovarianceObserver | JointCovarianceObserver:
    """Return the observer that contracts gradients with a posterior.

    Args:
        posterior: The posterior, on the model's device.
        precisions: Prior precision δ of each layer under each of D priors: ``(D, number of layers)``.
        layers: The Bayesian layers, in the posterior's order.
        classes: Number of answers C.
        directions: Number of directions K per batch.
    """
    if isinstance(posterior, BlockPosterior):
        return BlockCovarianceObserver(posterior.blocks, precisions, directions=directions)
    return JointCovarianceObserver(posterior, precisions, layers, classes)


class BlockCovarianceObserver(PerExampleObserver):
    """Sums Λ over independent layers; see :class:`lapora.curvature.backward.Observer`.

    Several prior precisions share one pass, since the rotated gradients do not depend on them.

    Args:
        blocks: The posterior of each layer, on the model's device.
        precisions: Prior precision δ of each block under each of D priors: ``(D, number of blocks)``.
        directions: Number of directions K per batch; decides which order of products is cheaper.
    """

    def __init__(self, blocks: Sequence[EigenBlock], precisions: Tensor, *, directions: int = 1) -> None:
        super().__init__({block.name: block.basis for block in blocks}, directions=directions)
        self._blocks = {block.name: block for block in blocks}
        self._precisions = {
            block.name: precisions[:, index].double().to(block.eigenvalues.device) for index, block in enumerate(blocks)
        }
        self._variances: dict[str, Tensor] = {}
        self._depth = len(precisions)
        self._covariance: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        """Discard the previous batch."""
        super().begin(batch)
        self._covariance = None

    def covariance(self, rows: int, directions: int) -> Tensor:
        """Return Λ of the last batch, ``(D, B, K, K)`` in float64."""
        if self._covariance is None:
            return torch.zeros(self._depth, rows, directions, directions, dtype=torch.float64)
        return self._covariance

    def join(self, layer: BayesianLayer, gradients: Sequence[LayerGradient]) -> None:
        """Contract the layer's K gradients with its posterior variance, and add the result to Λ."""
        count, rows = len(gradients), len(gradients[0].inside)
        variance = self._variance(layer.name, gradients[0].inside.dtype)
        if self._covariance is None:
            self._covariance = torch.zeros(self._depth, rows, count, count, dtype=torch.float64, device=variance.device)
        for first in range(count):
            for second in range(first, count):
                products = gradients[first].products(gradients[second]).flatten(1)
                term = (products @ variance).T.to(self._covariance)
                self._covariance[:, :, first, second] += term
                if second != first:
                    self._covariance[:, :, second, first] += term

    def _variance(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return ``1 / (λ + δ)`` of a block under each prior, ``(parameters, D)``."""
        if name not in self._variances:
            precision = self._blocks[name].eigenvalues.reshape(-1, 1) + self._precisions[name]
            if not bool((precision > 0).all()):
                raise NumericalError(f"{name}: the posterior precision is not positive; tune the prior again")
            self._variances[name] = (1.0 / precision).to(dtype)
        return self._variances[name]


class JointCovarianceObserver(JacobianObserver):
    """Computes Λ under a posterior whose basis spans all layers, from the gradients of all layers together.

    ``Λ = ⟨G⊥, G'⊥⟩ / (ρ + δ) + Σ_m c_m c'_m / (λ_m + δ)`` with ``c = W g`` and ``g⊥ = g - Wᵀ c``. For ``full``, where
    ρ is 0, this equals ``1/δ [G Gᵀ - G Jᵀ (J Jᵀ + δI)⁻¹ J Gᵀ]`` without the cancellation of large numbers.

    Args:
        posterior: The posterior, on the model's device.
        precisions: ``(D, number of layers)``; the same δ for all layers, since they are not independent.
        layers: The Bayesian layers, in the posterior's order.
        classes: Number of answers C.
    """

    def __init__(
        self, posterior: JointPosterior, precisions: Tensor, layers: Sequence[BayesianLayer], classes: int
    ) -> None:
        super().__init__(layers, classes)
        if not bool((precisions == precisions[:, :1]).all()):
            raise ValueError("a posterior that joins layers has one prior precision")
        self._posterior = posterior
        self._precisions = precisions[:, 0].double().to(posterior.basis.device)

    def covariance(self, rows: int, directions: int) -> Tensor:
        """Return Λ of the last batch, ``(D, B, K, K)`` in float64."""
        basis = self._posterior.basis
        # In float64 on a CPU: in float32 these products would depend on the batch size more than the gradients do. On
        # a GPU float64 may be many times slower.
        dtype = torch.float64 if basis.device.type == "cpu" else basis.dtype
        gradients = self.jacobian(rows, directions).to(basis.device, dtype).flatten(0, 1)
        outside, coordinates = gradients.clone(), []
        for part in basis.split(_BASIS_ROWS):
            part = part.to(dtype)
            coordinates.append(gradients @ part.T)
            outside.addmm_(coordinates[-1], part, alpha=-1.0)
        outside = outside.unflatten(0, (directions, rows))
        inside = torch.cat(coordinates, dim=1).unflatten(0, (directions, rows)).double()
        variance = 1.0 / (self._posterior.joint_eigenvalues + self._precisions.unsqueeze(1))
        found = torch.einsum("kbm,lbm,dm->dbkl", inside, inside, variance[:, : len(basis)])
        rest = torch.einsum("kbp,lbp->bkl", outside, outside).double()
        return found + rest * variance[:, -1].reshape(-1, 1, 1, 1)


class LinearisedPredictor:
    """Context manager that computes the logit moments of batches under the posterior.

    Args:
        answers: The network.
        layers: The Bayesian layers.
        posterior: Their posterior, on the model's device.
        precisions: Prior precision of each layer under each of D priors, ``(D, number of layers)``.
        classes: Number of answers C.
        every_class: Compute the covariance of all C logits (C backward passes) instead of C-1 differences.
        map_only: Compute no covariance: a forward pass only.

    Attributes:
        priors: Number of priors D.
    """

    def __init__(
        self,
        answers: OutputModel,
        layers: Sequence[BayesianLayer],
        posterior: Posterior,
        precisions: Tensor,
        *,
        classes: int,
        every_class: bool = False,
        map_only: bool = False,
    ) -> None:
        self.priors = len(precisions)
        self._columns = no_columns if map_only else class_columns if every_class else difference_columns
        self._observer = covariance_observer(
            posterior, precisions, layers, classes=classes, directions=classes - (not every_class)
        )
        self._linearisation = Linearisation(answers, [] if map_only else layers, self._observer)

    def __enter__(self) -> LinearisedPredictor:
        self._linearisation.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._linearisation.__exit__(kind, error, traceback)

    def moments(self, batch: Batch) -> LogitMoments:
        """Return mean and covariance of a batch's logits under the first prior."""
        return self.moments_under_each_prior(batch)[0]

    def moments_under_each_prior(self, batch: Batch) -> list[LogitMoments]:
        """Return mean and covariance of a batch's logits under each of the D priors, from one pass."""
        directions = 0

        def columns(logits: Tensor) -> Tensor:
            nonlocal directions
            along = self._columns(logits)
            directions = len(along)
            return along

        mean = self._linearisation.run(batch, columns)
        return [LogitMoments(mean, each) for each in self._observer.covariance(len(batch), directions)]
