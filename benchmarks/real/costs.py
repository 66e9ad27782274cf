"""CPU seconds and peak memory of predicting rows by every method, as ratios to MAP's; prints them as JSON.

Run as ``python -m benchmarks.real.costs ADAPTER BASE POSTERIORS ROWS RUN``: posteriors by name and with commas between,
and the folder of checkpoints that are the ensemble. Everything is measured in one process, after the model is loaded.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.peak import peak_memory, restart_peak
from benchmarks.real.tfb import SAMPLES, sampled
from lapora.config import DataSettings, EvalSettings, ModelSettings
from lapora.workflows import baselines
from lapora.workflows.rows import read_labelled_rows
from lapora.workflows.scoring import forward_table, score_rows
from lapora.workflows.task_model import open_fitted

_SIGMA = 0.01
"""Deviation of the sampled weights: it changes no time."""
_ROUNDS = 3


def main() -> None:
    adapter, base, names, limit, run = sys.argv[1:]
    model = ModelSettings(adapter, base_model=base, device="cpu", dtype="float32")
    settings = EvalSettings()
    by_name = {name: open_fitted(model, name) for name in names.split(",")}
    fitted = next(iter(by_name.values()))
    rows = read_labelled_rows(fitted.posterior, fitted.model.kind, DataSettings(limit=int(limit)))
    coded = fitted.model.encode(rows.examples)
    at_map = forward_table(fitted.model, coded)
    methods: dict[str, Callable[[], object]] = {
        "map": lambda: forward_table(fitted.model, coded),
        "mc-dropout": lambda: baselines.mc_dropout(fitted, [rows], settings.dropout_samples, 0),
        "ensemble": lambda: baselines.ensemble(model, fitted, [rows], [at_map], [Path(run)]),
        "TFB": lambda: sampled(fitted, coded, _SIGMA, SAMPLES),
    }
    for name, own in by_name.items():
        methods[f"laplace {name}"] = lambda own=own: score_rows(own, rows, ["mc-joint"], samples=settings.samples)
    costs: dict[str, list[tuple[float, float]]] = {label: [] for label in methods}
    for _ in range(_ROUNDS):
        for label, predict in methods.items():
            costs[label].append(measured(predict))
    seconds, memory = (
        {label: min(each[index] for each in found) for label, found in costs.items()} for index in range(2)
    )
    print(
        json.dumps(
            {
                label: {"seconds": seconds[label] / seconds["map"], "memory": memory[label] / memory["map"]}
                for label in methods
            }
        )
    )


def measured(predict: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU seconds of a call and the peak of the process's memory during it, in MiB."""
    restart_peak()
    started = time.process_time()
    predict()
    seconds = time.process_time() - started
    return seconds, peak_memory()


if __name__ == "__main__":
    main()
