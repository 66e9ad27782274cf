"""``lapora tune-prior``: choose the prior precision, from the files alone or by validation rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lapora.config import DataSettings, ModelSettings, PriorMethod, PriorSettings, Progress
from lapora.errors import MissingSplitError, UnlabelledError, UsageError
from lapora.posterior.artifact import SavedPosterior, posterior_folder
from lapora.posterior.evidence import EvidenceMaximum, bias_of_truncation, evidence_at, maximise_evidence
from lapora.posterior.lock import writing
from lapora.posterior.prior import ALL, PriorPrecision


@dataclass(frozen=True)
class TunedPrior:
    """What was chosen.

    Attributes:
        prior: The manifest's new ``prior``.
        precision: δ.
        method: How it was chosen in the end.
        reason: What was chosen and why, and what the other way would have given: one line.
        notes: What the user should know, lines for people.
    """

    prior: dict[str, Any]
    precision: PriorPrecision
    method: PriorMethod
    reason: str
    notes: list[str]


def tune_prior(
    model: ModelSettings,
    data: DataSettings | None = None,
    settings: PriorSettings | None = None,
    progress: Progress | None = None,
) -> TunedPrior:
    """Choose δ and record it in the manifest.

    Args:
        model: The adapter (for the marginal likelihood only its folder is read).
        data: Validation rows; None means a seeded half of the task's labelled split that ``fit`` did not read.
        settings: Method, structure of the prior, optimizer.
        progress: Told of rows done.

    Raises:
        PosteriorError: No such posterior, or a damaged one.
        UsageError: A combination that does not exist.
        DataError: ``validation`` without labelled rows.
        NumericalError: Eigenvalues that no curvature has.
    """
    data, settings = data or DataSettings(), settings or PriorSettings()
    if settings.link == "map":
        raise UsageError("--link map has no prior to tune: give the link that you predict with")
    folder = posterior_folder(model.root, settings.name)
    with model.processes.in_step():
        SavedPosterior(folder, prior_matters=False)  # nothing is written where no posterior is
    with model.processes.only_first(writing(folder)):
        return _tune(folder, model, data, settings, progress)


def _tune(
    folder: Path, model: ModelSettings, data: DataSettings, settings: PriorSettings, progress: Progress | None
) -> TunedPrior:
    posterior = SavedPosterior(folder, prior_matters=False)
    by_evidence = _maximise(posterior, settings)
    if not all(model.processes.gather(posterior.prior_is_sound())):
        _rewrite(model, posterior, by_evidence.describe(posterior.manifest["log_likelihood"] is not None))
    if settings.method == "adapted":
        tuned = _adapted(posterior, settings)
    elif settings.method == "marglik":
        tuned = _by_evidence(posterior, by_evidence, "")
        tuned.notes.extend(_unfinished_climb(posterior, settings, by_evidence))
    else:
        tuned = _by_validation(posterior, model, data, settings, by_evidence, progress)
    _rewrite(model, posterior, tuned.prior)
    return tuned


def _rewrite(model: ModelSettings, posterior: SavedPosterior, prior: dict[str, Any]) -> None:
    with model.processes.in_step():
        if model.processes.first:
            posterior.rewrite_manifest({"prior": prior})


def _maximise(posterior: SavedPosterior, settings: PriorSettings) -> EvidenceMaximum:
    return maximise_evidence(
        posterior.eigenvalues(),
        posterior.manifest["parameters"],
        posterior.manifest["log_likelihood"] or 0.0,
        structure=settings.structure,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        steps=settings.steps,
    )


def _unfinished_climb(posterior: SavedPosterior, settings: PriorSettings, climbed: EvidenceMaximum) -> list[str]:
    """Adam's fixed number of steps does not reach every optimum: compare with the exact solve."""
    if settings.optimizer == "exact":
        return []
    exact = _maximise(posterior, replace(settings, optimizer="exact"))
    gap = exact.log_marginal_likelihood - climbed.log_marginal_likelihood
    if gap < 1e-3:
        return []
    return [
        f"adam stopped {gap:.3g} nats below the maximum, which is at prior precision {exact.prior.describe()}: "
        "give more --steps, or --optimizer exact"
    ]


def _by_evidence(posterior: SavedPosterior, best: EvidenceMaximum, because: str) -> TunedPrior:
    prior = best.describe(posterior.manifest["log_likelihood"] is not None)
    notes = [*_few_answers_note(posterior), *_at_bound_notes(best.at_bound)]
    bias = bias_of_truncation(best, posterior.eigenvalues(), posterior.manifest["parameters"])
    reason = f"prior precision {best.prior.describe()} by marginal likelihood{because}"
    return TunedPrior(prior, best.prior, "marglik", reason, [*notes, *bias])


def _at_bound_notes(at_bound: dict[str, str]) -> list[str]:
    return [
        f"the prior precision{'' if group == ALL else f' of {group}'} ran to the {bound} value allowed: the data do "
        "not decide it"
        for group, bound in at_bound.items()
    ]


def _few_answers_note(posterior: SavedPosterior) -> list[str]:
    if len(posterior.manifest["answers"]["choices"]) <= 2:
        return []
    return [
        "with more than two answers the marginal likelihood may choose too wide a posterior for an adapter that is "
        "calibrated already: compare with MAP by `lapora eval`"
    ]


def _by_validation(
    posterior: SavedPosterior,
    model: ModelSettings,
    data: DataSettings,
    settings: PriorSettings,
    by_evidence: EvidenceMaximum,
    progress: Progress | None,
) -> TunedPrior:
    from lapora.workflows.validation import choose_by_validation

    try:
        choice = choose_by_validation(model, data, settings, by_evidence.prior, progress)
    except (MissingSplitError, UnlabelledError) as error:
        asked = data.split is not None or data.task is not None or data.data_dir is not None
        if settings.method == "validation" or asked:
            raise
        return _by_evidence(posterior, by_evidence, f", for want of validation rows ({error})")
    manifest = posterior.manifest
    evidence, effective = evidence_at(
        choice.prior, posterior.eigenvalues(), manifest["parameters"], manifest["log_likelihood"] or 0.0
    )
    prior = {
        **choice.prior.to_manifest(),
        "method": "validation",
        "log_marginal_likelihood": evidence if manifest["log_likelihood"] is not None else None,
        "effective_parameters": effective,
        "at_bound": {ALL: choice.at_bound} if choice.at_bound else None,
        "validation": choice.record,
    }
    return TunedPrior(prior, choice.prior, "validation", choice.reason, choice.notes)


def _adapted(posterior: SavedPosterior, settings: PriorSettings) -> TunedPrior:
    import numpy as np

    from lapora.posterior.adapted import LinearModel

    if posterior.manifest["structure"] != "full":
        raise UsageError(
            f"--method adapted needs a posterior of --structure full, not {posterior.manifest['structure']}"
        )
    if settings.structure != "scalar":
        raise UsageError(f"--method adapted chooses one precision: use --prior scalar, not {settings.structure}")
    names = ["linear_model.kernel", "linear_model.prior_mean", "linear_model.labels"]
    if names[0] not in posterior.manifest["tensors"]:
        raise UsageError("--method adapted needs labelled rows and --fisher exact in `lapora fit`")
    kernel, prior_mean, labels = (posterior.arrays(names)[name] for name in names)
    model = LinearModel(np.asarray(kernel), np.asarray(prior_mean), np.asarray(labels))
    precision, evidence, bound = model.maximise()
    chosen = PriorPrecision("scalar", {ALL: precision})
    parameters = posterior.manifest["parameters"]
    _, effective = evidence_at(chosen, posterior.eigenvalues(), parameters, 0.0)
    prior = {
        **chosen.to_manifest(),
        "method": "adapted",
        "log_marginal_likelihood": evidence,
        "effective_parameters": effective,
        "at_bound": {ALL: bound} if bound else None,
    }
    reason = f"prior precision {precision:.4g} by adapted evidence"
    return TunedPrior(prior, chosen, "adapted", reason, _at_bound_notes({ALL: bound} if bound else {}))
