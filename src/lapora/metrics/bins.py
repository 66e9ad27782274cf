"""Bins of a reliability diagram."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lapora.metrics.weighted import ECE_BINS, equal_width_bins


@dataclass(frozen=True)
class Bin:
    """One bin of confidence, the top probability.

    Attributes:
        low: Lower edge, inclusive.
        high: Upper edge, exclusive except for the last bin.
        count: Number of rows.
        confidence: Mean confidence, or None for an empty bin.
        accuracy: Accuracy, or None for an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the bin as JSON values."""
        return asdict(self)


def reliability_bins(log_p: Tensor, targets: Tensor, bins: int = ECE_BINS) -> list[Bin]:
    """Compute count, mean confidence and accuracy in equal-width bins of confidence, as used by the ECE.

    Args:
        log_p: ``(N, C)`` log-probabilities, float64.
        targets: ``(N,)`` labels, int64.
        bins: Number of bins.
    """
    confidence, predicted = log_p.exp().max(dim=1)
    right = (predicted == targets).double()
    chosen = equal_width_bins(confidence, bins)
    counts = torch.bincount(chosen, minlength=bins)
    sums = [torch.bincount(chosen, weights=values, minlength=bins) for values in (confidence, right)]
    return [
        Bin(
            low=index / bins,
            high=(index + 1) / bins,
            count=int(counts[index]),
            confidence=float(sums[0][index] / counts[index]) if counts[index] else None,
            accuracy=float(sums[1][index] / counts[index]) if counts[index] else None,
        )
        for index in range(bins)
    ]
