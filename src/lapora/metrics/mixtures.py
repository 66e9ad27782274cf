"""Scores of regressions whose prediction is a mixture of Gaussians.

A prediction is a tensor ``(..., M, 3)`` in float64: mean, variance and weight of M components; the weights sum to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PIT_BINS = 20
_STEPS = 60
_CHUNK_ELEMENTS = 4_000_000


def mixture_moments(mixture: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of mixtures, ``(...)`` each."""
    mean, variance, weight = mixture.unbind(dim=-1)
    center = (weight * mean).sum(dim=-1)
    spread = (weight * (variance + (mean - center.unsqueeze(-1)).square())).sum(dim=-1)
    return center, spread


def mixture_log_density(mixture: Tensor, values: Tensor) -> Tensor:
    """Return the log-density of mixtures at values, ``(...)``."""
    mean, variance, weight = mixture.unbind(dim=-1)
    squared = (values.unsqueeze(-1) - mean).square() / variance
    return torch.logsumexp(weight.log() - 0.5 * (squared + variance.log() + math.log(2.0 * math.pi)), dim=-1)


def mixture_cdf(mixture: Tensor, values: Tensor) -> Tensor:
    """Return the distribution function of mixtures at values, ``(...)``: the probability integral transform."""
    mean, variance, weight = mixture.unbind(dim=-1)
    return (weight * torch.special.ndtr((values.unsqueeze(-1) - mean) / variance.sqrt())).sum(dim=-1)


def mixture_quantile(mixture: Tensor, level: float) -> Tensor:
    """Return a quantile of mixtures, ``(...)``, by bisection between the components' quantiles.

    Args:
        mixture: The mixtures.
        level: Probability below the quantile, in (0, 1).
    """
    mean, variance, _ = mixture.unbind(dim=-1)
    normal = float(torch.special.ndtri(torch.tensor(level, dtype=torch.float64)))
    quantiles = mean + normal * variance.sqrt()
    low, high = quantiles.min(dim=-1).values, quantiles.max(dim=-1).values
    if mixture.shape[-2] == 1:
        return low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        below = mixture_cdf(mixture, middle) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def central_interval(mixture: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Return the ends of the central intervals of a probability, ``(...)`` each."""
    tail = (1.0 - probability) / 2.0
    return mixture_quantile(mixture, max(tail, 1e-12)), mixture_quantile(mixture, min(1.0 - tail, 1.0 - 1e-12))


def mixture_crps(mixture: Tensor, values: Tensor) -> Tensor:
    """Return the continuous ranked probability score of mixtures at values, ``(...)``, in the unit of the values.

    ``E|X - y| - E|X - X'|/2``, in closed form (Grimit et al. 2006).
    """
    flat, at = mixture.reshape(-1, *mixture.shape[-2:]), values.reshape(-1)
    chunk = max(1, _CHUNK_ELEMENTS // mixture.shape[-2] ** 2)
    parts = [_crps(part, own) for part, own in zip(flat.split(chunk), at.split(chunk), strict=True)]
    return torch.cat(parts).reshape(values.shape)


def _crps(mixture: Tensor, values: Tensor) -> Tensor:
    mean, variance, weight = mixture.unbind(dim=-1)
    to_value = (weight * _expected_distance(values.unsqueeze(-1) - mean, variance)).sum(dim=-1)
    between = _expected_distance(mean.unsqueeze(2) - mean.unsqueeze(1), variance.unsqueeze(2) + variance.unsqueeze(1))
    return to_value - 0.5 * torch.einsum("bi,bij,bj->b", weight, between, weight)


def _expected_distance(mean: Tensor, variance: Tensor) -> Tensor:
    """Return ``E|x|`` of Gaussians."""
    deviation = variance.sqrt()
    scaled = mean / deviation
    density = torch.exp(-0.5 * scaled.square()) / math.sqrt(2.0 * math.pi)
    return 2.0 * deviation * density + mean * (2.0 * torch.special.ndtr(scaled) - 1.0)


def pit_histogram(levels: Tensor, bins: int = PIT_BINS) -> list[float]:
    """Return the share of probability integral transforms, ``(N,)`` in [0, 1], in each of equal bins.

    All shares are ``1 / bins`` for calibrated predictions; the outer ones are higher for overconfident predictions.
    """
    chosen = (levels * bins).long().clamp(0, bins - 1)
    return (torch.bincount(chosen, minlength=bins).double() / max(1, len(levels))).tolist()
