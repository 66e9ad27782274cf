"""Criteria for the prior precision δ, as pure functions of arrays.

Every criterion returns a δ; ``inf`` is the MAP (zero variance). Notation as in the method's papers:
N rows, C classes, ``d_n`` the C-1 logit differences ``f_c - f_0``, ``Λ_n(δ)`` their covariance under the linearised
posterior, ``H_n`` the Hessian of ``-log p(y|d)``, λ the curvature's eigenvalues. ``Differences`` are ``(N, C-1)``,
``Variances`` ``(G, N, C-1, C-1)`` at the G prior precisions of a grid.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg

from lapora.likelihoods.base import LogitMoments
from lapora.likelihoods.categorical import log_probabilities
from lapora.posterior.marglik import Evidence, Spectrum

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
FOLDS = 5
SAMPLES = 256
SATURATED_NLL = 0.1
"""Training NLL below which :func:`gated` regards an adapter as overfitted."""


# Probabilities and scores


def differences(logits: Array) -> Array:
    """Return ``f_c - f_0``, which determine the softmax."""
    return logits[:, 1:] - logits[:, :1]


def log_softmax(mean: Array) -> Array:
    """Return log-probabilities of the C classes from C-1 differences."""
    logits = np.concatenate([np.zeros((len(mean), 1)), mean], axis=1)
    high = logits.max(axis=1, keepdims=True)
    return logits - high - np.log(np.exp(logits - high).sum(axis=1, keepdims=True))


def predictive(mean: Array, variance: Array, samples: int = SAMPLES) -> Array:
    """Return log-probabilities of ``E softmax(d)``, ``d ~ N(mean, variance)``: the tool's ``mc-joint`` link."""
    logits = np.concatenate([np.zeros((len(mean), 1)), mean], axis=1)
    moments = LogitMoments(torch.tensor(logits), torch.tensor(np.asarray(variance, dtype=np.float64)))
    return log_probabilities("mc-joint", moments, samples=samples).numpy()


def mean_nll(log_p: Array, labels: Labels) -> float:
    """Return the mean negative log-likelihood in nats."""
    return float(-log_p[np.arange(len(labels)), labels].mean())


def nll_curve(mean: Array, variances: Array, labels: Labels) -> Array:
    """Return the NLL at each δ of the grid, then at the MAP: ``(G + 1,)``."""
    at_grid = [mean_nll(predictive(mean, variance), labels) for variance in variances]
    return np.array([*at_grid, mean_nll(log_softmax(mean), labels)])


def lowest(grid: Array, curve: Array) -> float:
    """Return the δ of the least NLL; ``inf`` for the MAP."""
    return float(np.append(grid, np.inf)[int(np.argmin(curve))])


def hessians(mean: Array) -> Array:
    """``H_n = diag(p) - p pᵀ`` of the differences, ``(N, C-1, C-1)``."""
    p = np.exp(log_softmax(mean))[:, 1:]
    return p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None, :]


# Validation, and what stands in for it


def validation(grid: Array, mean: Array, variances: Array, labels: Labels) -> float:
    """Return the δ of the least NLL on held-out labeled rows."""
    return lowest(grid, nll_curve(mean, variances, labels))


def thinned_rows(grid: Array, mean: Array, variances: Array, labels: Labels) -> float:
    """Validate on the training rows with a random share of their tokens deleted.

    Deleting tokens breaks what the adapter knows by heart and mostly keeps what it has learned, so that the thinned
    rows' margins are near those of new rows.

    Args:
        grid: Prior precisions.
        mean: Differences of the thinned rows.
        variances: Their covariances under the posterior of the whole rows.
        labels: Labels of the rows.
    """
    return validation(grid, mean, variances, labels)


def evidence_or_thinned_rows(evidence: float, thinned: float, training_nll: float) -> float:
    """Use the evidence's δ if the training NLL is saturated, else that of the thinned rows.

    A saturated adapter may know its rows so well that it recognises their thinned copies; evidence does well there.

    Args:
        evidence: δ by :func:`marginal_likelihood`.
        thinned: δ by :func:`thinned_rows`, a fifth of the tokens deleted.
        training_nll: NLL of the whole training rows at the MAP.
    """
    return evidence if training_nll < SATURATED_NLL else thinned


def without_own_row(mean: Array, variances: Array) -> Array:
    """Return ``Λ_n`` with row n's own curvature removed from the posterior: ``Λ (I - H Λ)⁻¹``.

    Exact for the full GGN (a low-rank downdate); for KFAC an approximation, kept only where it is positive definite.
    """
    identity = np.eye(mean.shape[1])
    wide = np.asarray(variances, dtype=np.float64)
    system = np.swapaxes(identity - hessians(mean) @ wide, 2, 3) + 1e-9 * identity
    found = np.linalg.solve(system, np.swapaxes(wide, 2, 3))
    found = (found + np.swapaxes(found, 2, 3)) / 2
    bad = ~(np.linalg.eigvalsh(found).min(axis=-1) >= 0)
    found[bad] = wide[bad]
    return found


def leave_one_out_at_map(grid: Array, mean: Array, variances: Array, labels: Labels) -> float:
    """Approximate leave-one-out NLL by one Newton step from θ_MAP (Opper and Winther 2000; Vehtari et al. 2016)."""
    outside = without_own_row(mean, variances)
    residual = np.exp(log_softmax(mean))[:, 1:] - np.eye(mean.shape[1] + 1)[labels][:, 1:]
    shifted = mean + np.einsum("gncd,nd->gnc", outside, residual)
    at_grid = [mean_nll(predictive(m, v), labels) for m, v in zip(shifted, outside, strict=True)]
    return lowest(grid, np.array([*at_grid, mean_nll(log_softmax(mean), labels)]))


# Evidence


def marginal_likelihood(eigenvalues: Array, squared_norm: float) -> float:
    """Laplace evidence at θ_MAP (Laplace-LoRA, Eq. 13)."""
    return Evidence([Spectrum.of(eigenvalues, [None])], [squared_norm]).maximize()[0]


def without_initialisation(eigenvalues: Array, squared_norm: float, initial: float) -> float:
    """Evidence with the expected squared norm of A's random initialization subtracted from ``‖θ‖²``.

    PEFT draws A uniformly within ``±1/sqrt(d_in)``: ``E‖A_0‖² = r/3`` for each matrix.
    """
    return marginal_likelihood(eigenvalues, max(squared_norm - initial, 1e-6))


def tempered(eigenvalues: Array, squared_norm: float, factor: float) -> float:
    """Multiply the evidence's δ by a constant."""
    return factor * marginal_likelihood(eigenvalues, squared_norm)


def gated(eigenvalues: Array, squared_norm: float, training_nll: float) -> float:
    """Use the evidence if the training NLL is saturated, else the MAP."""
    return marginal_likelihood(eigenvalues, squared_norm) if training_nll < SATURATED_NLL else np.inf


def function_change(features: Array, change: Array) -> float:
    """Evidence of the function's change from the base model, ``u ~ N(0, J Jᵀ/δ + σ²I)``, over δ and σ².

    Args:
        features: ``(N, C-1, M)`` with ``Φ Φᵀ = J Jᵀ`` (its leading part).
        change: ``f_MAP - f_base`` of the training rows, as differences.
    """
    flat, u = features.reshape(-1, features.shape[2]), change.ravel()
    spectrum = (flat**2).sum(axis=0)
    along = (flat.T @ u) ** 2 / spectrum
    rest, missing = max(float(u @ u - along.sum()), 1e-9), len(u) - len(spectrum)
    best, chosen = -np.inf, np.inf
    for delta in np.logspace(-2, 4, 61):
        for noise in np.logspace(-4, 1, 26):
            v = spectrum / delta + noise
            evidence = -0.5 * (np.log(v).sum() + (along / v).sum() + missing * np.log(noise) + rest / noise)
            if evidence > best:
                best, chosen = evidence, float(delta)
    return chosen


def adapted_evidence(features: Array, prior_mean: Array, labels: Labels) -> float:
    """Laplace evidence of the linearised model itself (Antorán et al. 2022).

    Args:
        features: ``(N, C-1, M)`` with ``Φ Φᵀ = J Jᵀ`` (its leading part).
        prior_mean: ``f_MAP - J θ_MAP`` of the training rows, as differences.
        labels: Labels of the rows.
    """
    best, chosen, weights = -np.inf, np.inf, None
    for delta in np.logspace(2.5, -1.5, 17):
        weights = fit_linear(features, prior_mean, labels, delta, weights)
        mean = prior_mean + features @ weights
        scaled = _curvature_rows(features, mean)
        _, determinant = np.linalg.slogdet(scaled.T @ scaled / delta + np.eye(scaled.shape[1]))
        likelihood = -mean_nll(log_softmax(mean), labels) * len(labels)
        evidence = likelihood - 0.5 * delta * float(weights @ weights) - 0.5 * determinant
        if evidence > best:
            best, chosen = evidence, float(delta)
    return chosen


# Linear models refitted


def fit_linear(
    features: Array, prior_mean: Array, labels: Labels, delta: float, start: Array | None = None, steps: int = 30
) -> Array:
    """Newton's mode of ``d = m + Φ w``, ``w ~ N(0, I/δ)``, with a softmax likelihood."""
    rows, columns, width = features.shape
    flat = features.reshape(rows * columns, width)
    target = np.eye(columns + 1)[labels][:, 1:]
    weights = np.zeros(width) if start is None else start.copy()

    def objective(at: Array) -> float:
        nll = mean_nll(log_softmax(prior_mean + (flat @ at).reshape(rows, columns)), labels)
        return nll * rows + 0.5 * delta * float(at @ at)

    value = objective(weights)
    for _ in range(steps):
        mean = prior_mean + (flat @ weights).reshape(rows, columns)
        gradient = flat.T @ (np.exp(log_softmax(mean))[:, 1:] - target).ravel() + delta * weights
        scaled = _curvature_rows(features, mean)
        step = linalg.solve(scaled.T @ scaled + delta * np.eye(width), gradient, assume_a="pos")
        size, new = 1.0, objective(weights - step)
        while new > value + 1e-9 and size > 1e-4:
            size /= 2
            new = objective(weights - size * step)
        weights = weights - size * step
        if abs(value - new) < 1e-4 * max(1.0, abs(value)):
            break
        value = new
    return weights


def _curvature_rows(features: Array, mean: Array) -> Array:
    """``H^{1/2}`` applied to the features, rows and columns flattened."""
    values, vectors = np.linalg.eigh(hessians(mean))
    root = vectors * np.sqrt(values.clip(min=0.0))[:, None, :]
    return np.einsum("ncs,ncm->nsm", root, features, optimize=True).reshape(-1, features.shape[2])


def cross_validated(features: Array, prior_mean: Array, labels: Labels, delta: float, start: Array | None) -> Array:
    """Differences of every row from a linear model fitted without the row's fold."""
    order = np.random.default_rng(0).permutation(len(labels))
    found = np.zeros_like(prior_mean)
    for fold in range(FOLDS):
        out = order[fold::FOLDS]
        kept = np.setdiff1d(order, out)
        weights = fit_linear(features[kept], prior_mean[kept], labels[kept], delta, start)
        found[out] = prior_mean[out] + features[out] @ weights
    return found


def cross_validated_evidence(features: Array, prior_mean: Array, labels: Labels) -> float:
    """Return the δ of the least k-fold NLL of the linearized model, refitted from its prior mean."""
    grid = np.logspace(2.5, -2, 10)
    scores = [mean_nll(log_softmax(cross_validated(features, prior_mean, labels, d, None)), labels) for d in grid]
    return float(grid[int(np.argmin(scores))])


def probe_features(embeddings: Array, classes: int, width: int = 400) -> Array:
    """Features of a linear probe on frozen embeddings, one weight vector per class: ``(N, C-1, M)``."""
    centred = embeddings - embeddings.mean(axis=0)
    scaled = np.column_stack([centred / np.sqrt((centred**2).sum(axis=1).mean()), np.ones(len(embeddings))])
    u, s, _ = np.linalg.svd(scaled, full_matrices=False)
    reduced = (u * s)[:, : max(1, width // (classes - 1) if classes > 2 else width)]
    mixing = np.linalg.cholesky(np.eye(classes - 1) + 1.0)
    return np.einsum("cd,nm->ncdm", mixing, reduced).reshape(len(embeddings), classes - 1, -1)


def class_prior(labels: Labels, classes: int) -> Array:
    """Differences of a constant predictor, ``(N, C-1)``."""
    counts = np.log(np.bincount(labels, minlength=classes).clip(min=0.5))
    return np.repeat((counts[1:] - counts[0])[None], len(labels), axis=0)


def simulated_margins(embeddings: Array, labels: Labels, classes: int, training_nll: float) -> Array:
    """Return held-out margins of a probe with the adapter's training NLL.

    The probe reads the frozen encoder, which has seen no label, so that its folds are really held out; its ridge is
    set so that its training NLL is the adapter's. Returns the cross-validated differences.
    """
    features, prior = probe_features(embeddings, classes), class_prior(labels, classes)
    low, high, weights = np.log(1e-5), np.log(1e4), None
    middle = 0.0
    for _ in range(10):
        middle = (low + high) / 2
        weights = fit_linear(features, prior, labels, float(np.exp(middle)), weights)
        reached = mean_nll(log_softmax(prior + features @ weights), labels)
        if abs(reached - training_nll) < 0.01 * training_nll + 1e-3:
            break
        low, high = (low, middle) if reached > training_nll else (middle, high)
    return cross_validated(features, prior, labels, float(np.exp(middle)), weights)


def simulated_validation(grid: Array, mean: Array, variances: Array, labels: Labels, margins: Array) -> float:
    """Validation with the margins of :func:`simulated_margins` and the variances of the training rows."""
    return validation(grid, margins, without_own_row(mean, variances), labels)


def matched_gap(grid: Array, mean: Array, variances: Array, gap: float) -> float:
    """Return the δ at which the posterior's expected generalization gap is that of a probe.

    The linearised model's expected optimism per row is ``1/N Σ tr(H_n Λ_n(δ))`` (``tr F(F+δ)⁻¹ / N`` for the full
    GGN; Takeuchi's and Moody's criteria).

    Args:
        grid: Prior precisions, ascending.
        mean: Differences of the training rows.
        variances: Their covariances.
        gap: Held-out less training NLL.
    """
    optimism = np.einsum("ncd,gncd->g", hessians(mean), np.asarray(variances, dtype=np.float64)) / len(mean)
    if gap <= optimism[-1]:
        return np.inf
    return float(np.exp(np.interp(-gap, -optimism, np.log(grid))))


# Temperature, for comparison


def temperature(mean: Array, labels: Labels) -> float:
    """The temperature of the least NLL (Guo et al. 2017), to 1 % between 0.05 and 20."""
    grid = np.exp(np.arange(np.log(0.05), np.log(20.0), 0.01))
    return float(grid[int(np.argmin([mean_nll(log_softmax(mean / t), labels) for t in grid]))])
