"""Temperature scaling (Guo et al. 2017)."""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

LOWEST, HIGHEST = 0.01, 100.0


def fit_temperature(log_p: Tensor, targets: Tensor) -> float:
    """The temperature T of least NLL of ``softmax(log_p / T)``; NLL is convex in 1/T.

    Args:
        log_p: ``(N, C)`` log-probabilities of rows that are not going to be scored.
        targets: ``(N,)`` their labels.

    Returns:
        T, within 0.01 and 100.
    """

    def nll(log_temperature: float) -> float:
        scaled = torch.log_softmax(log_p / math.exp(log_temperature), dim=1)
        return float(-scaled.gather(1, targets.unsqueeze(1)).mean())

    found = minimize_scalar(
        nll, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded", options={"xatol": 1e-6}
    )
    return math.exp(float(found.x))
