"""One logit for two answers: ``p(second answer|f) = sigmoid(f)``.

The Fisher of the logit is ``σ(f) (1 - σ(f))``, one column. A prediction is that of two classes with the logits 0 and
f, by the same one-dimensional integral.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lapora.config import DEFAULT_SAMPLES, LikelihoodName, Link
from lapora.likelihoods.answers import AnswerLikelihood
from lapora.likelihoods.base import Averaging, LogitMoments
from lapora.likelihoods.categorical import (
    averaged_log_probabilities,
    averaged_mutual_information,
    grid_log_probabilities,
)


def bernoulli_columns(logits: Tensor) -> Tensor:
    """Return ``sqrt(σ(f) (1 - σ(f)))`` of each logit, in float64, without cancellation for large logits."""
    logits = logits.double()
    return (0.5 * (logsigmoid(logits) + logsigmoid(-logits))).exp()


def two_answers(moments: LogitMoments, positive: int = 1) -> LogitMoments:
    """Convert the moments of one logit, ``(B, 1)``, to those of two, of which the other is 0.

    Args:
        moments: Mean and variance of the logit.
        positive: Index of the positive answer.
    """
    mean = moments.mean.double().cpu()
    variance = moments.covariance.double().cpu().flatten(1)
    if not variance.shape[1]:  # MAP, without directions
        variance = torch.zeros_like(mean)
    chosen = torch.zeros(2, dtype=torch.float64)
    chosen[positive] = 1.0
    return LogitMoments(mean * chosen, torch.diag_embed(variance * chosen))


class Bernoulli(AnswerLikelihood):
    """``p(y|f)`` of two answers by one logit, that of the answer :attr:`positive`."""

    name: ClassVar[LikelihoodName] = "bernoulli"
    positive: ClassVar[int] = 1

    @property
    def outputs(self) -> int:
        """One."""
        return 1

    def exact_columns(self, outputs: Tensor) -> Tensor:
        """Return ``sqrt(σ(f) (1 - σ(f)))``, ``(1, B, 1)``."""
        return bernoulli_columns(outputs).unsqueeze(0)

    def sampled_columns(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        """Return ``y - σ(f)`` with y sampled from the model."""
        p = torch.sigmoid(outputs.double())
        return ((uniform.to(p).unsqueeze(1) < p).to(p) - p).unsqueeze(0)

    def empirical_columns(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``y - σ(f)``."""
        p = torch.sigmoid(outputs.double())
        return ((targets.unsqueeze(1) == self.positive).to(p) - p).unsqueeze(0)

    def log_p(self, outputs: Tensor) -> Tensor:
        """Return ``log σ(f)`` of the positive answer and ``log σ(-f)`` of the other."""
        log_p = torch.cat([logsigmoid(-outputs), logsigmoid(outputs)], dim=1)
        return log_p if self.positive == 1 else log_p.flip(1)

    def _two(self, found: Sequence[LogitMoments]) -> list[LogitMoments]:
        return [two_answers(each, self.positive) for each in found]

    def predict(
        self,
        link: Link,
        found: Sequence[LogitMoments],
        averaging: Averaging,
        *,
        samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
    ) -> Tensor:
        """Apply the link to two classes."""
        return averaged_log_probabilities(link, self._two(found), averaging, samples=samples, seed=seed)

    def grid(
        self,
        link: Link,
        found: Sequence[LogitMoments],
        temperatures: Tensor,
        targets: Tensor,
        *,
        samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
    ) -> Tensor:
        """Apply the link to two classes."""
        return grid_log_probabilities(link, self._two(found), temperatures, targets, samples=samples, seed=seed)

    def information(
        self, found: Sequence[LogitMoments], averaging: Averaging, *, samples: int = DEFAULT_SAMPLES, seed: int = 0
    ) -> Tensor:
        """Return the mutual information of answer and weights."""
        return averaged_mutual_information(self._two(found), averaging, samples=samples, seed=seed)
