"""Draw NLL and ECE against the number of labelled rows, from the curves of the averaged prior.

Run from the project's root, after ``benchmarks.prior_selection.averaging``::

    python -m benchmarks.prior_selection.draw_rows docs/gallery/rows.png [ADAPTER...]
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict

from benchmarks.prior_selection.averaging import CURVES

ADAPTERS = {
    "smollm2-source5-over": "language model, five answers,\nlearnt by heart",
    "minilm-source2": "encoder, two answers,\noverfitted",
    "minilm-source5": "encoder, five answers,\ncalibrated",
    "smollm2-source2": "language model, two answers,\ncalibrated",
}
STYLES = {
    "MAP": ("MAP, the plain adapter", "#777777", ":"),
    "marginal likelihood": ("marginal likelihood", "#D55E00", "--"),
    "temperature": ("one temperature, no prior (mean only)", "#CC79A7", (0, (1, 1))),
    "temperature, prior": ("one temperature, prior on log τ (as in eval)", "#CC79A7", "-."),
    "prior precision": ("one prior precision, by validation", "#56B4E9", (0, (5, 1))),
    "averaged": ("averaged (default)", "black", "-"),
}
_SIZES = [0, 5, 10, 20, 50, 100, 200]


def main() -> None:
    from matplotlib import pyplot

    picture, *chosen = sys.argv[1:] or ["docs/gallery/rows.png"]
    titles = {name: ADAPTERS.get(name, name) for name in chosen} if chosen else ADAPTERS
    curves = _read()
    figure, axes = pyplot.subplots(
        2, len(titles), figsize=(3.3 * len(titles), 6.4), layout="constrained", squeeze=False, sharex=True
    )
    for column, (name, title) in enumerate(titles.items()):
        for row, score in enumerate(("nll", "ece")):
            axis = axes[row][column]
            for method, (label, color, line) in STYLES.items():
                points = curves[name, method]
                places = [_SIZES.index(int(each["m"])) for each in points]
                mean = [float(each[score]) for each in points]
                spread = [float(each[f"{score}_sd"]) for each in points]
                thick = 2.4 if method == "averaged" else 1.0 if method == "temperature" else 1.6
                axis.plot(places, mean, color=color, linestyle=line, linewidth=thick, label=label)
                if method not in ("MAP", "temperature"):
                    low, high = zip(*((m - s, m + s) for m, s in zip(mean, spread, strict=True)), strict=True)
                    axis.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
            axis.set_xticks(range(len(_SIZES)), [str(size) for size in _SIZES])
            axis.grid(alpha=0.3)
            fixed = [
                float(each[score])
                for method in ("MAP", "marginal likelihood", "averaged")
                for each in curves[name, method]
            ]
            room = 0.25 * (max(fixed) - min(fixed)) + 0.01
            axis.set_ylim(max(0.0, min(fixed) - room), max(fixed) + room)
        axes[0][column].set_title(f"{name}\n{title}", fontsize=9)
        axes[1][column].set_xlabel("labelled rows m")
    axes[0][0].set_ylabel("NLL of the other rows, nats")
    axes[1][0].set_ylabel("ECE of the other rows")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(picture, dpi=100)


def _read() -> dict[tuple[str, str], list[dict[str, str]]]:
    found = defaultdict(list)
    with CURVES.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            found[line["adapter"], line["method"]].append(line)
    return found


if __name__ == "__main__":
    main()
