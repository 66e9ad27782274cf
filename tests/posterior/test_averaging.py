"""Weights over prior precisions and temperatures: each against the formula, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lapora.posterior import averaging
from lapora.posterior.averaging import Averaged, TrainingCurve, average, tolerance_of

DELTAS = np.array([0.1, 1.0, 10.0, 100.0, math.inf])
TEMPERATURES = np.array([0.5, 1.0, 2.0])


def normal_tail(value: float) -> float:
    return 0.5 * math.erfc(value / math.sqrt(2.0))


def of_precisions(tolerance: float, width: float) -> list[float]:
    step = math.log(10.0)
    masses = []
    for delta in DELTAS:
        if math.isinf(delta):  # all of the prior's mass above the last cell
            masses.append(normal_tail((math.log(100.0) + step / 2 - math.log(tolerance)) / width))
        else:
            z = (math.log(delta) - math.log(tolerance)) / width
            masses.append(math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * step / width)
    return [mass / sum(masses) for mass in masses]


def test_the_weights_are_the_formula():
    nll = np.random.default_rng(0).uniform(0.2, 1.2, (5, 3))
    rows, tolerance = 7, 3.0
    priors = of_precisions(tolerance, averaging.PRECISION_WIDTH)
    of_tau = [math.exp(-0.5 * (math.log(tau) / averaging.TEMPERATURE_WIDTH) ** 2) for tau in TEMPERATURES]
    expected = np.zeros((5, 3))
    for i in range(5):
        for j in range(3):
            prior = 0.5 * priors[i] * of_tau[j] / sum(of_tau) + (0.5 if (i, j) == (4, 1) else 0.0)
            expected[i, j] = prior * math.exp(-rows * nll[i, j])
    found = average(DELTAS, TEMPERATURES, tolerance, nll, rows)
    assert np.allclose(found, expected / expected.sum(), rtol=1e-10)
    alone = average(DELTAS, [1.0], tolerance)
    assert np.allclose(alone[:, 0], of_precisions(tolerance, averaging.PRECISION_WIDTH_WITHOUT_ROWS))


def test_without_rows_the_temperature_is_one_and_the_tolerance_is_the_center():
    weights = average(DELTAS, TEMPERATURES, 10.0)
    assert np.allclose(weights.sum(), 1.0) and not weights[:, [0, 2]].any()
    assert weights[:, 1].argmax() == 2
    lower = average(DELTAS, TEMPERATURES, 1.0)
    assert lower[:, 1].argmax() == 1


def test_many_rows_decide_for_the_least_nll():
    nll = np.full((5, 3), 0.5)
    nll[1, 2] = 0.4
    weights = average(DELTAS, TEMPERATURES, 100.0, nll, 10_000)
    assert weights[1, 2] > 1 - 1e-6
    nll[1, 2], nll[4, 1] = 0.5, 0.3  # MAP
    assert average(DELTAS, TEMPERATURES, 0.1, nll, 10_000)[4, 1] > 1 - 1e-6


def test_rows_that_say_nothing_leave_the_prior():
    nll = np.full((5, 3), 0.7)
    few, many = (average(DELTAS, TEMPERATURES, 5.0, nll, rows) for rows in (1, 5000))
    assert np.allclose(few, many)


def curve(mean_excess: np.ndarray, variance: np.ndarray, map_nll: float = 0.1) -> TrainingCurve:
    deltas = np.logspace(-2, 4, len(mean_excess))
    return TrainingCurve(
        precisions=deltas.tolist(),
        nll=(map_nll + mean_excess).tolist(),
        variance=variance.tolist(),
        map_nll=map_nll,
        n=100,
    )


def test_the_tolerance_is_where_the_excess_meets_what_is_allowed():
    """With an excess of k/δ and a variance of r times its square, δ₀ = k / (a exp(-t/b) r)."""
    deltas = np.logspace(-2, 4, 25)
    for ratio in (0.5, 2.0, 9.0):
        excess = 0.02 / deltas
        found = tolerance_of(curve(excess, ratio * excess**2))
        assert found == pytest.approx(0.02 / (0.01 * math.exp(-0.1 / 0.2) * ratio), rel=1e-6)
    capped = tolerance_of(curve(0.02 / deltas, 1e4 * (0.02 / deltas) ** 2))
    assert capped == pytest.approx(0.02 / (0.01 * math.exp(-0.1 / 0.2) * 10.0), rel=1e-6)


def test_the_tolerance_at_the_ends_of_the_grid():
    few = np.array([1.0, 1.0, 1.0])
    assert tolerance_of(curve(np.zeros(3), few)) == 0.01  # harmless everywhere
    assert tolerance_of(curve(np.array([-0.1, -0.2, 0.0]), few)) == 0.01  # better than MAP
    assert tolerance_of(curve(np.array([9.0, 8.0, 7.0]), few)) == pytest.approx(1e4)  # harmful everywhere


def test_what_is_tolerated_at_a_smaller_precision_again_does_not_count():
    excess = np.array([0.0, 5.0, 1e-3, 0.0])
    found = tolerance_of(curve(excess, 100 * excess**2 + 1.0))
    assert 1.0 < found < 1e4


def test_an_excess_that_vanishes_moves_the_tolerance_little():
    """Whether predictions are hardly worse than MAP or hardly better at the next point must not matter."""
    variance = np.full(3, 0.04)
    found = [tolerance_of(curve(np.array([1.0, 0.1, excess]), variance)) for excess in (1e-4, 2e-6, 5e-7, -1e-4, -0.05)]
    assert found == pytest.approx([found[0]] * 5) and 10.0 < found[0] < 316.0


def test_the_less_closely_rows_are_fitted_the_less_is_tolerated():
    excess = 0.02 / np.logspace(-2, 4, 25)
    close, loose = (tolerance_of(curve(excess, 4 * excess**2, map_nll)) for map_nll in (0.01, 0.5))
    assert close < loose


def test_an_excess_that_all_rows_bear_is_tolerated_less_than_one_that_few_bear():
    excess = 0.02 / np.logspace(-2, 4, 25)
    few, all_alike = (tolerance_of(curve(excess, ratio * excess**2)) for ratio in (9.0, 0.25))
    assert few < all_alike


def averaged(weights: np.ndarray) -> Averaged:
    return Averaged(
        precisions=[0.1, 1.0, 10.0, 100.0, None],
        temperatures=TEMPERATURES.tolist(),
        weights=weights.tolist(),
        tolerance=1.0,
    )


def test_pruning_keeps_the_heaviest_components_and_renormalizes():
    weights = np.random.default_rng(1).dirichlet(np.full(15, 0.2)).reshape(5, 3)
    whole = averaged(weights)
    pruned = whole.pruned(0.9)
    pruned.check()
    kept = sorted(value for row in pruned.weights for value in row if value)
    heaviest = np.sort(weights.reshape(-1))[::-1]
    count = int(np.searchsorted(np.cumsum(heaviest), 0.9)) + 1
    assert len(kept) == count < 15
    assert np.allclose(kept, np.sort(heaviest[:count] / heaviest[:count].sum()))
    assert np.allclose(sum(map(sum, whole.pruned(1.0).weights)), 1.0)


def test_means_are_weighted_geometric_means():
    weights = np.zeros((5, 3))
    weights[1, 0], weights[2, 2] = 0.25, 0.75
    whole = averaged(weights)
    assert whole.mean_precision == pytest.approx(10.0**0.75)
    assert whole.mean_temperature == pytest.approx(0.5**0.25 * 2.0**0.75)
    assert whole.temperature_interval() == (0.5, 2.0)
    assert whole.map_weight == 0.0
    point = whole.point()
    point.check()
    assert point.precisions == [whole.mean_precision] and point.weights == [[1.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [[0.5]]}, "shape of the grid"),
        ({"weights": [[0.2] * 3] * 5}, "sum to 1"),
        ({"weights": [[-1.0, 1.0, 1.0]] + [[0.0] * 3] * 4}, "sum to 1"),
        ({"precisions": []}, "empty"),
        ({"precisions": [-1.0, 1.0, 2.0, 3.0, None]}, "not a positive number"),
        ({"temperatures": [0.0, 1.0, 2.0]}, "not a positive number"),
    ],
)
def test_what_is_no_average_is_refused(change, message):
    weights = np.full((5, 3), 1 / 15)
    fields = {"precisions": [0.1, 1.0, 10.0, 100.0, None], "temperatures": [0.5, 1.0, 2.0], "weights": weights.tolist()}
    Averaged(**fields).check()
    with pytest.raises(ValueError, match=message):
        Averaged(**{**fields, **change}).check()
