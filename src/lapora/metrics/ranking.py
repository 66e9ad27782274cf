"""What an ordering of rows is worth: AUROC, the risk-coverage curve, and a threshold for a wanted coverage."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.stats import rankdata
from torch import Tensor


def auroc(positive: Tensor, negative: Tensor) -> float | None:
    """Chance that a positive row's score exceeds a negative one's, a tie counted half (Mann & Whitney 1947).

    Ranks rather than torchmetrics, which passes scores outside [0, 1] through a sigmoid: an entropy may exceed one.

    Args:
        positive: ``(M,)`` scores.
        negative: ``(N,)`` scores.

    Returns:
        None where either is empty.
    """
    if not len(positive) or not len(negative):
        return None
    ranks = rankdata(torch.cat([positive, negative]).numpy())[: len(positive)]
    wins = ranks.sum() - len(positive) * (len(positive) + 1) / 2
    return float(wins / (len(positive) * len(negative)))


def risk_coverage(log_p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The risk-coverage curve: rows are taken from the most confident on, rows of equal confidence together.

    Args:
        log_p: ``(N, C)`` log-probabilities, float64.
        targets: ``(N,)`` labels.

    Returns:
        Coverage and error rate at every distinct confidence, ``(G,)`` each, coverage rising to one.
    """
    confidence, predicted = log_p.exp().max(dim=1)
    order = confidence.argsort(descending=True)
    wrong = (predicted != targets).double()[order].cumsum(0)
    taken = torch.arange(1, len(order) + 1, dtype=torch.float64)
    ordered = confidence[order]
    last = torch.cat([ordered[1:] != ordered[:-1], torch.tensor([True])])
    return (taken / len(order))[last], (wrong / taken)[last]


class Threshold(NamedTuple):
    """A threshold on the confidence: rows below it are abstained from.

    Attributes:
        threshold: Its value.
        coverage: Share of rows that reach it.
        accuracy: Share of right rows among these.
    """

    threshold: float
    coverage: float
    accuracy: float


def threshold_for_coverage(log_p: Tensor, targets: Tensor, coverage: float) -> Threshold:
    """The highest threshold that keeps at least a share of the rows.

    Args:
        log_p: ``(N, C)`` log-probabilities, float64.
        targets: ``(N,)`` labels.
        coverage: The share wanted, in (0, 1].
    """
    confidence, predicted = log_p.exp().max(dim=1)
    needed = max(1, math.ceil(coverage * len(confidence) - 1e-9))
    threshold = confidence.sort(descending=True).values[needed - 1]
    kept = confidence >= threshold
    right = (predicted == targets)[kept].double()
    return Threshold(float(threshold), float(kept.double().mean()), float(right.mean()))
