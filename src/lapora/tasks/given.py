"""Rows given in Python: one or many; texts, mappings, a DataFrame or a ``datasets.Dataset``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lapora.tasks.rows import Row

WHAT_TO_GIVE = (
    "give a row (a mapping with the task's fields), or a list of them, a pandas DataFrame, or a datasets.Dataset"
)


def is_one_row(rows: Any) -> bool:
    """Return whether one row was given, not several."""
    return isinstance(rows, str | Row) or (isinstance(rows, Mapping) and not _named(rows, "DatasetDict"))


def given_rows(rows: Any, *, texts: bool) -> Iterator[dict[str, Any]]:
    """Yield rows as dictionaries.

    Args:
        rows: One row or several; missing values, as pandas has them (NaN, NA, NaT), become None.
        texts: Whether a text is a row, with itself as the ready prompt.

    Raises:
        TypeError: Something else was given; the message says what to give.
    """
    return (_row(row, number, texts) for number, row in enumerate(_several(rows)))


def _several(rows: Any) -> Iterable[Any]:
    if is_one_row(rows):
        return [rows]
    if _named(rows, "DatasetDict", "IterableDatasetDict"):
        raise TypeError(f"rows: a {type(rows).__name__} holds several splits; give one of them, rows['train']")
    if _named(rows, "Series"):
        raise TypeError("rows: a Series may be a row or a column; give a DataFrame, or list(series) for texts")
    if _named(rows, "DataFrame"):
        if hasattr(rows, "to_dicts"):  # polars
            return list(rows.to_dicts())
        return list(rows.to_dict("records"))
    if isinstance(rows, bytes | bytearray) or not isinstance(rows, Iterable):
        raise TypeError(f"rows: {_article(rows)}; {WHAT_TO_GIVE}")
    return rows


def _row(row: Any, number: int, texts: bool) -> dict[str, Any]:
    if isinstance(row, Row):
        row = row.values
    if isinstance(row, Mapping):
        return {key: _plain(value) for key, value in row.items()}
    if texts and isinstance(row, str):
        return {"text": row}
    kinds = "a text or a mapping" if texts else "a mapping"
    raise TypeError(f"row {number}: {_article(row)}; a row is {kinds} with the task's fields")


def _plain(value: Any) -> Any:
    """Return NumPy's arrays and numbers, as DataFrames have, as Python's lists and numbers; a missing value as None."""
    if isinstance(value, str):
        return value
    if type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") and hasattr(value, "dtype") else value


def _named(rows: Any, *names: str) -> bool:
    return any(kind.__name__ in names for kind in type(rows).__mro__)


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
