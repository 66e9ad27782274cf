"""Scores against torchmetrics, scikit-learn and cases worked by hand; intervals; mutual information."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_matthews_corrcoef,
)

from lapora import metrics
from lapora.likelihoods.base import LogitMoments
from lapora.likelihoods.categorical import expected_binary_entropy, log_probabilities, mutual_information
from lapora.metrics.weighted import WeightedScores


def drawn(classes: int, count: int = 400, seed: int = 0, tied: bool = False):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator).double() * 2
    targets = torch.where(
        torch.rand(count, generator=generator) < 0.6,
        logits.argmax(dim=1),
        torch.randint(0, classes, (count,), generator=generator),
    )
    return torch.log_softmax(logits.round() if tied else logits, dim=1), targets


def test_scores_are_in_float64():
    """A gate at the bound itself holds: 419 of 500 rows right is .838, and not the nearest float32 below it."""
    right = torch.arange(500) < 419
    p = torch.tensor([[0.1, 0.9], [0.9, 0.1]], dtype=torch.float64)[right.long()]
    scores = metrics.evaluate(p.log(), torch.zeros(500, dtype=torch.long))
    assert scores["accuracy"] == 419 / 500
    assert scores["ece"] == pytest.approx(0.9 - 419 / 500, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_scores_agree_with_torchmetrics_and_scikit_learn(classes, tied):
    log_p, targets = drawn(classes, tied=tied)
    p, labels = log_p.exp(), targets.numpy()
    confidence, predicted = p.max(dim=1)
    right = (predicted == targets).numpy()
    scores = metrics.evaluate(log_p, targets, with_mcc=True)
    assert scores["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted), abs=1e-7)
    assert scores["accuracy"] == pytest.approx(float(multiclass_accuracy(predicted, targets, classes, "micro")))
    assert scores["mcc"] == pytest.approx(sklearn_metrics.matthews_corrcoef(labels, predicted), abs=1e-6)
    assert scores["mcc"] == pytest.approx(float(multiclass_matthews_corrcoef(predicted, targets, classes)))
    assert scores["nll"] == pytest.approx(sklearn_metrics.log_loss(labels, p.numpy()))
    one_hot = np.eye(classes)[labels]
    assert scores["brier"] == pytest.approx(((p.numpy() - one_hot) ** 2).sum(axis=1).mean())
    if classes == 2:
        assert scores["brier"] == pytest.approx(2 * sklearn_metrics.brier_score_loss(labels, p[:, 1].numpy()))
    assert scores["ece"] == pytest.approx(
        float(multiclass_calibration_error(p, targets, classes, n_bins=15, norm="l1")), abs=1e-6
    )
    assert scores["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(right, confidence.numpy()))
    assert scores["auroc"] == pytest.approx(float(binary_auroc(confidence, torch.tensor(right).long())), abs=1e-6)
    assert metrics.auroc(confidence[right], confidence[~right]) == pytest.approx(scores["auroc"])


@pytest.mark.parametrize("tied", [False, True])
def test_whole_weights_give_the_scores_of_rows_repeated_so_often(tied):
    log_p, targets = drawn(3, tied=tied)
    repeats = torch.randint(0, 4, (len(targets),), generator=torch.Generator().manual_seed(1))
    weighted = WeightedScores(log_p, targets, with_mcc=True)(repeats.double().unsqueeze(0))
    rows = torch.repeat_interleave(torch.arange(len(targets)), repeats)
    again = metrics.evaluate(log_p[rows], targets[rows], with_mcc=True)
    for key, value in again.items():
        assert float(weighted[key]) == pytest.approx(value, abs=1e-5), key


def test_adaptive_ece_of_rows_that_fill_its_bins_is_that_of_equal_parts():
    log_p, targets = drawn(2, count=300)
    confidence, predicted = log_p.exp().max(dim=1)
    order = confidence.argsort()
    gap = ((predicted == targets).double() - confidence)[order]
    by_hand = sum(abs(float(part.sum())) for part in gap.split(20)) / 300
    assert metrics.evaluate(log_p, targets)["adaptive_ece"] == pytest.approx(by_hand)


def test_a_case_worked_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.85, 0.15], [0.3, 0.7], [0.38, 0.62]], dtype=torch.float64)
    targets = torch.tensor([0, 1, 1, 0])  # right, wrong, right, wrong in falling confidence .9 .85 .7 .62
    scores = metrics.evaluate(p.log(), targets, with_mcc=True)
    assert scores["accuracy"] == 0.5 and scores["mcc"] == pytest.approx(0.0)
    assert scores["ece"] == pytest.approx((0.1 + 0.85 + 0.3 + 0.62) / 4, abs=1e-6)
    assert scores["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.15) + math.log(0.7) + math.log(0.38)) / 4)
    assert scores["brier"] == pytest.approx(2 * (0.01 + 0.85**2 + 0.09 + 0.62**2) / 4)
    assert scores["auroc"] == pytest.approx(3 / 4)
    assert scores["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    coverage, risk = metrics.risk_coverage(p.log(), targets)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0] and risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert metrics.threshold_for_coverage(p.log(), targets, 0.75) == pytest.approx((0.7, 0.75, 2 / 3))
    assert metrics.threshold_for_coverage(p.log(), targets, 0.51) == pytest.approx((0.7, 0.75, 2 / 3))
    bins = metrics.reliability_bins(p.log(), targets)
    assert [each.count for each in bins] == [0] * 9 + [1, 1, 0, 1, 1, 0]
    assert bins[9].accuracy == 0.0 and bins[9].confidence == pytest.approx(0.62) and bins[0].accuracy is None


def test_rows_of_equal_confidence_stand_together():
    """A constant predictor ranks nothing: no score may depend on the order of its rows."""
    targets = torch.tensor([0, 0, 0, 1, 1])
    constant = metrics.constant_predictor(targets, 2)
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        scores = metrics.evaluate(constant, targets[order])
        assert scores["aurc"] == pytest.approx(0.4) and scores["auroc"] == 0.5
        assert scores["adaptive_ece"] == pytest.approx(0.0, abs=1e-12)
    assert metrics.threshold_for_coverage(constant, targets, 0.2).coverage == 1.0


def test_all_right_has_no_auroc_and_no_interval_of_it():
    log_p = torch.log(torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64))
    targets = torch.tensor([0, 0])
    assert math.isnan(metrics.evaluate(log_p, targets)["auroc"])
    own, _ = metrics.intervals({"map": log_p}, targets, resamples=50)
    assert "auroc" not in own["map"] and own["map"]["accuracy"] == (1.0, 1.0)
    assert metrics.auroc(torch.tensor([1.0]), torch.tensor([])) is None


def test_intervals_are_paired_and_cover():
    log_p, targets = drawn(2, count=300)
    flatter = torch.log_softmax(log_p / 2, dim=1)
    own, paired = metrics.intervals({"map": log_p, "flatter": flatter}, targets, reference="map", with_mcc=True)
    scores = metrics.evaluate(log_p, targets, with_mcc=True)
    assert set(own["map"]) == set(scores)
    for key in ("accuracy", "nll", "brier", "mcc", "auroc", "aurc"):
        low, high = own["map"][key]
        assert low < scores[key] < high
    # The two order rows alike: their accuracies differ in no resample, and the paired interval is narrower.
    assert paired["flatter"]["accuracy"] == (0.0, 0.0)
    assert paired["flatter"]["nll"].high - paired["flatter"]["nll"].low < own["map"]["nll"].high - own["map"]["nll"].low
    mean = metrics.paired_interval(metrics.row_nll(flatter, targets) - metrics.row_nll(log_p, targets))
    assert paired["flatter"]["nll"] == pytest.approx(mean, abs=0.02)
    assert metrics.intervals({"map": log_p}, targets, seed=0) == metrics.intervals({"map": log_p}, targets, seed=0)


def test_temperature_is_where_the_nll_is_least():
    log_p, targets = drawn(4)
    fitted = metrics.fit_temperature(log_p, targets)

    def nll(value: float) -> float:
        return metrics.evaluate(torch.log_softmax(log_p / value, dim=1), targets)["nll"]

    assert fitted > 1 and nll(fitted) <= min(nll(fitted * 1.02), nll(fitted / 1.02), nll(1.0))
    torch.manual_seed(3)
    sampled = torch.distributions.Categorical(logits=log_p / 3).sample((50,)).flatten()
    assert metrics.fit_temperature(log_p.repeat(50, 1), sampled) == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("mean", [0.0, -2.5, 12.0, 30.0])
@pytest.mark.parametrize("deviation", [1e-3, 0.7, 4.99, 5.01, 60.0])
def test_the_entropy_of_a_coin_with_gaussian_logit(mean, deviation):
    x = torch.linspace(mean - 12 * deviation, mean + 12 * deviation, 400_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * ((x - mean) / deviation) ** 2)
    p = torch.sigmoid(x)
    exact = float((weight * (torch.special.entr(p) + torch.special.entr(1 - p))).sum() / weight.sum())
    got = expected_binary_entropy(*(torch.tensor([value], dtype=torch.float64) for value in (mean, deviation)))
    assert float(got) == pytest.approx(exact, abs=1e-7)


@pytest.mark.parametrize("classes", [2, 4])
def test_mutual_information_against_plain_sampling(classes):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, classes, generator=generator).double()
    factor = torch.randn(3, classes, classes, generator=generator).double()
    covariance = factor @ factor.transpose(1, 2)
    got = mutual_information(LogitMoments(mean, covariance))
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(classes))
    noise = torch.randn(60_000, 3, classes, generator=generator).double()
    p = torch.softmax(mean + torch.einsum("bij,sbj->sbi", root, noise), dim=-1)
    sampled = torch.special.entr(p.mean(0)).sum(1) - torch.special.entr(p).sum(2).mean(0)
    assert got.tolist() == pytest.approx(sampled.tolist(), abs=0.01)
    assert bool((got < math.log(classes)).all())
    certain = mutual_information(LogitMoments(mean, torch.zeros_like(covariance)))
    assert certain.abs().max() < 1e-9
    entropy = metrics.row_entropy(log_probabilities("mc-joint", LogitMoments(mean, covariance)))
    assert bool((got <= entropy).all())
