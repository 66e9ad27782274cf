"""Scores of several labels, counted by hand."""

from __future__ import annotations

import pytest
import torch

from lapora.likelihoods.multilabel import Multilabel

LIKELIHOOD = Multilabel(("a", "b", "c"))
P = torch.tensor([[0.91, 0.23, 0.62], [0.41, 0.71, 0.5], [0.81, 0.12, 0.31], [0.31, 0.23, 0.12]], dtype=torch.float64)
LABELS = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]]).double()


def test_scores_are_those_counted_by_hand():
    table = torch.stack([1 - P, P], dim=2).log()
    scores = LIKELIHOOD.scores(table, LABELS)
    # a: predicted in rows 0 and 2, there in 0 and 1; b: row 1 alone; c: predicted in 0 and 1 (0.5 counts), there in 0
    assert scores["f1_macro"] == pytest.approx((2 / 4 + 2 / 2 + 2 / 3) / 3)
    assert scores["f1_micro"] == pytest.approx(2 * 3 / (5 + 4))
    assert scores["exact_match"] == pytest.approx(2 / 4)
    likelihoods = torch.where(LABELS == 1, P, 1 - P)
    assert scores["nll"] == pytest.approx(float(-likelihoods.log().sum(dim=1).mean()))
    assert scores["brier"] == pytest.approx(float((P - LABELS).square().mean()))
    confidence = torch.maximum(P, 1 - P).flatten()
    right = ((P >= 0.5).double() == LABELS).double().flatten()
    bins = (confidence * 15).long()
    gaps = [abs(float((right - confidence)[bins == index].sum())) for index in range(15)]
    assert scores["ece"] == pytest.approx(sum(gaps) / 12)


def test_a_label_that_never_occurs_has_an_f1_of_zero():
    table = torch.stack([1 - P, P], dim=2).log()
    none = torch.zeros_like(LABELS)
    scores = LIKELIHOOD.scores(table, none)
    assert scores["f1_macro"] == scores["f1_micro"] == 0.0


def test_the_constant_is_the_frequency_of_each_label():
    table = LIKELIHOOD.constant(LABELS)
    assert table[0, :, 1].exp().tolist() == pytest.approx([0.5, 0.25, 0.25])
