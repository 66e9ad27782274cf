"""Compare the cost of averaged predictions, and of a grid of priors, with one prediction of the same rows.

``python -m benchmarks.validation_cost``: every structure under mc-joint, and KFAC under every other link. The average
is over a prior made with no labelled row, with 20 and with 250. Times are medians of CPU seconds of this process, in
alternation; loading is excluded.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

from benchmarks.shared_adapters import ADAPTERS
from lapora.config import DEFAULT_SAMPLES, DataSettings, FitSettings, Link, ModelSettings, PriorSettings, Structure
from lapora.posterior.prior import PriorPrecision
from lapora.workflows.fit import fit
from lapora.workflows.rows import read_labelled_rows
from lapora.workflows.scoring import score_rows
from lapora.workflows.task_model import Fitted, open_fitted
from lapora.workflows.tune_prior import GRID, TUNING_SAMPLES, tune_prior

_LINKS: dict[Structure, tuple[Link, ...]] = {"kron": ("mc-joint", "mc-indep", "probit", "bridge")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["source2", "source5"], metavar="ADAPTER")
    parser.add_argument("--structures", nargs="+", choices=get_args(Structure), default=get_args(Structure))
    parser.add_argument("--links", nargs="+", choices=get_args(Link), help="only these links")
    parser.add_argument("--rows", type=int, default=200, help="number of rows to fit on, and to predict")
    parser.add_argument("--tuned", type=int, nargs="+", default=[0, 20, 250], help="labelled rows of the average")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    heads = [f"average, m = {count}" for count in options.tuned]
    print("| " + " | ".join(["adapter", "structure", "link", "one prior", *heads, "grid"]) + " |")
    print("| --- " * (len(heads) + 5) + "|")
    for name in options.names:
        with tempfile.TemporaryDirectory() as folder:
            _measure(name, Path(folder), options)


def _measure(name: str, folder: Path, options: argparse.Namespace) -> None:
    model, data = ADAPTERS[name].place(folder)
    fitted = None
    for structure in options.structures:
        settings = FitSettings(structure=structure, name=structure, max_length=ADAPTERS[name].max_length)
        fit(model, replace(data, limit=options.rows), settings)
        for link in _LINKS.get(structure, ("mc-joint",)):
            if options.links and link not in options.links:
                continue
            averages = [fitted := _average(model, data, structure, link, m, fitted) for m in options.tuned]
            runs = _runs(averages, link, options.rows)
            one, *others = _times(runs, options.repeats)
            sizes = [f" ({len(each.averaging.components)} components)" for each in averages] + [""]
            cells = [f"{taken / one:.2f}{size}" for taken, size in zip(others, sizes, strict=True)]
            print("| " + " | ".join([name, structure, link, f"{one:.2f} s", *cells]) + " |", flush=True)


def _runs(averages: list[Fitted], link: Link, limit: int) -> list[Callable[[], object]]:
    """One prior precision, each average, and a grid."""
    first = averages[0]
    rows = read_labelled_rows(first.posterior, first.model.kind, DataSettings(limit=limit))
    one, *grid = [PriorPrecision("scalar", {"all": float(value)}) for value in (7.0, *GRID, 7.0)]
    return [
        lambda: score_rows(first, rows, [link], samples=DEFAULT_SAMPLES, priors=[one]),
        *(lambda it=it: score_rows(it, rows, [link], samples=DEFAULT_SAMPLES) for it in averages),
        lambda: score_rows(first, rows, [link], samples=TUNING_SAMPLES, priors=grid),
    ]


def _average(
    model: ModelSettings, data: DataSettings, name: Structure, link: Link, rows: int, earlier: Fitted | None
) -> Fitted:
    """Return the adapter with its prior averaged over, given some labelled rows."""
    labelled = DataSettings(task=data.task, data_dir=data.data_dir, split="validation", limit=rows) if rows else None
    if labelled is not None:
        tune_prior(model, labelled, PriorSettings(name=name, link=link))
    return open_fitted(model, name, earlier)


def _times(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median CPU seconds of each, after a warm-up."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for own, run in zip(times, runs, strict=True):
            started = time.process_time()
            run()
            if turn:
                own.append(time.process_time() - started)
    return [statistics.median(own) for own in times]


if __name__ == "__main__":
    main()
