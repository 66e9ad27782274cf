"""``lapora compare``: runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lapora.report.evaluation import HEADINGS, label_of, number
from lapora.report.overview import cell

_BEST_IS_HIGH = ("accuracy", "mcc", "auroc")
# The constant predictor is calibrated and says nothing, and an oracle has seen the labels: they are no candidates.
_NO_CANDIDATES = ("constant", "temperature (oracle)")


def print_comparison(runs: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> None:
    """Print runs: a table of each score for a terminal, tab-separated lines for a pipe.

    Args:
        runs: What :func:`lapora.workflows.results.read_results` read.
        scores: Which scores.
    """
    console = Console()
    if not console.is_terminal:
        _print_lines(runs)
        return
    legend = Table(box=None, show_header=False)
    for _ in range(7):
        legend.add_column(overflow="fold")
    for index, run in enumerate(runs, 1):
        time = str(run.get("time", ""))[:16].replace("T", " ")  # to the minute
        cells = (run["run"], time, run.get("adapter", ""), f"{run['task']} {run['split']}", run["n"])
        legend.add_row(Text(f"#{index}"), *(cell(str(value)) for value in cells), Text("rows"))
    console.print(legend)
    for score in scores:
        console.print(_side_by_side(runs, score))


def _side_by_side(runs: Sequence[Mapping[str, Any]], score: str) -> Table:
    """Methods down, runs across; the best of each run is bold."""
    table = Table(title=HEADINGS[score], box=box.SIMPLE_HEAD)
    table.add_column("method")
    columns = [{label_of(result): result.get(score) for result in run["results"]} for run in runs]
    for index in range(len(runs)):
        table.add_column(f"#{index + 1}", justify="right")
    best = max if score in _BEST_IS_HIGH else min
    bests = []
    for column in columns:
        known = [value for label, value in column.items() if value is not None and label not in _NO_CANDIDATES]
        bests.append(best(known) if known else None)
    for label in dict.fromkeys(label for column in columns for label in column):
        cells = [
            Text(
                number(column[label]) if label in column else "",
                style="bold"
                if label not in _NO_CANDIDATES and value is not None and column.get(label) == value
                else "",
            )
            for column, value in zip(columns, bests, strict=True)
        ]
        table.add_row(cell(label), *cells)
    return table


def _print_lines(runs: Sequence[Mapping[str, Any]]) -> None:
    """One line a run and method, so that ``sort`` and ``cut`` work."""
    print("\t".join(["run", "time", "adapter", "task", "split", "n", "method", "name", "link", *HEADINGS]))
    for run in runs:
        about = [run["run"], run.get("time"), run.get("adapter"), run["task"], run["split"], run["n"]]
        for result in run["results"]:
            named = [result["method"], result.get("name"), result.get("link")]
            values = [result.get(score) for score in HEADINGS]
            cells = ["" if cell is None else " ".join(str(cell).split()) for cell in (*about, *named, *values)]
            print("\t".join(cells))
