"""Other data than the adapter's own, and rows that one would rather not answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lapora import metrics
from lapora.config import EvalSettings
from lapora.errors import DataError
from lapora.tasks import load_rows, load_task, render_all, resolve_choices
from lapora.workflows.plan import Prediction
from lapora.workflows.scoring import LabelledRows
from lapora.workflows.session import Session


def read_shifted_rows(session: Session, settings: EvalSettings, limit: int | None) -> list[LabelledRows]:
    """The rows of every ``--ood`` task; a row without a label has target -1.

    They are scored over the adapter's own answers, so that only the number of answers has to be the same.

    Raises:
        DataError: No such task or rows, or another number of answers.
    """
    folders: list[Path | None] = list(settings.ood_data_dirs)
    if len(folders) <= 1:
        folders = (folders or [None]) * len(settings.ood)
    return [_read(session, task, folder, limit) for task, folder in zip(settings.ood, folders, strict=True)]


def _read(session: Session, name: str, folder: Path | None, limit: int | None) -> LabelledRows:
    task = load_task(name)
    errors = []
    for split in ("validation", "test"):
        try:
            rows = load_rows(task, split, data_dir=folder, limit=limit)
        except DataError as error:
            errors.append(error)
            continue
        choices = resolve_choices(task, rows)
        if len(choices) != len(session.choices):
            raise DataError(
                f"--ood {name}: {len(choices)} answers ({', '.join(choices)}), and the adapter has "
                f"{len(session.choices)} ({', '.join(session.choices)}); give a task with as many"
            )
        examples = render_all(task, rows, kind=session.loaded.kind, choices=choices, labels="optional")
        same = choices == session.choices
        targets = [example.target if same and example.target is not None else -1 for example in examples]
        return LabelledRows(task, split, examples, torch.tensor(targets), 0)
    reason = str(errors[0]).replace("--data-dir", "--ood-data-dir")
    raise DataError(f"--ood {name}: {reason}") from errors[0]


def shift_record(inside: Sequence[Prediction], outside: Sequence[Prediction], rows: LabelledRows) -> dict[str, Any]:
    """How each method behaves on other data, and how well it tells them from its own.

    Args:
        inside: Predictions of the adapter's own rows.
        outside: The same methods' predictions of the other rows.
        rows: The other rows.

    Returns:
        ``task``, ``split``, ``n`` and for each method the mean confidence and entropy in and out of distribution,
        accuracy where the labels are known and the answers the same, and ``auroc`` of three scores, higher on
        other data: ``max_probability`` (one less it), ``entropy`` and ``mutual_information`` (None for one model).
    """
    results = []
    labelled = rows.targets >= 0
    for own, other in zip(inside, outside, strict=True):
        information: tuple[torch.Tensor, torch.Tensor] | None = None
        if own.mutual_information is not None and other.mutual_information is not None:
            information = own.mutual_information, other.mutual_information
        confidence = [each.log_p.exp().max(dim=1) for each in (own, other)]
        entropy = [metrics.row_entropy(each.log_p) for each in (own, other)]
        right = (confidence[1].indices == rows.targets)[labelled].double()
        results.append(
            {
                **own.identity(),
                "accuracy": float(right.mean()) if len(right) else None,
                "confidence": float(confidence[1].values.mean()),
                "confidence_in": float(confidence[0].values.mean()),
                "entropy": float(entropy[1].mean()),
                "entropy_in": float(entropy[0].mean()),
                "mutual_information": float(information[1].mean()) if information else None,
                "mutual_information_in": float(information[0].mean()) if information else None,
                "auroc": {
                    "max_probability": metrics.auroc(1 - confidence[1].values, 1 - confidence[0].values),
                    "entropy": metrics.auroc(entropy[1], entropy[0]),
                    "mutual_information": metrics.auroc(information[1], information[0]) if information else None,
                },
            }
        )
    return {"task": rows.task.task, "split": rows.split, "n": len(rows.examples), "results": results}


def coverage_record(prediction: Prediction, targets: torch.Tensor, coverage: float) -> dict[str, float]:
    """The threshold that keeps a share of the rows: the value for ``predict --abstain-below``."""
    found = metrics.threshold_for_coverage(prediction.log_p, targets, coverage)
    return {"asked": coverage, **found._asdict()}
