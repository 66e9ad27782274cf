"""Tables of the results: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.real.labels import CONSTANT, PLAIN, SCORES
from benchmarks.real.run import Run


def markdown(runs: Sequence[Sequence[Run]]) -> Iterator[str]:
    """Yield the lines of a table for each experiment with skill, and of a list of the others.

    Args:
        runs: The runs of each experiment, one for each seed.
    """
    scored = [[run for run in seeds if run.scores] for seeds in runs]
    skilled = [seeds for seeds in scored if seeds and seeds[0].skilled]
    for seeds in skilled:
        yield from _table(seeds)
    if chance := [seeds[0] for seeds in scored if seeds and not seeds[0].skilled]:
        yield "\n### No skill: not more accurate than the most frequent answer by two standard errors\n"
        yield "| experiment | rows | most frequent answer | MAP |"
        yield "| --- | --- | --- | --- |"
        for run in chance:
            constant, plain = run.scores[CONSTANT], run.scores[PLAIN]
            accuracies = f"{constant['accuracy']:.3f} | {plain['accuracy']:.3f}"
            yield f"| {run.experiment.name} | {plain['n']} | {accuracies} |"


def _table(seeds: Sequence[Run]) -> Iterator[str]:
    first = seeds[0]
    rows, count = first.scores[PLAIN]["n"], len(seeds)
    yield f"\n### {first.experiment.name}: {rows} rows scored, {count} seed{'s' * (count > 1)}\n"
    yield "| method | accuracy | NLL | NLL less MAP's (95 %) | ECE | seconds and memory over MAP's |"
    yield "| --- | --- | --- | --- | --- | --- |"
    scores, costs = [run.scores for run in seeds], first.costs
    for method in dict.fromkeys(method for each in scores for method in each):
        found = [each[method] for each in scores if method in each]
        cells = [_spread([each[score] for each in found]) for score in SCORES]
        gain = ""
        if differences := [each["difference"] for each in found if each.get("difference")]:
            means = [statistics.fmean(values) for values in zip(*differences, strict=True)]
            gain = f"{means[0]:+.3f} ({means[1]:+.3f} to {means[2]:+.3f})"
        cost = costs.get(method)
        ratio = f"{cost['seconds']:.2f}, {cost['memory']:.2f}" if cost else ""
        yield f"| {method} | {cells[0]} | {cells[1]} | {gain} | {cells[2]} | {ratio} |"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def write_csv(file: Path, runs: Sequence[Sequence[Run]]) -> None:
    """Write a line for every experiment, seed and method."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        out = csv.writer(stream, lineterminator="\n")
        out.writerow(["experiment", "seed", "method", *SCORES])
        for run in (run for seeds in runs for run in seeds):
            for method, scores in run.scores.items():
                out.writerow([run.experiment.name, run.seed, method, *(f"{scores[score]:.4f}" for score in SCORES)])
