"""Mistakes that are seen without loading PyTorch, reported together and in under a second."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from lapora.config import DataSettings, FitSettings, ModelSettings
from lapora.errors import DataError, LaporaError, SeveralError
from lapora.models.adapter import check_adapter_files


def check_fit(models: list[ModelSettings], data: DataSettings, settings: FitSettings) -> None:
    """Check the files that a fit reads and the posterior that it would replace.

    With several adapters only the data are checked: an error in one adapter stops no other.

    Raises:
        LaporaError: What is wrong; several mistakes are one error, with the status of the first.
    """
    from lapora.storage.saved import posterior_folder, refuse_to_replace

    checks: list[Callable[[], object]] = [lambda: _check_data(data)]
    if len(models) == 1:
        folder = posterior_folder(models[0].root, settings.name)
        checks.insert(0, lambda: check_adapter_files(models[0].folder))
        checks.append(lambda: refuse_to_replace(folder, overwrite=settings.overwrite))
    _raise_together(checks)


def check_fitted(model: ModelSettings, names: tuple[str, ...], data: DataSettings | None = None) -> None:
    """Check an adapter's files, its posteriors' manifests and the data asked for.

    Raises:
        LaporaError: What is wrong; several mistakes are one error, with the status of the first.
    """
    from lapora.storage.saved import SavedPosterior, posterior_folder

    if not model.folder.is_dir():  # it has no posterior either
        check_adapter_files(model.folder)
    checks: list[Callable[[], object]] = [lambda: check_adapter_files(model.folder)]
    for name in names:
        folder = posterior_folder(model.root, name)
        checks.append(functools.partial(SavedPosterior, folder, validate_prior=False))
    if data is not None:
        checks.append(lambda: _check_data(data))
    _raise_together(checks)


def check_input(source: str) -> None:
    """Check that the file of rows exists.

    Raises:
        DataError: There is no such file.
    """
    if source != "-" and not Path(source).exists():
        raise DataError(f"{source}: cannot be read (No such file or directory)")


def _check_data(data: DataSettings) -> None:
    from lapora.tasks import load_task
    from lapora.tasks.rows import find_split_file

    task = load_task(data.task) if data.task is not None else None
    if data.data_dir is not None and data.split is not None:
        find_split_file(data.data_dir, [data.split, *([task.source_split(data.split)] if task else [])])


def _raise_together(checks: list[Callable[[], object]]) -> None:
    found: list[LaporaError] = []
    for check in checks:
        try:
            check()
        except LaporaError as error:
            found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        raise SeveralError("; ".join(map(str, found)), found[0].exit_status)
