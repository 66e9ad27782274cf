"""``lapora calibrate``: fit, tune the prior on labelled rows, and compare with MAP on the other labelled rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from lapora import metrics
from lapora.config import (
    ENOUGH_ROWS,
    DataSettings,
    EvalSettings,
    FitSettings,
    Link,
    ModelSettings,
    PriorSettings,
    Progress,
)
from lapora.errors import NoRowsLeftError, UsageError
from lapora.memory.estimate import MemoryEstimate
from lapora.metrics.bootstrap import Interval
from lapora.models.loading import load_once
from lapora.workflows.commands import command_line, model_arguments
from lapora.workflows.evaluate import Evaluation, run_evaluation
from lapora.workflows.fit import FitResult, fit
from lapora.workflows.tune_prior import TunedPrior, tune_prior


@dataclass(frozen=True)
class Comparison:
    """Comparison of Laplace with another method on the same rows, in NLL.

    Attributes:
        nll: NLL of the other method, in nats per row.
        difference: NLL of Laplace minus ``nll``.
        interval: 95 % bootstrap interval of the difference, paired by row.
        accuracy_lost: Whether the accuracy of Laplace is significantly lower.
    """

    nll: float
    difference: float
    interval: Interval
    accuracy_lost: bool = False

    @property
    def better(self) -> bool:
        """Whether Laplace is significantly better."""
        return self.interval[1] < 0

    @property
    def worse(self) -> bool:
        """Whether Laplace is significantly worse."""
        return self.interval[0] > 0


@dataclass(frozen=True)
class Verdict:
    """Whether the calibrated probabilities are better.

    Attributes:
        better: Whether Laplace has a significantly lower NLL than the plain adapter; None if too few rows were scored.
        text: The verdict in sentences.
        link: The link to predict with; ``map`` if Laplace is no better.
        map: The comparison with the plain adapter.
        temperature: The comparison with a temperature that was fitted on the rows that tuned the prior.
    """

    better: bool | None
    text: str
    link: Link
    map: Comparison | None = None
    temperature: Comparison | None = None


@dataclass(frozen=True)
class Calibration:
    """Result of ``calibrate``.

    Attributes:
        fit: Result of the fit.
        prior: The prior that was chosen.
        evaluation: Scores of MAP, temperature and Laplace; None without labelled rows.
        verdict: The verdict.
        next: Arguments of the ``lapora`` command that predicts.
    """

    fit: FitResult
    prior: TunedPrior
    evaluation: Evaluation | None
    verdict: Verdict
    next: list[str]

    def describe(self) -> dict[str, Any]:
        """Return the JSON record of ``calibrate --json``."""
        evaluation = None
        if self.evaluation is not None:
            evaluation = {**self.evaluation.record, "warnings": self.evaluation.warnings}
        return {
            "fit": self.fit.describe(),
            "prior": self.prior.prior,
            "evaluation": evaluation,
            "verdict": {**asdict(self.verdict), "next": command_line(self.next)},
        }


def calibrate(
    model: ModelSettings,
    data: DataSettings,
    settings: FitSettings,
    prior: PriorSettings,
    step: Callable[[str], AbstractContextManager[Progress | None]],
    on_estimate: Callable[[MemoryEstimate], None] | None = None,
) -> Calibration:
    """Run ``fit``, ``tune-prior`` and ``eval`` on one loaded model.

    A seeded half of the first labelled split that the fit did not read tunes the prior and a temperature; the other
    half is scored.

    Args:
        model: The adapter and how to load it.
        data: The rows it was trained on.
        settings: The curvature, name of the posterior, seed.
        prior: Link; its name and seed are those of ``settings``.
        step: Returns the progress callback of a step.
        on_estimate: Called with the memory estimate, before any weight is loaded.

    Raises:
        LaporaError: As ``fit``, ``tune-prior`` and ``eval``.
    """
    if prior.link == "map":
        raise UsageError("--link map has no prior to tune: give the link that you predict with")
    load = load_once()
    with step("fit") as progress:
        fitted = fit(model, data, settings, progress, load, on_estimate)
    name = settings.name
    with step("tune the prior") as progress:
        prior = replace(prior, name=name, seed=settings.seed)
        tuned = tune_prior(model, DataSettings(), prior, progress, load)
    evaluation, verdict = None, None
    averaged = tuned.prior.get("averaged")
    if averaged and averaged["n"]:
        scored = EvalSettings(
            methods=("map", "temperature", "laplace"), names=(name,), links=(prior.link,), seed=settings.seed
        )
        try:
            with step("evaluate") as progress:
                evaluation = run_evaluation(model, DataSettings(split=averaged["split"]), scored, progress, load)
            verdict = judge(evaluation, prior.link)
        except NoRowsLeftError as error:
            verdict = _not_evaluated(str(error), tuned, prior.link)
    if verdict is None:
        verdict = _not_evaluated("there are no labelled rows except those that fit read", tuned, prior.link)
    following = predict_arguments(replace(model, base_model=None), name, verdict.link)  # the base is recorded
    return Calibration(fitted, tuned, evaluation, verdict, following)


def predict_arguments(model: ModelSettings, name: str, link: Link, rows: str = "rows.jsonl") -> list[str]:
    """Return the arguments of ``lapora`` that predict the rows of a file with a posterior."""
    options = model_arguments(model, name)
    if link != PriorSettings.link:
        options += ["--link", link]
    return ["predict", model.adapter, rows, *options]


def judge(evaluation: Evaluation, link: Link) -> Verdict:
    """Compare Laplace with the plain adapter and with the temperature, on the rows that were scored."""
    results = {result["method"]: result for result in evaluation.record["results"]}
    tables = {each.method: each.table for each in evaluation.predictions}
    own = results["laplace"]["nll"]
    to_map = results["laplace"]["difference_to_map"]
    versus_map = Comparison(
        results["map"]["nll"],
        to_map["nll"]["value"],
        Interval(*to_map["nll"]["interval"]),
        "accuracy" in to_map and to_map["accuracy"]["interval"][1] < 0,
    )
    rows = evaluation.likelihood.row_nll(tables["laplace"], evaluation.targets)
    rows -= evaluation.likelihood.row_nll(tables["temperature"], evaluation.targets)
    versus_temperature = Comparison(
        results["temperature"]["nll"], float(rows.mean()), Interval(*metrics.paired_interval(rows))
    )
    where = f"on {evaluation.record['n']} held-out rows of {evaluation.record['split']}"
    numbers = _numbers(own, versus_map)
    if evaluation.record["n"] < ENOUGH_ROWS:
        text = f"too few rows to judge, at least {ENOUGH_ROWS} are needed: {where}, {numbers}."
        return Verdict(None, text, link, versus_map, versus_temperature)
    if versus_map.better:
        text = f"better calibrated than the plain adapter {where}: {numbers}."
    else:
        how = "worse" if versus_map.worse else "no better"
        text = f"{how} than the plain adapter {where}: {numbers}. Use --link map."
    if versus_map.accuracy_lost:
        accuracies = (_short(results[method]["accuracy"]) for method in ("map", "laplace"))
        text += " Accuracy falls from {} to {}.".format(*accuracies)
    outcome = "not significantly different"
    if versus_temperature.better:
        outcome = "worse"
    elif versus_temperature.worse:
        outcome = "better"
    text += f" A temperature fitted on the same rows is {outcome}: {_numbers(own, versus_temperature)}."
    return Verdict(versus_map.better, text, link if versus_map.better else "map", versus_map, versus_temperature)


def _not_evaluated(reason: str, tuned: TunedPrior, link: Link) -> Verdict:
    return Verdict(None, f"not evaluated: {reason}. The prior: {tuned.reason}.", link)


def _numbers(own: float, other: Comparison) -> str:
    low, high = map(_short, other.interval)
    return (
        f"NLL {_short(own)} against {_short(other.nll)} (difference {_short(other.difference)}, 95 % interval {low} to "
        f"{high})"
    )


def _short(value: float) -> str:
    """Format with three digits and without the zero before the point: ``-.269``."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
