"""Scores as functions of row weights, in float64 (torchmetrics rounds to float32), and so for the bootstrap too.

A bootstrap resample is a count per row, so R resamples are a matrix ``(R, N)`` and a score takes a few matrix
products. Rows are sorted by confidence once; rows of equal confidence form a group that is never split, so that no
score depends on the order of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

ECE_BINS = 15
ADAPTIVE_BINS = 15


def equal_width_bins(confidence: Tensor, bins: int = ECE_BINS) -> Tensor:
    """Return the bin of each confidence, ``(N,)``; bin k is ``[k/bins, (k+1)/bins)``, and the last includes 1."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float32).to(confidence.dtype)
    return (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, bins - 1)


class WeightedScores:
    """Scores of one method's probabilities as a function of row weights.

    Args:
        log_p: ``(N, C)`` log-probabilities, float64.
        targets: ``(N,)`` labels, int64.
        with_mcc: Add the Matthews correlation coefficient.
        right: ``(N,)`` how far each prediction is right, from 0 to 1; by default 1 if the most probable class is the
            label, else 0.
    """

    def __init__(self, log_p: Tensor, targets: Tensor, *, with_mcc: bool = False, right: Tensor | None = None) -> None:
        self._classes = log_p.shape[1]
        p = log_p.exp()
        confidence, predicted = p.max(dim=1)
        self._right = (predicted == targets).double() if right is None else right
        one_hot = torch.nn.functional.one_hot(targets, self._classes)
        means = [self._right, -log_p.gather(1, targets.unsqueeze(1)).squeeze(1), (p - one_hot).square().sum(dim=1)]
        self._means = torch.stack(means, dim=1)
        gap = (self._right - confidence).unsqueeze(1)
        self._gap_by_bin = gap * torch.nn.functional.one_hot(equal_width_bins(confidence), ECE_BINS)
        self._confusion = None
        if with_mcc:
            cell = targets * self._classes + predicted
            self._confusion = torch.nn.functional.one_hot(cell, self._classes**2).double()
        # Ascending groups of equal confidence.
        self._order = confidence.argsort()
        ordered = confidence[self._order]
        self._group = torch.unique_consecutive(ordered, return_inverse=True)[1]
        self._groups = int(self._group[-1]) + 1
        self._gap = gap.squeeze(1)[self._order]
        self._right_ordered = self._right[self._order]

    def __call__(self, weights: Tensor) -> dict[str, Tensor]:
        """Compute the scores for each of R weightings.

        Args:
            weights: ``(R, N)`` float64, nonnegative: count of each row.

        Returns:
            ``(R,)`` for each score; AUROC is NaN if all rows are correct or all are wrong.
        """
        total = weights.sum(dim=1)
        accuracy, nll, brier = (weights @ self._means / total.unsqueeze(1)).unbind(dim=1)
        scores = {
            "accuracy": accuracy,
            "ece": (weights @ self._gap_by_bin).abs().sum(dim=1) / total,
            "nll": nll,
            "brier": brier,
        }
        if self._confusion is not None:
            scores["mcc"] = _matthews((weights @ self._confusion).unflatten(1, (self._classes, self._classes)))
        ordered = weights[:, self._order]
        mass, right = self._by_group(ordered), self._by_group(ordered * self._right_ordered)
        scores["adaptive_ece"] = _equal_mass(mass, self._by_group(ordered * self._gap))
        scores["auroc"] = _rank_auroc(right, mass - right)
        scores["aurc"] = _area_under_risk(mass, mass - right)
        return scores

    def _by_group(self, values: Tensor) -> Tensor:
        sums = values.new_zeros(len(values), self._groups)
        return sums.index_add_(1, self._group, values)


def _matthews(confusion: Tensor) -> Tensor:
    """Compute the multi-class MCC (Gorodkin 2004) of ``(R, C, C)`` counts, 0 where undefined."""
    actual, predicted, total = confusion.sum(dim=2), confusion.sum(dim=1), confusion.sum(dim=(1, 2))
    covariance = confusion.diagonal(dim1=1, dim2=2).sum(dim=1) * total - (actual * predicted).sum(dim=1)
    variances = (total.square() - actual.square().sum(dim=1)) * (total.square() - predicted.square().sum(dim=1))
    return torch.where(variances > 0, covariance / variances.clamp(min=1e-300).sqrt(), torch.zeros_like(total))


def _equal_mass(mass: Tensor, gap: Tensor, bins: int = ADAPTIVE_BINS) -> Tensor:
    """Compute the ECE with bins of equal mass (adaptive ECE; Nguyen and O'Connor 2015, Nixon et al. 2019).

    The cumulative sum of (correct - confidence) is interpolated linearly within groups of equal confidence, so that a
    group across a bin edge is split proportionally.

    Args:
        mass: ``(R, G)`` number of rows per group, ascending confidence.
        gap: ``(R, G)`` sum of correct - confidence per group.
        bins: Number of bins.
    """
    zero = mass.new_zeros(len(mass), 1)
    below, summed = torch.cat([zero, mass.cumsum(1)], 1), torch.cat([zero, gap.cumsum(1)], 1)
    edges = below[:, -1:] * torch.linspace(0, 1, bins + 1, dtype=mass.dtype)
    upper = torch.searchsorted(below, edges.contiguous()).clamp(1, mass.shape[1])
    start, width = below.gather(1, upper - 1), mass.gather(1, upper - 1)
    share = torch.where(width > 0, (edges - start) / width.clamp(min=1e-300), torch.zeros_like(edges)).clamp(0, 1)
    at_edge = summed.gather(1, upper - 1) + share * gap.gather(1, upper - 1)
    return at_edge.diff(dim=1).abs().sum(dim=1) / below[:, -1]


def _rank_auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """Compute the AUROC from ``(R, G)`` counts of positive and negative rows per group, ascending confidence."""
    below = negative.cumsum(1) - negative
    pairs = positive.sum(1) * negative.sum(1)
    wins = (positive * (below + 0.5 * negative)).sum(1)
    return torch.where(pairs > 0, wins / pairs.clamp(min=1.0), torch.full_like(pairs, torch.nan))


def _area_under_risk(mass: Tensor, wrong: Tensor) -> Tensor:
    """Compute the AURC: for each row the error rate of rows at least as confident, averaged over rows.

    Source: Geifman and El-Yaniv 2017.
    """
    accepted = mass.flip(1).cumsum(1)
    risk = wrong.flip(1).cumsum(1) / accepted.clamp(min=1e-300)
    return (mass.flip(1) * risk).sum(1) / accepted[:, -1]
