"""``lapora calibrate``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from lapora.cli.arguments import Fields, JsonOption, command
from lapora.cli.console import RowProgress, loading, print_message, program
from lapora.cli.early import check_fit
from lapora.cli.fit import print_notes, refuse_missing_task, saying_how_to_resume, verdict
from lapora.config import LAPLACE_LINKS, DataSettings, FitSettings, ModelSettings, PredictSettings, PriorSettings

if TYPE_CHECKING:
    from lapora.memory.estimate import MemoryEstimate
    from lapora.workflows.calibrate import Calibration


@command(writes=True)
def calibrate_command(
    *,
    model: ModelSettings,
    data: Annotated[
        DataSettings,
        Fields(
            split={"default": "train", "help": "Split the adapter was trained on."},
            limit={"help": "Use the first N training rows only."},
        ),
    ],
    settings: FitSettings,
    predictions: Annotated[
        PredictSettings, Fields("link", link={"help": f"Probabilities from logits: {LAPLACE_LINKS}."})
    ],
    as_json: JsonOption = False,
) -> None:
    """Fit, tune the prior and evaluate. Says whether the probabilities are better, and how to predict.

    Examples:
        lapora calibrate ADAPTER --data boolq
        lapora calibrate ADAPTER --data task.yaml --data-dir data
    """
    refuse_missing_task(data)
    check_fit([model], data, settings, predictions)
    with loading():
        from lapora.workflows.calibrate import calibrate

    prior = PriorSettings(link=predictions.link)
    with saying_how_to_resume(model, settings):
        done = calibrate(model, data, settings, prior, RowProgress, _warn_of_memory)
    if not model.processes.is_main:
        return
    print_notes(done.fit)
    print_message(f"tuned {done.prior.reason}")
    for note in (*done.prior.notes, *(done.evaluation.warnings if done.evaluation else ())):
        print_message(note)
    if as_json:
        typer.echo(json.dumps(done.describe()))
    else:
        _print(done)


def _warn_of_memory(found: MemoryEstimate) -> None:
    if found.fits is False:
        print_message(f"warning: {verdict(found)}")


def _print(done: Calibration) -> None:
    """Print the verdict, a small table and the next command on stdout."""
    from lapora.report.tables import console_of_data, label_of, number
    from lapora.workflows.commands import command_line

    console = console_of_data()
    console.print()
    console.print(Text(done.verdict.text), highlight=False, soft_wrap=not console.is_terminal)
    if done.evaluation is not None:
        record = done.evaluation.record
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column(f"{record['task']}, {record['split']}: {record['n']} rows")
        headings = {
            "accuracy": "accuracy",
            "rmse": "RMSE",
            "f1_micro": "F1",
            "nll": "NLL",
            "ece": "ECE",
            "crps": "CRPS",
        }
        shown = [score for score in headings if score in record["results"][0]]
        for score in shown:
            table.add_column(headings[score], justify="right")
        for result in record["results"]:
            table.add_row(Text(label_of(result)), *(number(result[score]) for score in shown))
        console.print(table)
    else:
        console.print()
    console.print("next, for a file of rows in JSON lines:")
    console.print(Text(f"  {command_line(done.next, program())}"), soft_wrap=True, highlight=False)
