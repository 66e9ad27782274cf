"""The tables of ``eval`` for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lapora.config import method_label
from lapora.report.overview import cell

if TYPE_CHECKING:  # listing tasks and inspecting a posterior need no torch
    from lapora.metrics import Bin

HEADINGS = {
    "accuracy": "accuracy",
    "mcc": "mcc",
    "ece": "ece",
    "adaptive_ece": "adaptive ece",
    "nll": "nll",
    "brier": "brier",
    "auroc": "auroc",
    "aurc": "aurc",
}
"""Scores in the order of the table, with their headings."""

_NARROW = ("accuracy", "mcc", "ece", "nll", "brier")
_WIDE_TERMINAL = 112
_IN_A_PIPE = 140


def number(value: float | None, digits: int = 3) -> str:
    """A score, or a dash where it is not defined."""
    return "-" if value is None else f"{value:.{digits}f}"


def threshold(value: float) -> str:
    """A threshold, rounded down: rows that stand on it are kept."""
    return f"{math.floor(value * 1e6) / 1e6:.6f}"


def label_of(result: Mapping[str, Any]) -> str:
    """How a result is named."""
    return method_label(result["method"], result.get("name"), result.get("link"))


def difference_of(result: Mapping[str, Any], score: str = "nll") -> str:
    """The paired difference to MAP with its interval."""
    found = result.get("difference_to_map", {}).get(score)
    if found is None:
        return ""
    low, high = found["interval"]
    return f"{found['value']:+.3f} ({low:+.3f} to {high:+.3f})"


def console_of_data() -> Console:
    """Standard output; wide enough for any table where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_IN_A_PIPE)


def print_evaluation(record: Mapping[str, Any]) -> None:
    """Print the table of ``eval``, with those of other data and of coverage where they were asked for."""
    console = console_of_data()
    results = record["results"]
    wide = console.width >= _WIDE_TERMINAL
    scores = [score for score in HEADINGS if score in results[0] and (wide or score in _NARROW)]
    table = Table(
        title=cell(f"{record['task']}, {record['split']}: {record['n']} rows"),
        caption="nll less MAP's: paired, with its 95 % bootstrap interval" if wide else None,
        box=box.SIMPLE_HEAD,
    )
    table.add_column("method")
    for score in scores:
        table.add_column(HEADINGS[score], justify="right")
    if wide:
        table.add_column("nll less MAP's", justify="right")
    for result in results:
        cells = [number(result[score]) for score in scores]
        table.add_row(cell(label_of(result)), *cells, *([difference_of(result)] if wide else []))
    console.print(table)
    if "coverage" in results[0]:
        console.print(_coverage(results))
    for shifted in record.get("ood", []):
        console.print(_shift(shifted))


def _coverage(results: Sequence[Mapping[str, Any]]) -> Table:
    asked = results[0]["coverage"]["asked"]
    table = Table(title=f"to answer {asked:.0%} of the rows", box=box.SIMPLE_HEAD)
    table.add_column("method")
    for heading in ("--abstain-below", "rows answered", "accuracy of these", "of all"):
        table.add_column(heading, justify="right")
    for result in results:
        found = result["coverage"]
        shares = [f"{found['coverage']:.1%}", number(found["accuracy"]), number(result["accuracy"])]
        table.add_row(cell(label_of(result)), threshold(found["threshold"]), *shares)
    return table


def _shift(shifted: Mapping[str, Any]) -> Table:
    table = Table(
        title=cell(f"other data: {shifted['task']}, {shifted['split']}: {shifted['n']} rows"),
        caption="AUROC of telling them from the rows above; 0.5 is chance",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("method")
    headings = ("accuracy", "confidence", "(own rows)", "entropy", "(own rows)")
    for heading in (*headings, "AUROC max p", "entropy", "mutual inf."):
        table.add_column(heading, justify="right")
    for result in shifted["results"]:
        values = [result[key] for key in ("accuracy", "confidence", "confidence_in", "entropy", "entropy_in")]
        values += [result["auroc"][key] for key in ("max_probability", "entropy", "mutual_information")]
        table.add_row(cell(label_of(result)), *(number(value) for value in values))
    return table


_BAR = 24


def print_reliability(diagrams: Mapping[str, Sequence[Bin]]) -> None:
    """Draw reliability diagrams side by side, on a terminal alone.

    Args:
        diagrams: Bins by method, at most two.
    """
    console = Console()
    if not console.is_terminal:
        return
    table = Table(
        title="how often right, by confidence (█ right, ┃ the confidence: bars should end there)",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("confidence")
    for label in diagrams:
        table.add_column(Text(label), min_width=_BAR)
        table.add_column("rows", justify="right")
    for row in zip(*diagrams.values(), strict=True):
        if any(each.count for each in row):
            cells = [cell for each in row for cell in (_bar(each), str(each.count) if each.count else "")]
            table.add_row(f"{row[0].low:.2f}-{row[0].high:.2f}", *cells)
    console.print(table)


def _bar(found: Bin) -> str:
    if found.accuracy is None or found.confidence is None:
        return ""
    filled, mark = round(found.accuracy * _BAR), min(_BAR - 1, int(found.confidence * _BAR))
    cells = ["█" if index < filled else "·" for index in range(_BAR)]
    cells[mark] = "┃"
    return "".join(cells)


def print_checkpoints(record: Mapping[str, Any]) -> None:
    """Print accuracy, ECE and NLL of every checkpoint."""
    console = console_of_data()
    for line in checkpoint_tables(record):
        console.print(line)


def checkpoint_tables(record: Mapping[str, Any]) -> list[Table]:
    """One table for each score: training steps down, methods across."""
    tables = []
    for score in ("accuracy", "ece", "nll"):
        results = record["checkpoints"][0]["results"]
        links = [result["link"] for result in results if "link" in result]
        shown = (None, "mc-joint" if "mc-joint" in links else next(iter(links), None))
        labels = [label_of(each) for each in results if each.get("link") in shown and each["method"] != "constant"]
        table = Table(
            title=cell(f"{record['task']}, {record['split']}: {score} of {record['n']} rows"), box=box.SIMPLE_HEAD
        )
        table.add_column("step", justify="right")
        for label in labels:
            table.add_column(Text(label.removeprefix("laplace ")), justify="right")
        for checkpoint in record["checkpoints"]:
            found = {label_of(result): result[score] for result in checkpoint["results"]}
            table.add_row(str(checkpoint["step"]), *(number(found.get(label)) for label in labels))
        tables.append(table)
    return tables
