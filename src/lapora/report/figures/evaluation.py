"""Figures of one evaluation: reliability diagrams, histograms of confidence, risk-coverage curves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from lapora import metrics
from lapora.report.figures.style import Picture, line_style, new_figure, style

_MOST_CURVES = 8
_LEAST_COVERAGE = 0.05
_NORMAL_95 = 1.96
_FEW = 10
"""Number of rows below which a bin's accuracy is unreliable."""


def evaluation_pictures(
    tables: Mapping[str, Tensor], targets: Tensor, after: Sequence[str], rows: str = ""
) -> list[Picture]:
    """Return all figures of an evaluation.

    Args:
        tables: ``(N, C)`` log-probabilities by method; ``map`` is among them.
        targets: ``(N,)`` labels.
        after: Methods to show beside MAP, each in its own figures.
        rows: What was scored, as ``boolq, 300 rows of validation``: the title of each figure.
    """
    pictures = []
    with style():
        for label in after:
            pair = {"map": tables["map"], label: tables[label]}
            ending = "" if len(after) == 1 else "-" + re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-")
            pictures += [_reliability(pair, targets, ending, rows), _histograms(pair, targets, ending, rows)]
        pictures.append(_risk_coverage(tables, targets, after, rows))
    return pictures


def _reliability(pair: Mapping[str, Tensor], targets: Tensor, ending: str, rows: str) -> Picture:
    figure = new_figure(7.4, 4.8, rows)
    axes = figure.subplots(2, len(pair), sharex=True, squeeze=False, height_ratios=[3, 1])
    most = 0
    for column, (label, log_p) in enumerate(pair.items()):
        upper, lower = axes[0, column], axes[1, column]
        bins = [each for each in metrics.reliability_bins(log_p, targets) if each.count]
        scores = metrics.evaluate(log_p, targets)
        centres = [(each.low + each.high) / 2 for each in bins]
        width = 1 / metrics.ECE_BINS
        height = np.array([each.accuracy or 0 for each in bins])
        confidence = np.array([each.confidence or 0 for each in bins])
        enough = np.array([each.count >= _FEW for each in bins])
        colors = np.where(enough, "#d9d9d9", "none")
        upper.bar(centres, height, width, color=colors, edgecolor="#333333", linewidth=0.7)
        gap = np.minimum(height, confidence), np.abs(height - confidence)
        upper.bar(
            centres, gap[1], width, gap[0], color=np.where(enough, "#e69f0066", "none"), hatch="////", linewidth=0
        )
        ends = np.array([_wilson(each.accuracy or 0, each.count) for each in bins]).T
        upper.errorbar(
            confidence,
            height,
            np.clip([height - ends[0], ends[1] - height], 0, None),
            fmt="o",
            color="black",
            markersize=4,
            linewidth=1,
            capsize=2,
        )
        upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
        upper.set(title=f"{label}\nECE {scores['ece']:.3f}   NLL {scores['nll']:.3f}", ylim=(0, 1.02))
        counts = [each.count for each in bins]
        shades = np.where(enough, "#7f7f7f", "none")
        bars = lower.bar(centres, counts, width, color=shades, edgecolor="#333333", linewidth=0.7)
        lower.bar_label(bars, fontsize=6.5, padding=1)
        lower.set(xlabel="confidence")
        most = max(most, *counts)
    lowest = math.floor(metrics.ECE_BINS / next(iter(pair.values())).shape[1]) / metrics.ECE_BINS
    axes[0, 0].set(ylabel="accuracy", xlim=(max(0.0, lowest - 0.02), 1.02))
    axes[1, 0].set(ylabel="rows")
    for lower in axes[1]:
        lower.set_ylim(0, 1.25 * most)
    for lower in axes[:, 1:].flat:
        lower.tick_params(labelleft=False)
    sides = f"{' (left) and '.join(pair)} (right)" if len(pair) == 2 else next(iter(pair))
    caption = (
        f"Reliability of {sides}: bars and points are the accuracy in each bin of "
        f"confidence, points at the bin's mean confidence with a 95 % Wilson interval; below, rows in each bin. "
        "Calibrated probabilities lie on the dashed line; the hatched part of a bar is the gap to it. Bins with fewer "
        f"than {_FEW} rows are hollow."
    )
    return Picture(f"reliability{ending}", caption, figure)


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927)."""
    square = _NORMAL_95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = _NORMAL_95 * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return middle - half, middle + half


def _histograms(pair: Mapping[str, Tensor], targets: Tensor, ending: str, rows: str) -> Picture:
    figure = new_figure(7.4, 3.3, rows)
    (axes,) = figure.subplots(1, len(pair), sharex=True, sharey=True, squeeze=False)
    lowest = 1 / next(iter(pair.values())).shape[1]
    edges = np.linspace(lowest, 1, 21)
    for axis, (label, log_p) in zip(axes, pair.items(), strict=True):
        confidence, predicted = log_p.exp().max(dim=1)
        right = predicted == targets
        values = [confidence[right].numpy(), confidence[~right].numpy()]
        _, _, groups = axis.hist(
            values, edges, stacked=True, color=["#d9d9d9", "#6e6e6e"], edgecolor="#222222", linewidth=0.6
        )
        for bar in groups[1]:
            bar.set_hatch("////")
        mean, accuracy = float(confidence.mean()), float(right.double().mean())
        axis.axvline(mean, color="black", linestyle="-", linewidth=1.3)
        axis.axvline(accuracy, color="black", linestyle=":", linewidth=1.6)
        axis.set(title=f"{label}\nmean confidence {mean:.3f}, accuracy {accuracy:.3f}", xlabel="confidence")
    axes[0].set_ylabel("rows")
    handles = [groups[0][0], groups[1][0], *axes[0].lines[:2]]
    names = ["right", "wrong", "mean confidence", "accuracy"]
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    caption = (
        f"Confidence of right and wrong answers under {' and '.join(pair)}; with calibrated probabilities the two "
        "vertical lines coincide."
    )
    return Picture(f"confidence{ending}", caption, figure)


def _risk_coverage(tables: Mapping[str, Tensor], targets: Tensor, first: Sequence[str], rows: str) -> Picture:
    """Draw one curve for all methods with the same ranking of the rows, such as MAP and a temperature with two answers.

    If there are too many, draw the baselines and ``first``.
    """
    order = [label for label in tables if not label.startswith("laplace") or label in first]
    tables = {label: tables[label] for label in (*order, *(label for label in tables if label not in order))}
    curves: dict[tuple[bytes, bytes], list[str]] = {}
    for label, log_p in tables.items():
        if label != "constant":
            coverage, risk = metrics.risk_coverage(log_p, targets)
            curves.setdefault((coverage.numpy().tobytes(), risk.numpy().tobytes()), []).append(label)
    shown = list(curves.values())[:_MOST_CURVES]
    figure = new_figure(5.8, 4.5, rows)
    axis: Axes = figure.subplots()
    for index, labels in enumerate(shown):
        coverage, risk = metrics.risk_coverage(tables[labels[0]], targets)
        area = metrics.evaluate(tables[labels[0]], targets)["aurc"]
        # The error rate of the first few rows is too noisy to draw.
        drawn = (coverage >= _LEAST_COVERAGE) | (coverage == coverage[-1])
        every = max(1, int(drawn.sum()) // 9)
        axis.plot(
            coverage[drawn].numpy(),
            risk[drawn].numpy(),
            label=f"{', '.join(labels)}: {area:.3f}",
            markevery=(index * every // len(shown), every),
            **line_style(index),
        )
    axis.set(xlabel="coverage: share of rows answered", ylabel="risk: error rate")
    axis.set(xlim=(0, 1.01), ylim=(0, None))
    longest = max(len(", ".join(labels)) for labels in shown)
    title = "area under the curve"
    figure.legend(
        title=title, title_fontsize=8, loc="outside lower center", ncols=1 if longest > 30 or len(shown) < 3 else 2
    )
    caption = (
        "Risk against coverage: error rate if only the most confident rows are answered (at least "
        f"{_LEAST_COVERAGE:.0%} of them); lower is better."
    )
    if len(curves) > len(shown):
        caption += f" The first {len(shown)} curves; {len(curves) - len(shown)} more are in the table."
    return Picture("risk-coverage", caption, figure)
