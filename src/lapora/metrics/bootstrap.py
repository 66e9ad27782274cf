"""Percentile bootstrap over rows (Efron 1979), for scores and for paired differences between methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lapora.metrics.weighted import WeightedScores

RESAMPLES = 1000
_CHUNK_ELEMENTS = 4_000_000


class Interval(NamedTuple):
    """A 95 % interval: the 2.5 % and 97.5 % quantiles of a bootstrap."""

    low: float
    high: float


def intervals(
    tables: Mapping[str, Tensor],
    targets: Tensor,
    *,
    reference: str | None = None,
    with_mcc: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """Compute 95 % intervals of the scores of class probabilities; see :func:`bootstrap_intervals`.

    Args:
        tables: ``(N, C)`` log-probabilities of each method, float64.
        targets: ``(N,)`` labels, int64.
        reference: Method to which paired differences are computed.
        with_mcc: Add the Matthews correlation coefficient.
        resamples: Number of resamples.
        seed: Random seed.
    """
    scorers = {key: WeightedScores(log_p, targets, with_mcc=with_mcc) for key, log_p in tables.items()}
    return bootstrap_intervals(scorers, len(targets), reference=reference, resamples=resamples, seed=seed)


def bootstrap_intervals(
    scorers: Mapping[str, Callable[[Tensor], dict[str, Tensor]]],
    count: int,
    *,
    reference: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """Compute 95 % intervals of all scores of several methods, on the same resamples.

    Args:
        scorers: The scores of each method as a function of row weights ``(R, N)``.
        count: Number of rows N.
        reference: Method to which paired differences are computed.
        resamples: Number of resamples.
        seed: Random seed.

    Returns:
        Intervals of the scores by method and score, and intervals of the differences to ``reference`` (empty without
        one). Scores undefined in more than 5 % of the resamples are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, list[dict[str, Tensor]]] = {key: [] for key in scorers}
    remaining = resamples
    while remaining > 0:
        size = min(remaining, max(1, _CHUNK_ELEMENTS // count))
        remaining -= size
        chosen = torch.randint(count, (size, count), generator=generator)
        weights = torch.zeros(size, count, dtype=torch.float64)
        weights.scatter_add_(1, chosen, torch.ones(size, count, dtype=torch.float64))
        for key, scorer in scorers.items():
            drawn[key].append(scorer(weights))
    values = {
        key: {score: torch.cat([part[score] for part in parts]) for score in parts[0]} for key, parts in drawn.items()
    }
    own = {key: _intervals_of(scores) for key, scores in values.items()}
    if reference is None:
        return own, {}
    base = values[reference]
    differences = {
        key: _intervals_of({score: value - base[score] for score, value in scores.items()})
        for key, scores in values.items()
        if key != reference
    }
    return own, differences


def _intervals_of(scores: Mapping[str, Tensor]) -> dict[str, Interval]:
    found = {}
    for score, drawn in scores.items():
        defined = drawn[torch.isfinite(drawn)]
        if len(defined) >= 0.95 * len(drawn):
            found[score] = _quantiles(defined)
    return found


def paired_interval(differences: Tensor, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval of the mean of paired differences.

    Args:
        differences: ``(N,)``, in the unit of the score.
        resamples: Number of resamples.
        seed: Random seed.
    """
    generator = torch.Generator().manual_seed(seed)
    means = [
        differences[torch.randint(len(differences), (len(differences),), generator=generator)].mean()
        for _ in range(resamples)
    ]
    return _quantiles(torch.stack(means))


def _quantiles(values: Tensor) -> Interval:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Interval(low, high)
