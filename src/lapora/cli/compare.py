"""``lapora compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lapora.cli.options import JsonOption
from lapora.cli.output import say
from lapora.errors import UsageError

_SIDE_BY_SIDE = ["accuracy", "ece", "nll"]


def compare_command(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS.jsonl...", help="Files of `lapora eval --output`.")],
    metric: Annotated[list[str], typer.Option(help="Score to show on a terminal; may be repeated.")] = _SIDE_BY_SIDE,
    as_json: JsonOption = False,
) -> None:
    """Show runs side by side: a table on a terminal, tab-separated lines in a pipe."""
    from lapora.report.comparison import print_comparison
    from lapora.report.evaluation import HEADINGS
    from lapora.workflows.results import read_results, same_rows

    for score in metric:
        if score not in HEADINGS:
            raise UsageError(f"--metric {score}: one of {', '.join(HEADINGS)}")
    runs = read_results(files)
    if as_json:
        typer.echo(json.dumps(runs))
    else:
        print_comparison(runs, list(dict.fromkeys(metric)))
    if not same_rows(runs):
        say("note: these runs did not score the same rows: their numbers differ by chance too")
