"""``lapora predict``."""

from __future__ import annotations

from collections import deque
from typing import Annotated

import typer

from lapora.cli.arguments import (
    NameOption,
    SamplesOption,
    SeedOption,
    takes_model,
)
from lapora.cli.jsonl import binary_lines, write_json_lines
from lapora.config import Link, ModelSettings, OnError, PredictSettings
from lapora.errors import UsageError


@takes_model()
def predict_command(
    model: ModelSettings,
    source: Annotated[str, typer.Argument(metavar="[INPUT|-]", help="JSON lines; - is standard input.")] = "-",
    output: Annotated[str, typer.Option("--output", "-o", help="File to write; - is standard output.")] = "-",
    name: NameOption = "default",
    link: Annotated[Link, typer.Option(help="How logit moments become probabilities.")] = PredictSettings.link,
    samples: SamplesOption = PredictSettings.samples,
    logits: Annotated[bool, typer.Option("--logits", help="Add the logits' mean and covariance.")] = False,
    on_error: Annotated[OnError, typer.Option(help="What a bad line does.")] = PredictSettings.on_error,
    abstain_below: Annotated[float | None, typer.Option(min=0, max=1, help="Mark less confident rows.")] = None,
    adapters: Annotated[
        list[str],
        typer.Option(
            "--adapter",
            metavar="[NAME=]FOLDER",
            help="Another adapter for rows that name it, or a folder of adapters; may be repeated.",
        ),
    ] = [],  # noqa: B006
    adapter_field: Annotated[
        str, typer.Option(help="With --adapter: the field that names a row's.")
    ] = PredictSettings.adapter_field,
    adapters_kept: Annotated[
        int, typer.Option(min=1, help="With --adapter: how many stay in memory.")
    ] = PredictSettings.adapters_kept,
    seed: SeedOption = 0,
) -> None:
    """Predict, one JSON line out per JSON line in."""
    if not adapters and (adapter_field, adapters_kept) != (
        PredictSettings.adapter_field,
        PredictSettings.adapters_kept,
    ):
        raise UsageError("--adapter-field and --adapters-kept go with --adapter")
    from lapora.workflows.predict import predict

    settings = PredictSettings(
        name=name,
        link=link,
        samples=samples,
        seed=seed,
        logits=logits,
        on_error=on_error,
        abstain_below=abstain_below,
        adapters=tuple(adapters),
        adapter_field=adapter_field,
        adapters_kept=adapters_kept,
    )
    if not model.processes.is_main:
        deque(predict(model, settings, ()), maxlen=0)  # the first process reads and writes for all
        return
    with binary_lines(source) as lines:
        write_json_lines(predict(model, settings, lines), output, source)
