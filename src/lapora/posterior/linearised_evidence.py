"""Adapted evidence: the Laplace evidence of the linearised model at its own mode.

θ_MAP is not a mode of the linearised model ``f = f_MAP + J(θ - θ_MAP)``. With ``θ ~ N(0, δ⁻¹I)`` that model is a
Gaussian process over the C-1 logit differences, with mean ``m = f_MAP - J θ_MAP`` and kernel ``K/δ``,
``K = J Jᵀ`` of unweighted Jacobians. Its mode is found by Newton's method in the dual (N(C-1) unknowns) and its
evidence is ``log p(y|h) - ½ (h - m)ᵀ α - ½ log |I + Sᵀ (K/δ) S|`` with ``h = m + (K/δ) α`` and ``S Sᵀ`` the
Hessian of the log-likelihood. Sources: Antorán et al. 2022, "Adapting the linearised Laplace model evidence for
modern deep learning"; Rasmussen and Williams 2006, section 3.5 (Newton's method of a multi-class process).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapora.errors import NumericalError
from lapora.posterior.marglik import HIGHEST_PRECISION, LOWEST_PRECISION

Array = NDArray[np.float64]
_NEWTON_STEPS = 100
_TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False)
class LinearModel:
    """The linearised model's view of the training rows.

    Attributes:
        kernel: ``K = J Jᵀ``, ``(N(C-1), N(C-1))``, rows by example, then by difference.
        prior_mean: ``f_MAP - J θ_MAP`` as differences to the first class, ``(N, C-1)``.
        labels: ``(N,)``.
    """

    kernel: Array
    prior_mean: Array
    labels: NDArray[np.int64]

    def log_marginal_likelihood(self, precision: float, start: Array | None = None) -> tuple[float, Array]:
        """The adapted evidence at one δ.

        Args:
            precision: δ.
            start: α to start Newton's method from.

        Returns:
            Nats, and the mode's α, ``(N(C-1),)``.

        Raises:
            NumericalError: Newton's method did not arrive.
        """
        from scipy.linalg import cho_factor, cho_solve

        kernel = self.kernel / precision
        mean = self.prior_mean.ravel()
        alpha = np.zeros_like(mean) if start is None else start
        objective, latent = self._objective(alpha, kernel @ alpha)
        for _ in range(_NEWTON_STEPS):
            gradient, root = self._slope_and_root(latent)
            target = _times_transposed(root, latent - mean)
            right = _times(root, target) + gradient  # W (h - m) + ∇ log p
            core = _sandwich(root, kernel)
            factor = cho_factor(core + np.eye(len(core)))
            newton = right - _times(root, cho_solve(factor, _times_transposed(root, kernel @ right)))
            step, size = newton - alpha, 1.0
            along = kernel @ step
            moved = kernel @ alpha
            while True:
                candidate, values = self._objective(alpha + size * step, moved + size * along)
                if candidate >= objective - 1e-12 * abs(objective) or size < 1e-6:
                    break
                size /= 2
            alpha = alpha + size * step
            improved = candidate - objective
            objective, latent = candidate, values
            if abs(improved) < _TOLERANCE:
                break
        else:
            raise NumericalError(f"adapted evidence: Newton's method did not arrive at prior precision {precision:.3g}")
        _, root = self._slope_and_root(latent)
        core = _sandwich(root, kernel)
        sign, log_determinant = np.linalg.slogdet(core + np.eye(len(core)))
        if sign <= 0 or not math.isfinite(objective):
            raise NumericalError("adapted evidence: the kernel is not positive semi-definite; fit again")
        return objective - 0.5 * float(log_determinant), alpha

    def maximize(self) -> tuple[float, float, str | None]:
        """The δ of greatest adapted evidence in the range of :mod:`lapora.posterior.marglik`.

        The evidence may have several maxima, so every decade is looked at and the best is refined. Where Newton's
        method does not arrive, as with very wide priors, the evidence counts as -∞.

        Returns:
            δ, the evidence in nats, and ``lowest`` or ``highest`` where δ is at that end of the range.

        Raises:
            NumericalError: Newton's method arrived nowhere.
        """
        from scipy.optimize import minimize_scalar

        alpha: Array | None = None

        def evidence(log_precision: float) -> float:
            nonlocal alpha
            try:
                value, alpha = self.log_marginal_likelihood(math.exp(log_precision), alpha)
            except (NumericalError, np.linalg.LinAlgError):
                alpha = None
                return -math.inf
            return value

        lowest, highest = math.log(LOWEST_PRECISION), math.log(HIGHEST_PRECISION)
        step = math.log(10.0)
        # From the tight prior, whose mode is near, to the wide one.
        known = [(evidence(place), place) for place in np.arange(highest, lowest - step / 2, -step)]
        value, best = max(known)
        if not math.isfinite(value):
            raise NumericalError("adapted evidence: Newton's method arrived nowhere; use another --method")
        bracket = max(best - step, lowest), min(best + step, highest)
        alpha = None
        found = minimize_scalar(
            lambda place: -evidence(place), bounds=bracket, method="bounded", options={"xatol": 1e-3}
        )
        if -float(found.fun) > value:
            value, best = -float(found.fun), float(found.x)
        bound = "lowest" if best < lowest + 0.01 else "highest" if best > highest - 0.01 else None
        return math.exp(best), value, bound

    def _objective(self, alpha: Array, moved: Array) -> tuple[float, Array]:
        """``log p(y|h) - ½ (h - m)ᵀ α`` and h, at ``h = m + moved``."""
        latent = self.prior_mean.ravel() + moved
        log_p = _log_softmax(latent.reshape(self.prior_mean.shape))
        fit = float(log_p[np.arange(len(log_p)), self.labels].sum())
        return fit - 0.5 * float(alpha @ moved), latent

    def _slope_and_root(self, latent: Array) -> tuple[Array, Array]:
        """``∇ log p`` and S, a root of the Hessian of each example: ``(N, C-1, C-1)``."""
        p = np.exp(_log_softmax(latent.reshape(self.prior_mean.shape)))
        one_hot = np.eye(p.shape[1])[self.labels]
        rest = p[:, 1:]
        hessian = rest[:, :, None] * np.eye(rest.shape[1]) - rest[:, :, None] * rest[:, None, :]
        values, vectors = np.linalg.eigh(hessian)
        return (one_hot - p)[:, 1:].ravel(), vectors * np.sqrt(np.clip(values, 0.0, None))[:, None, :]


def _log_softmax(differences: Array) -> Array:
    logits = np.concatenate([np.zeros((len(differences), 1)), differences], axis=1)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _times(root: Array, vector: Array) -> Array:
    """``S v``."""
    return np.einsum("ncs,ns->nc", root, vector.reshape(root.shape[0], root.shape[2])).ravel()


def _times_transposed(root: Array, vector: Array) -> Array:
    """``Sᵀ v``."""
    return np.einsum("ncs,nc->ns", root, vector.reshape(root.shape[:2])).ravel()


def _sandwich(root: Array, kernel: Array) -> Array:
    """``Sᵀ K S``."""
    examples, classes, columns = root.shape
    blocks = kernel.reshape(examples, classes, examples, classes)
    left = np.einsum("ncs,ncmd->nsmd", root, blocks, optimize=True)
    return np.einsum("nsmd,mdt->nsmt", left, root, optimize=True).reshape(examples * columns, examples * columns)
