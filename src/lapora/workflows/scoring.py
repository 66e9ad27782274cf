"""Predictions of rows under a posterior, for tuning and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lapora.config import Link, Progress, method_label
from lapora.curvature.passes import stack_outputs
from lapora.likelihoods.base import LogitMoments
from lapora.models.batches import Batch
from lapora.models.batching import run_batches
from lapora.posterior.prior import PriorPrecision
from lapora.predictive.moments import LinearisedPredictor
from lapora.tasks import EncodedExample, Example
from lapora.workflows.rows import LabelledRows
from lapora.workflows.task_model import Fitted, PriorAverage, TaskModel, require_finite, translate_row_errors


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Predictions of rows.

    Attributes:
        tables: The likelihood's tables by link, ``(N, ...)`` in float64 for each average over priors. ``map`` is
            always included. Minus infinity for the answers that a row does not have.
        truncated: Number of rows that were truncated to the maximum length.
        information: Mutual information of answer and weights, ``(N,)`` in nats for each average, if requested.
    """

    tables: dict[Link, list[Tensor]]
    truncated: int
    information: list[Tensor] | None = None


def score_rows(
    fitted: Fitted,
    rows: LabelledRows,
    links: Sequence[Link],
    *,
    samples: int,
    seed: int = 0,
    averages: Sequence[PriorAverage] = (),
    with_information: bool = False,
    progress: Progress | None = None,
) -> ScoredRows:
    """Predict rows with several links in one pass, averaged as saved or in several other ways.

    Args:
        fitted: The fitted adapter.
        rows: The rows.
        links: Links from moments to probabilities.
        samples: Quasi-Monte-Carlo points of the sampling links.
        seed: Random seed of their scrambling.
        averages: Averages over prior precisions to predict under, each; by default the saved one.
        with_information: Compute the mutual information.
        progress: Progress callback.
    """
    model, processes, likelihood = fitted.model, fitted.model.processes, fitted.model.likelihood
    coded = model.encode(rows.examples)
    mine = processes.shard(coded)
    averages = averages or [fitted.average]

    def empty(link: Link, average: PriorAverage) -> Tensor:
        shape = likelihood.row_shape(1 if link == "map" else len(average.averaging.components))
        if not model.choices:  # each row has its own answers
            shape = (max(len(example.choices) for example in rows.examples),)
        return torch.full((len(mine), *shape), -torch.inf, dtype=torch.float64)

    tables: dict[Link, list[Tensor]] = {link: [empty(link, each) for each in averages] for link in ("map", *links)}
    information = [torch.zeros(len(mine), dtype=torch.float64) for _ in averages]
    priors, places = _distinct([each.priors for each in averages])
    predictor = fitted.predictor(
        every_class=any(likelihood.needs_every_output(link) for link in links),
        map_only=set(links) <= {"map"} and not with_information,
        priors=priors,
    )
    for batch, found in run_moments(model, predictor, rows.examples, coded, progress):
        positions = list(batch.rows)
        for index, average in enumerate(averages):
            own = [found[place] for place in places[index]]
            for link, table in tables.items():
                part = likelihood.predict(link, own, average.averaging, samples=samples, seed=seed)
                table[index][positions, : part.shape[1]] = part
            if with_information:
                information[index][positions] = likelihood.information(
                    own, average.averaging, samples=samples, seed=seed
                )

    def joined(parts: Sequence[Tensor]) -> list[Tensor]:
        return [processes.interleave(part, len(coded)) for part in parts]

    return ScoredRows(
        {link: joined(table) for link, table in tables.items()},
        sum(row.truncated for row in coded),
        joined(information) if with_information else None,
    )


def _distinct(groups: Sequence[Sequence[PriorPrecision]]) -> tuple[list[PriorPrecision], list[list[int]]]:
    """Return the distinct prior precisions of all groups, and the places there of each group's own."""
    distinct: dict[tuple[Any, ...], PriorPrecision] = {}
    keys = [[(prior.structure, *prior.precisions.items()) for prior in group] for group in groups]
    for group, own in zip(groups, keys, strict=True):
        distinct |= zip(own, group, strict=True)
    place = {key: index for index, key in enumerate(distinct)}
    return list(distinct.values()), [[place[key] for key in own] for own in keys]


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
