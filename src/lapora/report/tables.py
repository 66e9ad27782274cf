"""Tables on the terminal."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lapora.config import method_label
from lapora.errors import printable
from lapora.posterior.averaging import Averaged
from lapora.storage.manifest import Manifest, Prior, Scores, Validation

if TYPE_CHECKING:
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
    "exact_match": "exact match",
    "f1_micro": "f1 micro",
    "f1_macro": "f1 macro",
    "rmse": "rmse",
    "crps": "crps",
    "interval_coverage": "interval coverage",
    "interval_width": "interval width",
}
"""Scores in the order of the table, with their headings."""

_SECOND_TABLE = ("auroc", "aurc", "interval_coverage", "interval_width")
"""Scores that go into the second table on a narrow terminal."""

_WIDE_TERMINAL = 112
_IN_A_PIPE = 140


def number(value: float | None, digits: int = 3) -> str:
    """Format a score; a dash if it is not defined."""
    return "-" if value is None else f"{value:.{digits}f}"


def threshold(value: float) -> str:
    """Format a threshold, rounded down so that rows exactly on it are kept."""
    return f"{math.floor(value * 1e6) / 1e6:.6f}"


def label_of(result: Mapping[str, Any]) -> str:
    """Return the label of a result."""
    return method_label(result["method"], result.get("name"), result.get("link"))


def difference_of(result: Mapping[str, Any], score: str = "nll") -> str:
    """Format the paired difference to MAP with its interval."""
    found = result.get("difference_to_map", {}).get(score)
    if found is None:
        return ""
    low, high = found["interval"]
    return f"{found['value']:+.3f} ({low:+.3f} to {high:+.3f})"


def console_of_data() -> Console:
    """Return a console on standard output; if it is not a terminal, wide enough for any table, without padding."""
    console = Console()
    return console if console.is_terminal else Console(width=_IN_A_PIPE, file=cast("IO[str]", _Unpadded(sys.stdout)))


class _Unpadded:
    """A text stream that drops spaces at the end of lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(re.sub(r" +$", "", text, flags=re.MULTILINE))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_evaluation(record: Mapping[str, Any]) -> None:
    """Print the tables of ``eval``: scores and, on request, coverage and out-of-distribution rows.

    On a narrow terminal the columns are split into two tables, so that nothing is cut.
    """
    console = console_of_data()
    results = record["results"]
    wide = console.width >= _WIDE_TERMINAL
    title = f"{record['task']}, {record['split']}: {record['n']} rows"
    scores = [score for score in HEADINGS if score in results[0]]
    if wide:
        console.print(_scores(results, title, scores, with_difference=True))
    else:
        first = [score for score in scores if score not in _SECOND_TABLE]
        console.print(_scores(results, title, first, with_difference=False))
        rest = [score for score in _SECOND_TABLE if score in scores]
        console.print(_scores(results, "", rest, with_difference=True))
    if "coverage" in results[0]:
        console.print(_coverage(results))
    for shifted in record.get("ood", []):
        for table in _shift(shifted, wide):
            console.print(table)


def _scores(results: Sequence[Mapping[str, Any]], title: str, scores: Sequence[str], *, with_difference: bool) -> Table:
    table = _table(title, "nll minus MAP: paired by row, with its 95 % bootstrap interval" if with_difference else "")
    for score in scores:
        _number_column(table, HEADINGS[score].replace(" ", "\n"))
    if with_difference:
        _number_column(table, "nll minus MAP")
    for result in results:
        cells = [number(result[score]) for score in scores]
        table.add_row(cell(label_of(result)), *cells, *([difference_of(result)] if with_difference else []))
    return table


def _table(title: str, caption: str = "") -> Table:
    """Return a table in which only the first column may be wrapped."""
    table = Table(title=cell(title) if title else None, caption=caption or None, box=box.SIMPLE_HEAD)
    table.add_column("method")
    return table


def _number_column(table: Table, heading: str) -> None:
    table.add_column(heading, justify="right", no_wrap=True)


def _coverage(results: Sequence[Mapping[str, Any]]) -> Table:
    asked = results[0]["coverage"]["asked"]
    table = _table(f"coverage of {asked:.0%} of the rows")
    for heading in ("--abstain-below", "rows\nanswered", "accuracy\nof these", "of all"):
        _number_column(table, heading)
    for result in results:
        found = result["coverage"]
        shares = [f"{found['coverage']:.1%}", number(found["accuracy"]), number(result["accuracy"])]
        table.add_row(cell(label_of(result)), threshold(found["threshold"]), *shares)
    return table


SHIFT_SCORES = ("accuracy", "f1_micro", "rmse")
SHIFT_MEANS = ("confidence", "deviation", "entropy")
SHIFT_MEASURES = {
    "max_probability": "max p",
    "deviation": "deviation",
    "entropy": "entropy",
    "mutual_information": "mutual inf.",
}
"""Columns of the tables of out-of-distribution rows: what the likelihood has of them is shown."""


def shift_columns(result: Mapping[str, Any]) -> tuple[str, list[str], list[str]]:
    """Return the score, the means and the measures of AUROC that a result of out-of-distribution rows has."""
    score = next(score for score in SHIFT_SCORES if score in result)
    means = [mean for mean in SHIFT_MEANS if mean in result]
    return score, means, [measure for measure in SHIFT_MEASURES if measure in result["auroc"]]


def _shift(shifted: Mapping[str, Any], wide: bool) -> list[Table]:
    """Return one table, or on a narrow terminal two, with AUROC in the second."""
    caption = "AUROC of separating them from the rows above; 0.5 is chance"
    first = _table(
        f"out of distribution: {shifted['task']}, {shifted['split']}: {shifted['n']} rows", caption if wide else ""
    )
    second = first if wide else _table("", caption)
    score, means, measures = shift_columns(shifted["results"][0])
    _number_column(first, HEADINGS[score].replace(" ", "\n"))
    for mean in means:
        _number_column(first, mean)
        _number_column(first, "(in\ndistr.)")
    for measure in measures:
        _number_column(second, f"AUROC\n{SHIFT_MEASURES[measure]}")
    for result in shifted["results"]:
        label = cell(label_of(result))
        levels = [number(result[key]) for key in (score, *(each for mean in means for each in (mean, f"{mean}_in")))]
        aurocs = [number(result["auroc"][measure]) for measure in measures]
        if wide:
            first.add_row(label, *levels, *aurocs)
        else:
            first.add_row(label, *levels)
            second.add_row(label, *aurocs)
    return [first] if wide else [first, second]


_BAR = 24


def print_reliability(diagrams: Mapping[str, Sequence[Bin]]) -> None:
    """Draw reliability diagrams side by side, if standard output is a terminal.

    Args:
        diagrams: Bins by method, at most two.
    """
    console = Console()
    if not console.is_terminal or not diagrams:
        return
    table = Table(
        title="accuracy by confidence",
        caption="█ accuracy, ┃ mean confidence; calibrated: bars end at the mark",
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
    """Print the scores of every checkpoint."""
    console = console_of_data()
    for line in checkpoint_tables(record):
        console.print(line)


def checkpoint_scores(record: Mapping[str, Any]) -> list[str]:
    """Return the scores of checkpoints to show: accuracy, ECE and NLL, or another likelihood's equivalents."""
    first = record["checkpoints"][0]["results"][0]
    return [score for score in ("accuracy", "f1_micro", "rmse", "ece", "crps", "nll") if score in first]


def checkpoint_tables(record: Mapping[str, Any]) -> list[Table]:
    """Return one table per score: one row per training step, one column per method."""
    tables = []
    for score in checkpoint_scores(record):
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


BEST_IS_HIGH = ("accuracy", "mcc", "auroc", "f1_macro", "f1_micro", "exact_match")
# Not compared: the constant predictor is calibrated by construction, and the oracle has seen the labels.
_NO_CANDIDATES = ("constant", "temperature (oracle)")
# The best coverage is the interval's probability, and a narrow interval is good only if it covers as much.
_NO_BEST = ("interval_coverage", "interval_width")


def print_comparison(runs: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> None:
    """Print runs: one table per score on a terminal, tab-separated lines otherwise.

    Args:
        runs: Records from :func:`lapora.workflows.results.read_results`.
        scores: Scores to show.
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
    """Return a table with one row per method and one column per run; the best method of each run is bold."""
    table = Table(title=HEADINGS[score], box=box.SIMPLE_HEAD)
    table.add_column("method")
    columns = [{label_of(result): result.get(score) for result in run["results"]} for run in runs]
    for index in range(len(runs)):
        table.add_column(f"#{index + 1}", justify="right")
    best = max if score in BEST_IS_HIGH else min
    bests = []
    for column in columns:
        known = [value for label, value in column.items() if value is not None and label not in _NO_CANDIDATES]
        bests.append(best(known) if known and score not in _NO_BEST else None)
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
    """Print one line per run and method, for ``sort`` and ``cut``."""
    print("\t".join(["run", "time", "adapter", "task", "split", "n", "method", "name", "link", *HEADINGS]))
    for run in runs:
        about = [run["run"], run.get("time"), run.get("adapter"), run["task"], run["split"], run["n"]]
        for result in run["results"]:
            named = [result["method"], result.get("name"), result.get("link")]
            values = [result.get(score) for score in HEADINGS]
            values = [round(value, 6) if isinstance(value, float) else value for value in values]
            cells = ["" if cell is None else " ".join(str(cell).split()) for cell in (*about, *named, *values)]
            print("\t".join(cells))


def cell(text: str) -> Text:
    """Return literal text, without markup or terminal controls that the data may contain."""
    return Text(printable(text, 1000))


def print_tasks(tasks: list[dict[str, Any]]) -> None:
    """Print the built-in tasks: a table on a terminal, tab-separated lines otherwise."""
    header = ("task", "model kinds", "answers", "metric", "Hub")
    rows = [
        (
            task["task"],
            ", ".join(task["kinds"]),
            "of each row" if isinstance(task["choices"], str) else " | ".join(task["choices"]),
            task["metric"],
            task["hub"] or "",
        )
        for task in tasks
    ]
    console = Console()
    if not console.is_terminal:
        for row in rows:
            print("\t".join(printable(value, 1000) for value in row))
        return
    table = Table()
    for title in header:
        table.add_column(title)
    for row in rows:
        table.add_row(*map(cell, row))
    console.print(table)


def print_posterior(manifest: Manifest, prior: Prior) -> None:
    """Print a summary of a posterior."""
    lines = {
        "structure": f"{manifest.structure}, {manifest.weight_sharing}, {manifest.fisher} Fisher",
        "subset": f"{manifest.subset}, {len(manifest.parameters)} matrices",
        "base model": f"{manifest.base_model.name} ({manifest.base_model.dtype})",
        "task": f"{manifest.task['task']}, {manifest.answers.describe()}",
        "data": f"{manifest.data.n} rows of {manifest.data.split}",
        "log-likelihood": _nats(manifest.log_likelihood),
        "prior precision": f"{prior.precisions.describe()} ({prior.method}, {prior.structure})",
        "log marginal likelihood": _nats(prior.log_marginal_likelihood),
    }
    if manifest.rank is not None:
        lines["structure"] += f", rank {manifest.rank} ({manifest.kept:.1%} of the curvature's trace)"
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in lines.items():
        table.add_row(key, cell(value))
    console = console_of_data()
    console.print(table)
    if prior.validation is not None:
        console.print(_validation_curve(prior.validation))
    if prior.averaged is not None:
        console.print(_weights(prior.averaged))


_COUNT_BAR = 28
_LONG_NUMBER = 1e6


_SHADES = " ░▒▓█"
_WEIGHT_BAR = 20


def _weights(averaged: Averaged) -> Table:
    """Return the weights of an average as a picture: prior precisions down, temperatures across, darker is heavier."""
    source = f"{averaged.n} rows of {averaged.split}" if averaged.n else "training rows alone"
    tolerance = "" if averaged.tolerance is None else f"; * what the training rows tolerate, {averaged.tolerance:.3g}"
    table = Table(title=cell(f"weights, from {source}{tolerance}"), title_justify="left")
    table.add_column("precision", justify="right", no_wrap=True)
    shown = averaged.pruned(0.99)
    if len(averaged.temperatures) > 1:
        low, high = shown.temperatures[0], shown.temperatures[-1]
        table.add_column(f"temperature {low:.2f}-{high:.2f}", no_wrap=True)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    heaviest = max(max(row) for row in shown.weights)
    totals = [sum(row) for row in shown.weights]
    for precision, row, total in zip(shown.precisions, shown.weights, totals, strict=True):
        label = "MAP" if precision is None else f"{precision:.3g}"
        if averaged.tolerance is not None and label != "MAP" and _is_nearest(averaged, precision):
            label = f"* {label}"
        shades = "".join(_SHADES[min(4, math.ceil(4 * value / heaviest))] for value in row)
        bar = "█" * round(_WEIGHT_BAR * total / max(totals))
        cells = [label, *([shades] if len(averaged.temperatures) > 1 else []), f"{total:.2f}", bar]
        table.add_row(*cells)
    return table


def _is_nearest(averaged: Averaged, precision: float | None) -> bool:
    assert averaged.tolerance is not None
    finite = [value for value in averaged.precisions if value is not None]
    tolerance = averaged.tolerance
    return precision == min(finite, key=lambda value: abs(math.log(value / tolerance)))


def _validation_curve(record: Validation) -> Table:
    """Return NLL, ECE and accuracy of each prior tried, of MAP and of the marginal likelihood, with NLL as a bar."""
    title = f"{record.n} rows of {record.split}, {record.link} ({record.scheme})"
    table = Table(title=cell(title), title_justify="left")
    for title in ("prior precision", "nll", "ece", "accuracy"):
        table.add_column(title, justify="right")
    table.add_column("nll, longer is worse", min_width=_COUNT_BAR)
    points: list[Scores] = [*record.curve, record.map, *([record.marglik] if record.marglik else [])]
    low, high = min(point.nll for point in points), max(point.nll for point in points)

    def cells(point: Scores) -> tuple[str, ...]:
        length = 1 + round((_COUNT_BAR - 1) * (point.nll - low) / (high - low or 1.0))
        nll, *others = (number(value) for value in (point.nll, point.ece, point.accuracy))
        return (nll, *others, "█" * length + (" least" if nll == number(low) else ""))

    for shown, equal in groupby(record.curve, key=cells):
        precisions = [point.precision for point in equal]
        ends = dict.fromkeys(f"{precision:.3g}" for precision in (precisions[0], precisions[-1]))
        table.add_row(" to ".join(ends), *shown)
    table.add_section()
    table.add_row("MAP", *cells(record.map))
    if record.marglik is not None:
        precision = f" {record.marglik.precision:.3g}" if record.marglik.structure == "scalar" else ""
        table.add_row(f"marglik{precision}", *cells(record.marglik))
    return table


def print_answers(records: Sequence[Mapping[str, Any]]) -> None:
    """Print predictions of texts: the answer and its probability by the plain adapter and by Laplace.

    Args:
        records: Of ``predict``, each with its ``text``.
    """
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("text", "plain adapter", "lapora"):
        table.add_column(heading)
    for record in records:
        own = []
        for field in ("map_probabilities", "probabilities"):
            answer, p = max(record[field].items(), key=lambda each: each[1])
            own.append(f"{answer} {p:.2f}")
        table.add_row(*map(cell, (record["text"], *own)))
    console_of_data().print(table)


def _nats(value: float | None) -> str:
    if value is None:
        return "unknown: the rows had no labels"
    return f"{value:.2f} nats" if abs(value) < _LONG_NUMBER else f"{value:.3g} nats"
