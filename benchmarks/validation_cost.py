"""Compare the cost of a grid of priors with one prediction of the same rows: ``python -m benchmarks.validation_cost``.

Every structure under mc-joint, and KFAC under every other link.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

from benchmarks.shared_adapters import ADAPTERS
from lapora.config import DEFAULT_SAMPLES, DataSettings, FitSettings, Link, Structure
from lapora.posterior.prior import PriorPrecision
from lapora.workflows.fit import fit
from lapora.workflows.scoring import read_labelled_rows, score_rows
from lapora.workflows.task_model import open_fitted
from lapora.workflows.tune_prior import GRID, TUNING_SAMPLES

_LINKS: dict[Structure, tuple[Link, ...]] = {"kron": ("mc-joint", "mc-indep", "probit", "bridge")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["source2", "source5"], metavar="ADAPTER")
    parser.add_argument("--structures", nargs="+", choices=get_args(Structure), default=get_args(Structure))
    parser.add_argument("--rows", type=int, default=200, help="to fit on, and to predict")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("| adapter | structure | link | one prior | the grid | ratio |\n| --- | --- | --- | --- | --- | --- |")
    for name in options.names:
        with tempfile.TemporaryDirectory() as folder:
            _measure(name, Path(folder), options)


def _measure(name: str, folder: Path, options: argparse.Namespace) -> None:
    grid = [PriorPrecision("scalar", {"all": float(value)}) for value in (*GRID, 7.0)]
    model, data = ADAPTERS[name].place(folder)
    session = None
    for structure in options.structures:
        settings = FitSettings(structure=structure, name=structure, max_length=ADAPTERS[name].max_length)
        fit(model, replace(data, limit=options.rows), settings)
        session = open_fitted(model, structure, session)
        rows = read_labelled_rows(session, DataSettings(limit=options.rows))
        for link in _LINKS.get(structure, ("mc-joint",)):
            times: dict[str, list[float]] = {"one": [], "grid": []}
            for _ in range(options.repeats + 1):
                for kind, priors, samples in (("one", [], DEFAULT_SAMPLES), ("grid", grid, TUNING_SAMPLES)):
                    started = time.perf_counter()
                    score_rows(session, rows, [link], samples=samples, priors=priors)
                    times[kind].append(time.perf_counter() - started)
            one, many = (statistics.median(values[1:]) for values in times.values())
            print(f"| {name} | {structure} | {link} | {one:.2f} s | {many:.2f} s | {many / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
