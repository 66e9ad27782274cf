"""Regression: ``y_k ~ N(f_k, s² v_k)`` for each of K outputs.

v is the variance of the plain adapter's residuals on the training rows, one per output; it is measured by a
forward pass before the curvature, whose columns are ``e_k / sqrt(v_k)``. The factor s² is chosen with the prior. The
prior of the weights is scaled with the noise, ``θ ~ N(0, s²/δ I)``, as in the conjugate prior of linear regression
(Bishop 2006, section 3.3), so that the predictive variance is ``s² (Λ(δ)_kk + v_k)`` with ``Λ(δ) = Σ R R'/(λ + δ)``:
s is the *temperature* of a regression, a factor on the standard deviation of the prediction. The marginal likelihood
chooses δ and s² together (:func:`lapora.posterior.marglik.maximize_evidence`; Immer et al. 2021), ``validation``
chooses them by the NLL of held-out rows, and an average is over both.

A prediction is a mixture of M Gaussians for each output, a table ``(N, K, M, 3)`` of means, variances and weights
(:mod:`lapora.metrics.mixtures`); MAP has one component, with s = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lapora import metrics
from lapora.config import DEFAULT_INTERVAL, DEFAULT_SAMPLES, Link, PredictSettings
from lapora.errors import DataError
from lapora.likelihoods.base import Averaging, Likelihood, LogitMoments, ScoreOptions, Scorer, logits_record
from lapora.metrics.mixtures import (
    central_interval,
    mixture_cdf,
    mixture_crps,
    mixture_log_density,
    mixture_moments,
)

_NO_VARIANCE = 1e-24
_LOG_2_PI_E = math.log(2.0 * math.pi * math.e)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """``p(y|f) = Π_k N(y_k; f_k, v_k)``.

    Attributes:
        choices: Names of the K outputs.
        noise: Residual variance v of each output; empty before it is measured.
    """

    noise: tuple[float, ...] = ()

    name = "gaussian"
    score = "rmse"
    has_noise = True

    def with_noise(self, outputs: Tensor, targets: Tensor) -> Gaussian:
        """Measure the noise: the residual variances of the plain adapter's outputs, ``(N, K)``.

        Raises:
            DataError: The outputs of the training rows equal the targets.
        """
        variance = (targets.double() - outputs.double()).square().mean(dim=0)
        scale = targets.double().square().mean(dim=0)
        for name, value, size in zip(self.choices, variance.tolist(), scale.tolist(), strict=True):
            if value <= _NO_VARIANCE * size or not math.isfinite(value):
                raise DataError(
                    f"the training rows leave no residual of {name} (variance {value:.3g}), so there is no noise to "
                    "measure: check that doc_to_target is the quantity that the adapter was trained on"
                )
        return replace(self, noise=tuple(variance.tolist()))

    @property
    def variance(self) -> Tensor:
        """Residual variance v, ``(K,)`` in float64."""
        return torch.tensor(self.noise or (1.0,) * self.outputs, dtype=torch.float64)

    @property
    def noise_entropy(self) -> float:
        """Return ``Σ_k log(2πe v_k) / 2``: the NLL of MAP on the training rows."""
        return 0.5 * float((self.variance.log() + _LOG_2_PI_E).sum())

    def targets(self, values: Sequence[Any]) -> Tensor:
        """Return the targets, ``(N, K)`` in float64."""
        return torch.tensor(values, dtype=torch.float64)

    def random_numbers(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return one number for each output."""
        return torch.rand(rows, self.outputs, generator=generator, dtype=torch.float64)

    def exact_columns(self, outputs: Tensor) -> Tensor:
        """Return ``e_k / sqrt(v_k)``."""
        scale = self.variance.to(outputs.device).rsqrt()
        return torch.diag(scale).unsqueeze(1).expand(-1, len(outputs), -1)

    def sampled_columns(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        """Return ``(y - f) / v`` with y sampled from the model."""
        normal = torch.special.ndtri(uniform.clamp(1e-12, 1.0 - 1e-12))
        return (normal * self.variance.rsqrt()).unsqueeze(0).to(outputs.device)

    def empirical_columns(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``(y - f) / v``."""
        return ((targets.to(outputs.device) - outputs.double()) / self.variance.to(outputs.device)).unsqueeze(0)

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``Σ_k log N(y_k; f_k, v_k)``."""
        return -self.row_nll(self.at_map(outputs), targets)

    def row_shape(self, components: int) -> tuple[int, ...]:
        """Return ``(K, M, 3)``."""
        return self.outputs, components, 3

    def predict(
        self,
        link: Link,
        found: Sequence[LogitMoments],
        averaging: Averaging,
        *,
        samples: int = DEFAULT_SAMPLES,
        seed: int = 0,
    ) -> Tensor:
        """Return one Gaussian for each prior precision and temperature, ``N(f, s² (Λ + v))``."""
        if link == "map":
            return self.at_map(found[0].mean)
        components = averaging.components
        index = torch.tensor([prior for prior, *_ in components])
        squares = torch.tensor([scale**2 for _, scale, _ in components], dtype=torch.float64)
        weights = torch.tensor([weight for *_, weight in components], dtype=torch.float64)
        variance = (_variances(found) + self.variance)[index] * squares.reshape(-1, 1, 1)  # (M, B, K)
        mean = found[0].mean.double().cpu().unsqueeze(2).expand(-1, -1, len(components))
        weight = (weights / weights.sum()).expand(mean.shape)
        return torch.stack([mean, variance.permute(1, 2, 0), weight], dim=3)

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
        """Return ``Σ_k log N(y_k; f_k, s² (Λ_kk + v_k))``."""
        squared = (targets.double().cpu() - found[0].mean.double().cpu()).square()
        variance = (_variances(found) + self.variance).unsqueeze(1) * temperatures.square().reshape(-1, 1, 1)
        return -0.5 * (squared / variance + variance.log() + math.log(2.0 * math.pi)).sum(dim=3)

    def information(
        self, found: Sequence[LogitMoments], averaging: Averaging, *, samples: int = DEFAULT_SAMPLES, seed: int = 0
    ) -> Tensor:
        """Return the entropy of a Gaussian with the prediction's variance, minus the mean entropy of the noise."""
        components = averaging.components
        noise = sum(weight * (self.variance.log() + 2.0 * math.log(scale)) for _, scale, weight in components)
        _, variance = mixture_moments(self.predict("mc-joint", found, averaging))
        return 0.5 * (variance.log() - noise).sum(dim=1)

    def uncertainty(self, table: Tensor) -> dict[str, Tensor]:
        """Return the standard deviation (geometric mean over the outputs), and the entropy of such Gaussians."""
        _, variance = mixture_moments(table)
        entropy = 0.5 * (variance.log() + _LOG_2_PI_E).sum(dim=1)
        return {"deviation": (0.5 * variance.log().mean(dim=1)).exp(), "entropy": entropy}

    def at_map(self, outputs: Tensor) -> Tensor:
        """Return ``N(f, v)``."""
        mean = outputs.double().cpu()
        return torch.stack([mean, self.variance.expand(mean.shape), torch.ones_like(mean)], dim=2).unsqueeze(2)

    def mixture(self, tables: Tensor) -> Tensor:
        """Return the mixture of all components, each prediction with the same weight."""
        members, rows, outputs, components, _ = tables.shape
        joined = tables.permute(1, 2, 0, 3, 4).reshape(rows, outputs, members * components, 3).clone()
        joined[..., 2] /= members
        return joined

    def constant(self, targets: Tensor) -> Tensor:
        """Return mean and variance of the targets."""
        mean, variance = targets.mean(dim=0), targets.var(dim=0, correction=0).clamp(min=1e-300)
        table = torch.stack([mean, variance, torch.ones_like(mean)], dim=1).unsqueeze(1)
        return table.expand(len(targets), -1, -1, -1).contiguous()

    def scaled(self, table: Tensor, temperature: float) -> Tensor:
        """Return the prediction with its standard deviation multiplied by the temperature."""
        scaled = table.clone()
        scaled[..., 1] *= temperature**2
        return scaled

    def fit_temperature(self, table: Tensor, targets: Tensor, *, width: float | None = None) -> float:
        """Fit the factor on the standard deviation."""
        return metrics.minimize_over_temperature(
            lambda temperature: float(self.row_nll(self.scaled(table, temperature), targets).mean()),
            len(targets),
            width=width,
        )

    def tuned(self, table: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        """Return the prediction with the noise of minimum NLL, and its scale s."""
        scale = self.fit_temperature(table, targets)
        return self.scaled(table, scale), scale

    def row_nll(self, table: Tensor, targets: Tensor) -> Tensor:
        """Return minus the log-density, summed over the outputs."""
        return -mixture_log_density(table, targets.double()).sum(dim=1)

    def scorer(self, table: Tensor, targets: Tensor, options: ScoreOptions = ScoreOptions()) -> Scorer:
        """Return RMSE, NLL, CRPS, and coverage and mean width of central intervals, over all outputs."""
        mean, _ = mixture_moments(table)
        low, high = central_interval(table, options.interval)
        inside = ((targets >= low) & (targets <= high)).double()
        per_output = torch.stack([(mean - targets).square(), mixture_crps(table, targets), inside, high - low])
        means = torch.cat([per_output.mean(dim=2), self.row_nll(table, targets).unsqueeze(0)]).T  # (N, 5)

        def scores(weights: Tensor) -> dict[str, Tensor]:
            squared, crps, coverage, width, nll = (weights @ means / weights.sum(dim=1, keepdim=True)).unbind(dim=1)
            return {
                "rmse": squared.sqrt(),
                "nll": nll,
                "crps": crps,
                "interval_coverage": coverage,
                "interval_width": width,
            }

        return scores

    def levels(self, table: Tensor, targets: Tensor) -> Tensor:
        """Return the probability integral transforms of the targets, ``(N K,)``: uniform if calibrated."""
        return mixture_cdf(table, targets.double()).flatten()

    def bias(self, table: Tensor, targets: Tensor) -> tuple[str, str]:
        """Compare the coverage of 90 % intervals."""
        low, high = central_interval(table, DEFAULT_INTERVAL)
        coverage = float(((targets >= low) & (targets <= high)).double().mean())
        direction = "overconfident" if coverage < DEFAULT_INTERVAL else "underconfident"
        return direction, f"{DEFAULT_INTERVAL:.0%} intervals hold {coverage:.0%} of the targets"

    def as_answers(self, table: Tensor, targets: Tensor) -> None:
        """Return None: there are no answers."""
        return

    def records(
        self,
        found: Sequence[LogitMoments],
        averaging: Averaging,
        settings: PredictSettings,
        texts: int = 1,
        own_choices: Sequence[tuple[str, ...]] = (),
    ) -> list[dict[str, Any]]:
        """Return mean, total and epistemic standard deviation and central interval; by name for several outputs."""
        table = self.predict(settings.link, found, averaging)
        mean, variance = mixture_moments(table)
        low, high = central_interval(table, settings.interval or DEFAULT_INTERVAL)
        epistemic = self._epistemic(found, averaging, settings.link)
        moments = LogitMoments(found[0].mean, epistemic)
        columns = {
            "prediction": mean,
            "deviation": variance.sqrt(),
            "epistemic_deviation": epistemic.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt(),
        }
        records = []
        for row in range(len(mean)):
            record: dict[str, Any] = {key: self._named(values[row]) for key, values in columns.items()}
            record["interval"] = {"low": self._named(low[row]), "high": self._named(high[row])}
            if settings.logits:
                record["logits"] = logits_record(moments, row, averaging)
            records.append(record)
        return records

    def _epistemic(self, found: Sequence[LogitMoments], averaging: Averaging, link: Link) -> Tensor:
        """Return the covariance of the outputs under the average, ``Σ w s² Λ``."""
        total = torch.zeros(len(found[0].mean), self.outputs, self.outputs, dtype=torch.float64)
        if link != "map":
            for index, scale, weight in averaging.components:
                total += weight * scale**2 * found[index].covariance.double().cpu()
        return total

    def _named(self, values: Tensor) -> Any:
        numbers = values.tolist()
        return numbers[0] if self.outputs == 1 else dict(zip(self.choices, numbers, strict=True))


def _variances(found: Sequence[LogitMoments]) -> Tensor:
    """Return ``Λ_kk`` under each of D priors, ``(D, B, K)`` in float64 on the CPU."""
    return torch.stack([each.covariance.double().cpu().diagonal(dim1=1, dim2=2) for each in found])
