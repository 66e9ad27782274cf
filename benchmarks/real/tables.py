"""Tables of the results: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SCORES = ("accuracy", "nll", "ece")
_DEVIATIONS = 2.0

Results = Mapping[tuple[str, int], Mapping[str, Mapping[str, Any]]]
"""Scores of every method by experiment and seed."""


def skilled(seeds: Sequence[Mapping[str, Mapping[str, Any]]], n: int) -> bool:
    """Whether MAP is more accurate than the constant predictor by two standard errors, on average over seeds."""
    constant = statistics.fmean(each["answer frequencies only"]["accuracy"] for each in seeds)
    plain = statistics.fmean(each["MAP"]["accuracy"] for each in seeds)
    return plain > constant + _DEVIATIONS * (constant * (1 - constant) / n) ** 0.5


def markdown(results: Results, rows: Mapping[str, int], costs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the tables, experiments with skill first."""
    names = list(dict.fromkeys(name for name, _ in results))
    by_name = {name: [each for (own, _), each in results.items() if own == name] for name in names}
    order = sorted(names, key=lambda name: not skilled(by_name[name], rows[name]))
    for name in order:
        seeds = by_name[name]
        note = "" if skilled(seeds, rows[name]) else ", **at chance: not in the headline**"
        yield f"\n### {name}: {rows[name]} rows scored, {len(seeds)} seed{'s' * (len(seeds) > 1)}{note}\n"
        yield "| method | accuracy | NLL | NLL less MAP's (95 %) | ECE | seconds and memory over MAP's |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for method in dict.fromkeys(method for each in seeds for method in each):
            found = [each[method] for each in seeds if method in each]
            cells = [_spread([each[score] for each in found]) for score in SCORES]
            differences = [each["difference"] for each in found if each.get("difference")]
            gain = ""
            if differences:
                means = [statistics.fmean(values) for values in zip(*differences, strict=True)]
                gain = f"{means[0]:+.3f} ({means[1]:+.3f} to {means[2]:+.3f})"
            cost = costs.get(name, {}).get(method)
            ratio = f"{cost['seconds']:.2f}, {cost['memory']:.2f}" if cost else ""
            yield f"| {method} | {cells[0]} | {cells[1]} | {gain} | {cells[2]} | {ratio} |"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def write_csv(file: Path, results: Results) -> None:
    """Write a line for every experiment, seed and method."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        out = csv.writer(stream, lineterminator="\n")
        out.writerow(["experiment", "seed", "method", *SCORES])
        for (name, seed), methods in results.items():
            for method, scores in methods.items():
                out.writerow([name, seed, method, *(f"{scores[score]:.4f}" for score in SCORES)])
