"""Running batches to logit moments."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from lapora.curvature.fisher import class_columns, difference_columns, no_columns
from lapora.curvature.linearisation import Linearisation
from lapora.model.answers import AnswerModel
from lapora.model.batches import Batch
from lapora.model.bayesian_layers import BayesianLayer
from lapora.posterior.gaussian import Posterior
from lapora.predictive.moments import LogitMoments, covariance_observer


class LinearisedPredictor:
    """Logit moments of batches under the posterior; a context manager.

    Args:
        answers: The network.
        layers: The Bayesian layers.
        posterior: Their posterior, on the model's device.
        precisions: Prior precision of each layer under each of D priors, ``(D, number of layers)``.
        classes: Number of answers C.
        every_class: Ask for the covariance of all C logits (C backward passes), not of C-1 differences.
        map_only: Ask for no covariance at all: one forward pass.
    """

    def __init__(
        self,
        answers: AnswerModel,
        layers: Sequence[BayesianLayer],
        posterior: Posterior,
        precisions: Tensor,
        *,
        classes: int,
        every_class: bool = False,
        map_only: bool = False,
    ) -> None:
        self._columns = no_columns if map_only else class_columns if every_class else difference_columns
        self._observer = covariance_observer(
            posterior, precisions, layers, classes=classes, directions=classes - (not every_class)
        )
        self._linearisation = Linearisation(answers, [] if map_only else layers, self._observer)

    def __enter__(self) -> LinearisedPredictor:
        self._linearisation.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._linearisation.__exit__(kind, error, traceback)

    def moments(self, batch: Batch) -> LogitMoments:
        """Mean and covariance of a batch's logits under the first prior."""
        return self.moments_under_each_prior(batch)[0]

    def moments_under_each_prior(self, batch: Batch) -> list[LogitMoments]:
        """Mean and covariance of a batch's logits under each of the D priors, from one pass."""
        directions = 0

        def columns(logits: Tensor) -> Tensor:
            nonlocal directions
            along = self._columns(logits)
            directions = len(along)
            return along

        mean = self._linearisation.run(batch, columns)
        return [LogitMoments(mean, each) for each in self._observer.covariance(len(batch), directions)]
