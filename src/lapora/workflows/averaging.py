"""Average the predictive over prior precisions and temperatures, from training rows and labelled rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lapora.config import PriorSettings, Progress
from lapora.posterior.averaging import (
    PRECISIONS,
    TEMPERATURES,
    TOLERANCE_ROWS,
    Averaged,
    TrainingCurve,
    average,
    tolerance_of,
)
from lapora.posterior.marglik import Spectrum, evidence_at
from lapora.posterior.prior import PriorPrecision

if TYPE_CHECKING:
    from lapora.curvature.passes import CurvatureRun
    from lapora.posterior.gaussian import Posterior
    from lapora.workflows.fit import FitInputs
    from lapora.workflows.rows import LabelledRows
    from lapora.workflows.task_model import Fitted

SAMPLES = 512
"""Quasi-Monte-Carlo points on the grid, for more than two answers; their error averages out over rows."""


def grid() -> NDArray[np.float64]:
    """Return the grid of prior precisions, MAP (infinity) last."""
    return np.append(PRECISIONS, math.inf)


def training_curve(
    inputs: FitInputs, posterior: Posterior, run: CurvatureRun, progress: Progress | None
) -> TrainingCurve | None:
    """Compute the NLL of the predictive on training rows at every prior precision of the grid, in one pass.

    Args:
        inputs: Model and training rows; a seeded choice of at most :data:`TOLERANCE_ROWS` rows is read.
        posterior: The posterior that was just computed.
        run: The passes it was computed from.
        progress: Progress callback.

    Returns:
        The curve, or None if a training row has no label.
    """
    import torch

    from lapora.predictive.moments import LinearisedPredictor
    from lapora.workflows.scoring import label_grid

    targets = run.targets
    if any(target is None for target in targets):
        return None
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(run.seed))
    chosen = sorted(order[:TOLERANCE_ROWS].tolist())
    device = inputs.model.outputs.device
    predictor = LinearisedPredictor(
        run.output_model,
        run.layers,
        posterior.on_device(run.layers, device, run.working_dtype),
        torch.tensor(grid()).unsqueeze(1).expand(-1, len(run.layers)),
        classes=run.classes,
        every_class=not run.likelihood.uses_differences,
    )
    table = label_grid(
        inputs.model,
        predictor,
        [inputs.rows.examples[row] for row in chosen],
        [inputs.encoded[row] for row in chosen],
        run.likelihood.targets([targets[row] for row in chosen]),
        temperatures=torch.ones(1, dtype=torch.float64),
        link="mc-joint",
        samples=SAMPLES,
        seed=run.seed,
        progress=progress,
    )
    nll = -table[:, 0] - run.likelihood.noise_entropy
    excess = nll[:-1] - nll[-1]
    return TrainingCurve(
        precisions=PRECISIONS.tolist(),
        nll=nll[:-1].mean(dim=1).tolist(),
        variance=excess.var(dim=1, correction=0).tolist(),
        map_nll=float(nll[-1].mean()),
        n=len(chosen),
    )


def average_without_rows(curve: TrainingCurve) -> Averaged:
    """Return the average from training rows alone: around the tolerance, at temperature 1."""
    tolerance = tolerance_of(curve)
    precisions = grid()
    weights = average(precisions, [1.0], tolerance)
    return Averaged(precisions=_listed(precisions), temperatures=[1.0], weights=weights.tolist(), tolerance=tolerance)


def average_with_rows(
    fitted: Fitted,
    rows: LabelledRows,
    reference: PriorPrecision,
    settings: PriorSettings,
    progress: Progress | None = None,
) -> tuple[Averaged, float]:
    """Return the average given labelled rows, in one pass over them.

    Args:
        fitted: The fitted adapter.
        rows: Labelled rows that the adapter was not trained on.
        reference: A prior whose ratios of precisions are preserved.
        settings: Link and seed.
        progress: Progress callback.

    Returns:
        The average, and the weighted standard deviation of the components' mean NLL in nats per row, which more rows
        could reduce.
    """
    import torch

    from lapora.workflows.rows import row_digest
    from lapora.workflows.scoring import label_grid

    curve = fitted.posterior.manifest.training_curve
    tolerance = None if curve is None else tolerance_of(curve)
    precisions = grid()
    likelihood = fitted.model.likelihood
    predictor = fitted.predictor(
        every_class=likelihood.needs_every_output(settings.link), priors=reference.on_grid(precisions)
    )
    encoded = fitted.model.encode(rows.examples)
    log_p = label_grid(
        fitted.model,
        predictor,
        rows.examples,
        encoded,
        rows.targets,
        temperatures=torch.tensor(TEMPERATURES),
        link=settings.link,
        samples=SAMPLES,
        seed=settings.seed,
        progress=progress,
    ).numpy()
    nll = -log_p.mean(axis=2)
    weights = average(precisions, TEMPERATURES, tolerance, nll, len(rows.examples))
    mixed = np.log(np.einsum("ij,ijn->n", weights, np.exp(log_p)).clip(1e-300))
    at_one = int(np.argmin(np.abs(np.log(TEMPERATURES))))
    deviation = math.sqrt(float((weights * np.square(nll - (weights * nll).sum())).sum()))
    averaged = Averaged(
        precisions=_listed(precisions),
        temperatures=TEMPERATURES.tolist(),
        weights=weights.tolist(),
        tolerance=tolerance,
        n=len(rows.examples),
        split=rows.split,
        rows=[row_digest(example) for example in rows.examples],
        link=settings.link,
        seed=settings.seed,
        nll=float(-mixed.mean()),
        map_nll=float(nll[-1, at_one]),
    )
    return averaged, deviation


def describe_averaged(
    averaged: Averaged,
    reference: PriorPrecision,
    spectra: Sequence[Spectrum],
    parameters: Sequence[Mapping[str, Any]],
    log_likelihood: float | None,
    residuals: int = 0,
) -> dict[str, Any]:
    """Return the manifest's ``prior`` of an average; its precision is the weighted geometric mean."""
    (mean,) = reference.on_grid([averaged.mean_precision])
    evidence, effective = evidence_at(mean, spectra, parameters, log_likelihood or 0.0, residuals)
    return {
        **mean.to_manifest(),
        "method": "averaged",
        "log_marginal_likelihood": evidence if log_likelihood is not None else None,
        "effective_parameters": effective,
        "at_bound": None,
        "averaged": msgspec.to_builtins(averaged),
    }


def _listed(precisions: NDArray[np.float64]) -> list[float | None]:
    return [None if math.isinf(value) else value for value in precisions.tolist()]
