"""One pass over the data: every batch shown to an observer of the curvature."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapora.config import FisherType, Progress
from lapora.curvature.fisher import empirical_columns, exact_columns, monte_carlo_columns
from lapora.curvature.linearisation import Directions, Linearisation, Observer
from lapora.curvature.resuming import PassKeeper, PassState, Resumable, add_up
from lapora.errors import UsageError
from lapora.model.answers import AnswerModel
from lapora.model.batch_feed import BatchFeed, run_batches
from lapora.model.batches import Batch
from lapora.model.bayesian_layers import BayesianLayer
from lapora.processes import ALONE, Processes


@dataclass(frozen=True, eq=False)
class DataPass:
    """What a pass found besides the curvature.

    Attributes:
        logits: At the MAP, ``(N, C)`` in float64, in the rows' order.
        log_likelihood: ``log p(y|X, θ_MAP)`` in nats, or None where a row has no label.
    """

    logits: Tensor
    log_likelihood: float | None


def collect(
    answers: AnswerModel,
    layers: Sequence[BayesianLayer],
    observer: Observer,
    batches: Iterable[Batch],
    *,
    targets: Sequence[int | None],
    fisher: FisherType | Directions = "exact",
    seed: int = 0,
    progress: Progress | None = None,
    keeper: PassKeeper | None = None,
    processes: Processes = ALONE,
) -> DataPass:
    """Show every batch to an observer.

    Args:
        answers: The network.
        layers: The Bayesian layers.
        observer: Who sees them.
        batches: All rows, each once; this process's share where there are several.
        targets: Label of each row.
        fisher: Which Fisher's columns to differentiate, or any other directions.
        seed: Of the labels drawn by the Monte-Carlo Fisher.
        progress: Told of rows done.
        keeper: Keeps the sums as the pass goes on, and has those to go on from; the observer must be resumable.
        processes: Those that share the rows: in the end the observer of each has the sums of all.

    Raises:
        UsageError: The empirical Fisher without labels.
    """
    # A number for each row, whatever batch or process it is in.
    uniform = torch.rand(len(targets), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labelled = all(target is not None for target in targets)
    if fisher == "empirical" and not labelled:
        raise UsageError("--fisher empirical needs a label in every row; use --fisher exact")
    found: list[Tensor] = []
    order: list[int] = []

    def state() -> PassState:
        assert isinstance(observer, Resumable)
        logits = torch.cat([each.cpu() for each in found])
        return PassState(order, logits, observer.state())

    with processes.in_step():
        saved = None if keeper is None else keeper.saved()
    if saved is not None:
        assert isinstance(observer, Resumable)
        observer.restore(saved.observer)
        found, order = [saved.logits], list(saved.order)
        batches = _after(batches, len(order))
    with processes.apart(), Linearisation(answers, layers, observer) as linearisation:

        def run(batch: Batch) -> Tensor:
            labels = torch.tensor([targets[row] for row in batch.rows]) if labelled else None
            return linearisation.run(batch, _columns(fisher, labels, uniform[list(batch.rows)]))

        for batch, logits in run_batches(batches, run):
            found.append(logits.double())
            order += batch.rows
            if progress is not None:
                progress(min(len(order) * processes.count, len(targets)), len(targets))
            if keeper is not None:
                keeper.offer(state)
        if keeper is not None and found:
            keeper.finish(state)
    if processes.count > 1:
        assert isinstance(observer, Resumable)
        add_up(processes, observer)
    logits = _in_order(processes.gather((order, [each.cpu() for each in found])))
    if not labelled or not len(logits):
        return DataPass(logits, None)
    log_p = torch.log_softmax(logits, dim=1)
    return DataPass(logits, float(log_p.gather(1, torch.tensor(targets).unsqueeze(1)).sum()))


def _after(batches: Iterable[Batch], rows: int) -> Iterable[Batch]:
    """The batches that are left when so many rows are done."""
    if isinstance(batches, BatchFeed):
        batches.skip(rows)
        return batches
    return _without(batches, rows)


def _without(batches: Iterable[Batch], rows: int) -> Iterator[Batch]:
    for batch in batches:
        if rows <= 0:
            yield batch
        rows -= len(batch)


def _in_order(parts: Sequence[tuple[list[int], list[Tensor]]]) -> Tensor:
    """Logits of all rows, ``(N, C)``, from the orders in which processes came to them."""
    order = [row for rows, _ in parts for row in rows]
    found = [logits for _, each in parts for logits in each]
    if not found:
        return torch.zeros(0, 0, dtype=torch.float64)
    stacked = torch.cat(found)
    logits = torch.empty_like(stacked)
    logits[torch.tensor(order, dtype=torch.long)] = stacked
    return logits


def _columns(fisher: FisherType | Directions, labels: Tensor | None, uniform: Tensor) -> Directions:
    if callable(fisher):
        return fisher
    if fisher == "exact":
        return exact_columns
    if fisher == "mc":
        return lambda logits: monte_carlo_columns(logits, uniform)
    assert labels is not None
    return lambda logits: empirical_columns(logits, labels.to(logits.device))
