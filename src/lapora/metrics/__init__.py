"""Metrics of class probabilities and of regressions: scores, intervals, calibration, selective prediction."""

from lapora.metrics.bins import Bin, reliability_bins
from lapora.metrics.bootstrap import Interval, bootstrap_intervals, intervals, paired_interval
from lapora.metrics.scores import (
    ADAPTIVE_BINS,
    ECE_BINS,
    HIGHER_IS_BETTER,
    auroc,
    constant_predictor,
    evaluate,
    fit_temperature,
    minimize_over_temperature,
    risk_coverage,
    row_entropy,
    row_nll,
    threshold_for_coverage,
)

__all__ = [
    "ADAPTIVE_BINS",
    "ECE_BINS",
    "HIGHER_IS_BETTER",
    "Bin",
    "Interval",
    "auroc",
    "bootstrap_intervals",
    "constant_predictor",
    "evaluate",
    "fit_temperature",
    "intervals",
    "minimize_over_temperature",
    "paired_interval",
    "reliability_bins",
    "risk_coverage",
    "row_entropy",
    "row_nll",
    "threshold_for_coverage",
]
