"""Scores of class probabilities against labels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.optimize import minimize_scalar
from scipy.stats import rankdata
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


LOWEST, HIGHEST = 0.01, 100.0


def fit_temperature(log_p: Tensor, targets: Tensor, *, width: float | None = None) -> float:
    """Fit the temperature T of ``softmax(log_p / T)``: minimum NLL, or maximum posterior under N(log T; 0, width²).

    Args:
        log_p: ``(N, C)`` log-probabilities of rows that will not be scored.
        targets: ``(N,)`` their labels.
        width: Standard deviation of the prior on log T; None is no prior.

    Returns:
        T, within 0.01 and 100.
    """

    def nll(log_temperature: float) -> float:
        scaled = torch.log_softmax(log_p / math.exp(log_temperature), dim=1)
        own = float(-scaled.gather(1, targets.unsqueeze(1)).mean())
        return own if width is None else own + 0.5 * (log_temperature / width) ** 2 / len(targets)

    found = minimize_scalar(
        nll, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded", options={"xatol": 1e-6}
    )
    return math.exp(float(found.x))
