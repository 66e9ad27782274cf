"""Mutual information between answer and weights: how much of the uncertainty is the posterior's own.

``I = H(E[p]) - E[H(p)]`` with ``p = softmax(f)``, ``f ~ N(mean, Λ)`` (Houlsby et al. 2011; Depeweg et al. 2018): the
entropy of the averaged probabilities (mc-joint), less what would be left if the weights were known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lapora.config import DEFAULT_SAMPLES
from lapora.predictive.links import (
    difference_covariance,
    differences_to_first,
    drawn_logits,
    log_probabilities,
    normal_points,
    symmetric_root,
)
from lapora.predictive.moments import LogitMoments

_WIDE = 5.0
_Z = torch.arange(-14.0, 14.1, 0.2, dtype=torch.float64)
_X = torch.arange(-60.0, 60.1, 0.2, dtype=torch.float64)
_CHUNK_ELEMENTS = 4_000_000


def mutual_information(moments: LogitMoments, *, samples: int = DEFAULT_SAMPLES, seed: int = 0) -> Tensor:
    """Mutual information of each row, in nats.

    Args:
        moments: Mean and covariance of the logits.
        samples: Quasi-Monte-Carlo points for C > 2, those of mc-joint (C = 2 is deterministic).
        seed: Their scrambling.

    Returns:
        ``(B,)`` in float64, at least 0 and at most log C.
    """
    averaged = log_probabilities("mc-joint", moments, samples=samples, seed=seed)
    total = torch.special.entr(averaged.exp()).sum(dim=1)
    mean, covariance = moments.mean.double().cpu(), moments.covariance.double().cpu()
    differences = differences_to_first(mean)
    if not moments.of_differences:
        covariance = difference_covariance(covariance)
    if differences.shape[1] == 1:
        known = expected_binary_entropy(differences[:, 0], covariance[:, 0, 0].clamp(min=0.0).sqrt())
    else:
        known = _sampled_entropy(differences, symmetric_root(covariance), samples, seed)
    return (total - known).clamp(min=0.0)


def expected_binary_entropy(mean: Tensor, deviation: Tensor) -> Tensor:
    """``E[h(sigmoid(x))]`` for ``x ~ N(mean, deviation²)``, h the entropy of a coin; all ``(B,)`` float64.

    The trapezoidal rule with step 0.2: in z where the deviation is small, else in x, where h has died away at 60.
    Both integrands are analytic in a strip about the real line, so the error is below 1e-8.
    """
    narrow = deviation.clamp(max=_WIDE)
    log_weights = -0.5 * _Z.square()
    weights = (log_weights - torch.logsumexp(log_weights, dim=0)).exp()
    by_z = _coin_entropy(mean.unsqueeze(1) + narrow.unsqueeze(1) * _Z) @ weights
    wide = deviation.clamp(min=_WIDE).unsqueeze(1)
    density = torch.exp(-0.5 * ((_X - mean.unsqueeze(1)) / wide).square()) / (wide * math.sqrt(2 * math.pi))
    by_x = density @ _coin_entropy(_X) * 0.2
    return torch.where(deviation <= _WIDE, by_z, by_x)


def _coin_entropy(logit: Tensor) -> Tensor:
    """``-p log p - (1-p) log(1-p)`` of ``p = sigmoid(logit)``, without cancellation far out."""
    distance = logit.abs()
    return torch.nn.functional.softplus(-distance) + distance * torch.sigmoid(-distance)


def _sampled_entropy(differences: Tensor, root: Tensor, samples: int, seed: int) -> Tensor:
    points = normal_points(samples, differences.shape[1], seed)
    chunk = max(1, _CHUNK_ELEMENTS // (len(points) * (differences.shape[1] + 1)))
    found = []
    for mean, factor in zip(differences.split(chunk), root.split(chunk), strict=True):
        p = torch.softmax(drawn_logits(mean, factor, points), dim=2)
        found.append(torch.special.entr(p).sum(dim=2).mean(dim=1))
    return torch.cat(found)
