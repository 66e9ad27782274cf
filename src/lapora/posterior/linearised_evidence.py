"""Adapted evidence: the Laplace evidence of the linearized model at its own mode.

θ_MAP is not a mode of the linearized model ``f = f_MAP + J(θ - θ_MAP)``. With ``θ ~ N(0, δ⁻¹I)`` this model is a
Gaussian process over the C-1 logit differences, with mean ``m = f_MAP - J θ_MAP`` and kernel ``K/δ``,
``K = J Jᵀ`` of unweighted Jacobians. Newton's method in the dual (N(C-1) unknowns) finds its mode, and the
evidence is ``log p(y|h) - ½ (h - m)ᵀ α - ½ log |I + Sᵀ (K/δ) S|`` with ``h = m + (K/δ) α`` and ``S Sᵀ`` the
negative Hessian of the log-likelihood. Sources: Antorán et al. 2022, "Adapting the linearised Laplace model evidence
for modern deep learning"; Rasmussen and Williams 2006, section 3.5 (Newton's method for a multi-class process).
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
    """The linearized model on the training rows.

    Attributes:
        kernel: ``K = J Jᵀ``, ``(N(C-1), N(C-1))``, ordered by example, then by logit difference.
        prior_mean: ``f_MAP - J θ_MAP`` as differences to the first class, ``(N, C-1)``.
        labels: ``(N,)`` int64.
    """

    kernel: Array
    prior_mean: Array
    labels: NDArray[np.int64]

    def log_marginal_likelihood(self, precision: float, start: Array | None = None) -> tuple[float, Array]:
        """Compute the adapted evidence at one prior precision.

        Args:
            precision: Prior precision δ.
            start: Initial α of Newton's method, ``(N(C-1),)``; None is zero.

        Returns:
            The evidence in nats, and α at the mode, ``(N(C-1),)``.

        Raises:
            NumericalError: Newton's method did not converge, or the kernel is not positive semi-definite.
        """
        from scipy.linalg import cho_factor, cho_solve

        kernel = self.kernel / precision
        mean = self.prior_mean.ravel()
        alpha = np.zeros_like(mean) if start is None else start
        objective, latent = self._objective(alpha, kernel @ alpha)
        for _ in range(_NEWTON_STEPS):
            gradient, root = self._gradient_and_root(latent)
            target = _times_transposed(root, latent - mean)
            right = _times(root, target) + gradient  # W (h - m) + ∇ log p
            core = _sandwich(root, kernel)
            factor = cho_factor(core + np.eye(len(core)))
            newton = right - _times(root, cho_solve(factor, _times_transposed(root, kernel @ right)))
            step, size = newton - alpha, 1.0
            along = kernel @ step
            offset = kernel @ alpha
            while True:
                candidate, values = self._objective(alpha + size * step, offset + size * along)
                if candidate >= objective - 1e-12 * abs(objective) or size < 1e-6:
                    break
                size /= 2
            alpha = alpha + size * step
            improved = candidate - objective
            objective, latent = candidate, values
            if abs(improved) < _TOLERANCE:
                break
        else:
            raise NumericalError(
                f"adapted evidence: Newton's method did not converge at prior precision {precision:.3g}; use another "
                "--method"
            )
        _, root = self._gradient_and_root(latent)
        core = _sandwich(root, kernel)
        sign, log_determinant = np.linalg.slogdet(core + np.eye(len(core)))
        if sign <= 0 or not math.isfinite(objective):
            raise NumericalError("adapted evidence: the kernel is not positive semi-definite; fit again")
        return objective - 0.5 * float(log_determinant), alpha

    def maximize(self) -> tuple[float, float, str | None]:
        """Find the δ that maximizes the adapted evidence, in the range of :mod:`lapora.posterior.marglik`.

        The evidence may have several maxima: it is evaluated at every decade, and the best is refined. If Newton's
        method does not converge, as for very wide priors, the evidence is -∞.

        Returns:
            δ, the evidence in nats, and ``lowest`` or ``highest`` if δ is at that end of the range, else None.

        Raises:
            NumericalError: Newton's method did not converge for any δ.
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
        # From tight priors, whose mode is close to the start, to wide ones, each started at the previous mode.
        candidates = [(evidence(point), point) for point in np.arange(highest, lowest - step / 2, -step)]
        value, best = max(candidates)
        if not math.isfinite(value):
            raise NumericalError(
                "adapted evidence: Newton's method did not converge for any prior precision; use another --method"
            )
        bracket = max(best - step, lowest), min(best + step, highest)
        alpha = None
        refined = minimize_scalar(
            lambda point: -evidence(point), bounds=bracket, method="bounded", options={"xatol": 1e-3}
        )
        if -float(refined.fun) > value:
            value, best = -float(refined.fun), float(refined.x)
        bound = "lowest" if best < lowest + 0.01 else "highest" if best > highest - 0.01 else None
        return math.exp(best), value, bound

    def _objective(self, alpha: Array, offset: Array) -> tuple[float, Array]:
        """Compute ``log p(y|h) - ½ (h - m)ᵀ α`` and h, at ``h = m + offset``."""
        latent = self.prior_mean.ravel() + offset
        log_p = _log_softmax(latent.reshape(self.prior_mean.shape))
        log_likelihood = float(log_p[np.arange(len(log_p)), self.labels].sum())
        return log_likelihood - 0.5 * float(alpha @ offset), latent

    def _gradient_and_root(self, latent: Array) -> tuple[Array, Array]:
        """Compute ``∇ log p``, ``(N(C-1),)``, and a root S of each example's negative Hessian, ``(N, C-1, C-1)``."""
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
    """Compute ``S v``."""
    return np.einsum("ncs,ns->nc", root, vector.reshape(root.shape[0], root.shape[2])).ravel()


def _times_transposed(root: Array, vector: Array) -> Array:
    """Compute ``Sᵀ v``."""
    return np.einsum("ncs,nc->ns", root, vector.reshape(root.shape[:2])).ravel()


def _sandwich(root: Array, kernel: Array) -> Array:
    """Compute ``Sᵀ K S``."""
    examples, classes, columns = root.shape
    blocks = kernel.reshape(examples, classes, examples, classes)
    left = np.einsum("ncs,ncmd->nsmd", root, blocks, optimize=True)
    return np.einsum("nsmd,mdt->nsmt", left, root, optimize=True).reshape(examples * columns, examples * columns)
