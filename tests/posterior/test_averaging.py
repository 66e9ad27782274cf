"""Weights over prior precisions and temperatures: each against the formula, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lapora.posterior import averaging
from lapora.posterior.averaging import Averaged, TrainingCurve, allowed_excess, average, tolerance_of

DELTAS = np.array([0.1, 1.0, 10.0, 100.0, math.inf])
TEMPERATURES = np.array([0.5, 1.0, 2.0])


def normal_tail(value: float) -> float:
    return 0.5 * math.erfc(value / math.sqrt(2.0))


def test_the_weights_are_the_formula():
    nll = np.random.default_rng(0).uniform(0.2, 1.2, (5, 3))
    rows, tolerance = 7, 3.0
    step = math.log(10.0)
    expected = np.zeros((5, 3))
    for i, delta in enumerate(DELTAS):
        for j, tau in enumerate(TEMPERATURES):
            if math.isinf(delta):  # all of the prior's mass above the last cell
                edge = math.log(100.0) + step / 2
                prior = normal_tail((edge - math.log(tolerance)) / averaging.PRECISION_WIDTH)
            else:
                z = (math.log(delta) - math.log(tolerance)) / averaging.PRECISION_WIDTH
                prior = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * step / averaging.PRECISION_WIDTH
            of_tau = math.exp(-0.5 * (math.log(tau) / averaging.TEMPERATURE_WIDTH) ** 2)
            expected[i, j] = prior * of_tau * math.exp(-rows * nll[i, j])
    found = average(DELTAS, TEMPERATURES, tolerance, nll, rows)
    assert np.allclose(found, expected / expected.sum(), rtol=1e-10)


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


def test_the_tolerance_is_where_the_training_nll_exceeds_map_by_the_excess_allowed():
    deltas = np.logspace(-2, 4, 13)
    excess = 0.5 / (1.0 + deltas)  # falls with δ
    curve = TrainingCurve(precisions=deltas.tolist(), nll=(0.1 + excess).tolist(), map_nll=0.1, n=100)
    allowed = allowed_excess(0.1)
    exact = 0.5 / allowed - 1.0
    assert tolerance_of(curve) == pytest.approx(exact, rel=0.15)  # linear between the points of the grid
    assert deltas[0] < exact < deltas[-1]


def test_the_tolerance_at_the_ends_of_the_grid():
    deltas = [0.1, 1.0, 10.0]
    harmless = TrainingCurve(precisions=deltas, nll=[0.1, 0.1, 0.1], map_nll=0.1, n=9)
    assert tolerance_of(harmless) == 0.1
    harmful = TrainingCurve(precisions=deltas, nll=[9.0, 8.0, 7.0], map_nll=0.1, n=9)
    assert tolerance_of(harmful) == 10.0


def test_the_less_closely_rows_are_fitted_the_less_is_tolerated():
    assert allowed_excess(0.0) > allowed_excess(0.1) > allowed_excess(0.7) > 0


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
