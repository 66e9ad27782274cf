"""Figures of a regression: calibration of quantiles, and histograms of the probability integral transform."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from lapora.metrics.mixtures import PIT_BINS, pit_histogram
from lapora.report.figures.style import Picture, line_style, new_figure, style


def regression_pictures(levels: Mapping[str, Tensor]) -> list[Picture]:
    """Return the figures of a regression.

    Args:
        levels: Probability integral transforms ``(M,)`` by method: the predicted probability of a value below the
            target.
    """
    with style():
        return [_quantiles(levels), _histograms(levels)]


def _quantiles(levels: Mapping[str, Tensor]) -> Picture:
    figure = new_figure(4.8, 4.6)
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    grid = np.linspace(0, 1, 101)
    for index, (label, found) in enumerate(levels.items()):
        observed = np.searchsorted(np.sort(found.numpy()), grid, side="right") / max(1, len(found))
        axis.plot(grid, observed, label=label, markevery=(index * 2, 10), **line_style(index))
    axis.set(xlabel="predicted probability of a smaller value", ylabel="share of targets", xlim=(0, 1), ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=2)
    caption = (
        "Calibration of quantiles: the share of targets below each predicted quantile. Calibrated predictions lie on "
        "the dashed line; too narrow ones are above it on the left and below it on the right."
    )
    return Picture("quantiles", caption, figure)


def _histograms(levels: Mapping[str, Tensor]) -> Picture:
    figure = new_figure(7.4, 3.1)
    axes = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    centres = (np.arange(PIT_BINS) + 0.5) / PIT_BINS
    for axis, (label, found) in zip(axes, levels.items(), strict=True):
        shares = pit_histogram(found)
        axis.bar(centres, shares, 1 / PIT_BINS, color="#d9d9d9", edgecolor="#333333", linewidth=0.7)
        axis.axhline(1 / PIT_BINS, color="black", linestyle="--", linewidth=1)
        axis.set(title=label, xlabel="probability integral transform", xlim=(0, 1))
    axes[0].set_ylabel("share of targets")
    caption = (
        "Histograms of the probability integral transform. They are flat for calibrated predictions, high at both "
        "ends for too narrow ones."
    )
    return Picture("pit", caption, figure)
