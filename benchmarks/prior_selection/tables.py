"""Log-probabilities of each adapter's rows at every prior precision and temperature, by mc-joint."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.prior_selection.moments import PRECISIONS, Moments, Part
from lapora.likelihoods.base import LogitMoments
from lapora.likelihoods.categorical import grid_log_probabilities
from lapora.posterior.averaging import TEMPERATURES, TrainingCurve

Array = NDArray[np.float64]

_POINTS = 128


@dataclass(frozen=True)
class Tables:
    """One adapter's figures; the last prior precision is MAP.

    Attributes:
        labels: Of the held-out rows, ``(N,)``.
        log_p: Of the held-out rows, ``(D+1, T, N, C)``.
        training: Log-probability of the training rows' labels at temperature 1, ``(D+1, M)``.
        mean: Logits of the held-out rows, ``(N, C)``.
        evidence: Prior precision by marginal likelihood.
    """

    labels: NDArray[np.int64]
    log_p: NDArray[np.float32]
    training: NDArray[np.float32]
    mean: Array
    evidence: float

    @classmethod
    def build(cls, moments: Moments) -> Tables:
        """Apply the link."""
        held = moments.held
        every = [
            _labels_log_p(held, np.full(len(held.labels), each), TEMPERATURES) for each in range(held.mean.shape[1])
        ]
        log_p = np.stack(every, axis=3)
        log_p -= np.logaddexp.reduce(log_p, axis=3, keepdims=True)
        train = moments.train
        training = _labels_log_p(train, train.labels, np.ones(1))[:, 0]
        return cls(held.labels, log_p.astype(np.float32), training.astype(np.float32), held.mean, moments.evidence)

    def save(self, path: Path) -> None:
        """Write an npz file."""
        np.savez(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Tables:
        """Read what :meth:`save` wrote."""
        with np.load(path) as file:
            values = {each.name: file[each.name] for each in fields(cls)}
        return cls(**{**values, "evidence": float(values["evidence"])})

    def curve(self, every: int) -> TrainingCurve:
        """What the training rows say, at every so many of the prior precisions."""
        nll = -self.training.astype(np.float64)
        at, of_map = nll[:-1][::every], nll[-1]
        return TrainingCurve(
            precisions=PRECISIONS[::every].tolist(),
            nll=at.mean(axis=1).tolist(),
            variance=(at - of_map).var(axis=1).tolist(),
            map_nll=float(of_map.mean()),
            n=len(of_map),
        )


def _labels_log_p(part: Part, labels: NDArray[np.int64], temperatures: Array) -> Array:
    mean = torch.tensor(part.mean)
    covariances = [torch.tensor(each).double() for each in part.covariance]
    covariances.append(torch.zeros_like(covariances[0]))
    found = [LogitMoments(mean, each) for each in covariances]
    return grid_log_probabilities(
        "mc-joint", found, torch.tensor(temperatures), torch.tensor(labels), samples=_POINTS
    ).numpy()
