"""Links: from logit moments to class probabilities (Laplace-LoRA, Eqs. 15 to 20).

All work in float64 and return log-probabilities, so that a saturated model has a finite NLL without
clamping. Probabilities are averaged, never logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lapora.config import DEFAULT_SAMPLES, Link
from lapora.predictive.logistic_normal import log_expected_sigmoid
from lapora.predictive.moments import LogitMoments

_CHUNK_ELEMENTS = 4_000_000


def needs_every_class(link: Link) -> bool:
    """Whether the link needs the covariance of all C logits; mc-joint needs that of C-1 differences."""
    return link in ("mc-indep", "probit", "bridge")


def log_probabilities(link: Link, moments: LogitMoments, *, samples: int = DEFAULT_SAMPLES, seed: int = 0) -> Tensor:
    """Apply a link.

    Args:
        link: Which one.
        moments: Mean and covariance of the logits.
        samples: Quasi-Monte-Carlo points of the two sampling links, for C > 2 (C = 2 is deterministic).
        seed: Scrambling of those points; the same for every row, so that batching changes nothing.

    Returns:
        ``(B, C)`` log-probabilities in float64, on the CPU.

    Raises:
        ValueError: The link needs every class (:func:`needs_every_class`), and the moments are of differences.
    """
    mean = moments.mean.double().cpu()
    covariance = moments.covariance.double().cpu()
    if link == "map":
        return torch.log_softmax(mean, dim=1)
    if link == "mc-joint":
        differences = covariance if moments.of_differences else difference_covariance(covariance)
        return _averaged_softmax(differences_to_first(mean), differences, samples, seed)
    if moments.of_differences:
        raise ValueError(f"{link} needs the variances of all classes")
    variances = covariance.diagonal(dim1=1, dim2=2)
    analytic: dict[Link, Callable[[Tensor, Tensor], Tensor]] = {"probit": _probit, "bridge": _laplace_bridge}
    if link in analytic:
        return analytic[link](mean, variances)
    independent = difference_covariance(torch.diag_embed(variances))
    return _averaged_softmax(differences_to_first(mean), independent, samples, seed)


def difference_covariance(covariance: Tensor) -> Tensor:
    """Covariance of ``f_c - f_0``, ``(B, C-1, C-1)``, from that of ``f``, ``(B, C, C)``."""
    rest = covariance[:, 1:, 1:]
    return rest - covariance[:, 1:, :1] - covariance[:, :1, 1:] + covariance[:, :1, :1]


def differences_to_first(mean: Tensor) -> Tensor:
    """``f_c - f_0``, ``(B, C-1)``, from ``f``, ``(B, C)``."""
    return mean[:, 1:] - mean[:, :1]


def _probit(mean: Tensor, variances: Tensor) -> Tensor:
    """``softmax(f / sqrt(1 + π/8 diag Λ))`` (Eq. 18; MacKay 1992)."""
    return torch.log_softmax(mean / torch.sqrt(1.0 + math.pi / 8.0 * variances), dim=1)


def _laplace_bridge(mean: Tensor, variances: Tensor) -> Tensor:
    """Mean ``α/Σα`` of the Dirichlet that matches the Gaussian (Eq. 20; Hobbhahn et al. 2022).

    ``α_i = (1/Λ_ii) (1 - 2/C + e^{f_i} Σ_j e^{-f_j} / C²)``, in log space so that large logits do not overflow.
    """
    classes = mean.shape[1]
    exponential = mean + torch.logsumexp(-mean, dim=1, keepdim=True) - 2.0 * math.log(classes)
    # For C = 2 the constant is zero and only the exponential is left.
    constant = torch.full_like(exponential, 1.0 - 2.0 / classes).log()
    log_alpha = torch.logaddexp(constant, exponential) - variances.clamp(min=1e-300).log()
    return torch.log_softmax(log_alpha, dim=1)


def _averaged_softmax(differences: Tensor, covariance: Tensor, samples: int, seed: int) -> Tensor:
    """``log E[softmax(0, d)]`` for ``d ~ N(differences, covariance)``.

    Args:
        differences: ``(B, C-1)``, the mean of ``f_c - f_0``.
        covariance: ``(B, C-1, C-1)``.
        samples: Number of points when C > 2.
        seed: Their scrambling.
    """
    if differences.shape[1] == 1:
        deviation = covariance[:, 0, 0].clamp(min=0.0).sqrt()
        return torch.stack(log_expected_sigmoid(differences[:, 0], deviation), dim=1)
    points = normal_points(samples, differences.shape[1], seed)
    root = symmetric_root(covariance)
    chunk = max(1, _CHUNK_ELEMENTS // (samples * (differences.shape[1] + 1)))
    averaged = [
        _log_mean_softmax(mean, factor, points)
        for mean, factor in zip(differences.split(chunk), root.split(chunk), strict=True)
    ]
    return torch.cat(averaged)


def symmetric_root(covariance: Tensor) -> Tensor:
    """L with ``L Lᵀ`` the covariances ``(B, K, K)``; not Cholesky's, since they may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0.0).sqrt().unsqueeze(1)


def _log_mean_softmax(mean: Tensor, root: Tensor, points: Tensor) -> Tensor:
    averaged = torch.logsumexp(torch.log_softmax(drawn_logits(mean, root, points), dim=2), dim=1)
    averaged = averaged - math.log(len(points))
    return averaged - torch.logsumexp(averaged, dim=1, keepdim=True)


def drawn_logits(mean: Tensor, root: Tensor, points: Tensor) -> Tensor:
    """Logits at points of the standard normal, the first class's zero.

    Args:
        mean: ``(B, C-1)``, of ``f_c - f_0``.
        root: ``(B, C-1, C-1)``, a root of their covariance.
        points: ``(S, C-1)``.

    Returns:
        ``(B, S, C)``.
    """
    drawn = mean.unsqueeze(1) + points @ root.transpose(1, 2)
    return torch.cat([drawn.new_zeros(*drawn.shape[:2], 1), drawn], dim=2)


def normal_points(samples: int, dimensions: int, seed: int) -> Tensor:
    """Scrambled Sobol points carried to the standard normal, ``(samples, dimensions)``, with mean zero.

    Half of the points are the other half's mirror images, which integrates every odd function exactly.
    """
    half = (samples + 1) // 2
    uniform = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed).draw(half, dtype=torch.float64)
    tiny = 0.5 / (half * 1024)
    normal = torch.special.ndtri(uniform.clamp(tiny, 1.0 - tiny))
    return torch.cat([normal, -normal])
