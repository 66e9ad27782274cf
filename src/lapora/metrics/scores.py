"""Scores of class probabilities against labels."""

from __future__ import annotations

import torch
from torch import Tensor

from lapora.metrics.weighted import ADAPTIVE_BINS, ECE_BINS, WeightedScores

__all__ = ["ADAPTIVE_BINS", "ECE_BINS", "HIGHER_IS_BETTER", "constant_predictor", "evaluate", "row_entropy", "row_nll"]

HIGHER_IS_BETTER = frozenset({"accuracy", "mcc", "auroc"})
"""Of the others, less is better."""


def evaluate(log_p: Tensor, targets: Tensor, *, with_mcc: bool = False) -> dict[str, float]:
    """Score probabilities against labels.

    Args:
        log_p: ``(N, C)`` log-probabilities, float64.
        targets: ``(N,)`` int64.
        with_mcc: Add the Matthews correlation coefficient.

    Returns:
        ``accuracy``, ``ece`` (15 equal-width bins of the top probability; Guo et al. 2017), ``nll`` (nats per
        row, from log-probabilities), ``brier`` (sum over classes), ``mcc`` on request, ``adaptive_ece`` (15
        bins of equal mass), ``auroc`` (of the top probability for being right; NaN where every row is right,
        or wrong) and ``aurc`` (area under the risk-coverage curve).
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_matthews_corrcoef,
    )

    classes = log_p.shape[1]
    p = log_p.exp()
    weighted = WeightedScores(log_p, targets)(torch.ones(1, len(targets), dtype=torch.float64))
    scores = {
        "accuracy": float(multiclass_accuracy(log_p, targets, classes, average="micro")),
        # torchmetrics gives a probability of exactly one a bin of its own: keep it in the last.
        "ece": float(
            multiclass_calibration_error(p.clamp(max=1.0 - 1e-12), targets, classes, n_bins=ECE_BINS, norm="l1")
        ),
        "nll": float(row_nll(log_p, targets).mean()),
        "brier": float((p - torch.nn.functional.one_hot(targets, classes)).square().sum(dim=1).mean()),
    }
    if with_mcc:
        scores["mcc"] = float(multiclass_matthews_corrcoef(p.argmax(dim=1), targets, classes))
    return scores | {key: float(weighted[key]) for key in ("adaptive_ece", "auroc", "aurc")}


def constant_predictor(targets: Tensor, classes: int) -> Tensor:
    """Log-probabilities of always predicting the class frequencies of these very rows.

    Args:
        targets: ``(N,)`` int64.
        classes: C.

    Returns:
        ``(N, C)``, float64.
    """
    frequencies = torch.bincount(targets, minlength=classes).double() / len(targets)
    return frequencies.log().clamp(min=-1e300).expand(len(targets), classes).contiguous()


def row_nll(log_p: Tensor, targets: Tensor) -> Tensor:
    """NLL of every row, in nats, ``(N,)``, of log-probabilities ``(N, C)`` and labels ``(N,)``."""
    return -log_p.gather(1, targets.unsqueeze(1)).squeeze(1)


def row_entropy(log_p: Tensor) -> Tensor:
    """Entropy of every row's probabilities, in nats: ``(N,)``."""
    return torch.special.entr(log_p.exp()).sum(dim=-1)
