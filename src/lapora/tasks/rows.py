"""The rows of a task's split: from a local folder, from the task's own files, or from the Hub."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapora.errors import DataError, MissingSplitError, UsageError, first_line
from lapora.tasks.files import find_split_file, read_file
from lapora.tasks.quoting import listed, printable, quoted
from lapora.tasks.task import Task
from lapora.tasks.templates import compiled_template


@dataclass(frozen=True)
class Row:
    """One row of the data.

    Attributes:
        index: Its number in the split, from 0, before any row is left out.
        values: Its values by field name.
    """

    index: int
    values: Mapping[str, Any]


def load_rows(task: Task, split: str, *, data_dir: str | Path | None = None, limit: int | None = None) -> list[Row]:
    """The rows of a split that the task keeps.

    Args:
        task: The task.
        split: ``train``, ``validation`` or ``test`` (mapped to the data set's own names), or any other name.
        data_dir: Folder with ``SPLIT.jsonl`` (or .json, .csv, .parquet), instead of the task's own source.
        limit: Only the first so many of the rows that are kept.

    Returns:
        At least one row, in the source's order.

    Raises:
        DataError: The source cannot be read, is not what it says, or has no rows for this task.
        UsageError: ``limit`` is not positive.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: must be at least 1")
    where, source = _open(task, split, data_dir)
    kept: list[Row] = []
    seen = 0
    rows = (Row(index, values) for index, values in enumerate(source))
    for row in rows:
        seen += 1
        if keeps(task, row.values, f"{where}, row {row.index}"):
            kept.append(row)
            if len(kept) == limit:
                break
    if not seen:
        raise DataError(f"{where}: no rows; choose another split with --split, or check the file")
    if not kept:
        raise DataError(f"{where}: keep_if leaves none of the {seen} rows; check task {quoted(task.task)}")
    return kept


def keeps(task: Task, values: Mapping[str, Any], where: str) -> bool:
    """Whether the task's ``keep_if`` keeps a row.

    Raises:
        DataError: The row lacks a field of ``keep_if``, or that is neither true nor false.
    """
    if task.keep_if is None:
        return True
    template = compiled_template(task.keep_if)
    lacking = sorted(template.fields - set(values))
    if lacking:
        raise DataError(f"{where}: no field {listed(lacking)}, which keep_if needs; it has {listed(list(values))}")
    result = template.value(values, where)
    if isinstance(result, (bool, int)):
        return bool(result)
    word = result.strip().lower() if isinstance(result, str) else None
    if word not in ("true", "false", "1", "0"):
        raise DataError(f"{where}: keep_if gives {quoted(result)}, which is neither true nor false")
    return word in ("true", "1")


def _open(task: Task, split: str, data_dir: str | Path | None) -> tuple[str, Iterable[Mapping[str, Any]]]:
    """The source's rows, and how messages name it."""
    if data_dir is not None:
        names = list(dict.fromkeys([split, task.source_split(split)]))
        path = find_split_file(Path(data_dir), names)
        return printable(path), read_file(path)
    files = task.dataset_kwargs.get("data_files")
    if task.reads_files:
        paths = _files_of_split(task, split, files)
        if not any("://" in path for path in paths):
            return f"task {quoted(task.task)}, split {printable(split)}", _read_all(task, paths)
    if task.dataset_path is None:
        raise MissingSplitError(
            f"task {quoted(task.task)} names no data: give --data-dir DIR, or dataset_path in its YAML"
        )
    hub_split = task.source_split(split)
    where = printable(f"{task.hub_source or task.dataset_path}, split {hub_split}")
    return where, _hub_rows(task, hub_split)


def split_source(task: Task, split: str, data_dir: str | Path | None) -> tuple[str, ...]:
    """What identifies a split, whatever it is called: its files, or the data set and the split's name there."""
    if data_dir is not None:
        try:
            return (str(find_split_file(Path(data_dir), [split, task.source_split(split)]).resolve()),)
        except DataError:
            return (str(Path(data_dir).resolve()), split)
    if task.reads_files:
        try:
            paths = _files_of_split(task, split, task.dataset_kwargs.get("data_files"))
        except DataError:
            return (task.task, split)
        return tuple(path if "://" in path else str(Path(path).resolve()) for path in paths)
    return (str(task.hub_source or task.dataset_path), task.source_split(split))


def _files_of_split(task: Task, split: str, files: Any) -> list[str]:
    # Without split names the harness, through `datasets`, takes all files as the training split.
    by_split = dict(files) if isinstance(files, Mapping) else {"train": files}
    for name in (split, task.source_split(split)):
        if name in by_split:
            named = by_split[name]
            return [named] if isinstance(named, str) else list(named)
    raise MissingSplitError(
        f"task {quoted(task.task)}: data_files has no split {quoted(split)}; it has {listed(list(by_split))}"
    )


def _read_all(task: Task, paths: list[str]) -> Iterator[Mapping[str, Any]]:
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"task {quoted(task.task)}: no file {quoted(path, 200)}; correct its data_files")
    return itertools.chain.from_iterable(read_file(Path(path)) for path in paths)


def _hub_rows(task: Task, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    named = printable(task.hub_source or task.dataset_path)
    remedy = "or give the rows as files with --data-dir DIR"
    try:
        with _quiet():
            return datasets.load_dataset(task.dataset_path, task.dataset_name, split=split, **task.dataset_kwargs)
    except MemoryError:
        raise
    except Exception as error:  # `datasets` raises whatever the layer below raised
        if _is_unreachable(error):
            reason = f"cannot reach the Hub for {named} ({first_line(error, 120)}); connect"
        elif type(error).__name__ == "DatasetNotFoundError":
            reason = f"no data set {named} on the Hub, or it is not public; correct dataset_path"
        elif "scripts are no longer supported" in str(error):
            reason = f"{named} needs a Python script, which `datasets` no longer runs; use a converted copy"
        else:
            reason = f"{named}, split {printable(split)}: {first_line(error)}; correct the task"
        raise MissingSplitError(f"{reason}, {remedy}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep off stderr what `datasets` says on its way: its retries, and its bars where no terminal is."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    hide_bars = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if hide_bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if hide_bars:
            datasets.enable_progress_bars()


def _is_unreachable(error: BaseException) -> bool:
    """Whether an error, or what caused it, is about the connection."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        names = {kind.__name__ for kind in type(current).__mro__}
        if names & {
            "ConnectionError",
            "OfflineModeIsEnabled",
            "TimeoutError",
            "TransportError",
            "LocalEntryNotFoundError",
        }:
            return True
        current = current.__cause__ or current.__context__
    return False
