"""Measure how the cost of fit and predict grows: ``python -m benchmarks.scaling [PICTURE.png]``.

One size is varied at a time around a small Llama-shaped model; an exponent is fitted to time against size by least
squares in logarithms. An exponent of 1 is linear; below 1, fixed costs still matter at that size.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np

from benchmarks import floor as measured
from benchmarks.models import subject

BASE: dict[str, Any] = {
    "kind": "llama-134M",
    "classes": 2,
    "tokens": 32,
    "rows": 64,
    "batch_size": 16,
    "rank": 8,
    "layers": 4,
    "width": 256,
    "heads": 4,
}
SIZES: dict[str, list[int]] = {
    "rows": [32, 64, 128, 256],
    "tokens": [16, 32, 64, 128],
    "rank": [4, 8, 16, 32],
    "classes": [2, 3, 5, 9],
    "layers": [2, 4, 8, 16],
}
_ROUNDS = 3


def main() -> None:
    picture = sys.argv[1] if len(sys.argv) > 1 else None
    found: dict[str, dict[str, list[float]]] = {}
    print("| varied | sizes | floor, s | fit, s | predict, s | exponent of floor, fit, predict |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, sizes in SIZES.items():
        times = {"floor": [], "fit": [], "predict": []}
        for size in sizes:
            for kind, seconds in _measure({**BASE, name: size}).items():
                times[kind].append(seconds)
        found[name] = times
        exponents = [_exponent(name, values) for values in times.values()]
        cells = [" ".join(f"{value:.2f}" for value in values) for values in times.values()]
        print(
            f"| {name} | {' '.join(map(str, sizes))} | {' | '.join(cells)} | "
            f"{' '.join(f'{exponent:.2f}' for exponent in exponents)} |",
            flush=True,
        )
    if picture:
        _draw(found, picture)


def _exponent(name: str, seconds: list[float]) -> float:
    # C answers cost one forward and C-1 backward passes: the passes are what grows.
    grows = [size + int(name == "classes") for size in SIZES[name]]
    return float(np.polyfit(np.log(grows), np.log(seconds), 1)[0])


def _measure(case: dict[str, Any]) -> dict[str, float]:
    it = subject(**case)
    posterior = measured.fit(it).on_device(it.layers, it.answers.device, it.layers[0].module.weight.dtype)
    runs = {
        "floor": lambda: measured.floor(it, it.classes - 1),
        "fit": lambda: measured.fit(it),
        "predict": lambda: measured.predict(it, posterior, "mc-joint"),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def _draw(found: dict[str, dict[str, list[float]]], picture: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SIZES), figsize=(3.4 * len(SIZES), 3.8), layout="constrained", sharey=True)
    styles = {"floor": ("k", "--", "s"), "fit": ("tab:blue", "-", "o"), "predict": ("tab:orange", "-.", "^")}
    for axis, (name, times) in zip(axes, found.items(), strict=True):
        for kind, values in times.items():
            colour, line, marker = styles[kind]
            label = f"{kind}, exponent {_exponent(name, values):.2f}"
            axis.plot(SIZES[name], values, color=colour, linestyle=line, marker=marker, label=label)
        axis.legend(fontsize="small")
        axis.set(xscale="log", yscale="log", xlabel=name, title=f"cost against {name}")
        axis.set_xticks(SIZES[name], [str(size) for size in SIZES[name]], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("seconds")
    axes[0].set_yticks([0.2, 0.5, 1.0, 2.0], ["0.2", "0.5", "1", "2"])
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
