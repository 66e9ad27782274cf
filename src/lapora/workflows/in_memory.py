"""Fit and predict with a PEFT model that stands in memory, as in a training loop."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from lapora.config import DataSettings, FitSettings, Progress
from lapora.errors import DataError
from lapora.model.bayesian_layers import find_bayesian_layers
from lapora.model.borrowed import adapter_in_memory, borrowed, loaded_in_memory
from lapora.posterior.artifact import SavedPosterior
from lapora.tasks import Row, Task, load_task
from lapora.workflows.fit import FitResult, fit_prepared
from lapora.workflows.prepare import prepare_rows
from lapora.workflows.session import Session, join_session


def fit_in_memory(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any] | Row],
    task: Task | Mapping[str, Any] | str | Path,
    settings: FitSettings,
    *,
    root: Path,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[Session, FitResult]:
    """Fit a model as it stands, and join it with its posterior; see :func:`lapora.api.fit_model`.

    Raises:
        DataError: No rows, or one that is no mapping.
        LaporaError: As :func:`lapora.workflows.fit.fit`.
    """
    resolved = _task(task)
    given = [_values(row, number) for number, row in enumerate(rows)]
    if not given:
        raise DataError("no rows: give the rows that the adapter was trained on")
    with tempfile.TemporaryDirectory(prefix="lapora-") as folder:
        adapter = adapter_in_memory(model, Path(folder))
    loaded = loaded_in_memory(model, tokenizer, adapter)
    with borrowed(model, loaded.pad_token_id):
        prepared = prepare_rows(
            adapter, lambda: loaded, resolved, given, DataSettings(split="train"), settings, batch_size
        )
        fitted = fit_prepared(prepared, settings, root, progress)
        layers = find_bayesian_layers(loaded.model, settings.subset)
        return join_session(SavedPosterior(fitted.folder), loaded, layers, batch_size), fitted


def _values(row: Mapping[str, Any] | Row, number: int) -> dict[str, Any]:
    values = row.values if isinstance(row, Row) else row
    if not isinstance(values, Mapping):
        raise DataError(f"row {number}: a {type(row).__name__}; a row is a mapping with the task's fields")
    return dict(values)


def _task(task: Task | Mapping[str, Any] | str | Path) -> Task:
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return Task.from_dict(cast("Mapping[str, Any]", task))
    return load_task(str(task))
