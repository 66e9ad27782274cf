"""Reward models against laplace-torch, and the deviation of single rewards."""

from __future__ import annotations

import pytest
import torch

from lapora.config import PredictSettings
from lapora.curvature.passes import CurvatureRun
from lapora.likelihoods.base import Averaging, LogitMoments
from lapora.likelihoods.preference import Preference, reward_deviation
from lapora.models.lora_layers import BayesianLayer
from lapora.posterior.marglik import evidence_at
from lapora.posterior.prior import PriorPrecision
from lapora.posterior.structures import fit_structure
from lapora.predictive.moments import LinearisedPredictor
from tiny_models import Row, batches, rows, tiny_classifier

LIKELIHOOD = Preference(("first", "second"))


class Rewards(torch.nn.Module):
    """Rewards of texts ``(B, F)``, or of both texts of pairs ``(B, 2, F)``."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.head = torch.nn.Linear(weight.shape[1], 1, bias=False).double()
        with torch.no_grad():
            self.head.weight.copy_(weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        rewards = self.head(features)
        return rewards if features.dim() == 2 else rewards.squeeze(2)


def features_of(answers, encoded) -> torch.Tensor:
    seen = []
    handle = answers.network.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    for batch in batches(answers, encoded, 1):
        answers.logits(batch)
    handle.remove()
    features = torch.stack(seen)
    return torch.cat([features, torch.ones(len(features), 1).double()], dim=1)


def test_a_reward_model_agrees_with_laplace_torch():
    from laplace import Laplace

    answers = tiny_classifier(1)
    head = answers.network.classifier
    layer = BayesianLayer("classifier", "head", head, head, reads_answer_only=True, bias_as_input=True)
    first, second = rows(10), rows(10, seed=8)
    encoded = [Row(row.input_ids, second=other) for row, other in zip(first, second, strict=True)]
    pairs = torch.stack([features_of(answers, first), features_of(answers, second)], dim=1)
    weight = torch.cat([head.weight, head.bias.unsqueeze(1)], dim=1).detach()
    run = CurvatureRun(
        answers, [layer], lambda: batches(answers, encoded, 4, pad_to=11), [0] * 10, 1, likelihood=LIKELIHOOD
    )
    posterior, data = fit_structure("full", run)
    theirs = Laplace(
        Rewards(weight), "reward_modeling", subset_of_weights="all", hessian_structure="full", prior_precision=0.6
    )
    dataset = torch.utils.data.TensorDataset(pairs, torch.zeros(10, dtype=torch.long))
    theirs.fit(torch.utils.data.DataLoader(dataset, batch_size=4))
    assert data.log_likelihood == pytest.approx(float(theirs.log_likelihood))
    parameters = [{"name": "classifier", "role": "head", "squared_norm": float(weight.square().sum())}]
    evidence, _ = evidence_at(
        PriorPrecision("scalar", {"all": 0.6}),
        posterior.spectra,
        parameters,
        data.log_likelihood,
    )
    assert float(theirs.log_marginal_likelihood()) == pytest.approx(evidence, rel=1e-6)
    mean, variance = theirs(pairs[:, 0])[:2]
    (batch,) = batches(answers, first, 10)
    with LinearisedPredictor(
        answers, [layer], posterior, torch.tensor([[0.6]]).double(), classes=1, every_class=True
    ) as predictor:
        moments = predictor.moments(batch)
    assert torch.allclose(moments.mean, mean.detach().reshape(10, 1), atol=1e-9)
    assert torch.allclose(moments.covariance.flatten(), variance.detach().flatten(), rtol=1e-6)


def test_the_deviation_of_a_reward_averages_variances_and_takes_no_temperature():
    found = [LogitMoments(torch.tensor([[1.0]]).double(), value * torch.ones(1, 1, 1).double()) for value in (4.0, 0.0)]
    averaging = Averaging(torch.tensor([1.0, 3.0]).double(), torch.tensor([[0.1, 0.15], [0.5, 0.25]]).double())
    assert float(reward_deviation(found, averaging)) == pytest.approx(1.0)
    (record,) = LIKELIHOOD.records(found, averaging, PredictSettings(penalty=0.5))
    assert record == {"reward": 1.0, "deviation": pytest.approx(1.0), "penalized_reward": pytest.approx(0.5)}
    (plain,) = LIKELIHOOD.records(found, averaging, PredictSettings(link="map"))
    assert plain == {"reward": 1.0, "deviation": 0.0}


def test_ties_are_half_right():
    table = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]).double().log()
    targets = torch.zeros(4, dtype=torch.long)
    assert LIKELIHOOD.scores(table, targets)["accuracy"] == pytest.approx(0.5)
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0]]).double()
    assert LIKELIHOOD.scorer(table, targets)(weights)["accuracy"].tolist() == pytest.approx([0.5, 0.5])
    constant = LIKELIHOOD.scores(LIKELIHOOD.constant(targets), targets)
    expected = {"accuracy": 0.5, "ece": 0.0, "adaptive_ece": 0.0, "auroc": 0.5, "aurc": 0.5}
    assert {name: constant[name] for name in expected} == pytest.approx(expected, abs=1e-7)
