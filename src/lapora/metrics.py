"""Accuracy, MCC, calibration error, NLL and Brier score of class probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

ECE_BINS = 15


def evaluate(log_p: Tensor, targets: Tensor, *, with_mcc: bool = False) -> dict[str, float]:
    """Score probabilities against labels.

    Args:
        log_p: ``(N, C)`` log-probabilities, float64.
        targets: ``(N,)`` int64.
        with_mcc: Add the Matthews correlation coefficient.

    Returns:
        ``accuracy``, ``ece`` (15 equal-width bins of the top probability; Guo et al. 2017), ``nll`` (nats per
        row, from log-probabilities), ``brier`` (sum over classes), and ``mcc`` on request.
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_matthews_corrcoef,
    )

    classes = log_p.shape[1]
    p = log_p.exp()
    scores = {
        "accuracy": float(multiclass_accuracy(log_p, targets, classes, average="micro")),
        # torchmetrics gives a probability of exactly one a bin of its own: keep it in the last.
        "ece": float(
            multiclass_calibration_error(p.clamp(max=1.0 - 1e-12), targets, classes, n_bins=ECE_BINS, norm="l1")
        ),
        "nll": float(-log_p.gather(1, targets.unsqueeze(1)).mean()),
        "brier": float((p - torch.nn.functional.one_hot(targets, classes)).square().sum(dim=1).mean()),
    }
    if with_mcc:
        scores["mcc"] = float(multiclass_matthews_corrcoef(p.argmax(dim=1), targets, classes))
    return scores


def constant_predictor(targets: Tensor, classes: int) -> Tensor:
    """Log-probabilities of always predicting the class frequencies of these very rows: ``(N, C)``."""
    frequencies = torch.bincount(targets, minlength=classes).double() / len(targets)
    return frequencies.log().clamp(min=-1e300).expand(len(targets), classes).contiguous()


def row_nll(log_p: Tensor, targets: Tensor) -> Tensor:
    """NLL of every row, in nats: ``(N,)``."""
    return -log_p.gather(1, targets.unsqueeze(1)).squeeze(1)


def paired_interval(differences: Tensor, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean of paired differences ``(N,)`` (percentiles; Efron 1979)."""
    generator = torch.Generator().manual_seed(seed)
    means = [
        differences[torch.randint(len(differences), (len(differences),), generator=generator)].mean()
        for _ in range(resamples)
    ]
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=differences.dtype)).tolist()
    return low, high
