"""What every likelihood works on: moments of a model's outputs, and the weights of an average over several of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def divided(self, temperature: float) -> LogitMoments:
        """Return the moments of ``f / τ``."""
        if temperature == 1.0:
            return self
        return LogitMoments(self.mean / temperature, self.covariance / temperature**2)


@dataclass(frozen=True)
class Averaging:
    """Weights of an average over D prior precisions and T temperatures.

    Attributes:
        temperatures: τ, ``(T,)`` in float64.
        weights: ``(D, T)`` in float64, summing to 1.
    """

    temperatures: Tensor
    weights: Tensor

    @classmethod
    def single(cls) -> Averaging:
        """Return the average of one prior precision at temperature 1."""
        return cls(torch.ones(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))

    @property
    def is_single(self) -> bool:
        """Whether there is one component, at temperature 1."""
        return self.weights.numel() == 1 and float(self.temperatures[0]) == 1.0

    @property
    def components(self) -> list[tuple[int, float, float]]:
        """Index of the prior precision, temperature and weight of every component with weight."""
        return [
            (int(row), float(self.temperatures[column]), float(self.weights[row, column]))
            for row, column in self.weights.nonzero().tolist()
        ]

    def moments(self, found: list[LogitMoments]) -> LogitMoments:
        """Return mean and covariance of the mixture of the Gaussians of ``f / τ``.

        With weights w: ``E = f Σ w/τ`` and ``Cov = Σ w Λ/τ² + f fᵀ (Σ w/τ² - (Σ w/τ)²)``.

        Args:
            found: The moments under each prior precision.
        """
        if self.is_single:
            return found[0]
        mean = found[0].mean.double()
        inverse = 1.0 / self.temperatures.to(mean.device)
        weights = self.weights.to(mean.device)
        first, second = float((weights @ inverse).sum()), float((weights @ inverse.square()).sum())
        within = sum(
            (float(share) * each.covariance for share, each in zip(weights @ inverse.square(), found, strict=True)),
            start=torch.zeros_like(found[0].covariance),
        )
        outputs = mean[:, 1:] - mean[:, :1] if found[0].of_differences else mean
        between = (second - first**2) * outputs.unsqueeze(2) * outputs.unsqueeze(1)
        return LogitMoments(mean * first, within + between.to(within))
