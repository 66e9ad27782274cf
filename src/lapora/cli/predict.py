"""``lapora predict``."""

from __future__ import annotations

import os
import stat
import sys
from collections import deque
from dataclasses import replace
from typing import Annotated

from lapora.cli.arguments import command
from lapora.cli.console import RowRate, loading, print_command, print_message, program
from lapora.cli.early import check_fitted, check_input
from lapora.cli.formats import InputFormat, count_rows, open_rows, resolve_format, write_records
from lapora.config import DATA, OUTPUT, ModelSettings, Option, PredictSettings
from lapora.errors import UsageError


@command()
def predict_command(
    *,
    model: ModelSettings,
    source: Annotated[str, Option("File of rows, also .gz; - is standard input.", flag="INPUT")] = "-",
    output: Annotated[
        str,
        Option(
            "File to write, .csv or .parquet or else JSON lines; - is standard output.",
            OUTPUT,
            "--output",
            also=("-o",),
            metavar="FILE",
        ),
    ] = "-",
    settings: PredictSettings,
    input_format: Annotated[
        InputFormat | None,
        Option(
            "text (a line is a prompt, or the task's field text), csv, jsonl or parquet.",
            DATA,
            metavar="NAME",
            shown="by the file's ending",
            synonyms={"txt": "text", "json": "jsonl", "ndjson": "jsonl"},
        ),
    ] = None,
) -> None:
    """Predict: a JSON line per row. Rows: task fields, text, or prompt and answers.

    Examples:
        lapora predict ADAPTER rows.jsonl --output predictions.jsonl
        lapora predict ADAPTER rows.csv.gz --output predictions.parquet
        head -3 rows.jsonl | lapora predict ADAPTER --abstain-below 0.8
    """
    default = PredictSettings()
    if not settings.adapters and (settings.adapter_field, settings.adapters_kept) != (
        default.adapter_field,
        default.adapters_kept,
    ):
        raise UsageError("--adapter-field and --adapters-kept go with --adapter")
    if output.endswith(".gz"):
        raise UsageError(f"--output {output}: predictions are not compressed; give a name without .gz")
    if output.lower().endswith((".tsv", ".xls", ".xlsx")):
        raise UsageError(f"--output {output}: this format is not written; give a name that ends in .csv or .jsonl")
    if settings.adapters and output.lower().endswith((".csv", ".parquet")):
        raise UsageError(f"--output {output}: adapters may have different answers; write JSON lines")
    kind = resolve_format(source, input_format)
    if not settings.adapters:
        check_fitted(model, (settings.name,), settings)
    check_input(source)
    if source == "-" and sys.stdin is not None and sys.stdin.isatty() and model.processes.is_main:
        print_message(_waiting(kind))
        if settings.on_error is None:  # one mistyped line does not end what has loaded a model
            settings = replace(settings, on_error="report")
    with loading():
        from lapora.workflows.commands import command_line
        from lapora.workflows.predict import predict

    if not model.processes.is_main:
        deque(predict(model, settings, ()), maxlen=0)  # the main process reads and writes for all
        return

    def note(message: str, arguments: list[str]) -> None:
        print_command(message, command_line(arguments, program()))

    to_file = _is_file(output)
    rate = RowRate("predict", count_rows(source, kind) if to_file and source != "-" else None, to_file)
    with open_rows(source, kind) as rows:
        write_records(rate.count(predict(model, settings, rows, note)), output, source)


def _waiting(kind: InputFormat) -> str:
    what = {"text": "texts, one per line", "csv": "CSV with a header"}.get(
        kind, "rows, one JSON object a line, with the task's fields"
    )
    end = "Ctrl-Z, Enter" if os.name == "nt" else "Ctrl-D"
    return f"waiting for {what}, on standard input; {end} ends"


def _is_file(output: str) -> bool:
    """Return whether predictions go to a file, so that the terminal is free for a progress bar."""
    if output != "-":
        return True
    try:
        return stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):
        return False
