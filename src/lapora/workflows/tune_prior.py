"""``lapora tune-prior``: choose the prior precision or average over it, with labelled rows or without."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lapora.config import DataSettings, ModelSettings, PriorSettings, PriorStructure, Progress, check_likelihood
from lapora.errors import DataError, MissingSplitError, UnlabelledError, UnreadableSourceError, UsageError
from lapora.models.adapter import read_adapter
from lapora.posterior.averaging import Averaged
from lapora.posterior.marglik import EvidenceMaximum, evidence_at, maximize_evidence
from lapora.posterior.prior import ALL, PriorPrecision
from lapora.storage.files import write_lock
from lapora.storage.saved import SavedPosterior, posterior_folder
from lapora.workflows.averaging import average_with_rows, average_without_rows, describe_averaged
from lapora.workflows.contradictions import resolve_task

if TYPE_CHECKING:
    from lapora.models.loading import Loader
    from lapora.workflows.rows import LabelledRows
    from lapora.workflows.task_model import Fitted

GRID = np.logspace(-3.0, 8.0, 23)
"""Prior precisions tried by ``--method validation``: two per decade, from a nearly flat prior to MAP."""

_NO_DIFFERENCE = 1e-6
_WORTH_SAYING = 1e-4
"""Thresholds of NLL differences, in nats per row: values that count as equal, and differences that are not reported."""

_UNDECIDED = 0.005
"""Standard deviation of the components' NLL, in nats per row, above which more rows would help."""

TUNING_SAMPLES = 512
"""Quasi-Monte-Carlo points during the grid search; their error averages out over rows."""

_FEW_ROWS = 100


@dataclass(frozen=True)
class TunedPrior:
    """Result of ``tune-prior``.

    Attributes:
        prior: The manifest's new ``prior``.
        precision: δ; for an average, its weighted geometric mean.
        method: ``averaged``, ``validation``, ``marglik`` or ``adapted``.
        reason: Summary of the choice, in one line.
        notes: What the user should know, one line each.
    """

    prior: dict[str, Any]
    precision: PriorPrecision
    method: str
    reason: str
    notes: list[str]


def tune_prior(
    model: ModelSettings,
    data: DataSettings | None = None,
    settings: PriorSettings | None = None,
    progress: Progress | None = None,
    load: Loader | None = None,
) -> TunedPrior:
    """Choose the prior, or average over it, and record it in the manifest.

    Args:
        model: The adapter; the marginal likelihood needs its files only.
        data: Labelled rows; None means a seeded half of the task's labelled split that ``fit`` did not read.
        settings: Method, structure of the prior, optimizer.
        progress: Progress callback.
        load: Loads the model, if it is needed; by default :func:`lapora.models.loading.load_model`.

    Raises:
        PosteriorError: The posterior is missing or damaged.
        UsageError: The options cannot be combined.
        DataError: ``validation`` is requested, and there are no labelled rows.
        NumericalError: An eigenvalue is negative or not finite.
    """
    data, settings = data or DataSettings(), settings or PriorSettings()
    if settings.link == "map":
        raise UsageError("--link map has no prior to tune: give the link that you predict with")
    if settings.structure == "point" and settings.method != "auto":
        raise UsageError(f"--prior point goes with --method auto; {settings.method} gives one precision anyway")
    folder = posterior_folder(model.root, settings.name)
    with model.processes.raise_together():
        SavedPosterior(folder, validate_prior=False)  # raises before the lock file is written
    with model.processes.on_main(write_lock(folder)):
        return _tune(folder, model, data, settings, progress, load)


def _tune(
    folder: Path,
    model: ModelSettings,
    data: DataSettings,
    settings: PriorSettings,
    progress: Progress | None,
    load: Loader | None,
) -> TunedPrior:
    posterior = SavedPosterior(folder, validate_prior=False)
    check_likelihood(resolve_task(data, posterior.manifest).likelihood, settings)
    evidence = _maximize(posterior, settings)
    if not all(model.processes.all_gather(posterior.prior_is_sound())):
        _rewrite(model, posterior, evidence.describe(posterior.manifest.log_likelihood is not None))
    if settings.method in ("auto", "validation"):
        _refuse_other_answers(posterior, model, data, settings, load)
    if settings.method == "adapted":
        tuned = _adapted(posterior, settings)
    elif settings.method == "marglik":
        tuned = _by_evidence(posterior, evidence)
        tuned.notes.extend(_unfinished_adam(posterior, settings, evidence))
    elif settings.method == "validation":
        tuned = _by_validation(posterior, model, data, settings, evidence, progress, load)
    else:
        tuned = _by_average(posterior, model, data, settings, evidence, progress, load)
    _rewrite(model, posterior, tuned.prior)
    tuned.notes.extend(_notes_on_optimizer(settings))
    return tuned


def _notes_on_optimizer(settings: PriorSettings) -> list[str]:
    """Return a note on options of the optimizer that have no effect."""
    default = PriorSettings()
    if settings.optimizer == "exact" and (settings.learning_rate, settings.steps) != (
        default.learning_rate,
        default.steps,
    ):
        return ["note: --lr and --steps have no effect without --optimizer adam"]
    if settings.optimizer == "adam" and settings.method == "auto" and _structure(settings) == "scalar":
        return ["note: --optimizer adam has no effect without --method marglik"]
    return []


def _rewrite(model: ModelSettings, posterior: SavedPosterior, prior: dict[str, Any]) -> None:
    with model.processes.raise_together():
        if model.processes.is_main:
            posterior.rewrite_manifest({"prior": prior})


def _open(model: ModelSettings, data: DataSettings, settings: PriorSettings, load: Loader | None) -> Fitted:
    from lapora.models.loading import load_model  # imports torch, which marglik does not need
    from lapora.workflows.task_model import open_fitted

    return open_fitted(model, settings.name, data=data, load=load or load_model)


def _refuse_other_answers(
    posterior: SavedPosterior, model: ModelSettings, data: DataSettings, settings: PriorSettings, load: Loader | None
) -> None:
    """Refuse rows with other answers than the posterior's; the error names all differences."""
    from lapora.workflows.task_model import differences_of_answers

    if differences_of_answers(posterior, data):
        _open(model, data, settings, load)


def _structure(settings: PriorSettings) -> PriorStructure:
    return "scalar" if settings.structure == "point" else settings.structure


def _maximize(posterior: SavedPosterior, settings: PriorSettings) -> EvidenceMaximum:
    return maximize_evidence(
        posterior.spectra(),
        posterior.manifest.parameters,
        posterior.manifest.log_likelihood or 0.0,
        structure=_structure(settings),
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        residuals=posterior.manifest.residuals,
    )


def _by_average(
    posterior: SavedPosterior,
    model: ModelSettings,
    data: DataSettings,
    settings: PriorSettings,
    evidence: EvidenceMaximum,
    progress: Progress | None,
    load: Loader | None,
) -> TunedPrior:
    """Average over prior precision and temperature, with labelled rows or without."""
    found = _rows_or_reason(posterior, model, data, settings)
    manifest = posterior.manifest
    if isinstance(found, str):
        if manifest.training_curve is None:
            tuned = _by_evidence(posterior, evidence, f" ({found})")
            why = "fitted by an earlier version, or on rows without labels"
            tuned.notes.append(f"the posterior has no NLL curve of its training rows ({why}): fit again to average")
            return tuned
        averaged = average_without_rows(manifest.training_curve)
        notes = [f"the average is over what the training rows tolerate: {found}"]
        if settings.structure in ("kind", "layer"):
            notes.append(
                f"--prior {settings.structure} is ignored without labelled rows: all layers share one precision"
            )
            evidence = _maximize(posterior, replace(settings, structure="scalar"))
        deviation = None
    else:
        fitted = _open(model, data, settings, load)
        averaged, deviation = average_with_rows(fitted, found, evidence.prior, settings, progress)
        notes = _notes_on_rows(data, found)
    if settings.structure == "point":
        averaged = averaged.point()
    prior = describe_averaged(
        averaged,
        evidence.prior,
        posterior.spectra(),
        manifest.parameters,
        manifest.log_likelihood,
        manifest.residuals,
    )
    notes += [*_notes_of_average(averaged, deviation), *_at_bound_notes(evidence.at_bound)]
    mean = PriorPrecision.from_manifest(prior)
    return TunedPrior(prior, mean, "averaged", _learned(averaged), notes)


def _rows_or_reason(
    posterior: SavedPosterior, model: ModelSettings, data: DataSettings, settings: PriorSettings
) -> LabelledRows | str:
    """Read the labelled rows without loading a model; if none were requested and there are none, return why."""
    from lapora.workflows.rows import tuning_rows

    try:
        return tuning_rows(posterior, read_adapter(model.folder).kind, data, settings.seed)
    except (MissingSplitError, UnlabelledError) as error:
        if data.split is not None or data.task is not None or data.data_dir is not None:
            raise
        if isinstance(error, UnreadableSourceError) and _is_tuned(posterior.content.get("prior")):
            raise DataError(
                f"{error}; the present prior was tuned on labelled rows and is kept: give their folder with --data-dir"
            ) from None
        return str(error)


def _notes_on_rows(data: DataSettings, rows: LabelledRows) -> list[str]:
    count, found = len(rows.examples), []
    if rows.excluded:
        found.append(f"rows of {rows.split} left out, because fit read them too, with the same labels: {rows.excluded}")
    if data.limit is None or data.limit <= count:
        return found
    return [
        *found,
        f"--limit {data.limit}: all {count} rows of {rows.split} tuned the prior, and none is left to evaluate on",
    ]


def _is_tuned(prior: Any) -> bool:
    """Return whether a prior of a manifest, which may be damaged, was tuned on labelled rows."""
    if not isinstance(prior, Mapping):
        return False
    averaged = prior.get("averaged")
    return bool(prior.get("validation") or (isinstance(averaged, Mapping) and averaged.get("n")))


def _learned(averaged: Averaged) -> str:
    """Return a summary of the average, in one line."""
    source = "no labelled rows" if not averaged.n else f"{averaged.n} rows of {averaged.split}"
    width = ""
    if averaged.tolerance is not None:
        ratio = averaged.mean_precision / averaged.tolerance
        if averaged.map_weight > 0.9:
            width = " (MAP has nearly all of the weight)"
        elif ratio < 1 / 1.2:
            width = f" ({1 / ratio:.3g} x more variance than the training rows tolerate)"
        elif ratio > 1.2:
            width = f" ({ratio:.3g} x less variance than the training rows tolerate)"
        else:
            width = " (as wide as the training rows tolerate)"
    if len(averaged.precisions) == 1:
        return f"from {source}: prior precision {averaged.mean_precision:.3g}{width}, temperature " + (
            f"{averaged.mean_temperature:.2f}"
        )
    line = f"from {source}: averaged over prior precisions around {averaged.mean_precision:.3g}{width}"
    if averaged.n:
        low, high = averaged.temperature_interval()
        line += f", temperature {averaged.mean_temperature:.2f} ({low:.2f} to {high:.2f})"
        if averaged.nll is not None and averaged.map_nll is not None:
            line += f"; NLL {averaged.nll:.4f} on these rows, MAP {averaged.map_nll:.4f}"
    return line


ADVICE_ON_ROWS = "more labelled rows would"
"""Beginning of the note on more labelled rows."""


def _notes_of_average(averaged: Averaged, deviation: float | None) -> list[str]:
    if deviation is None:
        return ["with labelled rows (--split, --data-dir) the temperature is averaged over, too"]
    if deviation > _UNDECIDED:
        return [f"{ADVICE_ON_ROWS} help: the averaged settings still differ by {deviation:.3f} nats a row"]
    return [f"{ADVICE_ON_ROWS} change little: the averaged settings differ by {deviation:.4f} nats a row"]


def _unfinished_adam(posterior: SavedPosterior, settings: PriorSettings, reached: EvidenceMaximum) -> list[str]:
    """Compare with the exact solve: a fixed number of Adam steps does not always converge."""
    if settings.optimizer == "exact":
        return []
    exact = _maximize(posterior, replace(settings, optimizer="exact"))
    gap = exact.log_marginal_likelihood - reached.log_marginal_likelihood
    if gap < 1e-3:
        return []
    return [
        f"adam stopped {gap:.3g} nats below the maximum, which is at prior precision {exact.prior.describe()}: "
        "give more --steps, or --optimizer exact"
    ]


def _by_evidence(posterior: SavedPosterior, best: EvidenceMaximum, because: str = "") -> TunedPrior:
    prior = best.describe(posterior.manifest.log_likelihood is not None)
    notes = [*_harm_note(posterior), *_at_bound_notes(best.at_bound), *_truncation_note(posterior)]
    reason = f"prior precision {best.prior.describe()} by marginal likelihood{because}"
    return TunedPrior(prior, best.prior, "marglik", reason, notes)


_SHARE_WORTH_SAYING = 0.95


def _truncation_note(posterior: SavedPosterior) -> list[str]:
    """Warn of a posterior of version 0.1, whose truncation drops a part of the curvature."""
    kept = posterior.manifest.kept
    if posterior.manifest.remainder == "mean" or kept >= _SHARE_WORTH_SAYING:
        return []
    return [
        f"warning: an earlier version of lapora left {1 - kept:.0%} of the curvature's trace out of this posterior: "
        "the marginal likelihood chooses too small a prior precision; fit again with --overwrite"
    ]


def _at_bound_notes(at_bound: dict[str, str]) -> list[str]:
    return [
        f"the prior precision{'' if group == ALL else f' of {group}'} reached the {bound} value allowed: the data do "
        "not determine it"
        for group, bound in at_bound.items()
    ]


def _harm_note(posterior: SavedPosterior) -> list[str]:
    """Warn where the marginal likelihood is known to harm: causal models, regressions, and more than two answers."""
    manifest = posterior.manifest
    likelihood = manifest.task.get("likelihood", "categorical")
    chosen = "small a prior precision"
    if manifest.answers.causal:
        kind = "on causal language models"
    elif likelihood == "gaussian":
        kind, chosen = "of regressions", "large a noise"
    elif likelihood == "categorical" and len(manifest.answers.choices) > 2:
        kind = "with more than two answers"
    else:
        return []
    return [
        f"warning: {kind} the marginal likelihood often chooses far too {chosen}, and makes the predictions "
        "worse than the plain adapter's: compare by `lapora eval`, or use --method auto"
    ]


def _by_validation(
    posterior: SavedPosterior,
    model: ModelSettings,
    data: DataSettings,
    settings: PriorSettings,
    evidence: EvidenceMaximum,
    progress: Progress | None,
    load: Loader | None,
) -> TunedPrior:
    """Choose the prior precision of minimum NLL on labelled rows.

    A scalar prior is searched on :data:`GRID`. With one prior per kind or layer, the ratios are those of the
    marginal likelihood and their common factor is searched.
    """
    from lapora.workflows.rows import tuning_rows

    rows = tuning_rows(posterior, read_adapter(model.folder).kind, data, settings.seed)
    fitted = _open(model, data, settings, load)
    choice = _choose(fitted, rows, settings, evidence.prior, progress)
    choice.notes.extend(_notes_on_rows(data, rows))
    manifest = posterior.manifest
    log_evidence, effective = evidence_at(
        choice.prior, posterior.spectra(), manifest.parameters, manifest.log_likelihood or 0.0, manifest.residuals
    )
    prior = {
        **choice.prior.to_manifest(),
        "method": "validation",
        "log_marginal_likelihood": log_evidence if manifest.log_likelihood is not None else None,
        "effective_parameters": effective,
        "at_bound": {ALL: choice.at_bound} if choice.at_bound else None,
        "validation": choice.record,
        **({} if choice.noise_scale == 1.0 else {"noise_scale": choice.noise_scale}),
    }
    if len(rows.examples) < _FEW_ROWS:
        choice.notes.append(
            f"with {len(rows.examples)} rows the choice of one prior precision is uncertain: --method auto averages"
        )
    return TunedPrior(prior, choice.prior, "validation", choice.reason, choice.notes)


@dataclass(frozen=True)
class ValidationChoice:
    """A prior precision chosen on labelled rows.

    Attributes:
        prior: The prior of minimum NLL.
        record: The manifest's record: the curve, MAP, the rows used, and NLL at the marginal likelihood's prior.
        at_bound: ``lowest`` or ``highest`` if the minimum is at that end of the grid, else None.
        reason: The choice, and the marginal likelihood's for comparison, in one line.
        notes: What else the user should know.
        noise_scale: s of a regression's noise.
    """

    prior: PriorPrecision
    record: dict[str, Any]
    at_bound: str | None
    reason: str
    notes: list[str]
    noise_scale: float = 1.0


def _choose(
    fitted: Fitted,
    rows: LabelledRows,
    settings: PriorSettings,
    by_evidence: PriorPrecision,
    progress: Progress | None = None,
) -> ValidationChoice:
    from lapora import metrics
    from lapora.workflows.rows import row_digest
    from lapora.workflows.scoring import score_rows
    from lapora.workflows.task_model import PriorAverage

    scalar = settings.structure == "scalar"
    # With several precisions, the grid applies to the smallest, so that all of them reach MAP at its end.
    smallest = min(by_evidence.precisions.values())
    factors = GRID / smallest
    priors = [
        *(PriorPrecision("scalar", {"all": float(value)}) for value in GRID if scalar),
        *(by_evidence.scaled(float(factor)) for factor in factors if not scalar),
        by_evidence,
    ]
    scored = score_rows(
        fitted,
        rows,
        [settings.link],
        samples=TUNING_SAMPLES,
        seed=settings.seed,
        averages=[PriorAverage.single(each) for each in priors],
        progress=progress,
    )
    likelihood = fitted.model.likelihood
    tables, scales = zip(
        *(likelihood.tuned(table, rows.targets) for table in scored.tables[settings.link]), strict=True
    )
    scores = [likelihood.scores(table, rows.targets) for table in tables]
    at_map = likelihood.scores(scored.tables["map"][0], rows.targets)
    nll = [score["nll"] for score in scores[:-1]]
    least = curve_minimum(np.log(GRID).tolist(), nll)
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
        likelihood.row_nll(tables[nearest], rows.targets) - likelihood.row_nll(scored.tables["map"][0], rows.targets)
    )
    if difference[0] > _WORTH_SAYING:
        direction, _ = likelihood.bias(tables[nearest], rows.targets)
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
            {"precision": float(value), **_recorded(score)} for value, score in zip(GRID, scores[:-1], strict=True)
        ],
        "least_nll": least.value,
        "map": _recorded(at_map),
        "marglik": {**by_evidence.to_manifest(), **_recorded(scores[-1])},
        "rows": [row_digest(example) for example in rows.examples],
    }
    return ValidationChoice(prior, record, least.at_bound, reason, notes, scales[nearest])


def _recorded(scores: Mapping[str, float]) -> dict[str, float]:
    return {key: scores[key] for key in ("nll", "ece", "accuracy") if key in scores}


class CurveMinimum(NamedTuple):
    """Minimum of a curve.

    Attributes:
        position: Its position, log δ.
        value: NLL there in nats per row, interpolated by a parabola unless at a bound.
        at_bound: ``lowest`` or ``highest`` if the minimum is at that end, else None.
    """

    position: float
    value: float
    at_bound: str | None


def curve_minimum(positions: Sequence[float], values: Sequence[float]) -> CurveMinimum:
    """Return the minimum of a curve: the vertex of the parabola through its lowest point and the two neighbors."""
    best = _least(values)
    here = float(positions[best]), float(values[best])
    if best in (0, len(positions) - 1):
        return CurveMinimum(*here, "highest" if best else "lowest")
    around = slice(best - 1, best + 2)
    curvature, slope, height = np.polyfit(
        np.asarray(positions[around]) - positions[best], np.asarray(values[around]), 2
    )
    if curvature <= 0:
        return CurveMinimum(*here, None)
    limit = positions[best + 1] - positions[best]
    offset = float(np.clip(-slope / (2 * curvature), -limit, limit))
    value = float(curvature * offset**2 + slope * offset + height)
    return CurveMinimum(positions[best] + offset, value, None)


def _least(values: Sequence[float]) -> int:
    """Return the index of the minimum; of equal values the last, whose prior is closer to MAP."""
    return int(np.flatnonzero(np.asarray(values) <= min(values) + _NO_DIFFERENCE)[-1])


def _notes(at_bound: str | None) -> list[str]:
    if at_bound == "highest":
        return ["the least NLL is at the highest prior precision tried, which is MAP: the posterior adds nothing"]
    if at_bound == "lowest":
        return ["the least NLL is at the lowest prior precision tried: look at the curve with `lapora inspect`"]
    return []


def _adapted(posterior: SavedPosterior, settings: PriorSettings) -> TunedPrior:
    import numpy as np

    from lapora.posterior.linearised_evidence import LinearModel

    if posterior.manifest.structure != "full":
        raise UsageError(f"--method adapted needs a posterior of --structure full, not {posterior.manifest.structure}")
    if settings.structure != "scalar":
        raise UsageError(f"--method adapted chooses one precision: use --prior scalar, not {settings.structure}")
    names = ["linear_model.kernel", "linear_model.prior_mean", "linear_model.labels"]
    if names[0] not in posterior.tensors:
        raise UsageError(
            "--method adapted: this posterior has no linear model; fit again with --structure full --fisher exact on "
            "labelled rows that all have the same number of answers (likelihood categorical)"
        )
    kernel, prior_mean, labels = (posterior.arrays(names)[name] for name in names)
    model = LinearModel(np.asarray(kernel), np.asarray(prior_mean), np.asarray(labels))
    precision, evidence, bound = model.maximize()
    chosen = PriorPrecision("scalar", {ALL: precision})
    parameters = posterior.manifest.parameters
    _, effective = evidence_at(chosen, posterior.spectra(), parameters, 0.0)
    prior = {
        **chosen.to_manifest(),
        "method": "adapted",
        "log_marginal_likelihood": evidence,
        "effective_parameters": effective,
        "at_bound": {ALL: bound} if bound else None,
    }
    reason = f"prior precision {precision:.4g} by adapted evidence"
    return TunedPrior(prior, chosen, "adapted", reason, _at_bound_notes({ALL: bound} if bound else {}))
