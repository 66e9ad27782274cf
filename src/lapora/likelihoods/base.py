"""What every likelihood works on: mean and covariance of a model's outputs."""

from __future__ import annotations

from dataclasses import dataclass

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
