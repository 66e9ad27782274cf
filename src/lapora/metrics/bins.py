"""The bins of a reliability diagram."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lapora.metrics.weighted import ECE_BINS, equal_width_bins


@dataclass(frozen=True)
class Bin:
    """The rows whose top probability lies in one bin.

    Attributes:
        low: Lower edge, which belongs to the bin.
        high: Upper edge.
        count: Number of rows.
        confidence: Their mean top probability, or None in an empty bin.
        accuracy: Their share of right rows, or None in an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def reliability_bins(log_p: Tensor, targets: Tensor, bins: int = ECE_BINS) -> list[Bin]:
    """Cut rows by top probability into equal-width bins: those of the ECE.

    Args:
        log_p: ``(N, C)`` log-probabilities, float64.
        targets: ``(N,)`` labels.
        bins: How many.
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
