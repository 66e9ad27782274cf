"""One answer out of C: Fisher columns, and links from logit moments to probabilities.

The Fisher of one example is ``J_nᵀ M_n J_n``. Any columns ``S_n`` with ``S_n S_nᵀ = M_n`` will do; the curvature is
summed from the gradients along them. Source: Laplace-LoRA (Yang et al. 2024), Eq. 8; for softmax the Fisher is the
generalized Gauss-Newton matrix (Martens 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lapora.config import DEFAULT_SAMPLES, Link
from lapora.likelihoods.answers import AnswerLikelihood
from lapora.likelihoods.base import Averaging, LogitMoments
from lapora.likelihoods.quadrature import log_expected_sigmoid


class Categorical(AnswerLikelihood):
    """``p(y|f) = softmax(f)_y``; see this module's functions."""

    name = "categorical"
    uses_differences = True

    def exact_columns(self, outputs: Tensor) -> Tensor:
        """See :func:`exact_columns`."""
        return exact_columns(outputs)

    def sampled_columns(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        """See :func:`monte_carlo_columns`."""
        return monte_carlo_columns(outputs, uniform)

    def empirical_columns(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :func:`empirical_columns`."""
        return empirical_columns(outputs, targets)

    def log_p(self, outputs: Tensor) -> Tensor:
        """Return the log-softmax."""
        return torch.log_softmax(outputs, dim=1)

    def needs_every_output(self, link: Link) -> bool:
        """Return whether a link depends on the variance of the logits' common shift."""
        return needs_every_class(link)

    def predict(
        self,
        link: Link,
        found: Sequence[LogitMoments],
        averaging: Averaging,
        *,
        samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
    ) -> Tensor:
        """See :func:`averaged_log_probabilities`."""
        return averaged_log_probabilities(link, found, averaging, samples=samples, seed=seed)

    def grid(
        self,
        link: Link,
        found: Sequence[LogitMoments],
        temperatures: Tensor,
        targets: Tensor,
        *,
        samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
    ) -> Tensor:
        """See :func:`grid_log_probabilities`."""
        return grid_log_probabilities(link, found, temperatures, targets, samples=samples, seed=seed)

    def information(
        self, found: Sequence[LogitMoments], averaging: Averaging, *, samples: int = DEFAULT_SAMPLES, seed: int = 0
    ) -> Tensor:
        """See :func:`averaged_mutual_information`."""
        return averaged_mutual_information(found, averaging, samples=samples, seed=seed)


def exact_columns(logits: Tensor) -> Tensor:
    """Return the columns of the Hessian's factor ``S Sᵀ = diag(p) - p pᵀ``, C-1 instead of C.

    With ``R_k = Σ_{j>=k} p_j``, column k is ``sqrt(p_k R_{k+1} / R_k) (e_k - Σ_{j>k} (p_j / R_{k+1}) e_j)``.
    Tail sums and their logarithms are computed in log space, so that saturated probabilities lose no digits.

    Args:
        logits: ``(B, C)``; minus infinity at the end for answers that a row does not have, whose columns are zero.

    Returns:
        ``(C-1, B, C)``, in float64.
    """
    log_p = torch.log_softmax(logits.double(), dim=1)
    classes = log_p.shape[1]
    # log R_k for k = 0..C-1: a cumulative log-sum-exp from the end.
    log_tail = torch.logcumsumexp(log_p.flip(1), dim=1).flip(1)
    columns = log_p.new_zeros(classes - 1, *log_p.shape)
    for k in range(classes - 1):
        after = log_tail[:, k + 1]
        last = after == -torch.inf
        size = (0.5 * (log_p[:, k] + after - log_tail[:, k])).exp().masked_fill(last, 0.0)
        columns[k, :, k] = size
        share = (log_p[:, k + 1 :] - after.unsqueeze(1)).exp().masked_fill(last.unsqueeze(1), 0.0)
        columns[k, :, k + 1 :] = -size.unsqueeze(1) * share
    return columns


def monte_carlo_columns(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return one column per example: the score ``e_y - p`` of a label sampled from the model.

    Args:
        logits: ``(B, C)``.
        uniform: ``(B,)`` uniform numbers of [0, 1), from which the labels are sampled by inversion.

    Returns:
        ``(1, B, C)``, in float64; its outer product equals ``diag(p) - p pᵀ`` in expectation.
    """
    p = torch.softmax(logits.double(), dim=1)
    passed = p.cumsum(dim=1) <= uniform.to(p).unsqueeze(1)
    return empirical_columns(logits, passed.sum(dim=1).clamp(max=p.shape[1] - 1))


def empirical_columns(logits: Tensor, labels: Tensor) -> Tensor:
    """Return one column per example: the score ``e_y - p`` of its own label.

    Args:
        logits: ``(B, C)``.
        labels: ``(B,)`` int64.

    Returns:
        ``(1, B, C)``, in float64.
    """
    p = torch.softmax(logits.double(), dim=1)
    return (torch.nn.functional.one_hot(labels, p.shape[1]).to(p) - p).unsqueeze(0)


SAMPLED: tuple[Link, ...] = ("mc-joint", "mc-indep")
"""Links that sample from the Gaussian for more than two answers."""

_CHUNK_ELEMENTS = 4_000_000


def needs_every_class(link: Link) -> bool:
    """Return whether a link needs the covariance of all C logits; mc-joint needs that of C-1 differences."""
    return link in ("mc-indep", "probit", "bridge")


def log_probabilities(link: Link, moments: LogitMoments, *, samples: int = DEFAULT_SAMPLES, seed: int = 0) -> Tensor:
    """Apply a link.

    Args:
        link: The link.
        moments: Mean and covariance of the logits.
        samples: Quasi-Monte-Carlo points of the two sampling links, for C > 2 (C = 2 is deterministic).
        seed: Random seed of their scrambling; the points are the same for every row, so that batches have no effect.

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


def averaged_log_probabilities(
    link: Link,
    found: Sequence[LogitMoments],
    averaging: Averaging,
    *,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
) -> Tensor:
    """Average a link over prior precisions and temperatures: ``log Σ_ij w_ij p_ij``.

    With two classes every component is integrated; with more, the quasi-Monte-Carlo points are divided among the
    components by an additional coordinate, so that the average costs as much as one component. MAP is not averaged.

    Args:
        link: The link.
        found: Moments under each of the D prior precisions.
        averaging: The weights.
        samples: Quasi-Monte-Carlo points of the two sampling links, for C > 2.
        seed: Random seed of their scrambling.

    Returns:
        ``(B, C)`` log-probabilities in float64, on the CPU.
    """
    if link == "map" or averaging.is_single:
        return log_probabilities(link, found[0], samples=samples, seed=seed)
    classes = found[0].mean.shape[1]
    if link not in SAMPLED or classes == 2:
        index, columns = averaging.weights.nonzero(as_tuple=True)
        parts = _log_p_of_components(link, found, index, averaging.temperatures[columns])
        weights = averaging.weights[index, columns]
        averaged = torch.logsumexp(parts + weights.log().reshape(-1, 1, 1), dim=0)
        return averaged - torch.logsumexp(averaged, dim=1, keepdim=True)
    mean = differences_to_first(found[0].mean.double().cpu())
    roots = [symmetric_root(_differences(link, each)) for each in found]
    groups = _shared_points(averaging, samples, classes - 1, seed)
    chunk = max(1, _CHUNK_ELEMENTS // (samples * classes))
    averaged_chunks = []
    for start in range(0, len(mean), chunk):
        part = slice(start, start + chunk)
        logs = torch.cat(
            [
                torch.log_softmax(drawn_logits(mean[part], roots[index][part], points) / temperature, dim=2)
                for index, temperature, points in groups
            ],
            dim=1,
        )
        averaged = torch.logsumexp(logs, dim=1)
        averaged_chunks.append(averaged - torch.logsumexp(averaged, dim=1, keepdim=True))
    return torch.cat(averaged_chunks)


def _log_p_of_components(link: Link, found: Sequence[LogitMoments], index: Tensor, temperatures: Tensor) -> Tensor:
    """Apply a link without sampling to several prior precisions and temperatures at once.

    Args:
        link: The link.
        found: Moments under each of the D prior precisions.
        index: Index of the prior precision of each component, ``(K,)``.
        temperatures: Temperature of each component, ``(K,)`` float64.

    Returns:
        ``(K, B, C)`` log-probabilities in float64, on the CPU.
    """
    mean = found[0].mean.double().cpu()
    covariances = torch.stack([each.covariance.double().cpu() for each in found])
    scale = 1.0 / temperatures.reshape(-1, 1, 1)
    chunk = max(1, _CHUNK_ELEMENTS // (len(index) * max(256, covariances[0, 0].numel())))
    parts = []
    for start in range(0, len(mean), chunk):
        part = slice(start, start + chunk)
        means = mean[part] * scale
        covariance = covariances[index, part] * scale.square().unsqueeze(3)
        log_p = log_probabilities(link, LogitMoments(means.flatten(0, 1), covariance.flatten(0, 1)))
        parts.append(log_p.unflatten(0, means.shape[:2]))
    return torch.cat(parts, dim=1)


def _differences(link: Link, moments: LogitMoments) -> Tensor:
    """Return the covariance of the logit differences that a sampling link samples."""
    covariance = moments.covariance.double().cpu()
    if link == "mc-joint":
        return covariance if moments.of_differences else difference_covariance(covariance)
    if moments.of_differences:
        raise ValueError(f"{link} needs the variances of all classes")
    return difference_covariance(torch.diag_embed(covariance.diagonal(dim1=1, dim2=2)))


def _shared_points(averaging: Averaging, samples: int, dimensions: int, seed: int) -> list[tuple[int, Tensor, Tensor]]:
    """Divide quasi-Monte-Carlo points among the components, by their last coordinate.

    Returns:
        For each prior precision with points: its index, the temperature ``(S, 1)`` of each of its points, and the
        points ``(S, dimensions)``; a point and its mirror image belong to the same component.
    """
    half = (samples + 1) // 2
    uniform = torch.quasirandom.SobolEngine(dimensions + 1, scramble=True, seed=seed).draw(half, dtype=torch.float64)
    tiny = 0.5 / (half * 1024)
    normal = torch.special.ndtri(uniform[:, :-1].clamp(tiny, 1.0 - tiny))
    components = averaging.components
    bounds = torch.tensor([weight for *_, weight in components], dtype=torch.float64).cumsum(0)
    chosen = torch.searchsorted(bounds / bounds[-1], uniform[:, -1].contiguous()).clamp(max=len(components) - 1)
    of_prior = torch.tensor([index for index, *_ in components])[chosen]
    temperatures = torch.tensor([temperature for _, temperature, _ in components], dtype=torch.float64)[chosen]
    groups = []
    for index in of_prior.unique().tolist():
        own = of_prior == index
        points = torch.cat([normal[own], -normal[own]])
        groups.append((int(index), temperatures[own].repeat(2).unsqueeze(1), points))
    return groups


def grid_log_probabilities(
    link: Link,
    found: Sequence[LogitMoments],
    temperatures: Tensor,
    labels: Tensor,
    *,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
) -> Tensor:
    """Return the log-probability of each row's label under every prior precision and temperature.

    Args:
        link: The link.
        found: Moments under each of the D prior precisions.
        temperatures: ``(T,)``.
        labels: ``(B,)``.
        samples: Quasi-Monte-Carlo points of the two sampling links, for C > 2.
        seed: Random seed of their scrambling.

    Returns:
        ``(D, T, B)`` in float64.
    """
    classes = found[0].mean.shape[1]
    own = labels.unsqueeze(1)
    if link not in SAMPLED or classes == 2:
        index = torch.arange(len(found)).repeat_interleave(len(temperatures))
        log_p = _log_p_of_components(link, found, index, temperatures.double().cpu().repeat(len(found)))
        label = log_p.gather(2, own.expand(len(index), -1, 1)).squeeze(2)
        return label.unflatten(0, (len(found), len(temperatures)))
    table = torch.empty(len(found), len(temperatures), len(labels), dtype=torch.float64)
    mean = differences_to_first(found[0].mean.double().cpu())
    points = normal_points(samples, classes - 1, seed)
    chunk = max(1, _CHUNK_ELEMENTS // (len(points) * classes))
    for row, moments in enumerate(found):
        root = symmetric_root(_differences(link, moments))
        for start in range(0, len(mean), chunk):
            part = slice(start, start + chunk)
            drawn = drawn_logits(mean[part], root[part], points)
            for column, temperature in enumerate(temperatures.tolist()):
                log_p = torch.log_softmax(drawn / temperature, dim=2)
                label = log_p.gather(2, own[part].unsqueeze(1).expand(-1, len(points), 1)).squeeze(2)
                table[row, column, part] = torch.logsumexp(label, dim=1) - math.log(len(points))
    return table


def difference_covariance(covariance: Tensor) -> Tensor:
    """Return the covariance of ``f_c - f_0``, ``(B, C-1, C-1)``, from that of ``f``, ``(B, C, C)``."""
    rest = covariance[:, 1:, 1:]
    return rest - covariance[:, 1:, :1] - covariance[:, :1, 1:] + covariance[:, :1, :1]


def differences_to_first(mean: Tensor) -> Tensor:
    """Return ``f_c - f_0``, ``(B, C-1)``, from ``f``, ``(B, C)``."""
    return mean[:, 1:] - mean[:, :1]


def _probit(mean: Tensor, variances: Tensor) -> Tensor:
    """Compute the logarithm of ``softmax(f / sqrt(1 + π/8 diag Λ))`` (Eq. 18; MacKay 1992)."""
    return torch.log_softmax(mean / torch.sqrt(1.0 + math.pi / 8.0 * variances), dim=1)


def _laplace_bridge(mean: Tensor, variances: Tensor) -> Tensor:
    """Compute the logarithm of the mean ``α/Σα`` of the matching Dirichlet (Eq. 20; Hobbhahn et al. 2022).

    ``α_i = (1/Λ_ii) (1 - 2/C + e^{f_i} Σ_j e^{-f_j} / C²)``, in log space so that large logits do not overflow.
    For C > 2 it does not tend to the softmax as Λ tends to 0; for a row without variance (MAP) the result is the
    softmax itself.
    """
    classes = mean.shape[1]
    exponential = mean + torch.logsumexp(-mean, dim=1, keepdim=True) - 2.0 * math.log(classes)
    # For C = 2 the constant is zero, and only the exponential remains.
    constant = torch.full_like(exponential, 1.0 - 2.0 / classes).log()
    log_alpha = torch.logaddexp(constant, exponential) - variances.clamp(min=1e-300).log()
    certain = (variances == 0).all(dim=1, keepdim=True)
    return torch.log_softmax(torch.where(certain, mean, log_alpha), dim=1)


def _averaged_softmax(differences: Tensor, covariance: Tensor, samples: int, seed: int) -> Tensor:
    """Compute ``log E[softmax(0, d)]`` for ``d ~ N(differences, covariance)``.

    Args:
        differences: ``(B, C-1)``, the mean of ``f_c - f_0``.
        covariance: ``(B, C-1, C-1)``.
        samples: Number of points when C > 2.
        seed: Random seed of their scrambling.
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
    """Return L with ``L Lᵀ`` equal to the covariances ``(B, K, K)``; not by Cholesky, since they may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0.0).sqrt().unsqueeze(1)


def _log_mean_softmax(mean: Tensor, root: Tensor, points: Tensor) -> Tensor:
    averaged = torch.logsumexp(torch.log_softmax(drawn_logits(mean, root, points), dim=2), dim=1)
    averaged = averaged - math.log(len(points))
    return averaged - torch.logsumexp(averaged, dim=1, keepdim=True)


def drawn_logits(mean: Tensor, root: Tensor, points: Tensor) -> Tensor:
    """Compute the logits at points of the standard normal; that of the first class is zero.

    Args:
        mean: Mean of ``f_c - f_0``, ``(B, C-1)``.
        root: Square root of their covariance, ``(B, C-1, C-1)``.
        points: ``(S, C-1)``.

    Returns:
        ``(B, S, C)``.
    """
    drawn = mean.unsqueeze(1) + points @ root.transpose(1, 2)
    return torch.cat([drawn.new_zeros(*drawn.shape[:2], 1), drawn], dim=2)


def normal_points(samples: int, dimensions: int, seed: int) -> Tensor:
    """Return scrambled Sobol points of the standard normal, ``(samples, dimensions)``, with mean zero.

    Half of the points mirror the other half (antithetic), which integrates every odd function exactly.
    """
    half = (samples + 1) // 2
    uniform = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed).draw(half, dtype=torch.float64)
    tiny = 0.5 / (half * 1024)
    normal = torch.special.ndtri(uniform.clamp(tiny, 1.0 - tiny))
    return torch.cat([normal, -normal])


_WIDE = 5.0
_Z = torch.arange(-14.0, 14.1, 0.2, dtype=torch.float64)
_X = torch.arange(-60.0, 60.1, 0.2, dtype=torch.float64)


def mutual_information(moments: LogitMoments, *, samples: int = DEFAULT_SAMPLES, seed: int = 0) -> Tensor:
    """Compute the mutual information of answer and weights for each row, in nats.

    Args:
        moments: Mean and covariance of the logits.
        samples: Quasi-Monte-Carlo points for C > 2, those of mc-joint (C = 2 is deterministic).
        seed: Random seed of their scrambling.

    Returns:
        ``(B,)`` in float64, at least 0 and at most log C.
    """
    averaged = log_probabilities("mc-joint", moments, samples=samples, seed=seed)
    total = torch.special.entr(averaged.exp()).sum(dim=1)
    return (total - _expected_entropy(moments, samples, seed)).clamp(min=0.0)


def _expected_entropy(moments: LogitMoments, samples: int, seed: int) -> Tensor:
    """Return ``E[H(softmax(f))]`` of each row, ``(B,)``."""
    differences = differences_to_first(moments.mean.double().cpu())
    covariance = _differences("mc-joint", moments)
    if differences.shape[1] == 1:
        return expected_binary_entropy(differences[:, 0], covariance[:, 0, 0].clamp(min=0.0).sqrt())
    return _sampled_entropy(differences, symmetric_root(covariance), samples, seed)


def averaged_mutual_information(
    found: Sequence[LogitMoments], averaging: Averaging, *, samples: int = DEFAULT_SAMPLES, seed: int = 0
) -> Tensor:
    """Compute the mutual information of answer and weights under an average, in nats.

    ``I = H(Σ w p) - Σ w E[H(softmax(f / τ))]``; see :func:`mutual_information`.

    Returns:
        ``(B,)`` in float64, at least 0 and at most log C.
    """
    if averaging.is_single:
        return mutual_information(found[0], samples=samples, seed=seed)
    averaged = averaged_log_probabilities("mc-joint", found, averaging, samples=samples, seed=seed)
    known = torch.zeros(len(averaged), dtype=torch.float64)
    for index, temperature, weight in averaging.components:
        known += weight * _expected_entropy(found[index].divided(temperature), max(64, samples // 16), seed)
    return (torch.special.entr(averaged.exp()).sum(dim=1) - known).clamp(min=0.0)


def expected_binary_entropy(mean: Tensor, deviation: Tensor) -> Tensor:
    """Compute ``E[h(sigmoid(x))]`` for ``x ~ N(mean, deviation²)``, with h the binary entropy; all ``(B,)`` float64.

    Trapezoidal rule with step 0.2: in z for small deviations, else in x, where h is negligible beyond 60. Both
    integrands are analytic in a strip around the real line, so the error is below 1e-8.
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
    """Compute ``-p log p - (1-p) log(1-p)`` of ``p = sigmoid(logit)``, without cancellation for large logits."""
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
