"""Labelled rows and their log-probabilities under a session's posterior: what tuning and evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lapora.config import Link, Progress, method_label
from lapora.likelihoods.base import LogitMoments
from lapora.likelihoods.categorical import log_probabilities, needs_every_class
from lapora.models.batching import run_batches
from lapora.posterior.prior import PriorPrecision
from lapora.tasks import EncodedExample
from lapora.workflows.rows import LabelledRows
from lapora.workflows.task_model import Fitted, TaskModel, require_finite, translate_row_errors


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Log-probabilities of rows.

    Attributes:
        log_p: By link, ``(D, N, C)`` in float64 under each of D priors; ``map`` is always there.
        truncated: How many rows were cut to the greatest length.
        moments: Mean and covariance of the logits under the first prior, where they were asked for.
    """

    log_p: dict[Link, Tensor]
    truncated: int
    moments: LogitMoments | None = None


def score_rows(
    fitted: Fitted,
    rows: LabelledRows,
    links: Sequence[Link],
    *,
    samples: int,
    seed: int = 0,
    priors: Sequence[PriorPrecision] = (),
    with_moments: bool = False,
    progress: Progress | None = None,
) -> ScoredRows:
    """Predict rows by several links, under the saved prior or under several others, in one pass.

    Args:
        fitted: The fitted adapter.
        rows: What to predict.
        links: How moments become probabilities.
        samples: Points of the sampling links.
        seed: Their scrambling.
        priors: Priors to predict under; by default the saved one.
        with_moments: Keep the moments of the logits.
        progress: Told of rows done.
    """
    model, processes = fitted.model, fitted.model.processes
    coded = model.encode(rows.examples)
    mine = processes.shard(coded)
    depth = max(1, len(priors))
    shape = (depth, len(mine), len(model.choices))
    log_p: dict[Link, Tensor] = {link: torch.zeros(shape, dtype=torch.float64) for link in ("map", *links)}
    done = 0
    every_class = any(needs_every_class(link) for link in links)
    map_only = set(links) <= {"map"} and not with_moments
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    with (
        processes.on_shard(),
        translate_row_errors([example.where for example in processes.shard(rows.examples)]),
        fitted.predictor(every_class=every_class, map_only=map_only, priors=priors) as predictor,
    ):
        for batch, found in run_batches(model.batches(mine), predictor.moments_under_each_prior):
            for index, moments in enumerate(found):
                require_finite(moments.covariance, batch)
                for link, table in log_p.items():
                    table[index, list(batch.rows)] = log_probabilities(link, moments, samples=samples, seed=seed)
                if with_moments and index == 0:
                    pairs = zip(moments.mean.cpu(), moments.covariance.cpu(), strict=True)
                    kept |= zip(batch.rows, pairs, strict=True)
            done += len(batch)
            if progress is not None:
                progress(min(done * processes.count, len(coded)), len(coded))
    log_p = {link: processes.interleave(table, len(coded), dim=1) for link, table in log_p.items()}
    truncated = sum(row.truncated for row in coded)
    if not with_moments:
        return ScoredRows(log_p, truncated)
    found_everywhere = processes.all_gather([kept[row] for row in range(len(mine))])
    pairs_in_order = [found_everywhere[row % processes.count][row // processes.count] for row in range(len(coded))]
    mean, covariance = (torch.stack([pair[part] for pair in pairs_in_order]) for part in (0, 1))
    return ScoredRows(log_p, truncated, LogitMoments(mean, covariance))


def forward_log_p(model: TaskModel, coded: Sequence[EncodedExample]) -> Tensor:
    """Return log-probabilities by one forward pass of the network, ``(N, C)`` in float64, in the rows' order."""
    found: dict[int, Tensor] = {}
    with model.processes.on_shard(), torch.no_grad():
        for batch, logits in run_batches(model.sharded_batches(coded), model.outputs.logits):
            found |= zip(batch.rows, torch.log_softmax(logits.double(), dim=1).cpu(), strict=True)
    everywhere = {row: log_p for each in model.processes.all_gather(found) for row, log_p in each.items()}
    return torch.stack([everywhere[row] for row in range(len(coded))])


@dataclass(frozen=True, eq=False)
class Prediction:
    """One method's probabilities of a set of rows.

    Attributes:
        method: Which.
        log_p: ``(N, C)`` log-probabilities, float64.
        name: The posterior, of ``laplace``.
        link: Its link.
        details: What else the record says of it.
        mutual_information: ``(N,)`` nats, where the method is an average over models.
    """

    method: str
    log_p: Tensor
    name: str | None = None
    link: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    mutual_information: Tensor | None = None

    @property
    def label(self) -> str:
        """Its name for people."""
        return method_label(self.method, self.name, self.link)

    def identity(self) -> dict[str, Any]:
        """The record's first fields."""
        named = {key: value for key, value in (("name", self.name), ("link", self.link)) if value is not None}
        return {"method": self.method, **named, **self.details}
