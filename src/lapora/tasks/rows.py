"""Read the rows of a split from a local folder, from the task's own files, or from the Hub."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from lapora.errors import (
    DataError,
    MissingSplitError,
    UnreadableSourceError,
    UsageError,
    first_line,
    listed,
    printable,
    quoted,
)
from lapora.tasks.task import ROW_SUFFIXES, Task
from lapora.tasks.templates import compiled_template


@dataclass(frozen=True)
class Row:
    """One row of a split.

    Attributes:
        index: Position in the split, from 0, counted before filtering.
        values: Values by field name.
        source: Name of its file or split, for error messages.
    """

    index: int
    values: Mapping[str, Any]
    source: str = field(default="", compare=False)

    @property
    def where(self) -> str:
        """Name of the row in error messages."""
        return f"{self.source}, row {self.index}" if self.source else f"row {self.index}"


def load_rows(task: Task, split: str, *, data_dir: str | Path | None = None, limit: int | None = None) -> list[Row]:
    """Load the rows of a split, filtered by the task's ``keep_if``.

    Args:
        task: The task.
        split: ``train``, ``validation`` or ``test`` (mapped to the dataset's own names), or any other name.
        data_dir: Folder with ``SPLIT.jsonl`` (or .json, .csv, .parquet), instead of the task's own source.
        limit: Maximum number of rows, after filtering.

    Returns:
        At least one row, in the order of the source.

    Raises:
        DataError: The source cannot be read, has another format than its suffix, or has no rows for this task.
        UsageError: ``limit`` is not positive.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: must be at least 1")
    where, name, source = _open(task, split, data_dir)
    kept: list[Row] = []
    seen = 0
    rows = (Row(index, values, name) for index, values in enumerate(source))
    for row in rows:
        seen += 1
        if keeps(task, row.values, f"{where}, row {row.index}"):
            kept.append(row)
            if len(kept) == limit:
                break
    if not seen:
        raise DataError(f"{where}: it has no rows; choose another split with --split, or check the file")
    if not kept:
        raise DataError(f"{where}: keep_if excludes all {seen} rows; check task {quoted(task.task)}")
    return kept


def keeps(task: Task, values: Mapping[str, Any], where: str) -> bool:
    """Return whether the task's ``keep_if`` keeps a row.

    Raises:
        DataError: The row has no field that ``keep_if`` uses, or its value is neither true nor false.
    """
    if task.keep_if is None:
        return True
    template = compiled_template(task.keep_if)
    missing = sorted(template.fields - set(values))
    if missing:
        raise DataError(
            f"{where}: missing field {listed(missing)}, used by keep_if; the row has {listed(list(values))}"
        )
    result = template.value(values, where)
    if isinstance(result, (bool, int)):
        return bool(result)
    word = result.strip().lower() if isinstance(result, str) else None
    if word not in ("true", "false", "1", "0"):
        raise DataError(f"{where}: keep_if returned {quoted(result)}, which is neither true nor false")
    return word in ("true", "1")


def _open(task: Task, split: str, data_dir: str | Path | None) -> tuple[str, str, Iterable[Mapping[str, Any]]]:
    """Return the whole and the short name of the source for error messages, and its rows."""
    if data_dir is not None:
        names = list(dict.fromkeys([split, task.source_split(split)]))
        path = find_split_file(Path(data_dir), names)
        if path.suffix.lower() == ".parquet":
            check_label_names(task, _parquet_features(path), printable(path))
        return printable(path), printable(path.name), read_file(path)
    files = task.dataset_kwargs.get("data_files")
    if task.reads_files:
        paths = _files_of_split(task, split, files)
        if not any("://" in path for path in paths):
            name = printable(Path(paths[0]).name) if len(paths) == 1 else printable(split)
            return f"task {quoted(task.task)}, split {printable(split)}", name, _read_all(task, paths)
    if task.dataset_path is None:
        raise MissingSplitError(
            f"task {quoted(task.task)} has no data source; give --data-dir DIR, or set dataset_path in its YAML"
        )
    hub_split = task.source_split(split)
    where = printable(f"{task.hub_source or task.dataset_path}, split {hub_split}")
    rows = _hub_rows(task, hub_split)
    check_label_names(task, getattr(rows, "features", None) or {}, where)
    return where, printable(hub_split), rows


_FIELD = re.compile(r"\s*(?:\{\{\s*(\w+)\s*\}\}|(\w+))\s*")


def check_label_names(task: Task, features: Mapping[str, Any], where: str) -> None:
    """Check that the names of integer labels (``datasets.ClassLabel``) do not contradict the task's answers.

    Args:
        task: The task.
        features: Features of the data by field: ``ClassLabel`` objects, or mappings as in a Parquet file.
        where: Name of the source in error messages.

    Raises:
        DataError: A name is one of the answers, at another index.
    """
    found = _FIELD.fullmatch(task.doc_to_target) if isinstance(task.doc_to_target, str) else None
    if found is None or not isinstance(task.doc_to_choice, tuple):
        return
    name = found[1] or found[2]
    feature = features.get(name)
    names = feature.get("names") if isinstance(feature, Mapping) else getattr(feature, "names", None)
    if not isinstance(names, list):
        return
    answers = [answer.strip().casefold() for answer in task.doc_to_choice]
    for index, label in enumerate(str(label).strip().casefold() for label in names):
        if label in answers and answers.index(label) != index:
            raise DataError(
                f"{where}: label {index} of {quoted(name)} is called {quoted(names[index])}, which is answer "
                f"{answers.index(label)} of task {quoted(task.task)}; write doc_to_choice in the order of the labels "
                f"({listed(names)})"
            )


@dataclass(frozen=True)
class SplitSource:
    """Where the rows of a split come from.

    Attributes:
        places: Its files; or the data set on the Hub, whose splits ``parts`` names.
        parts: Names and slices of its splits on the Hub, as in ``train[:80%]+test``.
    """

    places: frozenset[str]
    parts: tuple[_Part, ...] = ()

    def overlaps(self, other: SplitSource) -> bool:
        """Return whether the two can have a row in common."""
        if not self.places & other.places:
            return False
        pairs = list(itertools.product(self.parts, other.parts))
        return not pairs or any(one.overlaps(two) for one, two in pairs)


@dataclass(frozen=True)
class _Part:
    """A split of a data set on the Hub, or a slice of one: rows, or percents of them."""

    name: str
    start: str = ""
    stop: str = ""

    def overlaps(self, other: _Part) -> bool:
        """Return whether the two can have a row in common; slices that cannot be compared may have."""
        if self.name != other.name:
            return False
        ends = [end for end in (self.start, self.stop, other.start, other.stop) if end]
        if any(end.startswith("-") for end in ends) or len({end.endswith("%") for end in ends}) > 1:
            return True
        (low, high), (other_low, other_high) = self._range(), other._range()
        return low < other_high and other_low < high

    def _range(self) -> tuple[float, float]:
        return float(self.start.rstrip("%") or 0), float(self.stop.rstrip("%") or math.inf)


_PART = re.compile(r"\s*([^\[+]+?)\s*(?:\[\s*(-?\d*%?)\s*:\s*(-?\d*%?)\s*\])?\s*(?:\([\w%]+\))?\s*")


def split_source(task: Task, split: str, data_dir: str | Path | None) -> SplitSource:
    """Return where the rows of a split come from, under any name of the split."""
    if data_dir is not None:
        try:
            file = find_split_file(Path(data_dir), [split, task.source_split(split)])
        except DataError:
            file = Path(data_dir) / split
        return SplitSource(frozenset([str(file.resolve())]))
    if task.reads_files:
        try:
            paths = _files_of_split(task, split, task.dataset_kwargs.get("data_files"))
        except DataError:
            return SplitSource(frozenset([f"{task.task} {split}"]))
        return SplitSource(frozenset(path if "://" in path else str(Path(path).resolve()) for path in paths))
    found = [_PART.fullmatch(part) for part in task.source_split(split).split("+")]
    parts = tuple(_Part(match[1], match[2] or "", match[3] or "") for match in found if match)
    return SplitSource(frozenset([str(task.hub_source or task.dataset_path)]), parts)


def _files_of_split(task: Task, split: str, files: Any) -> list[str]:
    # Without split names, lm-evaluation-harness (through `datasets`) reads all files as the training split.
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
            raise DataError(f"task {quoted(task.task)}: no file {quoted(path, 200)}; fix its data_files")
    return itertools.chain.from_iterable(read_file(Path(path)) for path in paths)


def _hub_rows(task: Task, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    named = printable(task.hub_source or task.dataset_path)
    remedy = "or give the rows as files with --data-dir DIR"
    try:
        with _silence_datasets():
            return datasets.load_dataset(task.dataset_path, task.dataset_name, split=split, **task.dataset_kwargs)
    except MemoryError:
        raise
    except Exception as error:  # `datasets` also raises errors of any library below it
        if _is_unreachable(error):
            problem = f"cannot reach the Hub for {named} ({first_line(error, 120)}); connect"
            raise UnreadableSourceError(f"{problem}, {remedy}") from None
        if type(error).__name__ == "DatasetNotFoundError":
            reason = f"no dataset {named} on the Hub, or it is private; fix dataset_path"
        elif "scripts are no longer supported" in str(error):
            reason = f"{named} needs a loading script, which `datasets` no longer supports; use a Parquet copy"
        else:
            reason = f"{named}, split {printable(split)}: {first_line(error)}; fix the task"
        raise MissingSplitError(f"{reason}, {remedy}") from None


@contextlib.contextmanager
def _silence_datasets() -> Iterator[None]:
    """Silence `datasets`: retries always, progress bars unless stderr is a terminal."""
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
    """Return whether an error, or one of its causes, is a connection error."""
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


_LOOKS_LIKE = {
    b"PAR1": "it looks like Parquet",
    b"\x1f\x8b": "it looks like gzip: unpack it",
    b"PK\x03\x04": "it looks like a zip file: unpack it",
    b"ARROW1": "it looks like an Arrow file: save it as Parquet",
    b"\x80": "it looks like a pickle, which lapora never reads: save it as JSON lines",
    b"<": "it looks like HTML: check whether the download was an error page",
    b"version https://git-lfs": "it is a Git LFS pointer: run `git lfs pull`",
}


_UNREAD = {
    "{name}.tsv": "tab-separated files are not read: save it as .csv or .jsonl",
    "{name}.*.gz": "compressed files are not read here: unpack it",
    "{name}-*-of-*.parquet": "a split in parts: list the files under data_files of the task's YAML",
    "data/{name}-*.parquet": "it is in the folder data: list the files under data_files of the task's YAML, or give "
    "the dataset as dataset_path",
}
"""Files of a split that are not read, and what to do with them."""


def find_split_file(folder: Path, names: list[str]) -> Path:
    """Return the file of a split: the first existing one of ``names`` with a supported suffix.

    Raises:
        MissingSplitError: The folder has no such file; the message lists the files found.
        UnreadableSourceError: There is no such folder.
        DataError: A name is not a valid file name.
    """
    if folder.is_file():
        raise MissingSplitError(
            f"--data-dir {quoted(str(folder), 200)}: a file; give its folder, --data-dir {folder.parent}, and the "
            f"file's name without its ending as --split {folder.name.partition('.')[0]}"
        )
    if not folder.is_dir():
        raise UnreadableSourceError(
            f"--data-dir {quoted(str(folder), 200)}: no such folder; give the folder of the split files"
        )
    for name in names:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise DataError(f"split {quoted(name)} is not a valid file name; use a name such as train or validation")
        for suffix in ROW_SUFFIXES:
            path = folder / f"{name}{suffix}"
            if path.is_file():
                return path
    wanted = {f"{name}{suffix}".casefold(): f"{name}{suffix}" for name in names for suffix in ROW_SUFFIXES}
    for entry in sorted(folder.iterdir()):
        if (right := wanted.get(entry.name.casefold())) and entry.is_file():
            raise MissingSplitError(
                f"--data-dir {quoted(str(folder), 200)}: no {right}, but {quoted(entry.name)}; rename it to {right}"
            )
    for name in names:
        for pattern, remedy in _UNREAD.items():
            if unread := sorted(folder.glob(pattern.format(name=name))):
                raise MissingSplitError(f"--data-dir {quoted(str(folder), 200)}: it has {unread[0].name}; {remedy}")
    files = sorted(entry.name for entry in folder.iterdir() if entry.suffix in ROW_SUFFIXES)
    found = listed(files) if files else "no .jsonl, .json, .csv or .parquet file"
    raise MissingSplitError(
        f"--data-dir {quoted(str(folder), 200)}: no {names[0]}.jsonl (nor .json, .csv, .parquet); "
        f"the folder has {found}; choose with --split"
    )


def read_file(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file, in the format of its suffix.

    Raises:
        DataError: The file cannot be read or has another format; an invalid line is given by its number.
    """
    readers = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": parquet_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{quoted(str(path), 200)}: its name must end in {', '.join(ROW_SUFFIXES)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(
            f"{quoted(str(path), 200)}: {error.strerror or first_line(error)}; check the path and its permissions"
        ) from None


def parse_json_line(line: str | bytes, where: str) -> dict[str, Any]:
    """Parse one line as a JSON object.

    Args:
        line: The line, with or without its line ending.
        where: Name of the line in error messages.

    Raises:
        DataError: The line is not UTF-8, not JSON (NaN and Infinity are not JSON), nested too deeply, or not an
            object.
    """
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        values = json.loads(text.removeprefix("\ufeff"), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        opens = text.strip() == "{" or text.lstrip().startswith("[")
        remedy = "; write each row as one line, or a list of rows to a file whose name ends in .json" if opens else ""
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}{remedy}") from None
    except RecursionError:
        raise DataError(f"{where}: JSON is nested too deeply; flatten the row") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {first_line(error)}") from None
    if not isinstance(values, dict):
        remedy = "; a list of rows is read from a file whose name ends in .json" if isinstance(values, list) else ""
        raise DataError(f'{where}: not a JSON object such as {{"question": ...}} but {quoted(values, 30)}{remedy}')
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; use null or leave the field out")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"number {quoted(digits, 20)} is too large")
    return value


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip(b" \t\r\n"):
                continue
            try:
                yield parse_json_line(line.removeprefix(b"\xef\xbb\xbf"), f"{quoted(str(path), 200)}, line {number}")
            except DataError as error:
                raise DataError(f"{error}{_hint(path) if number == 1 else ''}") from None


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    where = quoted(str(path), 200)
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines with the suffix .json
            yield from _json_lines(path)
            return
        raise DataError(f"{where}, line {error.lineno}: not JSON: {error.msg}{_hint(path)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {first_line(error)}{_hint(path)}") from None
    if isinstance(values, dict):
        # A single row of JSON lines, or {"data": [...]} as written by `datasets`.
        values = values["data"] if isinstance(values.get("data"), list) and len(values) == 1 else [values]
    if not isinstance(values, list):
        raise DataError(f"{where}: not a list of JSON objects; give one object per row")
    for index, row in enumerate(values):
        if not isinstance(row, dict):
            raise DataError(f"{where}: row {index} is not a JSON object but {quoted(row, 30)}")
        yield row


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    yield from csv_rows(path, quoted(str(path), 200))


def csv_rows(source: Path | IO[bytes], where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV file; missing values are None.

    Raises:
        DataError: The file has another format.
    """
    hint = _hint(source) if isinstance(source, Path) else ""
    # pandas, like `datasets`, except that the strings "NA" and "None" stay strings.
    import pandas

    try:
        options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
        header = pandas.read_csv(source, header=None, nrows=1, **options).iloc[0]
        _refuse_other_separators([str(name).strip() for name in header], where)
        if not isinstance(source, Path):
            source.seek(0)
        frame = pandas.read_csv(source, **options)
    except pandas.errors.EmptyDataError:
        return
    except OSError:
        raise
    except UnicodeDecodeError:
        raise DataError(
            f"{where}{_not_utf8(source)}; save the file as UTF-8{hint if _is_known(hint) else ''}"
        ) from None
    except (ValueError, OverflowError, pandas.errors.ParserError) as error:
        if fields := _TOO_MANY_FIELDS.search(str(error)):
            raise DataError(
                f"{where}, line {fields[2]}: not CSV: {fields[3]} fields, and the header has {fields[1]}; quote fields "
                "with commas"
            ) from None
        raise DataError(f"{where}: not CSV: {first_line(error)}{hint}") from None
    if not isinstance(frame.index, pandas.RangeIndex):
        # pandas would use the extra first column as row names.
        raise DataError(
            f"{where}, line 2: not CSV: more fields than the header {quoted(','.join(map(str, header)))}; name every "
            "column in the first line, and quote fields with commas"
        )
    names = [str(name).strip() for name in frame.columns]
    given = [str(name).strip() for name in header if str(name).strip()]  # pandas would rename the second of a name
    if twice := next((name for name in given if given.count(name) > 1), None):
        raise DataError(f"{where}: the header has {quoted(twice)} twice; rename one of the columns")
    texts = frame.astype(object).where(frame.notna(), None)
    columns = [_typed_column(list(texts.iloc[:, number])) for number in range(len(names))]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


_TOO_MANY_FIELDS = re.compile(r"Expected (\d+) fields in line (\d+), saw (\d+)")


def _refuse_other_separators(header: Sequence[str], where: str) -> None:
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise DataError(
            f"{where}: the header {quoted(header[0])} has no comma; separate columns by commas, not by {other!r}"
        )


def _not_utf8(source: Path | IO[bytes]) -> str:
    """Return the place of the first byte that is not UTF-8, as for JSON lines."""
    if not isinstance(source, Path):
        source.seek(0)
    content = source.read_bytes() if isinstance(source, Path) else source.read()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].split(b"\n")
        return f", line {len(before)}: not UTF-8 at byte {len(before[-1])}"
    return ": not UTF-8"


_INTEGER, _NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})"), re.compile(r"-?\d+\.\d+(e[-+]\d+)?")
_TRUTH = {"True": True, "true": True, "TRUE": True, "False": False, "false": False, "FALSE": False}


def _typed_column(cells: list[str | None]) -> list[Any]:
    """Convert a column to booleans or numbers if nothing of its text is lost: 007 and 0.50 stay text."""
    given = [cell for cell in cells if cell]
    convert: Callable[[str], Any] | None = None
    if not given:
        return cells
    if all(cell in _TRUTH for cell in given):
        convert = _TRUTH.__getitem__
    elif all(_INTEGER.fullmatch(cell) for cell in given):
        convert = int
    elif all(_NUMBER.fullmatch(cell) and str(float(cell)) == cell for cell in given):
        convert = float
    return cells if convert is None else [convert(cell) if cell else None for cell in cells]


def _parquet_features(path: Path) -> dict[str, Any]:
    """Return the features that `datasets` writes to the metadata of a Parquet file."""
    import pyarrow.parquet

    try:
        with pyarrow.OSFile(os.fsencode(path)) as stream:
            metadata = pyarrow.parquet.read_schema(stream).metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, a batch at a time in memory.

    Raises:
        DataError: The file has another format.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        # As bytes: pyarrow takes a text path only if it is UTF-8.
        with pyarrow.OSFile(os.fsencode(path)) as stream:
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches():
                yield from _with_texts(batch).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        hint = _hint(path)
        if _LOOKS_LIKE[b"PAR1"] in hint:
            hint = "; it begins as a Parquet file, and is incomplete or damaged: copy or save it again"
        raise DataError(f"{quoted(str(path), 200)}: not Parquet: {first_line(error)}{hint}") from None


def _with_texts(batch: Any) -> Any:
    """Convert binary columns of a batch to text where they are UTF-8: some writers store texts so."""
    import pyarrow

    for index, column in enumerate(batch.schema):
        if pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type):
            with contextlib.suppress(pyarrow.ArrowInvalid):
                batch = batch.set_column(index, column.name, batch.column(index).cast(pyarrow.large_string()))
    return batch


_UNKNOWN = "; check that the file's suffix matches its format"


def _is_known(hint: str) -> bool:
    return bool(hint) and hint != _UNKNOWN


def _hint(path: Path) -> str:
    with path.open("rb") as stream:
        start = stream.read(32).lstrip()
    for magic, hint in _LOOKS_LIKE.items():
        if start.startswith(magic):
            return f"; {hint}"
    return _UNKNOWN
