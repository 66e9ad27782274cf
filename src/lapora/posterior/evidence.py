"""The prior precision by Laplace marginal likelihood (Laplace-LoRA, Eq. 13).

``log p(D|δ) ≈ log p(y|X, θ_MAP) - 1/2 Σ_ℓ [ δ ‖θ_ℓ‖² + Σ_ij log(1 + λ_ij^ℓ / δ) ]``

Only eigenvalues, norms and one log-likelihood are needed, so this module works on NumPy arrays and imports
neither torch nor a model. The derivative in log δ, ``-1/2 [δ ‖θ‖² - Σ λ/(λ+δ)]``, falls through zero once:
a bracketed root is the maximum (MacKay 1992: δ‖θ‖² equals the number of well-determined parameters).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapora.errors import NumericalError

LOWEST_PRECISION = 1e-6
HIGHEST_PRECISION = 1e8


@dataclass(frozen=True)
class EvidenceMaximum:
    """Where the marginal likelihood is greatest.

    Attributes:
        precision: δ, one over the prior's variance.
        log_marginal_likelihood: In nats; without a log-likelihood, up to that constant.
        effective_parameters: ``Σ λ/(λ+δ)``, the number of directions that the data determine.
        at_bound: ``lowest`` or ``highest`` where δ ran to the end of its range, else None.
    """

    precision: float
    log_marginal_likelihood: float
    effective_parameters: float
    at_bound: str | None

    def describe(self, labelled: bool) -> dict[str, Any]:
        """The manifest's ``prior``; the evidence itself is known only where the rows had labels."""
        return {
            "precision": self.precision,
            "structure": "scalar",
            "method": "marglik",
            "log_marginal_likelihood": self.log_marginal_likelihood if labelled else None,
            "effective_parameters": self.effective_parameters,
            "at_bound": self.at_bound,
        }


class Evidence:
    """The marginal likelihood as a function of a prior precision that some blocks share.

    Args:
        eigenvalues: ``λ`` of each block, any shape. Directions without curvature may be left out: they
            add nothing to the sums.
        squared_norms: ``‖θ‖²`` of each block.
        log_likelihood: ``log p(y|X, θ_MAP)`` in nats, or 0 where the data had no labels.

    Raises:
        NumericalError: An eigenvalue is negative or not finite.
    """

    def __init__(
        self,
        eigenvalues: Sequence[NDArray[np.float64]],
        squared_norms: Sequence[float],
        log_likelihood: float = 0.0,
    ) -> None:
        flat = [np.asarray(values, dtype=np.float64).ravel() for values in eigenvalues]
        self.eigenvalues = np.concatenate(flat) if flat else np.zeros(0)
        if not np.all(np.isfinite(self.eigenvalues)) or np.any(self.eigenvalues < 0):
            raise NumericalError("the curvature's eigenvalues are not finite and non-negative; fit again")
        self.squared_norm = float(sum(squared_norms))
        self.log_likelihood = log_likelihood

    def log_marginal_likelihood(self, precision: float) -> float:
        """``log p(D|δ)`` at one δ, in nats."""
        complexity = float(np.log1p(self.eigenvalues / precision).sum())
        return self.log_likelihood - 0.5 * (precision * self.squared_norm + complexity)

    def effective_parameters(self, precision: float) -> float:
        """``Σ λ/(λ+δ)``."""
        return float((self.eigenvalues / (self.eigenvalues + precision)).sum())

    def slope(self, precision: float) -> float:
        """Derivative of the log marginal likelihood in log δ."""
        return -0.5 * (precision * self.squared_norm - self.effective_parameters(precision))

    def maximise(self) -> EvidenceMaximum:
        """Find the δ of greatest marginal likelihood within [1e-6, 1e8], by a bracketed root of the slope."""
        from scipy.optimize import brentq

        bound: str | None = None
        if self.slope(HIGHEST_PRECISION) >= 0:
            precision, bound = HIGHEST_PRECISION, "highest"
        elif self.slope(LOWEST_PRECISION) <= 0:
            precision, bound = LOWEST_PRECISION, "lowest"
        else:
            root = brentq(
                lambda log_precision: self.slope(math.exp(log_precision)),
                math.log(LOWEST_PRECISION),
                math.log(HIGHEST_PRECISION),
                xtol=1e-10,
            )
            precision = math.exp(root)
        return EvidenceMaximum(
            precision=precision,
            log_marginal_likelihood=self.log_marginal_likelihood(precision),
            effective_parameters=self.effective_parameters(precision),
            at_bound=bound,
        )
