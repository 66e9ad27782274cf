"""Predictions of rows under a posterior, for tuning and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lapora.config import Link, Progress, method_label
from lapora.curvature.passes import stack_outputs
from lapora.likelihoods.base import Averaging, LogitMoments
from lapora.models.batches import Batch
from lapora.models.batching import run_batches
from lapora.posterior.prior import PriorPrecision
from lapora.predictive.moments import LinearisedPredictor
from lapora.tasks import EncodedExample, Example
from lapora.workflows.rows import LabelledRows
from lapora.workflows.task_model import Fitted, TaskModel, require_finite, translate_row_errors


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Predictions of rows.

    Attributes:
        tables: The likelihood's tables by link, ``(D, N, ...)`` in float64: averaged as saved (D = 1), or under each
            of D given priors. ``map`` is always included. Minus infinity for the answers that a row does not have.
        truncated: Number of rows that were truncated to the maximum length.
        information: Mutual information of answer and weights, ``(N,)`` in nats, if requested.
    """

    tables: dict[Link, Tensor]
    truncated: int
    information: Tensor | None = None


def score_rows(
    fitted: Fitted,
    rows: LabelledRows,
    links: Sequence[Link],
    *,
    samples: int,
    seed: int = 0,
    priors: Sequence[PriorPrecision] = (),
    with_information: bool = False,
    progress: Progress | None = None,
) -> ScoredRows:
    """Predict rows with several links in one pass, under the saved prior or under several others.

    Args:
        fitted: The fitted adapter.
        rows: The rows.
        links: Links from moments to probabilities.
        samples: Quasi-Monte-Carlo points of the sampling links.
        seed: Random seed of their scrambling.
        priors: Prior precisions to predict under, one by one; by default predictions average over the saved prior.
        with_information: Compute the mutual information.
        progress: Progress callback.
    """
    model, processes, likelihood = fitted.model, fitted.model.processes, fitted.model.likelihood
    coded = model.encode(rows.examples)
    mine = processes.shard(coded)
    averaging = Averaging.single() if priors else fitted.averaging
    tables: dict[Link, Tensor] = {}
    for link in ("map", *links):
        shape = likelihood.row_shape(1 if link == "map" else len(averaging.components))
        if not model.choices:  # each row has its own answers
            shape = (max(len(example.choices) for example in rows.examples),)
        tables[link] = torch.full((max(1, len(priors)), len(mine), *shape), -torch.inf, dtype=torch.float64)
    information = torch.zeros(len(mine), dtype=torch.float64)
    predictor = fitted.predictor(
        every_class=any(likelihood.needs_every_output(link) for link in links),
        map_only=set(links) <= {"map"} and not with_information,
        priors=priors,
    )
    for batch, found in run_moments(model, predictor, rows.examples, coded, progress):
        positions = list(batch.rows)
        for link, table in tables.items():
            for index, each in enumerate([[moments] for moments in found] if priors else [found]):
                own = likelihood.predict(link, each, averaging, samples=samples, seed=seed)
                table[index, positions, : own.shape[1]] = own
        if with_information:
            information[positions] = likelihood.information(found, averaging, samples=samples, seed=seed)
    joined = {link: processes.interleave(table, len(coded), dim=1) for link, table in tables.items()}
    return ScoredRows(
        joined,
        sum(row.truncated for row in coded),
        processes.interleave(information, len(coded)) if with_information else None,
    )


def label_grid(
    model: TaskModel,
    predictor: LinearisedPredictor,
    examples: Sequence[Example],
    encoded: Sequence[EncodedExample],
    labels: Tensor,
    *,
    temperatures: Tensor,
    link: Link,
    samples: int,
    seed: int,
    progress: Progress | None = None,
) -> Tensor:
    """Return the log-probability of each row's label under every prior precision and temperature, in one pass.

    Args:
        model: The adapter with its task.
        predictor: The linearised predictive under D prior precisions.
        examples: The N rows.
        encoded: Their token ids.
        labels: Their labels, ``(N, ...)``.
        temperatures: ``(T,)``.
        link: Link from moments to probabilities.
        samples: Quasi-Monte-Carlo points of the sampling links.
        seed: Random seed of their scrambling.
        progress: Progress callback.

    Returns:
        ``(D, T, N)`` in float64.
    """
    processes = model.processes
    own = processes.shard(list(labels))
    table = torch.zeros(predictor.priors, len(temperatures), len(own), dtype=torch.float64)
    for batch, found in run_moments(model, predictor, examples, encoded, progress):
        targets = torch.stack([own[row] for row in batch.rows])
        part = model.likelihood.grid(link, found, temperatures, targets, samples=samples, seed=seed)
        table[:, :, list(batch.rows)] = part
    return processes.interleave(table, len(encoded), dim=2)


def run_moments(
    model: TaskModel,
    predictor: LinearisedPredictor,
    examples: Sequence[Example],
    encoded: Sequence[EncodedExample],
    progress: Progress | None = None,
) -> Iterator[tuple[Batch, list[LogitMoments]]]:
    """Yield the batches of this process's shard with their moments under every prior precision.

    Raises:
        NumericalError: A moment is NaN or infinite; the row is named.
    """
    processes = model.processes
    done = 0
    names = [example.where for example in processes.shard(examples)]
    with processes.on_shard(), translate_row_errors(names), predictor:
        for batch, found in run_batches(model.batches(processes.shard(encoded)), predictor.moments_under_each_prior):
            for moments in found:
                require_finite(moments.covariance, batch)
            yield batch, found
            done += len(batch)
            if progress is not None:
                progress(min(done * processes.count, len(encoded)), len(encoded))


def forward_table(model: TaskModel, coded: Sequence[EncodedExample]) -> Tensor:
    """Return the plain adapter's predictions by one forward pass, ``(N, ...)`` in float64, in the rows' order."""
    return _forward(model, coded, model.likelihood.at_map)


def forward_outputs(model: TaskModel, coded: Sequence[EncodedExample]) -> Tensor:
    """Return the plain adapter's outputs by one forward pass, ``(N, C)`` in float64, in the rows' order."""
    return _forward(model, coded, lambda outputs: outputs.double().cpu())


def _forward(model: TaskModel, coded: Sequence[EncodedExample], convert: Callable[[Tensor], Tensor]) -> Tensor:
    found: dict[int, Tensor] = {}
    with model.processes.on_shard(), torch.no_grad():
        for batch, logits in run_batches(model.sharded_batches(coded), model.outputs.logits):
            found |= zip(batch.rows, convert(logits), strict=True)
    everywhere = {row: own for each in model.processes.all_gather(found) for row, own in each.items()}
    rows = [everywhere[row].unsqueeze(0) for row in range(len(coded))]
    return stack_outputs(rows) if len({row.shape for row in rows}) > 1 else torch.cat(rows)


@dataclass(frozen=True, eq=False)
class Prediction:
    """One method's predictions of a set of rows.

    Attributes:
        method: Name of the method.
        table: The likelihood's table, ``(N, ...)`` in float64.
        name: Name of the posterior, for ``laplace``.
        link: Link, for ``laplace``.
        details: Further fields of the record.
        mutual_information: ``(N,)`` in nats, if the method averages over models.
    """

    method: str
    table: Tensor
    name: str | None = None
    link: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    mutual_information: Tensor | None = None

    @property
    def label(self) -> str:
        """Label of the method in tables and messages."""
        return method_label(self.method, self.name, self.link)

    def identity(self) -> dict[str, Any]:
        """Return the first fields of the record."""
        named = {key: value for key, value in (("name", self.name), ("link", self.link)) if value is not None}
        return {"method": self.method, **named, **self.details}
