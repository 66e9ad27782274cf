"""Running batches to logit moments."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch

from lapora.curvature.fisher import class_columns, difference_columns, no_columns
from lapora.curvature.linearisation import Linearisation
from lapora.model.answers import AnswerModel
from lapora.model.batches import Batch
from lapora.model.bayesian_layers import BayesianLayer
from lapora.posterior.gaussian import EigenBlock
from lapora.predictive.moments import CovarianceObserver, LogitMoments


class LinearisedPredictor:
    """Logit moments of batches under the posterior; a context manager.

    Args:
        answers: The network.
        layers: The Bayesian layers.
        blocks: Their posterior.
        prior_precision: δ.
        classes: Number of answers C.
        every_class: Ask for the covariance of all C logits (C backward passes), not of C-1 differences.
        map_only: Ask for no covariance at all: one forward pass.
    """

    def __init__(
        self,
        answers: AnswerModel,
        layers: Sequence[BayesianLayer],
        blocks: Sequence[EigenBlock],
        prior_precision: float,
        *,
        classes: int,
        every_class: bool = False,
        map_only: bool = False,
    ) -> None:
        self._columns = no_columns if map_only else class_columns if every_class else difference_columns
        precisions = torch.full((1, len(blocks)), prior_precision, dtype=torch.float64)
        self._observer = CovarianceObserver(blocks, precisions, directions=classes - (not every_class))
        self._linearisation = Linearisation(answers, [] if map_only else layers, self._observer)

    def __enter__(self) -> LinearisedPredictor:
        self._linearisation.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._linearisation.__exit__(kind, error, traceback)

    def moments(self, batch: Batch) -> LogitMoments:
        """Mean and covariance of a batch's logits."""
        directions = 0

        def columns(logits: torch.Tensor) -> torch.Tensor:
            nonlocal directions
            along = self._columns(logits)
            directions = len(along)
            return along

        mean = self._linearisation.run(batch, columns)
        covariance = self._observer.covariance(len(batch), directions)[0]
        return LogitMoments(mean=mean, covariance=covariance)
