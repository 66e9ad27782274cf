"""Average predictions over the prior precision δ and a temperature τ of the logits, instead of choosing them.

The predictive is a mixture over a grid of δ (MAP, δ = ∞, included) and τ,

    p(y|x) = Σ_ij w_ij E[softmax((f + ε) / τ_j)],   ε ~ N(0, Λ(δ_i)),   w_ij ∝ exp(-m NLL_ij) π_ij,

where NLL_ij is the mean over m labelled rows that the adapter was not trained on. With rows, half of the prior π is on
the adapter as it is (MAP, τ = 1) and half on N(log δ; log δ₀, s_δ²) N(log τ; 0, s_τ²); without rows, π is
N(log δ; log δ₀, 1²) at τ = 1.

The center δ₀ is the tolerance: how small δ may be before the predictive fits the training rows worse than MAP. Let
``d_n(δ)`` be the excess of row n's NLL over MAP's, and t the NLL of MAP on the training rows, of a regression less the
entropy of its noise, so that t is about 0 whatever the unit of the targets. δ₀ is the least δ from
which on ``mean(d) <= a exp(-t/b) min(var(d) / mean(d)², 10)``. The exponential is there because rows that are not
fitted closely carry little information about overfitting. The ratio is there because an equal excess on all rows is to
be expected on new rows too, while an excess on a few rows indicates memorized rows. A tolerance in terms of the
training loss is from TFB (Shi et al. 2024, "Training-free Bayesianization for low-rank adapters of large language
models"). The choice of the constants is described in docs/prior-selection.md. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Array = NDArray[np.float64]

PRECISIONS: Array = np.logspace(-3.0, 7.0, 16)
"""Prior precisions of the grid, three in two decades; MAP is appended."""

TEMPERATURES: Array = np.exp(0.2 * np.arange(-8, 13))
"""Temperatures of the grid, 0.2 to 11; 1 is one of them."""

TOLERANCE_ROWS = 200
"""Maximum number of training rows that the tolerance is estimated on."""

MAP_SHARE = 0.5
"""Share of the prior, with labelled rows, that is on MAP at temperature 1."""

TEMPERATURE_WIDTH = 0.6
"""s_τ: standard deviation of the prior on log τ."""

PRECISION_WIDTH = 6.0
"""s_δ with labelled rows: standard deviation of the prior on log δ about the tolerance."""

PRECISION_WIDTH_WITHOUT_ROWS = 1.0
"""s_δ without labelled rows."""

EXCESS, EXCESS_SCALE, LARGEST_RATIO = 0.01, 0.2, 10.0
"""a and b of the tolerance, in nats per row, and the maximum of the ratio of variance and squared mean."""

_NO_EXCESS = 1e-6
"""Mean excess in nats per row that is always tolerated."""

_LEAST_SHARE = 0.1
"""Smallest ratio of excess and allowed excess that is interpolated."""

RETAINED_WEIGHT = 0.999
"""Total weight of the components that are kept for prediction."""


class TrainingCurve(Struct, frozen=True, kw_only=True):
    """NLL of the predictive on training rows over the prior precision.

    Attributes:
        precisions: δ, increasing.
        nll: NLL at each δ, in nats per row; for a regression minus the entropy of its noise.
        variance: Variance over the rows of the excess of their NLL over MAP's, at each δ.
        map_nll: NLL of MAP, likewise.
        n: Number of rows.
    """

    precisions: list[float]
    nll: list[float]
    variance: list[float]
    map_nll: float
    n: int


class Averaged(Struct, frozen=True, kw_only=True):
    """Weights of the averaged predictive.

    Attributes:
        precisions: δ of each component, increasing; None is MAP. For a prior of several precisions, their
            geometric mean.
        temperatures: τ of each component.
        weights: Weight of each pair, ``[precision][temperature]``; they sum to 1.
        tolerance: δ₀, or None if the training rows had no labels.
        n: Number m of labelled rows.
        split: The split they come from.
        rows: Their digests; these rows are excluded from evaluation.
        link: Link of the predictive.
        seed: Random seed of the choice of the rows.
        nll: NLL of the averaged predictive on these rows, in nats per row.
        map_nll: NLL of MAP on them.
    """

    precisions: list[float | None]
    temperatures: list[float]
    weights: list[list[float]]
    tolerance: float | None = None
    n: int = 0
    split: str | None = None
    rows: list[str] = []
    link: str | None = None
    seed: int = 0
    nll: float | None = None
    map_nll: float | None = None

    def check(self) -> None:
        """Check that grid and weights match.

        Raises:
            ValueError: They do not; the message says why.
        """
        finite = [value for value in self.precisions if value is not None]
        if not self.precisions or not self.temperatures:
            raise ValueError("averaged: the grid is empty")
        if not all(math.isfinite(value) and value > 0 for value in [*finite, *self.temperatures]):
            raise ValueError("averaged: a precision or temperature is not a positive number")
        if len(self.weights) != len(self.precisions) or {len(row) for row in self.weights} != {len(self.temperatures)}:
            raise ValueError("averaged: the weights do not have the shape of the grid")
        weights = np.array(self.weights, dtype=np.float64)
        if not bool((weights >= 0).all()) or not math.isclose(float(weights.sum()), 1.0, abs_tol=1e-6):
            raise ValueError("averaged: the weights are not positive numbers that sum to 1")

    @property
    def grid(self) -> Array:
        """δ of each component, ``(D,)``; infinity for MAP."""
        return np.array([math.inf if value is None else value for value in self.precisions])

    @property
    def log_precisions(self) -> Array:
        """Log δ of each component, ``(D,)``; MAP counts as one step of the grid above the largest δ."""
        return log_positions(self.grid)

    @property
    def mean_precision(self) -> float:
        """Weighted geometric mean of δ."""
        return float(np.exp(np.array(self.weights).sum(axis=1) @ self.log_precisions))

    @property
    def mean_temperature(self) -> float:
        """Weighted geometric mean of τ."""
        return float(np.exp(np.array(self.weights).sum(axis=0) @ np.log(self.temperatures)))

    @property
    def map_weight(self) -> float:
        """Weight of MAP."""
        return float(sum(sum(row) for row, value in zip(self.weights, self.precisions, strict=True) if value is None))

    def temperature_interval(self, share: float = 0.9) -> tuple[float, float]:
        """Return the central interval of τ that contains a share of the weight."""
        return _interval(np.array(self.weights).sum(axis=0), np.array(self.temperatures), share)

    def pruned(self, retained: float = RETAINED_WEIGHT) -> Averaged:
        """Return the components of largest weight with a total of ``retained``, renormalized; drop empty rows."""
        weights = np.array(self.weights)
        order = np.argsort(weights, axis=None)[::-1]
        total = np.cumsum(weights.reshape(-1)[order])
        kept = np.zeros(weights.size, dtype=bool)
        kept[order[: int(np.searchsorted(total, retained * total[-1])) + 1]] = True
        weights = np.where(kept.reshape(weights.shape), weights, 0.0)
        rows, columns = weights.sum(axis=1) > 0, weights.sum(axis=0) > 0
        weights = weights[rows][:, columns] / weights.sum()
        return Averaged(
            precisions=[value for value, keep in zip(self.precisions, rows, strict=True) if keep],
            temperatures=[value for value, keep in zip(self.temperatures, columns, strict=True) if keep],
            weights=weights.tolist(),
        )

    def point(self) -> Averaged:
        """Return a single component: the weighted geometric means of δ and τ."""
        return Averaged(
            precisions=[self.mean_precision],
            temperatures=[self.mean_temperature],
            weights=[[1.0]],
            tolerance=self.tolerance,
            n=self.n,
            split=self.split,
            rows=self.rows,
            link=self.link,
            seed=self.seed,
            map_nll=self.map_nll,
        )


def log_positions(precisions: Array) -> Array:
    """Return log δ of an increasing grid, where infinity (MAP) is one step above the largest finite value."""
    logs = np.log(np.where(np.isinf(precisions), 1.0, precisions))
    finite = logs[~np.isinf(precisions)]
    step = float(finite[-1] - finite[-2]) if len(finite) > 1 else math.log(10.0) / 2
    top = (float(finite[-1]) if len(finite) else 0.0) + step
    return np.where(np.isinf(precisions), top, logs)


def tolerance_of(curve: TrainingCurve) -> float:
    """Return δ₀, the tolerance, between two points of the curve by linear interpolation of logarithms.

    The ratio of excess and allowed excess is interpolated; a ratio below :data:`_LEAST_SHARE`, or negative, counts as
    this share. If the largest δ of the curve is not tolerated, it is returned.
    """
    logs = np.log(curve.precisions)
    excess = np.array(curve.nll) - curve.map_nll
    mean = np.maximum(excess, _NO_EXCESS)
    ratio = np.minimum(np.array(curve.variance) / np.square(mean), LARGEST_RATIO)
    allowed = EXCESS * math.exp(-curve.map_nll / EXCESS_SCALE) * ratio
    over = np.where(excess <= _NO_EXCESS, -np.inf, np.log(mean) - np.log(np.maximum(allowed, 1e-300)))
    over = np.maximum(over, math.log(_LEAST_SHARE))
    above = np.flatnonzero(over > 0)
    if not len(above):
        return float(curve.precisions[0])
    last = int(above[-1])
    if last == len(logs) - 1:
        return float(curve.precisions[-1])
    share = over[last] / (over[last] - over[last + 1])
    return float(math.exp(logs[last] + share * (logs[last + 1] - logs[last])))


def _prior_of_precisions(precisions: Array, tolerance: float | None, width: float) -> Array:
    """Return N(log δ; log δ₀, width²) on the grid, summing to 1; MAP has the mass above the cell of the largest δ.

    Without a tolerance it is flat.
    """
    logs, finite = log_positions(precisions), np.isfinite(precisions)
    if tolerance is None:
        return np.full(len(logs), 1.0 / len(logs))
    step = float(logs[1] - logs[0]) if len(logs) > 1 else 1.0
    scaled = (logs - math.log(tolerance)) / width
    density = np.exp(-0.5 * np.square(scaled)) * step / (width * math.sqrt(2.0 * math.pi))
    edge = (logs - step / 2 - math.log(tolerance)) / width
    tail = [0.5 * math.erfc(value / math.sqrt(2.0)) for value in edge]
    mass = np.maximum(np.where(finite, density, tail), 1e-300)
    return np.asarray(mass / mass.sum())


def average(
    precisions: Array,
    temperatures: Sequence[float] | Array,
    tolerance: float | None,
    nll: Array | None = None,
    rows: int = 0,
) -> Array:
    """Return the weights ``w_ij``.

    Args:
        precisions: ``(D,)`` δ, increasing; infinity is MAP.
        temperatures: ``(T,)`` τ.
        tolerance: δ₀, or None for a flat prior on log δ.
        nll: ``(D, T)`` mean NLL on the labelled rows, in nats; not needed without rows.
        rows: Number m of labelled rows.

    Returns:
        ``(D, T)``, summing to 1. Without rows all weight is at the temperature nearest to 1.
    """
    log_temperatures = np.log(np.asarray(temperatures))
    at_one = int(np.argmin(np.abs(log_temperatures)))
    if not rows:
        weights = np.zeros((len(precisions), len(log_temperatures)))
        weights[:, at_one] = _prior_of_precisions(precisions, tolerance, PRECISION_WIDTH_WITHOUT_ROWS)
        return weights
    assert nll is not None
    of_temperatures = np.exp(-0.5 * np.square(log_temperatures / TEMPERATURE_WIDTH))
    of_precisions = _prior_of_precisions(precisions, tolerance, PRECISION_WIDTH)
    prior = np.outer(of_precisions, of_temperatures / of_temperatures.sum())
    is_map = np.isinf(precisions)
    if is_map.any():
        prior *= 1.0 - MAP_SHARE
        prior[is_map, at_one] += MAP_SHARE
    log_weights = np.log(np.maximum(prior, 1e-300)) - rows * nll
    weights = np.exp(log_weights - log_weights.max())
    return np.asarray(weights / weights.sum())


def _interval(weights: Array, values: Array, share: float) -> tuple[float, float]:
    total = np.cumsum(weights) / weights.sum()
    low = int(np.searchsorted(total, (1.0 - share) / 2))
    high = int(np.searchsorted(total, 1.0 - (1.0 - share) / 2))
    return float(values[min(low, len(values) - 1)]), float(values[min(high, len(values) - 1)])
