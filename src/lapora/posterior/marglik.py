"""The prior precision by Laplace marginal likelihood (Laplace-LoRA, Eq. 13).

``log p(D|δ) ≈ log p(y|X, θ_MAP) - 1/2 Σ_ℓ [ δ ‖θ_ℓ‖² + Σ_ij log(1 + λ_ij^ℓ / δ) ]``

It depends on eigenvalues, norms and one log-likelihood only, so this module uses NumPy arrays and does not import
torch. The derivative with respect to log δ, ``-1/2 [δ ‖θ‖² - Σ λ/(λ+δ)]``, is decreasing, so that its only root is the
maximum (MacKay 1992: δ‖θ‖² equals the number of well-determined parameters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapora.config import Optimizer, PriorStructure
from lapora.errors import NumericalError, UsageError
from lapora.posterior.prior import PriorPrecision, group_of

LOWEST_PRECISION = 1e-6
HIGHEST_PRECISION = 1e8

_ROOT_TOLERANCE = 1e-9
"""Tolerance in log δ. Bisection takes 35 sums, less time than the import of an optimization library."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of a curvature with their multiplicities.

    Attributes:
        values: ``λ``, any shape.
        counts: Multiplicity of each, of the same shape.
    """

    values: NDArray[np.float64]
    counts: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[np.float64], bases: Sequence[Sequence[int] | None]) -> Spectrum:
        """Compute the multiplicities of a Kronecker product's eigenvalues.

        Args:
            values: ``λ``, one axis per side: its k directions, then one value for all others if there are any.
            bases: Shape ``(d, k)`` of each side's basis; None is the identity.

        Raises:
            ValueError: The eigenvalues do not have the shape of the bases.
        """
        counts = np.ones(())
        for axis, shape in enumerate(bases):
            size, kept = [values.shape[axis]] * 2 if shape is None else shape
            others = [size - kept] * (kept < size)
            counts = np.multiply.outer(counts, np.append(np.ones(kept), others))
        if values.shape != counts.shape:
            raise ValueError(f"{values.shape} eigenvalues of {counts.shape} eigenspaces")
        return cls(values, counts)


class Evidence:
    """Marginal likelihood as a function of the prior precision of a group of blocks.

    Args:
        spectra: Eigenvalues of each block; zero eigenvalues may be omitted.
        squared_norms: ``‖θ‖²`` of each block.
        log_likelihood: ``log p(y|X, θ_MAP)`` in nats, or 0 if the data had no labels.

    Raises:
        NumericalError: An eigenvalue is negative or not finite.
    """

    def __init__(
        self, spectra: Sequence[Spectrum], squared_norms: Sequence[float], log_likelihood: float = 0.0
    ) -> None:
        self.eigenvalues = np.concatenate([np.zeros(0), *(spectrum.values.ravel() for spectrum in spectra)])
        self.counts = np.concatenate([np.zeros(0), *(spectrum.counts.ravel() for spectrum in spectra)])
        if not np.all(np.isfinite(self.eigenvalues)) or np.any(self.eigenvalues < 0):
            raise NumericalError("the curvature's eigenvalues are not finite and non-negative; fit again")
        self.squared_norm = float(sum(squared_norms))
        self.log_likelihood = log_likelihood

    def log_marginal_likelihood(self, precision: float) -> float:
        """Return ``log p(D|δ)`` at one δ, in nats."""
        complexity = float(self.counts @ np.log1p(self.eigenvalues / precision))
        return self.log_likelihood - 0.5 * (precision * self.squared_norm + complexity)

    def effective_parameters(self, precision: float) -> float:
        """Return ``Σ λ/(λ+δ)``."""
        return float(self.counts @ (self.eigenvalues / (self.eigenvalues + precision)))

    def slope(self, precision: float) -> float:
        """Return the derivative of the log marginal likelihood with respect to log δ."""
        return -0.5 * (precision * self.squared_norm - self.effective_parameters(precision))

    def maximize(self) -> tuple[float, str | None]:
        """Find the δ of maximum marginal likelihood in [1e-6, 1e8]: the only root of the slope, by bisection.

        Returns:
            δ, and ``lowest`` or ``highest`` if it is at that end of the range, else None.
        """
        if self.slope(HIGHEST_PRECISION) >= 0:
            return HIGHEST_PRECISION, "highest"
        if self.slope(LOWEST_PRECISION) <= 0:
            return LOWEST_PRECISION, "lowest"
        low, high = math.log(LOWEST_PRECISION), math.log(HIGHEST_PRECISION)
        while high - low > _ROOT_TOLERANCE:
            middle = (low + high) / 2
            low, high = (middle, high) if self.slope(math.exp(middle)) > 0 else (low, middle)
        return math.exp((low + high) / 2), None

    def adam(self, learning_rate: float, steps: int) -> tuple[float, str | None]:
        """Find the same δ as the paper does: by Adam on log δ, from δ = 1.

        Args:
            learning_rate: Learning rate of log δ; the paper's is 0.1.
            steps: Number of steps; the paper's is 1,000.

        Returns:
            As for :meth:`maximize`.
        """
        import torch

        log_precision = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([log_precision], lr=learning_rate, maximize=True)
        for _ in range(steps):
            log_precision.grad = torch.tensor(self.slope(_exp(log_precision.item())), dtype=torch.float64)
            optimizer.step()
        precision = _exp(log_precision.item())
        bounded = min(max(precision, LOWEST_PRECISION), HIGHEST_PRECISION)
        ran_to = None if bounded == precision else "lowest" if bounded == LOWEST_PRECISION else "highest"
        return bounded, ran_to


def _exp(value: float) -> float:
    """Return the exponential; a large learning rate takes Adam far outside the range of δ."""
    return math.exp(min(max(value, -60.0), 60.0))


@dataclass(frozen=True)
class EvidenceMaximum:
    """Maximum of the marginal likelihood.

    Attributes:
        prior: δ of every group of layers.
        log_marginal_likelihood: Its value in nats; without labels, up to the constant log-likelihood.
        effective_parameters: ``Σ λ/(λ+δ)``, the number of directions that the data determine.
        at_bound: ``lowest`` or ``highest`` for each group whose δ is at that end of the range.
        noise_scale: s of a regression's noise; 1 for other likelihoods.
    """

    prior: PriorPrecision
    log_marginal_likelihood: float
    effective_parameters: float
    at_bound: dict[str, str]
    noise_scale: float = 1.0

    def describe(self, labelled: bool) -> dict[str, Any]:
        """Return the manifest's ``prior``; the marginal likelihood is None if the rows had no labels."""
        return {
            **self.prior.to_manifest(),
            "method": "marglik",
            "log_marginal_likelihood": self.log_marginal_likelihood if labelled else None,
            "effective_parameters": self.effective_parameters,
            "at_bound": self.at_bound or None,
            **({} if self.noise_scale == 1.0 else {"noise_scale": self.noise_scale}),
        }


def maximize_evidence(
    spectra: Sequence[Spectrum],
    parameters: Sequence[Mapping[str, Any]],
    log_likelihood: float = 0.0,
    *,
    structure: PriorStructure = "scalar",
    optimizer: Optimizer = "exact",
    learning_rate: float = 0.1,
    steps: int = 1000,
    residuals: int = 0,
) -> EvidenceMaximum:
    """Choose δ for every group of layers; the evidence is a sum over layers, so the groups are independent.

    For a regression with R residuals, of mean square 1 in units of the noise that the curvature was computed with, the
    noise variance s² is chosen too (Immer et al. 2021). With the prior scaled likewise, ``θ ~ N(0, s²/δ I)``,

    ``log p(D|δ, s) = log p(y|X, θ_MAP) - ½ [R (log s² + 1/s² - 1) + δ ‖θ‖²/s² + Σ log(1 + λ/δ)]``,

    and for given δ the maximum is at ``s² = 1 + δ ‖θ‖²/R``: a root in s² alone, with the best δ for each s².

    Args:
        spectra: Eigenvalues of each layer, or of all layers together for a joint posterior.
        parameters: The manifest's ``parameters``.
        log_likelihood: ``log p(y|X, θ_MAP)`` in nats, or 0 if the data had no labels.
        structure: Which layers share a δ.
        optimizer: ``exact`` finds the root of the slope; ``adam`` is the paper's method.
        learning_rate: Learning rate of Adam.
        steps: Number of steps of Adam.
        residuals: Number of residuals R of a regression; 0 for other likelihoods.

    Raises:
        UsageError: Several precisions are requested for a joint posterior, or Adam for a regression.
        NumericalError: An eigenvalue is negative or not finite.
    """
    if residuals and optimizer != "exact":
        raise UsageError("--optimizer adam cannot choose the noise of a regression: use --optimizer exact")
    groups = _evidence_by_group(spectra, parameters, structure)
    norms = {group: evidence.squared_norm for group, evidence in groups.items()}

    def at_noise(square: float) -> tuple[dict[str, float], dict[str, str]]:
        """Return the best δ of every group for a given s², and the ends of the range that were reached."""
        precisions: dict[str, float] = {}
        at_bound: dict[str, str] = {}
        for group, evidence in groups.items():
            evidence.squared_norm = norms[group] / square
            precisions[group], bound = (
                evidence.maximize() if optimizer == "exact" else evidence.adam(learning_rate, steps)
            )
            if bound:
                at_bound[group] = bound
        return precisions, at_bound

    square = _fixed_point(lambda square: _noise_square(at_noise(square)[0], norms, residuals)) if residuals else 1.0
    precisions, at_bound = at_noise(square)
    total = log_likelihood - _noise_penalty(square, residuals)
    total += sum(evidence.log_marginal_likelihood(precisions[group]) for group, evidence in groups.items())
    effective = sum(evidence.effective_parameters(precisions[group]) for group, evidence in groups.items())
    return EvidenceMaximum(PriorPrecision(structure, precisions), total, effective, at_bound, math.sqrt(square))


_NOISE_TOLERANCE = 1e-10


def _fixed_point(function: Callable[[float], float]) -> float:
    """Return the s² ≥ 1 that an increasing, bounded function maps to itself, by Brent's method in log s²."""
    from scipy.optimize import brentq

    def excess(position: float) -> float:
        return math.log(function(math.exp(position))) - position

    low, high = 0.0, excess(0.0)
    while excess(high) > 0:
        low, high = high, high + 2 * max(high - low, _NOISE_TOLERANCE)
    return math.exp(brentq(excess, low, high, xtol=_NOISE_TOLERANCE) if excess(low) > 0 else low)


def _noise_square(precisions: Mapping[str, float], norms: Mapping[str, float], residuals: int) -> float:
    """Return the s² of maximum marginal likelihood at given δ; 1 without residuals."""
    return 1.0 + sum(precisions[group] * norms[group] for group in norms) / residuals if residuals else 1.0


def _noise_penalty(square: float, residuals: int) -> float:
    """Return ``½ R (log s² + 1/s² - 1)``."""
    return 0.5 * residuals * (math.log(square) + 1.0 / square - 1.0)


def evidence_at(
    prior: PriorPrecision,
    spectra: Sequence[Spectrum],
    parameters: Sequence[Mapping[str, Any]],
    log_likelihood: float,
    residuals: int = 0,
) -> tuple[float, float]:
    """Compute the log marginal likelihood and the effective number of parameters at a given prior.

    Args:
        prior: δ of every group of layers.
        spectra: As for :func:`maximize_evidence`.
        parameters: The manifest's ``parameters``.
        log_likelihood: ``log p(y|X, θ_MAP)`` in nats, or 0 if it is unknown.
        residuals: Number of residuals of a regression, whose noise is the best one for this prior.

    Returns:
        The evidence in nats, and ``Σ λ/(λ+δ)``.
    """
    total, effective = log_likelihood, 0.0
    groups = _evidence_by_group(spectra, parameters, prior.structure)
    norms = {group: evidence.squared_norm for group, evidence in groups.items()}
    square = _noise_square(prior.precisions, norms, residuals)
    total -= _noise_penalty(square, residuals)
    for group, evidence in groups.items():
        evidence.squared_norm = norms[group] / square
        total += evidence.log_marginal_likelihood(prior.precisions[group])
        effective += evidence.effective_parameters(prior.precisions[group])
    return total, effective


def _evidence_by_group(
    spectra: Sequence[Spectrum], parameters: Sequence[Mapping[str, Any]], structure: PriorStructure
) -> dict[str, Evidence]:
    joint = len(spectra) != len(parameters)
    if joint and structure != "scalar":
        raise UsageError(
            f"--prior {structure} needs independent layers (kron, ekfac, diag); full and lowrank join them: "
            "use --prior scalar"
        )
    groups: dict[str, list[int]] = {}
    for index, parameter in enumerate(parameters):
        groups.setdefault(group_of(parameter, structure), []).append(index)
    return {
        group: Evidence(
            spectra if joint else [spectra[index] for index in members],
            [float(parameters[index]["squared_norm"]) for index in members],
        )
        for group, members in groups.items()
    }
