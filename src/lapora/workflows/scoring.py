"""Labelled rows and their log-probabilities under a session's posterior: what tuning and evaluation share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from lapora.config import DataSettings, Link, Progress
from lapora.errors import DataError, PosteriorError, UnlabelledError
from lapora.model.answers import AnswerModel
from lapora.model.batch_feed import BatchFeed, BatchSize, run_batches
from lapora.posterior.prior import PriorPrecision
from lapora.predictive.links import log_probabilities, needs_every_class
from lapora.predictive.moments import LogitMoments
from lapora.tasks import EncodedExample, Example, Task, data_fingerprint, render_all, resolve_choices
from lapora.workflows.naming import naming_examples, refuse_infinite
from lapora.workflows.session import Session, read_rows

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
    if choices != session.choices:
        raise PosteriorError(
            f"posterior {session.posterior.folder.name}: fitted to the answers {', '.join(session.choices)}; task "
            f"{task.task} has {', '.join(choices)}; give the task that it was fitted on"
        )
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
    coded = session.encode(rows.examples)
    depth = max(1, len(priors))
    shape = (depth, len(coded), len(session.choices))
    log_p: dict[Link, Tensor] = {link: torch.zeros(shape, dtype=torch.float64) for link in ("map", *links)}
    done = 0
    every_class = any(needs_every_class(link) for link in links)
    map_only = set(links) <= {"map"} and not with_moments
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    with (
        naming_examples([example.where for example in rows.examples]),
        session.predictor(every_class=every_class, map_only=map_only, priors=priors) as predictor,
    ):
        for batch, found in run_batches(session.batches(coded), predictor.moments_under_each_prior):
            for index, moments in enumerate(found):
                refuse_infinite(moments.covariance, batch)
                for link, table in log_p.items():
                    table[index, list(batch.rows)] = log_probabilities(link, moments, samples=samples, seed=seed)
                if with_moments and index == 0:
                    pairs = zip(moments.mean.cpu(), moments.covariance.cpu(), strict=True)
                    kept |= zip(batch.rows, pairs, strict=True)
            done += len(batch)
            if progress is not None:
                progress(done, len(coded))
    truncated = sum(row.truncated for row in coded)
    if not with_moments:
        return ScoredRows(log_p, truncated)
    mean, covariance = (torch.stack([kept[row][part] for row in range(len(coded))]) for part in (0, 1))
    return ScoredRows(log_p, truncated, LogitMoments(mean, covariance))


def forward_log_p(answers: AnswerModel, coded: Sequence[EncodedExample], batch_size: BatchSize) -> Tensor:
    """Log-probabilities by one forward pass of the network as it stands: ``(N, C)``, float64, in the rows' order."""
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for batch, logits in run_batches(BatchFeed(answers, coded, batch_size), answers.logits):
            found |= zip(batch.rows, torch.log_softmax(logits.double(), dim=1).cpu(), strict=True)
    return torch.stack([found[row] for row in range(len(coded))])
