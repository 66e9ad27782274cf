"""Reward models: a text has a reward r, and of two texts the first is better with ``p = sigmoid(r₁ - r₂)``.

The output of a pair is the difference of its rewards (Bradley and Terry 1952), so that the Fisher has one column,
``sqrt(p (1 - p))``, whose gradient runs through both texts in one backward pass. The output of one text is its reward,
whose deviation can be subtracted from it (Yang et al. 2024, "Bayesian reward models for LLM alignment").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lapora.config import PredictSettings
from lapora.likelihoods.base import Averaging, LogitMoments, ScoreOptions, Scorer
from lapora.likelihoods.bernoulli import Bernoulli
from lapora.metrics.weighted import WeightedScores


class Preference(Bernoulli):
    """``p(first is better|r) = sigmoid(r₁ - r₂)``; the answers are ``first`` and ``second``."""

    name = "preference"
    positive = 0

    def constant(self, targets: Tensor) -> Tensor:
        """Return probability one half for both: the order of the texts is arbitrary."""
        return torch.full((len(targets), 2), 0.5, dtype=torch.float64).log()

    def scorer(self, table: Tensor, targets: Tensor, options: ScoreOptions = ScoreOptions()) -> Scorer:
        """Return the scores of answers, with ties counted half right."""
        return WeightedScores(table, targets, with_mcc=options.with_mcc, right=_right(table, targets))

    def records(
        self,
        found: Sequence[LogitMoments],
        averaging: Averaging,
        settings: PredictSettings,
        texts: int = 1,
        own_choices: Sequence[tuple[str, ...]] = (),
    ) -> list[dict[str, Any]]:
        """Return the answer for pairs, with the difference of the rewards; the reward of single texts."""
        means = found[0].mean.double().flatten().tolist()
        deviations = reward_deviation(found, averaging, plain=settings.link == "map").tolist()
        if texts == 2:
            records = super().records(found, averaging, settings)
            for record, mean, deviation in zip(records, means, deviations, strict=True):
                record["reward_difference"] = {"mean": mean, "deviation": deviation}
            return records
        records = []
        for mean, deviation in zip(means, deviations, strict=True):
            record = {"reward": mean, "deviation": deviation}
            if settings.penalty is not None:
                record["penalized_reward"] = mean - settings.penalty * deviation
            records.append(record)
        return records


def _right(table: Tensor, targets: Tensor) -> Tensor:
    """Return 1 for each row whose answer is right, 1/2 for a tie, else 0, ``(N,)`` in float64."""
    right = (table.argmax(dim=1) == targets).double()
    return torch.where(table[:, 0] == table[:, 1], 0.5, right)


def reward_deviation(found: Sequence[LogitMoments], averaging: Averaging, *, plain: bool = False) -> Tensor:
    """Return the standard deviation of B rewards, or differences of rewards, over the prior precisions, ``(B,)``.

    In the unit of the adapter's rewards: temperatures scale probabilities, and are not applied.

    Args:
        found: Moments under each prior precision.
        averaging: Their weights.
        plain: Return 0, as for the plain adapter.
    """
    variance = torch.zeros(len(found[0].mean), dtype=torch.float64)
    if not plain:
        for weight, each in zip(averaging.weights.sum(dim=1).tolist(), found, strict=True):
            variance += weight * each.covariance.double().cpu()[:, 0, 0]
    return variance.clamp(min=0.0).sqrt()
