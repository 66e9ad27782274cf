"""Read the rows of a command: split, labels and excluded rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lapora.config import DataSettings
from lapora.errors import (
    DataError,
    MissingSplitError,
    NoRowsLeftError,
    UnlabelledError,
    UnreadableSourceError,
    UsageError,
)
from lapora.storage.compatibility import answer_differences
from lapora.tasks import (
    Example,
    Row,
    SplitSource,
    Task,
    data_fingerprint,
    load_rows,
    render_all,
    resolve_choices,
    split_source,
)
from lapora.workflows.contradictions import resolve_task

if TYPE_CHECKING:
    from lapora.models.adapter import ModelKind
    from lapora.storage.manifest import Manifest
    from lapora.storage.saved import SavedPosterior

LABELLED_SPLITS = ("validation", "test")
"""Splits that are searched for labelled rows besides the training rows, in this order."""

_ROWS_SEARCHED_FOR_LABELS = 100


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Rows with their labels.

    Attributes:
        task: The task that rendered them.
        split: The split they come from.
        examples: The rows.
        targets: Their labels, ``(N,)`` or ``(N, C)``.
        excluded: Number of excluded rows of the split.
        read_by_fit: Positions of the rows that ``fit`` read too, with the same texts, answers and label.
    """

    task: Task
    split: str
    examples: list[Example]
    targets: Tensor
    excluded: int
    read_by_fit: frozenset[int] = frozenset()

    def only(self, positions: Sequence[int]) -> LabelledRows:
        """Return some of the rows."""
        return replace(
            self,
            examples=[self.examples[position] for position in positions],
            targets=self.targets[torch.tensor(positions, dtype=torch.long)],
            read_by_fit=frozenset(new for new, old in enumerate(positions) if old in self.read_by_fit),
        )

    def unread(self) -> LabelledRows:
        """Return the rows that ``fit`` did not read; the others count as excluded.

        Raises:
            NoRowsLeftError: It read all of them.
        """
        if not self.read_by_fit:
            return self
        positions = [position for position in range(len(self.examples)) if position not in self.read_by_fit]
        if not positions:
            raise NoRowsLeftError(
                f"{self.split}: fit read all {len(self.examples)} rows too, with the same labels; give other rows"
            )
        return replace(self.only(positions), excluded=self.excluded + len(self.read_by_fit))

    def chosen(self, count: int, seed: int) -> LabelledRows:
        """Return a random subset of the rows for a seed, in their order."""
        order = torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(seed))
        return self.only(sorted(order[:count].tolist()))


@dataclass(frozen=True)
class TuningRows:
    """Labelled rows that tuned a prior.

    Attributes:
        split: The split they come from.
        rows: Their digests; two rows with the same texts have the same.
    """

    split: str
    rows: tuple[str, ...]


def row_digest(example: Example) -> str:
    """Return the digest of a row's texts, answers and label, which identifies it in any file."""
    return data_fingerprint([example])[:16]


def read_rows(data: DataSettings, recorded: Manifest | None, default_split: str) -> tuple[Task, list[Row], str]:
    """Read the rows of a split.

    Args:
        data: Which rows; None means as recorded.
        recorded: The manifest of a posterior.
        default_split: The split when ``data`` names none.

    Returns:
        The task, its rows, and the split's name.
    """
    task = resolve_task(data, recorded)
    folder = data.data_dir or (recorded.data.data_dir if recorded else None)
    split = data.split or default_split
    return task, load_rows(task, split, data_dir=Path(folder) if folder else None, limit=data.limit), split


def are_training_rows(recorded: Manifest, data: DataSettings) -> bool:
    """Return whether ``data`` can have rows that ``fit`` read, under any name of the split."""
    return _source(recorded, data).overlaps(_source(recorded, DataSettings(split=recorded.data.split)))


def _source(recorded: Manifest, data: DataSettings) -> SplitSource:
    folder = data.data_dir or recorded.data.data_dir
    return split_source(resolve_task(data, recorded), data.split or "", folder)


def read_labelled_rows(
    posterior: SavedPosterior,
    kind: ModelKind,
    data: DataSettings,
    default_split: str = "validation",
    exclude: Collection[str] = (),
) -> LabelledRows:
    """Read the rows of a split with their labels, rendered as ``fit`` rendered its own.

    Args:
        posterior: The saved posterior.
        kind: The kind of model that reads the rows.
        data: Which rows; None means as recorded by ``fit``. The limit does not count excluded rows.
        default_split: The split when ``data`` names none.
        exclude: Digests of rows to exclude.

    Raises:
        UnlabelledError: No row has a label.
        DataError: A row cannot be read, or has no label.
        NoRowsLeftError: All rows were used to tune the prior or the temperature.
        PosteriorError: The task's answers are not the posterior's.
    """
    wanted = replace(data, limit=None) if exclude else data
    manifest, answers = posterior.manifest, tuple(posterior.manifest.answers.choices)
    task, rows, split = read_rows(wanted, manifest, default_split)
    choices = resolve_choices(task, rows, kind=kind)
    if differences := answer_differences(manifest, task.task, choices):
        raise posterior.mismatch(differences)
    bare = render_all(task, rows[:_ROWS_SEARCHED_FOR_LABELS], kind=kind, choices=answers, labels="optional")
    if all(example.target is None for example in bare):
        raise UnlabelledError(f"{split}: the first {len(bare)} rows have no labels; give a split that has them")
    examples = render_all(task, rows, kind=kind, choices=answers, labels="required")
    kept = [example for example in examples if not exclude or row_digest(example) not in exclude]
    if not kept:
        raise NoRowsLeftError(
            f"{split}: all {len(examples)} rows were used to tune the prior or the temperature; score another --split"
        )
    excluded = len(examples) - len(kept)
    kept = kept[: data.limit]
    read = posterior.training_rows
    read_by_fit = frozenset(index for index, example in enumerate(kept) if row_digest(example) in read)
    return LabelledRows(task, split, kept, label_tensor(kept), excluded, read_by_fit)


def label_tensor(examples: Sequence[Example]) -> Tensor:
    """Return the labels of rows that all have one: ``(N,)`` int64, or ``(N, C)`` float64 where labels are vectors."""
    labels = torch.tensor([cast(Any, example.target) for example in examples], dtype=torch.float64)
    return labels if labels.dim() > 1 else labels.long()


def tuning_rows(posterior: SavedPosterior, kind: ModelKind, data: DataSettings, seed: int) -> LabelledRows:
    """Read a random half (or the limit's number of rows) of the rows of a labelled split that ``fit`` did not read.

    Raises:
        MissingSplitError: There are no labelled rows but those that ``fit`` read, or none can be read.
        UsageError: The split that ``fit`` read was requested.
        DataError: A row cannot be read, or ``fit`` read all of the requested split.
    """
    rows = _labelled_split(posterior, kind, data)
    return rows.chosen(data.limit or max(1, len(rows.examples) // 2), seed)


def _labelled_split(posterior: SavedPosterior, kind: ModelKind, data: DataSettings) -> LabelledRows:
    """Read the requested split, or the first one with labels; never the one that ``fit`` read, under any name."""
    manifest = posterior.manifest
    if data.split is not None:
        if are_training_rows(manifest, data):
            raise UsageError(
                f"--split {data.split}: the adapter was trained on these rows; give another split, or --method marglik"
            )
        return read_labelled_rows(posterior, kind, replace(data, limit=None)).unread()
    reasons: list[DataError] = []
    for split in LABELLED_SPLITS:
        candidate = replace(data, split=split, limit=None)
        if are_training_rows(manifest, candidate):
            continue
        try:
            return read_labelled_rows(posterior, kind, candidate).unread()
        except (MissingSplitError, UnlabelledError, NoRowsLeftError) as error:
            reasons.append(error)
    unreadable = any(isinstance(reason, UnreadableSourceError) for reason in reasons)
    raise (UnreadableSourceError if unreadable else MissingSplitError)(
        f"no labelled rows except those that fit read ({reasons[0] if reasons else 'no other split'})"
    )
