"""``lapora predict``."""

from __future__ import annotations

from collections import deque
from typing import Annotated

from lapora.cli.arguments import command
from lapora.cli.console import print_message, program
from lapora.cli.jsonl import binary_lines, write_json_lines
from lapora.config import OUTPUT, ModelSettings, Option, PredictSettings
from lapora.errors import UsageError


@command()
def predict_command(
    *,
    model: ModelSettings,
    source: Annotated[str, Option("File of JSON lines; - is standard input.", flag="INPUT")] = "-",
    output: Annotated[
        str, Option("File to write; - is standard output.", OUTPUT, "--output", also=("-o",), metavar="FILE")
    ] = "-",
    settings: PredictSettings,
) -> None:
    """Predict: one JSON line out per line in. Rows have the task's fields, or text.

    Examples:
        lapora predict ADAPTER rows.jsonl --output predictions.jsonl
        head -3 rows.jsonl | lapora predict ADAPTER --abstain-below 0.8
    """
    default = PredictSettings()
    if not settings.adapters and (settings.adapter_field, settings.adapters_kept) != (
        default.adapter_field,
        default.adapters_kept,
    ):
        raise UsageError("--adapter-field and --adapters-kept go with --adapter")
    from lapora.workflows.commands import command_line
    from lapora.workflows.predict import predict

    if not model.processes.is_main:
        deque(predict(model, settings, ()), maxlen=0)  # the main process reads and writes for all
        return

    def note(message: str, arguments: list[str]) -> None:
        print_message(f"{message}: {command_line(arguments, program())}")

    with binary_lines(source) as lines:
        write_json_lines(predict(model, settings, lines, note), output, source)
