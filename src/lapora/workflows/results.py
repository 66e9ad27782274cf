"""Results kept in a JSON-lines file, one run a line, and read back to be compared."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapora._version import __version__
from lapora.errors import DataError


def append_result(file: Path, record: Mapping[str, Any], adapter: str) -> None:
    """Add one run to a file, in one write.

    Args:
        file: Made where it is missing.
        record: What ``eval --json`` prints.
        adapter: Where the adapter is.

    Raises:
        DataError: The file cannot be written.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "lapora_version": __version__, "adapter": adapter, **record}, ensure_ascii=False)
    try:
        with file.open("ab+") as stream:
            # A run that was killed while it wrote leaves half a line: start another.
            if stream.seek(0, os.SEEK_END):
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else f"\n{line}"
            stream.write(f"{line}\n".encode())
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror}); give another --output") from error


def read_results(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Every run of some files, each with where it stands as ``run``.

    Raises:
        DataError: A file cannot be read, a line is not a run, or there is none.
    """
    runs = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise DataError(f"{file}: cannot be read ({reason})") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                runs.append({"run": f"{file.name}:{number}", **_run(line, f"{file}, line {number}")})
    if not runs:
        raise DataError("no runs there; `lapora eval ... --output FILE` adds one")
    return runs


def _run(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        for result in record["results"]:
            str(result["method"])
        return {"task": record["task"], "split": record["split"], "n": record["n"], **record}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: not a result of `lapora eval --output` ({error!r:.60})") from error


def same_rows(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all runs scored the same rows: only then can their numbers be compared."""
    return len({run.get("rows") for run in runs}) == 1
