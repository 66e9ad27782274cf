"""Formats of the rows that ``predict`` reads and of the predictions that it writes."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lapora.cli.console import json_text
from lapora.cli.jsonl import binary_lines, is_one_file, write_json_lines, write_lines
from lapora.config import LONGEST_LINE
from lapora.errors import DataError, UsageError, first_line, listed

InputFormat = Literal["text", "csv", "jsonl", "parquet"]
Line = bytes | Mapping[str, Any] | None
"""A JSON line, a row, or None where the writer of a pipe pauses."""

_ENDINGS: dict[str, InputFormat] = {".txt": "text", ".text": "text", ".csv": "csv", ".parquet": "parquet"}
_COUNTED = 256 * 2**20
"""Largest file whose lines are counted for the progress bar, in bytes."""
_START = 4096
"""Bytes of a file that are read to recognise a JSON list."""
_GROUP = 1024
"""Rows per group of a Parquet file."""


def resolve_format(source: str, given: InputFormat | None) -> InputFormat:
    """Return the format of a file: the one given, or that of its ending; JSON lines for any other ending.

    Raises:
        UsageError: The ending is that of a format which is not read.
    """
    if given is None and _ending(source) == ".tsv":
        raise UsageError(f"{source}: tab-separated files are not read; save it as .csv or .jsonl")
    return given or _ENDINGS.get(_ending(source), "jsonl")


def _ending(path: str) -> str:
    """Return the file's ending, without ``.gz``."""
    return Path(path[: -len(".gz")] if path.endswith(".gz") else path).suffix.lower()


@contextmanager
def open_rows(source: str, kind: InputFormat) -> Iterator[Iterator[Line]]:
    """Open a file, or standard input for ``-``, and yield its rows.

    A line of text is the row ``{"text": line}``. A CSV file and a .json file with a list of rows are read as a whole,
    as ``fit`` reads them; the others are streamed.

    Raises:
        DataError: No such file, or one of another format.
        UsageError: Parquet from standard input, or compressed.
    """
    packed = source.endswith(".gz")
    if kind == "parquet":
        if source == "-" or packed:
            raise UsageError("Parquet is read from an uncompressed file: give its path as INPUT")
        yield _read(lambda: _parquet_rows(Path(source)), source)
    elif kind == "csv":
        yield _read(lambda: _csv_rows(source, packed), source)
    elif kind == "jsonl" and _is_json_list(source):
        yield _read(lambda: _json_rows(Path(source)), source)
    elif packed:
        yield _as_json(_read(lambda: _packed_lines(Path(source)), source), kind)
    else:
        with binary_lines(source) as lines:
            yield _as_json(lines, kind)


def _read(rows: Callable[[], Iterable[Any]], source: str) -> Iterator[Any]:
    try:
        yield from rows()
    except (OSError, EOFError) as error:
        raise DataError(
            f"{source}: cannot be read ({getattr(error, 'strerror', None) or first_line(error)})"
        ) from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    from lapora.tasks.rows import parquet_rows

    yield from parquet_rows(path)


def _is_json_list(source: str) -> bool:
    """Return whether a .json file holds one list of rows instead of a row per line."""
    if source == "-" or Path(source).suffix.lower() != ".json":
        return False
    with contextlib.suppress(OSError), Path(source).open("rb") as stream:
        return stream.read(_START).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return False


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    from lapora.tasks.rows import read_file

    yield from read_file(path)


def _csv_rows(source: str, packed: bool) -> Iterator[dict[str, Any]]:
    from lapora.tasks.rows import csv_rows

    if source == "-":
        yield from csv_rows(io.BytesIO(sys.stdin.buffer.read()), "standard input")
    elif packed:
        with gzip.open(source, "rb") as stream:
            yield from csv_rows(io.BytesIO(stream.read()), source)
    else:
        yield from csv_rows(Path(source), source)


def _packed_lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as stream:
        while line := stream.readline(LONGEST_LINE + 1):
            yield line
            rest = line
            while not rest.endswith(b"\n") and (rest := stream.readline(LONGEST_LINE + 1)):
                pass  # of a line that is too long


_CONTROL = {code: f"\\u{code:04x}".encode() for code in range(0x20)} | {ord('"'): b'\\"', ord("\\"): b"\\\\"}
_JSON_BYTES = [_CONTROL.get(code, bytes([code])) for code in range(256)]


def _as_json(lines: Iterator[bytes | None], kind: InputFormat) -> Iterator[Line]:
    """Convert lines of text to JSON lines; a line that is not UTF-8 is unchanged, and is reported with its number."""
    for line in lines:
        text = line if line is None else line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
        if kind != "text" or not text or not text.strip():
            yield line
        else:
            yield b'{"text": "' + b"".join(_JSON_BYTES[code] for code in text) + b'"}\n'


def count_rows(source: str, kind: InputFormat) -> int | None:
    """Count the rows of a file for a progress bar; None if that would take long, or is not possible."""
    with contextlib.suppress(Exception):
        path = Path(source)
        if kind == "parquet":
            import pyarrow.parquet

            with pyarrow.OSFile(os.fsencode(path)) as stream:
                return int(pyarrow.parquet.ParquetFile(stream).metadata.num_rows)
        if path.is_file() and path.stat().st_size <= _COUNTED and kind != "csv" and not source.endswith(".gz"):
            if kind == "jsonl" and _is_json_list(source):
                return None
            with path.open("rb") as stream:
                return sum(1 for line in stream if line.strip())
    return None


def write_records(records: Iterable[Mapping[str, Any]], target: str, source: str = "-") -> None:
    """Stream records to a file: CSV or Parquet by its ending, JSON lines otherwise and to standard output.

    CSV and Parquet have one column per answer, ``probabilities.ANSWER`` and ``map_probabilities.ANSWER``; lists of rows
    that have their own answers are JSON.

    Args:
        records: Records of ``predict``.
        target: Path of a file, or ``-`` for standard output.
        source: File that the records are made from; it must not be the target.

    Raises:
        UsageError: Source and target are one file.
        DataError: The file cannot be written.
    """
    ending = _ending(target)
    if target != "-" and ending == ".csv":
        write_lines(_csv_lines(records), target, source)
    elif target != "-" and ending == ".parquet":
        _write_parquet(records, target, source)
    else:
        write_json_lines(records, target, source)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with one value per column; matrices are JSON."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if key == "id":
            flat[key] = value if isinstance(value, str) else json_text(value)
        elif isinstance(value, Mapping):
            flat |= {
                f"{key}.{name}": each if isinstance(each, float) else json.dumps(each) for name, each in value.items()
            }
        else:
            flat[key] = json_text(value) if isinstance(value, list) else value
    return flat


def _tables(records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Yield the columns and some rows; the columns are those of the first row with a prediction.

    Rows with errors before it are buffered until then.
    """
    columns: list[str] = []
    waiting: list[dict[str, Any]] = []
    for record in records:
        waiting.append(_flat(record))
        found = waiting[-1]
        if not columns and "error" not in record:
            columns = list(dict.fromkeys(["index", "id", *found, "truncated", "error"]))
        if columns:
            if more := [key for key in found if key not in columns]:
                raise DataError(
                    f"row {record['index']}: {listed(more)} is not a column of the rows before it; rows with other "
                    "answers go into JSON lines: give --output a name that ends in .jsonl"
                )
            yield columns, waiting
            waiting = []
    if not columns:
        yield ["index", "id", "error"], waiting


def _csv_lines(records: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    headed = False
    for columns, rows in _tables(records):
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        if not headed:
            writer.writeheader()
            headed = True
        writer.writerows(rows)
        yield text.getvalue().encode("utf-8", "backslashreplace")


def _write_parquet(records: Iterable[Mapping[str, Any]], target: str, source: str) -> None:
    """Write groups of rows; what was predicted before an error or Ctrl-C can be read.

    The file appears when it is complete: a Parquet file cannot be read without its end.
    """
    import pyarrow
    import pyarrow.parquet

    if is_one_file(source, target):
        raise UsageError(f"--output {target} is the input file; give another")
    regular = not os.path.exists(target) or os.path.isfile(target)
    partial = f"{target}.partial" if regular else target
    try:
        with open(partial, "wb"):
            pass
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); give another --output") from error
    writer: Any = None
    stream: Any = None
    waiting: list[dict[str, Any]] = []
    schema: Any = None

    def flush() -> None:
        nonlocal writer, stream
        if schema is not None and (waiting or writer is None):
            if writer is None:
                stream = pyarrow.OSFile(os.fsencode(partial), "wb")
                writer = pyarrow.parquet.ParquetWriter(stream, schema)
            writer.write_table(pyarrow.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

    try:
        try:
            for columns, rows in _tables(records):
                if schema is None:
                    last = rows[-1] if rows else {}
                    schema = pyarrow.schema([(name, _arrow_type(name, last.get(name))) for name in columns])
                waiting += [{key: _encodable(value) for key, value in row.items()} for row in rows]
                if len(waiting) >= _GROUP:
                    flush()
        finally:
            try:
                flush()
            finally:
                if writer is not None:
                    writer.close()
                    stream.close()
                    if regular:
                        os.replace(partial, target)
                elif regular:
                    os.unlink(partial)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror or first_line(error)})") from error


def _encodable(value: Any) -> Any:
    """Return a text with half surrogate pairs, which an id may have, written as in CSV; other values unchanged."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _arrow_type(name: str, value: Any) -> Any:
    import pyarrow

    if name in ("abstained", "truncated"):
        return pyarrow.bool_()
    if name == "index":
        return pyarrow.int64()
    return pyarrow.float64() if isinstance(value, float) else pyarrow.string()
