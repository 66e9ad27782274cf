"""Scores of class probabilities against labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.optimize import minimize_scalar
from scipy.stats import rankdata
from torch import Tensor

from lapora.metrics.weighted import ADAPTIVE_BINS, ECE_BINS, WeightedScores

__all__ = ["ADAPTIVE_BINS", "ECE_BINS", "HIGHER_IS_BETTER", "constant_predictor", "evaluate", "row_entropy", "row_nll"]

HIGHER_IS_BETTER = frozenset({"accuracy", "mcc", "auroc"})
"""Scores of which higher values are better; lower values of all others are better."""


def evaluate(log_p: Tensor, targets: Tensor, *, with_mcc: bool = False) -> dict[str, float]:
    """Compute the scores of probabilities against labels.

    Args:
        log_p: ``(N, C)`` log-probabilities, float64.
        targets: ``(N,)`` labels, int64.
        with_mcc: Add the Matthews correlation coefficient.

    Returns:
        ``accuracy``, ``ece`` (15 equal-width bins of the top probability; Guo et al. 2017), ``nll`` (nats per
        row, from log-probabilities), ``brier`` (sum over classes), ``mcc`` on request, ``adaptive_ece`` (15
        bins of equal mass), ``auroc`` (of confidence for detecting correct rows; NaN if all rows are correct or all
        are wrong) and ``aurc`` (area under the risk-coverage curve).
    """
    weighted = WeightedScores(log_p, targets, with_mcc=with_mcc)(torch.ones(1, len(targets), dtype=torch.float64))
    return {key: float(value) for key, value in weighted.items()}


def constant_predictor(targets: Tensor, classes: int) -> Tensor:
    """Return the log-probabilities of a constant predictor: the class frequencies of these rows.

    Args:
        targets: ``(N,)`` labels, int64.
        classes: Number of classes C.

    Returns:
        ``(N, C)``, float64.
    """
    frequencies = torch.bincount(targets, minlength=classes).double() / len(targets)
    return frequencies.log().clamp(min=-1e300).expand(len(targets), classes).contiguous()


def row_nll(log_p: Tensor, targets: Tensor) -> Tensor:
    """Compute the NLL of every row in nats, ``(N,)``, from log-probabilities ``(N, C)`` and labels ``(N,)``."""
    return -log_p.gather(1, targets.unsqueeze(1)).squeeze(1)


def row_entropy(log_p: Tensor) -> Tensor:
    """Compute the entropy of every row in nats, ``(N,)``, from log-probabilities ``(N, C)``."""
    return torch.special.entr(log_p.exp()).sum(dim=-1)


def auroc(positive: Tensor, negative: Tensor) -> float | None:
    """Compute the AUROC: the probability that a positive score exceeds a negative one, ties counted half.

    Uses ranks instead of torchmetrics, which applies a sigmoid to scores outside [0, 1], such as entropies.

    Args:
        positive: ``(M,)`` scores.
        negative: ``(N,)`` scores.

    Returns:
        The AUROC, or None if either is empty.

    Source: Mann and Whitney 1947.
    """
    if not len(positive) or not len(negative):
        return None
    ranks = rankdata(torch.cat([positive, negative]).numpy())[: len(positive)]
    wins = ranks.sum() - len(positive) * (len(positive) + 1) / 2
    return float(wins / (len(positive) * len(negative)))


def risk_coverage(log_p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the risk-coverage curve: rows are accepted by descending confidence, ties together.

    Args:
        log_p: ``(N, C)`` log-probabilities, float64.
        targets: ``(N,)`` labels, int64.

    Returns:
        Coverage and error rate at each of the G distinct confidences, ``(G,)`` each, coverage ascending to one.
    """
    confidence, predicted = log_p.exp().max(dim=1)
    order = confidence.argsort(descending=True)
    wrong = (predicted != targets).double()[order].cumsum(0)
    accepted = torch.arange(1, len(order) + 1, dtype=torch.float64)
    ordered = confidence[order]
    last = torch.cat([ordered[1:] != ordered[:-1], torch.tensor([True])])
    return (accepted / len(order))[last], (wrong / accepted)[last]


class Threshold(NamedTuple):
    """A confidence threshold for abstention: rows below it are rejected.

    Attributes:
        threshold: Confidence.
        coverage: Share of accepted rows.
        accuracy: Accuracy of accepted rows.
    """

    threshold: float
    coverage: float
    accuracy: float


def threshold_for_coverage(log_p: Tensor, targets: Tensor, coverage: float) -> Threshold:
    """Find the highest threshold at which at least a share of the rows is accepted.

    Args:
        log_p: ``(N, C)`` log-probabilities, float64.
        targets: ``(N,)`` labels, int64.
        coverage: Share of accepted rows, in (0, 1].
    """
    confidence, predicted = log_p.exp().max(dim=1)
    needed = max(1, math.ceil(coverage * len(confidence) - 1e-9))
    threshold = confidence.sort(descending=True).values[needed - 1]
    accepted = confidence >= threshold
    right = (predicted == targets)[accepted].double()
    return Threshold(float(threshold), float(accepted.double().mean()), float(right.mean()))


LOWEST, HIGHEST = 0.01, 100.0


def fit_temperature(log_p: Tensor, targets: Tensor, *, width: float | None = None) -> float:
    """Fit the temperature T of ``softmax(log_p / T)``: minimum NLL, or maximum posterior under N(log T; 0, width²).

    Args:
        log_p: ``(N, C)`` log-probabilities of held-out rows, not the rows to be scored.
        targets: ``(N,)`` labels, int64.
        width: Standard deviation of the prior on log T; None is no prior.

    Returns:
        T, between 0.01 and 100.
    """

    def nll(temperature: float) -> float:
        scaled = torch.log_softmax(log_p / temperature, dim=1)
        return float(-scaled.gather(1, targets.unsqueeze(1)).mean())

    return minimize_over_temperature(nll, len(targets), width=width)


def minimize_over_temperature(nll: Callable[[float], float], count: int, *, width: float | None = None) -> float:
    """Minimize a mean NLL over a temperature T, with a prior N(log T; 0, width²) or without.

    Args:
        nll: Mean NLL at a temperature, in nats per row.
        count: Number of rows.
        width: Standard deviation of the prior on log T; None is no prior.

    Returns:
        T, between 0.01 and 100.
    """

    def objective(log_temperature: float) -> float:
        own = nll(math.exp(log_temperature))
        return own if width is None else own + 0.5 * (log_temperature / width) ** 2 / count

    found = minimize_scalar(
        objective, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded", options={"xatol": 1e-6}
    )
    return math.exp(float(found.x))
