"""How good probabilities are: scores, their bootstrap intervals, calibration and selective prediction."""

from lapora.metrics.bins import Bin, reliability_bins
from lapora.metrics.bootstrap import Interval, intervals, paired_interval
from lapora.metrics.ranking import auroc, risk_coverage, threshold_for_coverage
from lapora.metrics.scores import (
    ADAPTIVE_BINS,
    ECE_BINS,
    HIGHER_IS_BETTER,
    constant_predictor,
    evaluate,
    row_entropy,
    row_nll,
)
from lapora.metrics.temperature import fit_temperature

__all__ = [
    "ADAPTIVE_BINS",
    "ECE_BINS",
    "HIGHER_IS_BETTER",
    "Bin",
    "Interval",
    "auroc",
    "constant_predictor",
    "evaluate",
    "fit_temperature",
    "intervals",
    "paired_interval",
    "reliability_bins",
    "risk_coverage",
    "row_entropy",
    "row_nll",
    "threshold_for_coverage",
]
