"""``lapora tune-prior``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lapora.cli.arguments import Fields, JsonOption, command
from lapora.cli.console import RowProgress, loading, print_message
from lapora.cli.early import check_fitted
from lapora.config import DataSettings, ModelSettings, PriorSettings


@command(writes=True)
def tune_prior_command(
    *,
    model: ModelSettings,
    settings: PriorSettings,
    data: Annotated[
        DataSettings,
        Fields(
            split={"help": "Split of labelled rows.", "shown": "validation or test"},
            limit={"help": "Labelled rows, at random.", "shown": "half of them"},
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Choose the prior, or average over it. It decides how uncertain the weights are.

    Examples:
        lapora tune-prior ADAPTER
        lapora tune-prior ADAPTER --method marglik --prior layer
    """
    check_fitted(model, (settings.name,), settings, data)
    with loading():
        from lapora.workflows.tune_prior import tune_prior

    with RowProgress("tune-prior") as progress:
        tuned = tune_prior(model, data, settings, progress)
    if as_json and model.processes.is_main:
        typer.echo(json.dumps(tuned.prior))
    print_message(tuned.reason)
    for note in tuned.notes:
        print_message(note)
