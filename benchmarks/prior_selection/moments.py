"""Moments of the logits of each adapter at every prior precision of a grid, from one fit and one pass over its rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.prior_selection.recipes import DECODERS, Recipe, Row, held_out_rows, training_rows
from benchmarks.prior_selection.views import Network
from lapora.config import DataSettings, FitSettings, ModelSettings
from lapora.models.batches import Batch
from lapora.posterior.averaging import TOLERANCE_ROWS
from lapora.posterior.gaussian import BlockPosterior
from lapora.posterior.marglik import maximize_evidence
from lapora.posterior.prior import PriorPrecision
from lapora.predictive.moments import LinearisedPredictor
from lapora.workflows.fit import fit
from lapora.workflows.rows import read_labelled_rows
from lapora.workflows.task_model import open_fitted

Array = NDArray[np.float64]

PRECISIONS: Array = np.logspace(-3.0, 7.0, 31)
"""Prior precisions, three a decade: every second one is in the tool's grid."""

_HELD_OUT, _HELD_OUT_OF_DECODERS = 350, 200


@dataclass(frozen=True)
class Part:
    """Rows of one adapter.

    Attributes:
        labels: ``(N,)``.
        mean: Logits of MAP, ``(N, C)``.
        covariance: Of the C-1 differences to the first class, ``(D, N, C-1, C-1)``.
    """

    labels: NDArray[np.int64]
    mean: Array
    covariance: NDArray[np.float32]


@dataclass(frozen=True)
class Moments:
    """One adapter's rows.

    Attributes:
        train: Training rows, at most 200 and at random.
        held: Held-out rows.
        evidence: Prior precision by marginal likelihood.
    """

    train: Part
    held: Part
    evidence: float

    def save(self, path: Path) -> None:
        """Write an npz file."""
        parts = {"train": self.train, "held": self.held}
        arrays = {f"{name}_{key}": value for name, part in parts.items() for key, value in vars(part).items()}
        np.savez(path, evidence=self.evidence, **arrays)

    @classmethod
    def load(cls, path: Path) -> Moments:
        """Read what :meth:`save` wrote."""
        with np.load(path) as file:
            train, held = (
                Part(*(file[f"{name}_{key}"] for key in ("labels", "mean", "covariance"))) for name in ("train", "held")
            )
            return cls(train, held, float(file["evidence"]))


def encoder_moments(one: Recipe, shared: Path) -> Moments:
    """Fit one of the encoder's adapters (KFAC-expand) and run its rows."""
    network = Network(one, shared)
    rows = training_rows(one, shared / "data")
    blocks = network.kfac(network.encode(rows))
    posterior = BlockPosterior(blocks)
    evidence = maximize_evidence(posterior.spectra, posterior.parameters(), 0.0)
    gaussian = posterior.on_device(network.layers, torch.device("cpu"), torch.float32)
    precisions = torch.tensor(PRECISIONS).unsqueeze(1).expand(-1, len(network.layers))
    parts = []
    for chosen in (_some(rows, TOLERANCE_ROWS), _some(held_out_rows(one, shared / "data"), _HELD_OUT)):
        predictor = LinearisedPredictor(network.answers, network.layers, gaussian, precisions, classes=len(one.classes))
        labels = np.array([row.label for row in chosen])
        parts.append(_run(predictor, network.batches(network.encode(chosen)), labels))
    return Moments(*parts, evidence.prior.precisions["all"])


def decoder_moments(name: str, shared: Path, base: Path, folder: Path) -> Moments:
    """Fit one of the shared decoders' adapters on its 200 rows and run its rows.

    Args:
        name: The adapter.
        shared: Folder with ``adapters/`` and ``data/``.
        base: Folder of the base model.
        folder: The posterior is saved below it.
    """
    assert name in DECODERS
    model = ModelSettings(
        str(shared / "adapters" / name), base_model=str(base), output_dir=folder, device="cpu", dtype="float32"
    )
    data = DataSettings(
        task=str(shared / "adapters" / name / "task.yaml"), data_dir=shared / "data" / name.split("-")[1], limit=200
    )
    done = fit(model, data, FitSettings(overwrite=True))
    fitted = open_fitted(model, "default")
    parts = []
    for split, count in (("train", TOLERANCE_ROWS), ("validation", _HELD_OUT_OF_DECODERS)):
        asked = DataSettings(data.task, data_dir=data.data_dir, split=split, limit=count)
        rows = read_labelled_rows(fitted.posterior, fitted.model.kind, asked)
        predictor = fitted.predictor(
            every_class=False, priors=[PriorPrecision("scalar", {"all": float(each)}) for each in PRECISIONS]
        )
        batches = fitted.model.batches(fitted.model.encode(rows.examples))
        parts.append(_run(predictor, batches, rows.targets.numpy()))
    return Moments(*parts, done.evidence.prior.precisions["all"])


def _run(predictor: LinearisedPredictor, batches: Iterable[Batch], labels: NDArray[np.int64]) -> Part:
    rows: list[int] = []
    means, covariances = [], []
    with predictor as running:
        for batch in batches:
            found = running.moments_under_each_prior(batch)
            rows += batch.rows
            means.append(found[0].mean.double().numpy())
            covariances.append(np.stack([each.covariance.numpy().astype(np.float32) for each in found]))
    order = np.argsort(rows)
    return Part(labels, np.concatenate(means)[order], np.concatenate(covariances, axis=1)[:, order])


def _some(rows: list[Row], count: int) -> list[Row]:
    """A seeded choice of rows, in random order."""
    return [rows[position] for position in np.random.default_rng(0).permutation(len(rows))[:count]]
