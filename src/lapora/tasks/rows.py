"""Rows of a split, from local files or the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lapora.errors import DataError
from lapora.tasks.task import Task
from lapora.tasks.templates import render_value

_LOADERS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(
    task: Task, split: str, *, data_dir: str | Path | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Read the rows of one split that the task keeps, in order.

    Args:
        task: The task.
        split: ``train``, ``validation`` ...; on the Hub, the task's own name for it.
        data_dir: A folder with ``<split>.jsonl`` (or .json, .csv, .parquet), read instead of the Hub.
        limit: Keep the first so many rows.

    Raises:
        DataError: The data is missing, empty or not what it says.
    """
    rows = _local_rows(Path(data_dir), split) if data_dir is not None else _hub_rows(task, split)
    source = f"{data_dir or task.dataset_path} ({split})"
    if task.keep_if:
        rows = [r for i, r in enumerate(rows) if render_value(task.keep_if, r, f"{source}, row {i}") is True]
    if not rows:
        raise DataError(f"{source}: no rows; check the split and the task's keep_if")
    return rows[:limit] if limit else rows


def _local_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --data-dir is a folder with {split}.jsonl")
    jsonl = folder / f"{split}.jsonl"
    if jsonl.is_file():
        return _jsonl_rows(jsonl)
    for suffix, loader in _LOADERS.items():
        file = folder / f"{split}{suffix}"
        if file.is_file():
            return _read_with_datasets(loader, file)
    found = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) or "nothing"
    raise DataError(f"{folder}: no {split}.jsonl, .json, .csv or .parquet there (found {found}); see --split")


def _jsonl_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    with file.open(encoding="utf-8-sig", errors="strict") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{file}, line {number}: not a JSON object")
                    rows.append(row)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 text ({error})") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {number}: not valid JSON ({error})") from error
    return rows


def _read_with_datasets(loader: str, file: Path) -> list[dict[str, Any]]:
    import tempfile

    import datasets

    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            loaded = datasets.load_dataset(
                loader, data_files=str(file), split="train", cache_dir=cache, keep_in_memory=True
            )
            return [dict(row) for row in loaded]
    except Exception as error:
        # The library wraps its readers' errors in many types; all of them mean that the file is not readable.
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{file}: cannot be read as {loader} ({reason[:160]})") from error


def _hub_rows(task: Task, split: str) -> list[dict[str, Any]]:
    if not task.dataset_path:
        raise DataError(f"task {task.task} names no dataset_path; give its rows with --data-dir")
    import datasets

    datasets.disable_progress_bars()
    named = {"train": task.training_split, "validation": task.validation_split, "test": task.test_split}
    try:
        loaded = datasets.load_dataset(task.dataset_path, task.dataset_name, split=named.get(split) or split)
        return [dict(row) for row in loaded]
    except Exception as error:
        # Network, authentication, unknown configuration or split: the library's types differ by release.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{task.dataset_path} ({split}) cannot be had from the Hub ({reason[:160]}); "
            "check the network and the split, or give local files with --data-dir"
        ) from error
