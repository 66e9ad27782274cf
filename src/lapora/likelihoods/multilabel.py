"""Several labels at once: K logits, one per label, which is present or absent independently given the logits.

A prediction of N rows is a table ``(N, K, 2)`` of log-probabilities: of the label's absence and presence, each by the
one-dimensional integral over its own logit. The NLL of a row is the sum over its labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from lapora import metrics
from lapora.config import DEFAULT_SAMPLES, Link, PredictSettings
from lapora.likelihoods.base import Averaging, Likelihood, LogitMoments, ScoreOptions, Scorer, logits_record
from lapora.likelihoods.bernoulli import bernoulli_columns, two_answers
from lapora.likelihoods.categorical import (
    averaged_log_probabilities,
    averaged_mutual_information,
    grid_log_probabilities,
)
from lapora.metrics.weighted import ECE_BINS, equal_width_bins


class Multilabel(Likelihood):
    """``p(y|f) = Π_k sigmoid(±f_k)`` with labels y in {0, 1}^K."""

    name = "multilabel"
    score = "f1_micro"

    def targets(self, values: Sequence[Any]) -> Tensor:
        """Return the labels, ``(N, K)`` of 0 and 1."""
        return torch.tensor(values, dtype=torch.float64)

    def random_numbers(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return one number for each label."""
        return torch.rand(rows, self.outputs, generator=generator, dtype=torch.float64)

    def exact_columns(self, outputs: Tensor) -> Tensor:
        """Return one column for each label, ``sqrt(p_k (1 - p_k)) e_k``."""
        return torch.diag_embed(bernoulli_columns(outputs)).permute(1, 0, 2)

    def sampled_columns(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        """Return ``y - p`` with labels sampled from the model: one column for all labels."""
        p = torch.sigmoid(outputs.double())
        return ((uniform.to(p) < p).to(p) - p).unsqueeze(0)

    def empirical_columns(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``y - p``."""
        p = torch.sigmoid(outputs.double())
        return (targets.to(p) - p).unsqueeze(0)

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over the labels of ``log p(y_k|f_k)``."""
        return -self.row_nll(self.at_map(outputs), targets)

    def row_shape(self, components: int) -> tuple[int, ...]:
        """Return ``(K, 2)``."""
        return self.outputs, 2

    def predict(
        self,
        link: Link,
        found: Sequence[LogitMoments],
        averaging: Averaging,
        *,
        samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
    ) -> Tensor:
        """Apply the link to every label separately."""
        log_p = averaged_log_probabilities(link, _by_label(found), averaging, samples=samples, seed=seed)
        return log_p.unflatten(0, (-1, self.outputs))

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
        """Return the sum over the labels."""
        labels = targets.long().flatten()
        log_p = grid_log_probabilities(link, _by_label(found), temperatures, labels, samples=samples, seed=seed)
        return log_p.unflatten(2, (-1, self.outputs)).sum(dim=3)

    def information(
        self, found: Sequence[LogitMoments], averaging: Averaging, *, samples: int = DEFAULT_SAMPLES, seed: int = 0
    ) -> Tensor:
        """Return the sum over the labels."""
        found_by_label = averaged_mutual_information(_by_label(found), averaging, samples=samples, seed=seed)
        return found_by_label.unflatten(0, (-1, self.outputs)).sum(dim=1)

    def uncertainty(self, table: Tensor) -> dict[str, Tensor]:
        """Return 1 minus the larger probability, averaged over the labels, and the sum of the labels' entropies."""
        return {
            "max_probability": 1.0 - table.exp().amax(dim=2).mean(dim=1),
            "entropy": metrics.row_entropy(table).sum(dim=1),
        }

    def at_map(self, outputs: Tensor) -> Tensor:
        """Return ``log σ(-f_k)`` and ``log σ(f_k)``."""
        outputs = outputs.double().cpu()
        return torch.stack([logsigmoid(-outputs), logsigmoid(outputs)], dim=2)

    def mixture(self, tables: Tensor) -> Tensor:
        """Return the average of the probabilities."""
        return torch.logsumexp(tables, dim=0) - math.log(len(tables))

    def constant(self, targets: Tensor) -> Tensor:
        """Return the frequency of each label."""
        present = targets.double().mean(dim=0)
        log_p = torch.stack([1.0 - present, present], dim=1).log().clamp(min=-1e300)
        return log_p.expand(len(targets), -1, -1).contiguous()

    def scaled(self, table: Tensor, temperature: float) -> Tensor:
        """Return ``sigmoid(f_k / T)``."""
        return torch.log_softmax(table / temperature, dim=2)

    def fit_temperature(self, table: Tensor, targets: Tensor, *, width: float | None = None) -> float:
        """Fit one temperature for all labels."""
        return metrics.fit_temperature(*self.as_answers(table, targets), width=width)

    def row_nll(self, table: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-probability, summed over the labels."""
        chosen = targets.long().unsqueeze(2).to(table.device)
        return -table.gather(2, chosen).squeeze(2).sum(dim=1)

    def as_answers(self, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return every label of every row as a row with two answers."""
        return table.flatten(0, 1), targets.long().flatten()

    def scorer(self, table: Tensor, targets: Tensor, options: ScoreOptions = ScoreOptions()) -> Scorer:
        """Return F1 at 0.5, exact match, and NLL, Brier score and ECE (15 bins) over the labels.

        ``f1_micro`` counts the labels of all rows together, ``f1_macro`` is the mean over the labels.
        """
        p = table[:, :, 1].exp()
        predicted, present = (p >= 0.5).double(), targets.double()
        confidence = torch.maximum(p, 1.0 - p)
        right = (predicted == present).double()
        gap = (right - confidence).unsqueeze(2) * one_hot(equal_width_bins(confidence), ECE_BINS)
        counts = torch.stack([predicted * present, predicted, present], dim=2)  # (N, K, 3)
        means = torch.stack([right.prod(dim=1), self.row_nll(table, targets), (p - present).square().mean(dim=1)], 1)

        def scores(weights: Tensor) -> dict[str, Tensor]:
            total = weights.sum(dim=1)
            exact, nll, brier = (weights @ means / total.unsqueeze(1)).unbind(dim=1)
            hit, positive, actual = torch.einsum("rn,nkc->crk", weights, counts)
            return {
                "f1_macro": _f1(hit, positive, actual).mean(dim=1),
                "f1_micro": _f1(hit.sum(1), positive.sum(1), actual.sum(1)),
                "exact_match": exact,
                "ece": (weights @ gap.sum(dim=1)).abs().sum(dim=1) / (total * self.outputs),
                "nll": nll,
                "brier": brier,
            }

        return scores

    def bias(self, table: Tensor, targets: Tensor) -> tuple[str, str]:
        """Compare mean confidence and accuracy over all labels."""
        log_p, labels = self.as_answers(table, targets)
        accuracy = float((log_p.argmax(dim=1) == labels).double().mean())
        confidence = float(log_p.exp().max(dim=1).values.mean())
        direction = "underconfident" if confidence < accuracy else "overconfident"
        return direction, f"confidence {confidence:.2f}, accuracy {accuracy:.2f} over the labels"

    def records(
        self,
        found: Sequence[LogitMoments],
        averaging: Averaging,
        settings: PredictSettings,
        texts: int = 1,
        own_choices: Sequence[tuple[str, ...]] = (),
    ) -> list[dict[str, Any]]:
        """Return the labels with a probability of at least 0.5, and all probabilities, of each row."""
        p = self.predict(settings.link, found, averaging, samples=settings.samples, seed=settings.seed)[:, :, 1].exp()
        at_map = self.predict("map", found, averaging)[:, :, 1].exp()
        moments = averaging.moments(list(found)) if settings.logits else found[0]
        records = []
        for row in range(len(p)):
            present = dict(zip(self.choices, p[row].tolist(), strict=True))
            record: dict[str, Any] = {
                "prediction": [name for name, value in present.items() if value >= 0.5],
                "probabilities": present,
                "map_probabilities": dict(zip(self.choices, at_map[row].tolist(), strict=True)),
            }
            if settings.logits:
                record["logits"] = logits_record(moments, row, averaging)
            records.append(record)
        return records


def _by_label(found: Sequence[LogitMoments]) -> list[LogitMoments]:
    """Return each label of each row as a row of its own, with two answers."""
    rows = []
    for each in found:
        variances = each.covariance.diagonal(dim1=1, dim2=2)
        if not variances.shape[1]:  # MAP, without directions
            variances = torch.zeros_like(each.mean)
        rows.append(two_answers(LogitMoments(each.mean.reshape(-1, 1), variances.reshape(-1, 1, 1))))
    return rows


def _f1(hit: Tensor, predicted: Tensor, actual: Tensor) -> Tensor:
    """Compute ``2 tp / (predicted + actual)``, 0 for a label that neither occurs nor is predicted."""
    return 2.0 * hit / (predicted + actual).clamp(min=1e-300)
