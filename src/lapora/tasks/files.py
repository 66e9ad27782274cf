"""Rows of local files (JSON lines, JSON, CSV, Parquet), read without network and without writing anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lapora.errors import DataError, MissingSplitError, first_line
from lapora.tasks.quoting import listed, quoted

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_LOOKS_LIKE = {
    b"PAR1": "it looks like Parquet",
    b"\x1f\x8b": "it looks like gzip: unpack it",
    b"PK\x03\x04": "it looks like a zip file: unpack it",
    b"ARROW1": "it looks like an Arrow file: save it as Parquet",
    b"\x80": "it looks like a pickle, which lapora never reads: save it as JSON lines",
    b"<": "it looks like a web page: was the download an error page?",
    b"version https://git-lfs": "it is a Git LFS pointer: run `git lfs pull`",
}


def find_split_file(folder: Path, names: list[str]) -> Path:
    """The file of a split: the first of ``names`` that is there, with a suffix that can be read.

    Raises:
        MissingSplitError: There is no such folder or file; the message lists what was found.
        DataError: A name that is no file name.
    """
    if not folder.is_dir():
        raise MissingSplitError(
            f"--data-dir {quoted(str(folder), 200)}: no such folder; give the folder of the split files"
        )
    for name in names:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise DataError(f"the split {quoted(name)} is no file name; use a name such as train or validation")
        for suffix in SUFFIXES:
            path = folder / f"{name}{suffix}"
            if path.is_file():
                return path
    there = sorted(entry.name for entry in folder.iterdir() if entry.suffix in SUFFIXES)
    found = listed(there) if there else "no .jsonl, .json, .csv or .parquet file at all"
    raise MissingSplitError(
        f"--data-dir {quoted(str(folder), 200)}: no {names[0]}.jsonl (nor .json, .csv, .parquet); "
        f"it has {found}; choose with --split"
    )


def read_file(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file, by its suffix.

    Raises:
        DataError: It cannot be read or is not what its suffix says; a bad line is named by its number.
    """
    readers = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{quoted(str(path), 200)}: its name must end in {', '.join(SUFFIXES)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(
            f"{quoted(str(path), 200)}: {error.strerror or first_line(error)}; check the path and its permissions"
        ) from None


def parse_json_line(line: str | bytes, where: str) -> dict[str, Any]:
    """One JSON object.

    Args:
        line: The line, with or without its line end.
        where: The line, as an error message names it.

    Raises:
        DataError: It is not UTF-8, not JSON (NaN and Infinity are not JSON), nested too deeply, or no object.
    """
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        values = json.loads(text.removeprefix("\ufeff"), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{where}: not a row: it is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise DataError(f'{where}: not a JSON object such as {{"question": ...}} but {quoted(values, 30)}')
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; use null or leave the field out")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{quoted(digits, 20)} is too large a number")
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
        if error.msg == "Extra data":  # JSON lines under another name
            yield from _json_lines(path)
            return
        raise DataError(f"{where}, line {error.lineno}: not JSON: {error.msg}{_hint(path)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {first_line(error)}{_hint(path)}") from None
    if isinstance(values, dict):
        # One row of JSON lines, or the {"data": [...]} that `datasets` writes.
        values = values["data"] if isinstance(values.get("data"), list) and len(values) == 1 else [values]
    if not isinstance(values, list):
        raise DataError(f"{where}: must hold a list of objects, one for each row")
    for index, row in enumerate(values):
        if not isinstance(row, dict):
            raise DataError(f"{where}: row {index} is not a JSON object but {quoted(row, 30)}")
        yield row


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    # pandas, as `datasets` reads CSV; but a text that says "NA" or "None" is a text.
    import pandas

    try:
        frame = pandas.read_csv(path, keep_default_na=False, encoding="utf-8-sig", low_memory=False)
    except pandas.errors.EmptyDataError:
        return
    except OSError:
        raise
    except (ValueError, OverflowError, pandas.errors.ParserError) as error:
        raise DataError(f"{quoted(str(path), 200)}: not CSV: {first_line(error)}{_hint(path)}") from None
    if not isinstance(frame.index, pandas.RangeIndex):
        # pandas would take the surplus first column for row names.
        raise DataError(
            f"{quoted(str(path), 200)}: not CSV: its rows have more fields than its header; quote the commas"
        )
    names = [str(name) for name in frame.columns]
    cells = frame.astype(object).where(frame.notna(), None)
    for values in cells.itertuples(index=False, name=None):
        yield dict(zip(names, values, strict=True))


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{quoted(str(path), 200)}: not Parquet: {first_line(error)}{_hint(path)}") from None


def _hint(path: Path) -> str:
    with path.open("rb") as stream:
        start = stream.read(32).lstrip()
    for magic, says in _LOOKS_LIKE.items():
        if start.startswith(magic):
            return f"; {says}"
    return "; does the file's suffix say what it is?"
