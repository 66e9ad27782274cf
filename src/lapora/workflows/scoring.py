"""Labelled rows and their log-probabilities under a session's posterior: what tuning and evaluation share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from lapora.config import DataSettings, Link, Progress, method_label
from lapora.errors import DataError, MissingSplitError, UnlabelledError, UsageError
from lapora.likelihoods.base import LogitMoments
from lapora.likelihoods.categorical import log_probabilities, needs_every_class
from lapora.models.batching import BatchFeed, run_batches
from lapora.posterior.prior import PriorPrecision
from lapora.storage.compatibility import answer_differences
from lapora.tasks import EncodedExample, Example, Task, data_fingerprint, render_all, resolve_choices
from lapora.workflows.task_model import (
    Session,
    mismatch_error,
    read_rows,
    require_finite,
    source_of,
    translate_row_errors,
)

_LABELS_LOOKED_FOR = 100


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Rows with their labels.

    Attributes:
        task: The task that rendered them.
        split: Where they come from.
        examples: The rows.
        targets: Their labels, ``(N,)``.
        excluded: How many rows of the split were left out.
    """

    task: Task
    split: str
    examples: list[Example]
    targets: Tensor
    excluded: int

    def only(self, positions: Sequence[int]) -> LabelledRows:
        """Some of the rows."""
        return replace(
            self,
            examples=[self.examples[position] for position in positions],
            targets=self.targets[torch.tensor(positions, dtype=torch.long)],
        )

    def chosen(self, count: int, seed: int) -> LabelledRows:
        """A seeded choice of the rows, in their order."""
        order = torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(seed))
        return self.only(sorted(order[:count].tolist()))


def row_digest(example: Example) -> str:
    """What a row is known by, wherever it stands: its texts, answers and label."""
    return data_fingerprint([example])[:16]


def read_labelled_rows(
    session: Session, data: DataSettings, default_split: str = "validation", exclude: Collection[str] = ()
) -> LabelledRows:
    """Rows of a split, as ``fit`` rendered its own.

    Args:
        session: The fitted adapter.
        data: Which rows; None means as ``fit`` recorded it. A limit counts the rows that are not excluded.
        default_split: The split when ``data`` names none.
        exclude: Digests of rows to leave out.

    Raises:
        UnlabelledError: No row has a label.
        DataError: A row cannot be read, or has no label; or no row is left.
        PosteriorError: The task's answers are not the posterior's.
    """
    wanted = replace(data, limit=None) if exclude else data
    task, rows, split = read_rows(wanted, session.posterior.manifest, default_split)
    choices = resolve_choices(task, rows)
    if differences := answer_differences(session.posterior.manifest, task.task, choices):
        raise mismatch_error(session.posterior, differences)
    kind = session.loaded.kind
    bare = render_all(task, rows[:_LABELS_LOOKED_FOR], kind=kind, choices=session.choices, labels="optional")
    if all(example.target is None for example in bare):
        raise UnlabelledError(f"{split}: the rows have no labels (looked at {len(bare)}); give a split that has them")
    examples = render_all(task, rows, kind=kind, choices=session.choices, labels="required")
    kept = [example for example in examples if not exclude or row_digest(example) not in exclude]
    if not kept:
        raise DataError(f"{split}: all {len(examples)} rows were used to tune the prior; score another --split")
    excluded = len(examples) - len(kept)
    kept = kept[: data.limit]
    return LabelledRows(task, split, kept, torch.tensor([cast(int, row.target) for row in kept]), excluded)


def tuning_rows(session: Session, data: DataSettings, seed: int) -> LabelledRows:
    """A seeded half of the split (or as many rows as the limit says)."""
    rows = _labelled_split(session, data)
    return rows.chosen(data.limit or max(1, len(rows.examples) // 2), seed)


def _labelled_split(session: Session, data: DataSettings) -> LabelledRows:
    """The split asked for, or the first that has labels; never the one that ``fit`` read, whatever it is called."""
    fitted = session.posterior.manifest["data"]
    read = source_of(session.posterior.manifest, DataSettings(split=fitted["split"]))
    if data.split is not None:
        if source_of(session.posterior.manifest, data) == read:
            raise UsageError(
                f"--split {data.split}: the adapter was trained on these rows; give another split, or --method marglik"
            )
        return read_labelled_rows(session, replace(data, limit=None))
    reasons = []
    for split in ("validation", "test"):
        candidate = replace(data, split=split, limit=None)
        if source_of(session.posterior.manifest, candidate) == read:
            continue
        try:
            return read_labelled_rows(session, candidate)
        except (MissingSplitError, UnlabelledError) as error:
            reasons.append(str(error))
    raise MissingSplitError(f"no labelled rows but those that fit read ({reasons[0] if reasons else 'no other split'})")


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
    session: Session,
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
        session: The fitted adapter.
        rows: What to predict.
        links: How moments become probabilities.
        samples: Points of the sampling links.
        seed: Their scrambling.
        priors: Priors to predict under; by default the saved one.
        with_moments: Keep the moments of the logits.
        progress: Told of rows done.
    """
    processes = session.processes
    coded = session.encode(rows.examples)
    mine = processes.shard(coded)
    depth = max(1, len(priors))
    shape = (depth, len(mine), len(session.choices))
    log_p: dict[Link, Tensor] = {link: torch.zeros(shape, dtype=torch.float64) for link in ("map", *links)}
    done = 0
    every_class = any(needs_every_class(link) for link in links)
    map_only = set(links) <= {"map"} and not with_moments
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    with (
        processes.on_shard(),
        translate_row_errors([example.where for example in processes.shard(rows.examples)]),
        session.predictor(every_class=every_class, map_only=map_only, priors=priors) as predictor,
    ):
        for batch, found in run_batches(session.batches(mine), predictor.moments_under_each_prior):
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


def forward_log_p(session: Session, coded: Sequence[EncodedExample]) -> Tensor:
    """Log-probabilities by one forward pass of the network as it stands: ``(N, C)``, float64, in the rows' order."""
    found: dict[int, Tensor] = {}
    feed = BatchFeed(session.answers, coded, session.batch_size, session.processes)
    with session.processes.on_shard(), torch.no_grad():
        for batch, logits in run_batches(feed, session.answers.logits):
            found |= zip(batch.rows, torch.log_softmax(logits.double(), dim=1).cpu(), strict=True)
    everywhere = {row: log_p for each in session.processes.all_gather(found) for row, log_p in each.items()}
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
