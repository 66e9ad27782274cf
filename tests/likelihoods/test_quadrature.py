"""The two-class integral, against a rule with steps forty times as small."""

from __future__ import annotations

import pytest
import torch

from lapora.likelihoods.quadrature import log_expected_sigmoid


@pytest.mark.parametrize("deviation", [0.0, 0.1, 0.5, 0.500001, 1.0, 1.000001, 2.0, 2.000001, 5.0, 5.000001, 20.0])
def test_every_rule_is_exact_up_to_its_last_deviation(deviation):
    mean = torch.tensor([0.0, 0.01, 0.5, 2.0, 5.0, 12.0, 40.0, 700.0], dtype=torch.float64)
    nodes = torch.arange(-40.0, 40.0, 0.005, dtype=torch.float64)
    weights = torch.log_softmax(-0.5 * nodes.square(), dim=0)
    expected = torch.logsumexp(
        weights + torch.nn.functional.logsigmoid(-(mean.unsqueeze(1) + deviation * nodes)), dim=1
    )
    low, high = log_expected_sigmoid(mean, torch.full_like(mean, deviation))
    assert (high.exp() - (1 - expected.exp())).abs().max() < 1e-8
    assert (low - expected).abs().max() < 1e-7


def test_deviations_of_one_call_use_their_own_rules():
    mean, deviation = (
        torch.tensor([1.0, -2.0, 3.0, 0.5, 1.5]).double(),
        torch.tensor([0.2, 0.9, 1.7, 4.0, 9.0]).double(),
    )
    together = torch.stack(log_expected_sigmoid(mean, deviation))
    alone = [torch.stack(log_expected_sigmoid(mean[i : i + 1], deviation[i : i + 1])) for i in range(5)]
    assert torch.allclose(together, torch.cat(alone, dim=1), rtol=0, atol=1e-14)


def test_a_deviation_that_is_no_number_gives_none():
    low, high = log_expected_sigmoid(torch.ones(1).double(), torch.full((1,), float("nan")).double())
    assert low.isnan().all() and high.isnan().all()
