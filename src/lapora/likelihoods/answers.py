"""Common to likelihoods of one answer out of C: predictions are tables of log-probabilities ``(N, C)``."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lapora import metrics
from lapora.config import PredictSettings
from lapora.likelihoods.base import Averaging, Likelihood, LogitMoments, ScoreOptions, Scorer, logits_record
from lapora.metrics.weighted import WeightedScores


class AnswerLikelihood(Likelihood):
    """A likelihood of one answer out of C; its tables contain log-probabilities, ``(N, C)``."""

    @abstractmethod
    def log_p(self, outputs: Tensor) -> Tensor:
        """Return the log-probabilities of the C answers, ``(N, C)``."""

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probability of each row's label."""
        return self.log_p(outputs).gather(1, targets.unsqueeze(1)).squeeze(1)

    def row_shape(self, components: int) -> tuple[int, ...]:
        """Return ``(C,)``."""
        return (len(self.choices),)

    def at_map(self, outputs: Tensor) -> Tensor:
        """Return the log-probabilities of the plain adapter."""
        return self.log_p(outputs.double()).cpu()

    def mixture(self, tables: Tensor) -> Tensor:
        """Return the average of the probabilities."""
        log_p = torch.logsumexp(tables, dim=0) - math.log(len(tables))
        return log_p - torch.logsumexp(log_p, dim=1, keepdim=True)

    def uncertainty(self, table: Tensor) -> dict[str, Tensor]:
        """Return 1 minus the largest probability, and the entropy."""
        return {"max_probability": 1.0 - table.exp().amax(dim=1), "entropy": metrics.row_entropy(table)}

    def constant(self, targets: Tensor) -> Tensor:
        """Return the frequencies of the labels."""
        return metrics.constant_predictor(targets, len(self.choices))

    def scaled(self, table: Tensor, temperature: float) -> Tensor:
        """Return ``softmax(log p / T)``."""
        return torch.log_softmax(table / temperature, dim=1)

    def fit_temperature(self, table: Tensor, targets: Tensor, *, width: float | None = None) -> float:
        """Fit the temperature of the logits; see :func:`lapora.metrics.fit_temperature`."""
        return metrics.fit_temperature(table, targets, width=width)

    def row_nll(self, table: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-probability of each row's label."""
        return metrics.row_nll(table, targets)

    def scorer(self, table: Tensor, targets: Tensor, options: ScoreOptions = ScoreOptions()) -> Scorer:
        """Return accuracy, calibration errors, NLL, Brier score and ranking scores."""
        return WeightedScores(table, targets, with_mcc=options.with_mcc)

    def bias(self, table: Tensor, targets: Tensor) -> tuple[str, str]:
        """Compare mean confidence and accuracy."""
        accuracy = float((table.argmax(dim=1) == targets).double().mean())
        confidence = float(table.exp().max(dim=1).values.mean())
        direction = "underconfident" if confidence < accuracy else "overconfident"
        return direction, f"confidence {confidence:.2f}, accuracy {accuracy:.2f}"

    def records(
        self,
        found: Sequence[LogitMoments],
        averaging: Averaging,
        settings: PredictSettings,
        texts: int = 1,
        own_choices: Sequence[tuple[str, ...]] = (),
    ) -> list[dict[str, Any]]:
        """Return answer, confidence, entropy and probabilities of each row."""
        log_p = self.predict(settings.link, found, averaging, samples=settings.samples, seed=settings.seed)
        log_map = self.predict("map", found, averaging)
        moments = averaging.moments(list(found)) if settings.logits else found[0]
        records = []
        for row in range(len(log_p)):
            p = log_p[row].exp()
            best = int(p.argmax())
            own = own_choices[row] if own_choices else ()
            choices, both = own or self.choices, (p.tolist(), log_map[row].exp().tolist())
            named = [list(each) if own else dict(zip(choices, each, strict=True)) for each in both]
            record: dict[str, Any] = {
                "prediction": choices[best],
                "confidence": float(p[best]),
                "entropy": float(-(p * log_p[row]).nan_to_num(0.0).sum()),
                **({"answers": list(own)} if own else {}),
                "probabilities": named[0],
                "map_probabilities": named[1],
            }
            if settings.logits:
                record["logits"] = logits_record(moments, row, averaging)
            if settings.abstain_below is not None:
                record["abstained"] = record["confidence"] < settings.abstain_below
            records.append(record)
        return records
