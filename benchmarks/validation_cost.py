"""What a grid of priors costs beside one prediction of the same rows: ``python -m benchmarks.validation_cost``."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.shared_adapters import ADAPTERS
from lapora.config import DEFAULT_SAMPLES, DataSettings, FitSettings, Structure
from lapora.posterior.prior import PriorPrecision
from lapora.workflows.fit import fit
from lapora.workflows.scoring import read_labelled_rows, score_rows
from lapora.workflows.session import open_session
from lapora.workflows.validation import GRID, TUNING_SAMPLES

_REPEATS = 5


def main() -> None:
    names = sys.argv[1:] or ["source2", "source5"]
    structures: tuple[Structure, ...] = ("kron", "diag", "lowrank")
    print("| adapter | structure | one prior | the grid | ratio |\n| --- | --- | --- | --- | --- |")
    grid = [PriorPrecision("scalar", {"all": float(value)}) for value in (*GRID, 7.0)]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            model, data = ADAPTERS[name].place(Path(folder))
            session = None
            for structure in structures:
                settings = FitSettings(structure=structure, name=structure, max_length=ADAPTERS[name].max_length)
                fit(model, replace(data, limit=200), settings)
                session = open_session(model, structure, session)
                rows = read_labelled_rows(session, DataSettings(limit=200))
                times: dict[str, list[float]] = {"one": [], "grid": []}
                for _ in range(_REPEATS + 1):
                    for kind, priors, samples in (("one", [], DEFAULT_SAMPLES), ("grid", grid, TUNING_SAMPLES)):
                        started = time.perf_counter()
                        score_rows(session, rows, ["mc-joint"], samples=samples, priors=priors)
                        times[kind].append(time.perf_counter() - started)
                one, many = (statistics.median(values[1:]) for values in times.values())
                print(f"| {name} | {structure} | {one:.2f} s | {many:.2f} s | {many / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
