"""The prior precision by NLL of validation rows: a grid of priors in one pass over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lapora import metrics
from lapora.config import DataSettings, ModelSettings, PriorSettings, Progress
from lapora.errors import MissingSplitError, UnlabelledError, UsageError
from lapora.posterior.prior import PriorPrecision
from lapora.workflows.scoring import LabelledRows, read_labelled_rows, row_digest, score_rows
from lapora.workflows.session import Session, open_session, source_of

GRID = np.logspace(-3.0, 8.0, 23)
"""Prior precisions tried: half decades, from hardly any prior to MAP."""

_NO_DIFFERENCE = 1e-6
_WORTH_SAYING = 1e-4
"""Nats a row: differences in NLL below these do not decide, and are not spoken of."""

TUNING_SAMPLES = 512
"""Points of the sampling links while the grid is searched: their error averages out over rows."""


@dataclass(frozen=True)
class ValidationChoice:
    """What the validation rows say.

    Attributes:
        prior: The prior of least NLL.
        record: For the manifest: the curve, MAP, the rows used, and NLL at the marginal likelihood's prior.
        at_bound: ``lowest`` or ``highest`` where the least NLL is at the grid's end, else None.
        reason: What was chosen, and what the marginal likelihood would have given: one line.
        notes: What else the user should know.
    """

    prior: PriorPrecision
    record: dict[str, Any]
    at_bound: str | None
    reason: str
    notes: list[str]


def choose_by_validation(
    model: ModelSettings,
    data: DataSettings,
    settings: PriorSettings,
    by_evidence: PriorPrecision,
    progress: Progress | None = None,
) -> ValidationChoice:
    """Choose the prior of least validation NLL.

    A scalar prior is searched on :data:`GRID`. With one prior per kind or layer, the ratios are those of the
    marginal likelihood and their common factor is searched.

    Args:
        model: The adapter and how to run it.
        data: The rows: by default a seeded half of the first labelled split that ``fit`` did not read.
        settings: Link, seed, structure of the prior.
        by_evidence: The prior that the marginal likelihood chooses, shown beside.
        progress: Told of rows done.

    Raises:
        MissingSplitError: No labelled split but the one that ``fit`` read.
        DataError: A row that cannot be read.
        UsageError: The split that ``fit`` read was asked for.
    """
    session = open_session(model, settings.name, data=data)
    rows = _tuning_rows(session, data, settings.seed)
    scalar = settings.structure == "scalar"
    # With several precisions the grid is that of the smallest, so that its top is MAP for all of them.
    smallest = min(by_evidence.precisions.values())
    factors = GRID / smallest
    priors = [
        *(PriorPrecision("scalar", {"all": float(value)}) for value in GRID if scalar),
        *(by_evidence.scaled(float(factor)) for factor in factors if not scalar),
        by_evidence,
    ]
    scored = score_rows(
        session,
        rows,
        [settings.link],
        samples=TUNING_SAMPLES,
        seed=settings.seed,
        priors=priors,
        progress=progress,
    )
    tables = scored.log_p[settings.link]
    scores = [metrics.evaluate(table, rows.targets) for table in tables]
    at_map = metrics.evaluate(scored.log_p["map"][0], rows.targets)
    nll = [score["nll"] for score in scores[:-1]]
    least = least_point(np.log(GRID).tolist(), nll)
    best = math.exp(least.position)
    prior = PriorPrecision("scalar", {"all": best}) if scalar else by_evidence.scaled(best / smallest)
    nearest = _least(nll)
    about = "" if least.at_bound else "about "
    reason = (
        f"prior precision {prior.describe()} by validation: NLL {about}{least.value:.4f} on {len(rows.examples)} rows "
        f"of {rows.split} (MAP {at_map['nll']:.4f}; marginal likelihood would have given {by_evidence.describe()}, "
        f"NLL {scores[-1]['nll']:.4f})"
    )
    notes = _notes(least.at_bound)
    difference = metrics.paired_interval(
        metrics.row_nll(tables[nearest], rows.targets) - metrics.row_nll(scored.log_p["map"][0], rows.targets)
    )
    if difference[0] > _WORTH_SAYING:
        confidence = float(tables[nearest].exp().max(dim=1).values.mean())
        direction = "underconfident" if confidence < scores[nearest]["accuracy"] else "overconfident"
        notes.append(
            f"warning: even at its best, Laplace is worse than MAP in NLL on these rows (by {difference[0]:.4f} to "
            f"{difference[1]:.4f}) and {direction}: predict with --link map"
        )
    record = {
        "split": rows.split,
        "n": len(rows.examples),
        "seed": settings.seed,
        "link": settings.link,
        "scheme": "scalar" if scalar else f"{settings.structure}: ratios by marginal likelihood, one factor by NLL",
        "curve": [
            {"precision": float(value), **{key: score[key] for key in ("nll", "ece", "accuracy")}}
            for value, score in zip(GRID, scores[:-1], strict=True)
        ],
        "least_nll": least.value,
        "map": {key: at_map[key] for key in ("nll", "ece", "accuracy")},
        "marglik": {**by_evidence.to_manifest(), **{key: scores[-1][key] for key in ("nll", "ece", "accuracy")}},
        "rows": [row_digest(example) for example in rows.examples],
    }
    return ValidationChoice(prior, record, least.at_bound, reason, notes)


class LeastPoint(NamedTuple):
    """Where a curve is least.

    Attributes:
        position: Where, in log δ.
        value: The curve there, of the parabola where that says so: NLL, in nats a row.
        at_bound: ``lowest`` or ``highest`` where the least value is at that end, else None.
    """

    position: float
    value: float
    at_bound: str | None


def least_point(positions: Sequence[float], values: Sequence[float]) -> LeastPoint:
    """The least point of a curve: the vertex of the parabola through its three best neighbouring points."""
    best = _least(values)
    here = float(positions[best]), float(values[best])
    if best in (0, len(positions) - 1):
        return LeastPoint(*here, "highest" if best else "lowest")
    around = slice(best - 1, best + 2)
    curvature, slope, height = np.polyfit(
        np.asarray(positions[around]) - positions[best], np.asarray(values[around]), 2
    )
    if curvature <= 0:
        return LeastPoint(*here, None)
    limit = positions[best + 1] - positions[best]
    offset = float(np.clip(-slope / (2 * curvature), -limit, limit))
    value = float(curvature * offset**2 + slope * offset + height)
    return LeastPoint(positions[best] + offset, value, None)


def _least(values: Sequence[float]) -> int:
    """The last of the least values: where priors make no difference, the tighter one is nearer to MAP."""
    return int(np.flatnonzero(np.asarray(values) <= min(values) + _NO_DIFFERENCE)[-1])


def _tuning_rows(session: Session, data: DataSettings, seed: int) -> LabelledRows:
    """A seeded half of the split (or as many rows as the limit says)."""
    rows = _labelled_split(session, data)
    return rows.chosen(data.limit or max(1, len(rows.examples) // 2), seed)


def _labelled_split(session: Session, data: DataSettings) -> LabelledRows:
    """The split asked for, or the first that has labels; never the one that ``fit`` read, whatever it is called."""
    fitted = session.posterior.manifest["data"]
    read = source_of(session.posterior.manifest, DataSettings(split=fitted["split"]))
    if data.split is not None:
        if source_of(session.posterior.manifest, data) == read:
            raise UsageError(
                f"--split {data.split}: the adapter was trained on these rows; give another split, or --method marglik"
            )
        return read_labelled_rows(session, replace(data, limit=None))
    reasons = []
    for split in ("validation", "test"):
        candidate = replace(data, split=split, limit=None)
        if source_of(session.posterior.manifest, candidate) == read:
            continue
        try:
            return read_labelled_rows(session, candidate)
        except (MissingSplitError, UnlabelledError) as error:
            reasons.append(str(error))
    raise MissingSplitError(f"no labelled rows but those that fit read ({reasons[0] if reasons else 'no other split'})")


def _notes(at_bound: str | None) -> list[str]:
    if at_bound == "highest":
        return ["the least NLL is at the highest prior precision tried, which is MAP: the posterior adds nothing"]
    if at_bound == "lowest":
        return ["the least NLL is at the lowest prior precision tried: look at the curve with `lapora inspect`"]
    return []
