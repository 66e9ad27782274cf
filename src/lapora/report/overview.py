"""The built-in tasks, and what a posterior is."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lapora.posterior.prior import PriorPrecision
from lapora.tasks.quoting import printable


def cell(text: str) -> Text:
    """Text as it is: no markup that data brought along, no terminal controls."""
    return Text(printable(text, 1000))


def print_tasks(tasks: list[dict[str, Any]]) -> None:
    """Print the built-in tasks: a table for a terminal, tab-separated lines for a pipe."""
    header = ("task", "model kinds", "answers", "metric", "Hub")
    rows = [
        (
            task["task"],
            ", ".join(task["kinds"]),
            task["choices"] if isinstance(task["choices"], str) else " | ".join(task["choices"]),
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


def print_manifest(manifest: dict[str, Any]) -> None:
    """Print what a posterior is."""
    prior = manifest["prior"]
    precision = PriorPrecision.from_manifest(prior).describe()
    lines = {
        "structure": f"{manifest['structure']}, {manifest['weight_sharing']}, {manifest['fisher']} Fisher",
        "subset": f"{manifest['subset']}, {len(manifest['parameters'])} matrices",
        "base model": f"{manifest['base_model']['name']} ({manifest['base_model']['dtype']})",
        "task": f"{manifest['task']['task']}, {', '.join(manifest['answers']['choices'])}",
        "data": f"{manifest['data']['n']} rows of {manifest['data']['split']}",
        "log-likelihood": _nats(manifest["log_likelihood"]),
        "prior precision": f"{precision} ({prior['method']}, {prior['structure']})",
        "log marginal likelihood": _nats(prior["log_marginal_likelihood"]),
    }
    if manifest.get("kept", 1.0) < 1.0:
        lines["structure"] += f", {manifest['kept']:.1%} of the curvature's trace kept"
    table = Table(show_header=False)
    for key, value in lines.items():
        table.add_row(key, cell(value))
    console = Console()
    console.print(table)
    if "validation" in prior:
        console.print(_validation_curve(prior["validation"]))


_BAR = 30


def _validation_curve(record: dict[str, Any]) -> Table:
    """NLL, ECE and accuracy of every prior tried, of MAP and of the marginal likelihood's, NLL drawn as a bar."""
    title = f"{record['n']} rows of {record['split']}, {record['link']} ({record['scheme']})"
    table = Table(title=cell(title), title_justify="left")
    for title in ("prior precision", "nll", "ece", "accuracy"):
        table.add_column(title, justify="right")
    table.add_column("nll, longer is worse", min_width=_BAR)
    rows = [(f"{point['precision']:.3g}", point) for point in record["curve"]] + [("MAP", record["map"])]
    evidence = record["marglik"]
    several = evidence["structure"] != "scalar"
    rows.append(("marglik" if several else f"marglik {evidence['precision']:.3g}", evidence))
    values = [point["nll"] for _, point in rows]
    low, high = min(values), max(values)
    for label, point in rows:
        if label == "MAP":
            table.add_section()
        length = 1 + round((_BAR - 1) * (point["nll"] - low) / (high - low or 1.0))
        least = " least" if point["nll"] == low else ""
        table.add_row(label, *(f"{point[key]:.3f}" for key in ("nll", "ece", "accuracy")), "█" * length + least)
    return table


def _nats(value: float | None) -> str:
    return "unknown: the rows had no labels" if value is None else f"{value:.2f} nats"
