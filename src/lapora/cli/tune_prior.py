"""``lapora tune-prior``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lapora.cli.arguments import (
    DataDirOption,
    JsonOption,
    NameOption,
    SeedOption,
    TaskOption,
    takes_model,
)
from lapora.cli.console import RowProgress, print_message
from lapora.config import DataSettings, Link, ModelSettings, Optimizer, PriorChoice, PriorMethod, PriorSettings


@takes_model(writes=True)
def tune_prior_command(
    model: ModelSettings,
    name: NameOption = "default",
    method: Annotated[PriorMethod, typer.Option(help="How it is chosen.")] = PriorSettings.method,
    prior: Annotated[PriorChoice, typer.Option(help="One precision, or one per kind or layer.")] = (
        PriorSettings.structure
    ),
    optimizer: Annotated[
        Optimizer, typer.Option(help="Of the marginal likelihood; adam is the paper's.")
    ] = PriorSettings.optimizer,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of adam.")] = PriorSettings.learning_rate,
    steps: Annotated[int, typer.Option(min=1, help="Steps of adam.")] = PriorSettings.steps,
    link: Annotated[Link, typer.Option(help="Link to tune for, by validation.")] = PriorSettings.link,
    task: TaskOption = None,
    data_dir: DataDirOption = None,
    split: Annotated[str | None, typer.Option(help="Split with validation rows.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Validation rows to use; half of the split.")] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Choose the prior precision: by validation rows where there are some, else by the marginal likelihood."""
    from lapora.workflows.tune_prior import tune_prior

    settings = PriorSettings(name, method, prior, optimizer, lr, steps, link, seed)
    with RowProgress("tune-prior") as progress:
        tuned = tune_prior(model, DataSettings(task, data_dir, split, limit), settings, progress)
    if as_json and model.processes.is_main:
        typer.echo(json.dumps(tuned.prior))
    print_message(tuned.reason)
    for note in tuned.notes:
        print_message(note)
