"""Interface of a likelihood, and its inputs: moments of a model's outputs, and weights of an average.

A :class:`Likelihood` contains everything that depends on ``p(y|f)``: the square root of the Fisher, sampled labels,
the log-likelihood, predictions from moments, and the scores of predictions.
A prediction of N rows is a table of float64 with N rows, whose other dimensions are the likelihood's own:
log-probabilities of C answers, or components of a mixture of Gaussians.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lapora.config import DEFAULT_INTERVAL, DEFAULT_SAMPLES, FisherType, LikelihoodName, Link, PredictSettings
from lapora.metrics import Interval, bootstrap_intervals

Scorer = Callable[[Tensor], dict[str, Tensor]]
"""Maps R weightings of N rows, ``(R, N)``, to the scores under each, ``(R,)``."""


@dataclass(frozen=True)
class LogitMoments:
    """Mean and covariance of the outputs of B rows.

    Attributes:
        mean: ``f_MAP``, ``(B, C)``.
        covariance: ``(B, K, K)`` in float64: of the C outputs when ``K = C``, of the differences
            ``f_c - f_0`` when ``K = C - 1``.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def of_differences(self) -> bool:
        """Whether the covariance is that of the C-1 differences to the first class."""
        return self.covariance.shape[1] == self.mean.shape[1] - 1

    def divided(self, temperature: float) -> LogitMoments:
        """Return the moments of ``f / τ``."""
        if temperature == 1.0:
            return self
        return LogitMoments(self.mean / temperature, self.covariance / temperature**2)


Directions = Callable[[Tensor], Tensor]
"""Maps outputs ``(B, C)`` to directions ``(K, B, C)`` in their space."""


def class_columns(logits: Tensor) -> Tensor:
    """Return one direction per output.

    Returns:
        ``(C, B, C)``.
    """
    batch, classes = logits.shape
    identity = torch.eye(classes, dtype=logits.dtype, device=logits.device)
    return identity.unsqueeze(1).expand(classes, batch, classes)


def difference_columns(logits: Tensor) -> Tensor:
    """Return the directions of the C-1 differences ``f_c - f_0``, on which softmax depends.

    Returns:
        ``(C-1, B, C)``.
    """
    return class_columns(logits)[1:] - class_columns(logits)[:1]


def no_columns(logits: Tensor) -> Tensor:
    """Return no direction: only a forward pass is needed.

    Returns:
        ``(0, B, C)``.
    """
    return logits.new_zeros(0, *logits.shape)


@dataclass(frozen=True)
class ScoreOptions:
    """Options of a likelihood's scores.

    Attributes:
        with_mcc: Add the Matthews correlation coefficient.
        interval: Probability of the central intervals whose coverage is scored.
    """

    with_mcc: bool = False
    interval: float = DEFAULT_INTERVAL


@dataclass(frozen=True)
class Likelihood(ABC):
    """``p(y|f)`` with everything that depends on it.

    Attributes:
        choices: The C answers, or the names of the outputs.
    """

    choices: tuple[str, ...] = ()

    name: ClassVar[LikelihoodName]
    score: ClassVar[str] = "accuracy"
    """Main score, which does not depend on the predicted uncertainty."""

    has_noise: ClassVar[bool] = False
    """Whether the noise is measured on the training rows, which must all have a target."""

    uses_differences: ClassVar[bool] = False
    """Whether only the differences of the outputs matter, as under softmax."""

    @property
    def outputs(self) -> int:
        """Number of outputs C of the model."""
        return len(self.choices)

    @property
    def noise_entropy(self) -> float:
        """Entropy of the targets given the outputs in nats per row, if it is the same for all rows; else 0."""
        return 0.0

    @property
    def columns(self) -> int:
        """Number of columns of the exact Fisher's square root."""
        return self.outputs - self.uses_differences

    @property
    def directions(self) -> Directions:
        """Directions in output space that span the columns."""
        return difference_columns if self.uses_differences else class_columns

    def with_noise(self, outputs: Tensor, targets: Tensor) -> Likelihood:
        """Return the likelihood with the noise of the plain adapter's residuals."""
        return self

    def targets(self, values: Sequence[Any]) -> Tensor:
        """Return the labels of N rows as a tensor, ``(N,)`` or ``(N, C)``."""
        return torch.tensor(values)

    def random_numbers(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return uniform numbers of [0, 1) for sampling labels of the rows, ``(rows,)`` or ``(rows, C)``."""
        return torch.rand(rows, generator=generator, dtype=torch.float64)

    @abstractmethod
    def exact_columns(self, outputs: Tensor) -> Tensor:
        """Return S with ``S Sᵀ`` the Fisher in output space, ``(S, B, C)`` in float64."""

    @abstractmethod
    def sampled_columns(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        """Return the score of one label per row sampled from the model, ``(1, B, C)`` in float64."""

    @abstractmethod
    def empirical_columns(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the score of each row's own label, ``(1, B, C)`` in float64."""

    def fisher_columns(self, fisher: FisherType, targets: Tensor | None, uniform: Tensor) -> Directions:
        """Return the function from outputs to the columns of a Fisher estimator."""
        if fisher == "exact":
            return self.exact_columns
        if fisher == "mc":
            return lambda outputs: self.sampled_columns(outputs, uniform)
        assert targets is not None
        return lambda outputs: self.empirical_columns(outputs, targets.to(outputs.device))

    def column_weights(self, outputs: Tensor) -> Tensor:
        """Return the exact columns as combinations of :attr:`directions`, ``(B, S, K)``."""
        # A column of differences sums to zero, so it is a combination of differences to the first class.
        return self.exact_columns(outputs)[:, :, int(self.uses_differences) :].permute(1, 0, 2)

    @abstractmethod
    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``log p(y|f)`` of each row in nats, ``(N,)``."""

    def needs_every_output(self, link: Link) -> bool:
        """Return whether a link needs the covariance of all outputs."""
        return not self.uses_differences

    @abstractmethod
    def row_shape(self, components: int) -> tuple[int, ...]:
        """Return the shape of one row of a table.

        Args:
            components: Number of components of an average.
        """

    @abstractmethod
    def predict(
        self,
        link: Link,
        found: Sequence[LogitMoments],
        averaging: Averaging,
        *,
        samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
    ) -> Tensor:
        """Return the prediction of B rows, averaged over prior precisions and temperatures.

        Args:
            link: The link; ``map`` is the plain adapter.
            found: Moments under each of the D prior precisions.
            averaging: The weights.
            samples: Quasi-Monte-Carlo points of the sampling links.
            seed: Random seed of their scrambling.

        Returns:
            The table, ``(B, ...)`` in float64 on the CPU.
        """

    @abstractmethod
    def grid(
        self,
        link: Link,
        found: Sequence[LogitMoments],
        temperatures: Tensor,
        targets: Tensor,
        *,
        samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
    ) -> Tensor:
        """Return the log-probability of each row's label under every prior precision and temperature.

        Args:
            link: The link.
            found: Moments under each of the D prior precisions.
            temperatures: ``(T,)``.
            targets: Labels of the B rows.
            samples: Quasi-Monte-Carlo points of the sampling links.
            seed: Random seed of their scrambling.

        Returns:
            ``(D, T, B)`` in float64.
        """

    @abstractmethod
    def information(
        self, found: Sequence[LogitMoments], averaging: Averaging, *, samples: int = DEFAULT_SAMPLES, seed: int = 0
    ) -> Tensor:
        """Return the mutual information of target and weights, ``(B,)`` in nats."""

    @abstractmethod
    def uncertainty(self, table: Tensor) -> dict[str, Tensor]:
        """Return uncertainty measures ``(N,)`` by name, higher for more uncertain rows; one is ``entropy`` in nats."""

    @abstractmethod
    def at_map(self, outputs: Tensor) -> Tensor:
        """Return the table of the plain adapter from its outputs, ``(N, C)``."""

    @abstractmethod
    def mixture(self, tables: Tensor) -> Tensor:
        """Return the average of S predictions, ``(S, N, ...)``, with equal weights."""

    @abstractmethod
    def constant(self, targets: Tensor) -> Tensor:
        """Return the distribution of these labels as the prediction of every row."""

    @abstractmethod
    def scaled(self, table: Tensor, temperature: float) -> Tensor:
        """Return the plain adapter's prediction at a temperature."""

    @abstractmethod
    def fit_temperature(self, table: Tensor, targets: Tensor, *, width: float | None = None) -> float:
        """Fit the temperature of :meth:`scaled`: minimum NLL, or maximum posterior under N(log T; 0, width²)."""

    def tuned(self, table: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        """Return the prediction with the noise of minimum NLL, and its scale s; unchanged, and 1, without noise."""
        return table, 1.0

    @abstractmethod
    def row_nll(self, table: Tensor, targets: Tensor) -> Tensor:
        """Return the NLL of every row in nats, ``(N,)``."""

    @abstractmethod
    def scorer(self, table: Tensor, targets: Tensor, options: ScoreOptions = ScoreOptions()) -> Scorer:
        """Return the scores of a prediction as functions of row weights."""

    def scores(self, table: Tensor, targets: Tensor, options: ScoreOptions = ScoreOptions()) -> dict[str, float]:
        """Return the scores of a prediction."""
        found = self.scorer(table, targets, options)(torch.ones(1, len(targets), dtype=torch.float64))
        return {key: float(value) for key, value in found.items()}

    def intervals(
        self,
        tables: Mapping[str, Tensor],
        targets: Tensor,
        options: ScoreOptions = ScoreOptions(),
        *,
        reference: str | None = None,
        seed: int = 0,
    ) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
        """Return 95 % intervals of the scores, and of differences; see :func:`lapora.metrics.bootstrap_intervals`."""
        scorers = {key: self.scorer(table, targets, options) for key, table in tables.items()}
        return bootstrap_intervals(scorers, len(targets), reference=reference, seed=seed)

    @abstractmethod
    def bias(self, table: Tensor, targets: Tensor) -> tuple[str, str]:
        """Return whether predictions are over- or underconfident, and the numbers that show it, in words."""

    def as_answers(self, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return log-probabilities ``(M, C)`` and labels ``(M,)`` for reliability diagrams, or None without answers."""
        return table, targets

    def levels(self, table: Tensor, targets: Tensor) -> Tensor | None:
        """Return the probability integral transforms of numerical targets, ``(M,)``, or None for other targets."""
        return None

    @abstractmethod
    def records(
        self,
        found: Sequence[LogitMoments],
        averaging: Averaging,
        settings: PredictSettings,
        texts: int = 1,
        own_choices: Sequence[tuple[str, ...]] = (),
    ) -> list[dict[str, Any]]:
        """Return the fields that ``predict`` prints for each row of a batch.

        Args:
            found: Moments under each of the D prior precisions.
            averaging: The weights.
            settings: Link, samples, what is written.
            texts: Number of texts of a row that are compared.
            own_choices: Answers of each row that has its own; else empty.
        """


def logits_record(moments: LogitMoments, row: int, averaging: Averaging) -> dict[str, Any]:
    """Return mean and covariance of a row's outputs as JSON values."""
    return {
        "mean": moments.mean[row].double().tolist(),
        "covariance": moments.covariance[row].tolist(),
        **({} if averaging.is_single else {"averaged": True}),
    }


@dataclass(frozen=True)
class Averaging:
    """Weights of an average over D prior precisions and T temperatures.

    Attributes:
        temperatures: τ, ``(T,)`` in float64.
        weights: ``(D, T)`` in float64, summing to 1.
    """

    temperatures: Tensor
    weights: Tensor

    @classmethod
    def single(cls) -> Averaging:
        """Return the average of one prior precision at temperature 1."""
        return cls(torch.ones(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))

    @property
    def is_single(self) -> bool:
        """Whether there is one component, at temperature 1."""
        return self.weights.numel() == 1 and float(self.temperatures[0]) == 1.0

    @property
    def components(self) -> list[tuple[int, float, float]]:
        """Return index of the prior precision, temperature and weight of every component with nonzero weight."""
        return [
            (int(row), float(self.temperatures[column]), float(self.weights[row, column]))
            for row, column in self.weights.nonzero().tolist()
        ]

    def moments(self, found: list[LogitMoments]) -> LogitMoments:
        """Return mean and covariance of the mixture of the Gaussians ``f / τ``.

        With weights w: ``E = f Σ w/τ`` and ``Cov = Σ w Λ/τ² + f fᵀ (Σ w/τ² - (Σ w/τ)²)``.

        Args:
            found: The moments under each prior precision.
        """
        if self.is_single:
            return found[0]
        mean = found[0].mean.double()
        inverse = 1.0 / self.temperatures.to(mean.device)
        weights = self.weights.to(mean.device)
        first, second = float((weights @ inverse).sum()), float((weights @ inverse.square()).sum())
        within = sum(
            (float(share) * each.covariance for share, each in zip(weights @ inverse.square(), found, strict=True)),
            start=torch.zeros_like(found[0].covariance),
        )
        outputs = mean[:, 1:] - mean[:, :1] if found[0].of_differences else mean
        between = (second - first**2) * outputs.unsqueeze(2) * outputs.unsqueeze(1)
        return LogitMoments(mean * first, within + between.to(within))
