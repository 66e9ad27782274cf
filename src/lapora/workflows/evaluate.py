"""``lapora eval``: score baselines, MAP, and the requested posteriors and links on the same rows."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch

from lapora import metrics
from lapora.config import (
    DEFAULT_INTERVAL,
    DEFAULT_SAMPLES,
    ENOUGH_ROWS,
    LINKS,
    DataSettings,
    EvalSettings,
    Link,
    Method,
    ModelSettings,
    PriorSettings,
    Progress,
    check_likelihood,
)
from lapora.errors import DataError, MissingSplitError, PosteriorError, UsageError
from lapora.likelihoods.base import Likelihood, ScoreOptions
from lapora.models.loading import Loader, load_model
from lapora.storage.manifest import digest_of
from lapora.storage.saved import SavedPosterior, open_posterior, saved_names
from lapora.tasks import Row, Task, data_fingerprint, load_rows, load_task, render_all, resolve_choices
from lapora.workflows import baselines
from lapora.workflows.commands import model_arguments
from lapora.workflows.contradictions import check_other_rows, resolve_task
from lapora.workflows.rows import (
    LABELLED_SPLITS,
    LabelledRows,
    TuningRows,
    are_training_rows,
    read_labelled_rows,
    row_digest,
)
from lapora.workflows.scoring import Prediction, ScoredRows, score_rows
from lapora.workflows.task_model import Fitted, TaskModel, open_fitted


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Result of ``eval``.

    Attributes:
        record: The record that ``eval --json`` prints.
        predictions: Predictions of the scored rows by each method, in the order of the record.
        targets: Their labels, ``(N,)`` or ``(N, C)``.
        warnings: Messages: methods left out, and posteriors that are worse than MAP.
        manifests: The manifests of the scored posteriors, by name.
        likelihood: The likelihood of the predictions.
    """

    record: dict[str, Any]
    predictions: list[Prediction]
    targets: torch.Tensor
    warnings: list[str]
    manifests: dict[str, Mapping[str, Any]]
    likelihood: Likelihood


def evaluate(
    model: ModelSettings,
    data: DataSettings,
    *,
    names: Sequence[str] = ("default",),
    links: Sequence[Link] = ("mc-joint",),
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score the constant predictor, MAP and Laplace; return the record of :func:`run_evaluation` with ``warnings``."""
    settings = EvalSettings(names=tuple(names), links=tuple(links), samples=samples, seed=seed)
    done = run_evaluation(model, data, settings, progress)
    return {**done.record, "warnings": done.warnings}


def run_evaluation(
    model: ModelSettings,
    data: DataSettings,
    settings: EvalSettings,
    progress: Progress | None = None,
    load: Loader = load_model,
) -> Evaluation:
    """Score methods against labels. Rows that tuned a prior or the temperature are excluded.

    Args:
        model: The adapter and how to run it.
        data: The rows; by default the validation split of the recorded task.
        settings: Which methods to score, and how.
        progress: Progress callback: rows done, rows in total.
        load: Loads the model.

    Raises:
        UsageError: Options contradict each other, or the adapter does not support a method.
        DataError: The rows have no labels, or their answers are not the posterior's.
        PosteriorError: A posterior is missing, damaged, or belongs to other weights.
    """
    plan = make_plan(model, settings, data)
    fitted = open_fitted(model, plan.names[0], data=data, load=load)
    of_map = fitted.model
    notes = [*plan.left_out]
    temperature, rows = _temperature_and_rows(fitted, plan, data, settings, notes)
    trained = are_training_rows(fitted.posterior.manifest, replace(data, split=rows.split))
    advice = "" if trained else remedy_options(model, data)
    sets = [rows, *(_shifted_rows(fitted, name, folder, data.limit) for name, folder in plan.shifted)]

    predictions: list[list[Prediction]] = []
    of_posteriors: dict[str, _OfPosterior] = {}
    truncated = 0
    for names in plan.passes:
        members = _open_together(model, names, fitted, data, load)
        fitted = members[0]
        scored = [_score(members, each, plan.links, settings, progress) for each in sets]
        if not predictions:
            truncated = scored[0].truncated
            at_map = [each.tables["map"][0] for each in scored]
            predictions = _baselines(model, fitted, sets, at_map, plan, settings, temperature, notes)
        for index, (name, member) in enumerate(zip(names, members, strict=True)):
            of_posteriors[name] = _OfPosterior(
                member.posterior.content,
                [_laplace(name, plan.links, each, index) for each in scored],
                [
                    *_notes_on_training_rows(member.posterior, data, rows),
                    *_notes_on_map(member, of_map),
                    *_warnings(member, plan.links, rows, scored[0], index, advice),
                ],
            )
    in_order = {name: of_posteriors[name] for name in plan.names if name in of_posteriors}
    for each in in_order.values():
        notes += [note for note in each.notes if note not in notes]
        for found, own in zip(predictions, each.predictions, strict=True):
            found += own
    record = {
        "task": rows.task.task,
        "split": rows.split,
        "n": len(rows.examples),
        "excluded": rows.excluded,
        "truncated": truncated,
        "rows": data_fingerprint(rows.examples),
        "posteriors": {name: digest_of(each.manifest) for name, each in in_order.items()},
        "results": _results(fitted.model.likelihood, predictions[0], rows, settings),
    }
    if settings.ood:
        inside = [each for each in predictions[0] if each.method not in _OWN_ROWS_ONLY]
        record["ood"] = [
            shift_record(fitted.model.likelihood, inside, found, each)
            for found, each in zip(predictions[1:], sets[1:], strict=True)
        ]
    manifests = {name: each.manifest for name, each in in_order.items()}
    return Evaluation(record, predictions[0], rows.targets, notes, manifests, fitted.model.likelihood)


@dataclass(frozen=True, eq=False)
class _OfPosterior:
    """A posterior's manifest, its predictions of each set of rows, and what is to be said about it."""

    manifest: Mapping[str, Any]
    predictions: list[list[Prediction]]
    notes: list[str]


_OWN_ROWS_ONLY = ("constant", "temperature (oracle)")


def _temperature_and_rows(
    fitted: Fitted, plan: Plan, data: DataSettings, settings: EvalSettings, notes: list[str]
) -> tuple[baselines.Temperature | None, LabelledRows]:
    """Return the fitted temperature, if it is scored, and the rows that tuned neither it nor a prior."""

    def rows_without(tuned: frozenset[str]) -> LabelledRows:
        return read_labelled_rows(fitted.posterior, fitted.model.kind, data, exclude=plan.tuning_digests | tuned)

    if "temperature" in plan.methods:
        try:
            found = baselines.fit_temperature(fitted, plan.tuned_on, data, settings)
            rows = rows_without(found.rows)
        except DataError as error:
            if not plan.everything or settings.temperature_split:
                raise
            notes.append(f"left out: temperature: {error}")
        else:
            notes += found.notes
            return found, rows
    return None, rows_without(frozenset())


def _open_together(
    model: ModelSettings, names: Sequence[str], earlier: Fitted, data: DataSettings, load: Loader
) -> list[Fitted]:
    """Open posteriors that differ in their prior alone; every file is checked, and the factors are kept once.

    Raises:
        PosteriorError: One is damaged, or differs in more than the prior, because it was fitted again meanwhile.
    """
    first, *others = names
    members = [earlier if first == earlier.posterior.name else open_fitted(model, first, earlier, data, load)]
    for name in others:
        _, posterior = open_posterior(model, name)
        if posterior.digest_without_prior != members[0].posterior.digest_without_prior:
            raise PosteriorError(
                f"{posterior.folder}: another fit replaced it while it was read; run the command again"
            )
        posterior.check()
        members.append(replace(members[0], posterior=posterior))
    return members


def _notes_on_training_rows(posterior: SavedPosterior, data: DataSettings, rows: LabelledRows) -> list[str]:
    """Return a note if a posterior was fitted on rows that are scored."""
    if are_training_rows(posterior.manifest, replace(data, split=rows.split)):
        return [f"note: the adapter was trained on the rows of {rows.split}: these scores are too optimistic"]
    if read := sum(row_digest(example) in posterior.training_rows for example in rows.examples):
        return [
            f"note: fit read {read} of these {len(rows.examples)} rows too, with the same labels: they make the scores "
            "too optimistic"
        ]
    return []


def _notes_on_map(fitted: Fitted, of_map: TaskModel) -> list[str]:
    """Return notes on what a posterior's base and prompts have in another way than those that MAP is scored with."""
    name, models, found = fitted.posterior.name, (fitted.model, of_map), []
    own, others = (f"{each.loaded.dtype}, quantization {each.loaded.quantize}" for each in models)
    if own != others:
        found.append(
            f"note: {name} is on the base in {own}, and MAP in {others}: their differences include that of the base"
        )
    own, others = (
        f"at most {each.max_length} tokens, {'a' if each.chat_template else 'no'} chat template" for each in models
    )
    if own != others:
        found.append(f"note: {name} has {own}, and MAP {others}: their differences include that of the prompts")
    return found


def _score(
    members: Sequence[Fitted],
    rows: LabelledRows,
    links: Sequence[Link],
    settings: EvalSettings,
    progress: Progress | None,
) -> ScoredRows:
    """Predict rows under posteriors that differ in their prior alone, in one pass."""
    return score_rows(
        members[0],
        rows,
        links,
        averages=[each.average for each in members],
        samples=settings.samples,
        seed=settings.seed,
        with_information=bool(links and settings.ood),
        progress=progress,
    )


def _baselines(
    model: ModelSettings,
    fitted: Fitted,
    sets: Sequence[LabelledRows],
    at_map: Sequence[torch.Tensor],
    plan: Plan,
    settings: EvalSettings,
    temperature: baselines.Temperature | None,
    notes: list[str],
) -> list[list[Prediction]]:
    """Return the predictions of every method but Laplace for each set of rows.

    The constant predictor and the oracle temperature are of the first set only.
    """
    likelihood = fitted.model.likelihood
    found: list[list[Prediction]] = [[] for _ in sets]
    if "constant" in plan.methods:
        found[0].append(Prediction("constant", _constant(fitted, sets[0].targets, at_map[0])))
    for each, own in zip(found, at_map, strict=True):
        # All methods are compared with MAP, so it is always scored.
        each.append(Prediction("map", own))
        if temperature:
            each.append(temperature.predict(likelihood, own))
    if settings.temperature_oracle:
        found[0].append(baselines.oracle_temperature(likelihood, at_map[0], sets[0].targets))
    if "mc-dropout" in plan.methods:
        try:
            drawn = baselines.mc_dropout(fitted, sets, settings.dropout_samples, settings.seed)
        except UsageError as error:
            if not plan.everything:
                raise
            notes.append(f"left out: {error}")
        else:
            found = [[*each, one] for each, one in zip(found, drawn, strict=True)]
    if "ensemble" in plan.methods:
        averaged = baselines.ensemble(model, fitted, sets, at_map, settings.ensemble)
        found = [[*each, one] for each, one in zip(found, averaged, strict=True)]
    return found


def _constant(fitted: Fitted, targets: torch.Tensor, at_map: torch.Tensor) -> torch.Tensor:
    """Return the constant prediction; for a row with answers of its own, restricted to these."""
    if fitted.model.choices:
        return fitted.model.likelihood.constant(targets)
    constant = metrics.constant_predictor(targets, at_map.shape[1])
    return constant.masked_fill(at_map == -torch.inf, -torch.inf).log_softmax(dim=1)


def _laplace(name: str, links: Sequence[Link], scored: ScoredRows, index: int) -> list[Prediction]:
    information = scored.information[index] if scored.information else None
    return [
        Prediction(
            "laplace",
            scored.tables[link][index],
            name,
            link,
            mutual_information=None if link == "map" else information,
        )
        for link in links
    ]


def _results(
    likelihood: Likelihood, predictions: Sequence[Prediction], rows: LabelledRows, settings: EvalSettings
) -> list[dict[str, Any]]:
    """Return the record's entries: scores, their intervals, and the paired differences to MAP."""
    options = ScoreOptions(with_mcc=rows.task.metric == "mcc", interval=settings.interval or DEFAULT_INTERVAL)
    tables = {each.label: each.table for each in predictions}
    own, paired = likelihood.intervals(tables, rows.targets, options, reference="map", seed=settings.seed)
    scores = {label: likelihood.scores(table, rows.targets, options) for label, table in tables.items()}
    results = []
    for each in predictions:
        entry = {**each.identity(), **{key: _defined(value) for key, value in scores[each.label].items()}}
        entry["intervals"] = {key: list(interval) for key, interval in own[each.label].items()}
        if each.label in paired:
            entry["difference_to_map"] = {
                key: {"value": scores[each.label][key] - scores["map"][key], "interval": list(interval)}
                for key, interval in paired[each.label].items()
            }
        if settings.coverage is not None:
            entry["coverage"] = coverage_record(each, rows.targets, settings.coverage)
        results.append(entry)
    return results


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _warnings(
    fitted: Fitted, links: Sequence[Link], rows: LabelledRows, scored: ScoredRows, index: int, options: str
) -> list[str]:
    found = []
    for link in links:
        if link != "map":
            found += _warn(fitted, link, rows, scored.tables[link][index], scored.tables["map"][index], options)
    return found


_WORTH_SAYING = 1e-4
"""Differences in NLL below this, in nats per row, are ignored."""


def _warn(
    fitted: Fitted,
    link: Link,
    rows: LabelledRows,
    table: torch.Tensor,
    at_map: torch.Tensor,
    options: str,
) -> list[str]:
    """Return a warning with the suggested command if Laplace is significantly worse than MAP, else nothing."""
    likelihood = fitted.model.likelihood
    differences = likelihood.row_nll(table, rows.targets) - likelihood.row_nll(at_map, rows.targets)
    worse = float(differences.mean())
    if worse <= _WORTH_SAYING:
        return []
    low, high = metrics.paired_interval(differences)
    name = fitted.posterior.name
    interval = f"{worse:.4f} a row, 95 % interval {low:.4f} to {high:.4f}, {len(differences)} rows"
    if len(differences) < ENOUGH_ROWS:
        return [f"note: {name} ({link}) is worse than MAP in NLL on too few rows to judge by ({interval})"]
    if low <= 0:
        return [f"note: {name} ({link}) is no better than MAP in NLL on these rows ({interval})"]
    direction, numbers = likelihood.bias(table, rows.targets)
    return [
        f"warning: {name} ({link}) is worse than MAP in NLL by {interval}, and {direction} ({numbers}); "
        f"{_remedy(fitted, link, options)}"
    ]


def remedy_options(model: ModelSettings, data: DataSettings) -> str:
    """Return the arguments that ``tune-prior`` needs to find the posterior, the base and the rows of this run."""
    given = {"--data": data.task, "--data-dir": data.data_dir, "--split": data.split}
    options = [part for option, value in given.items() if value is not None for part in (option, str(value))]
    return shlex.join([model.adapter, *model_arguments(model), *options])


def _remedy(fitted: Fitted, link: Link, options: str) -> str:
    """Return the remedy if Laplace is worse than MAP: a complete command, or other options.

    Args:
        fitted: The fitted adapter.
        link: The link that was scored.
        options: Arguments of ``tune-prior``; empty if the adapter was trained on the rows.
    """
    if not options:
        return "compare on rows that the adapter was not trained on: --split validation"
    prior = fitted.prior
    command = f"lapora tune-prior {options} --name {fitted.posterior.name}"
    if link != PriorSettings.link:
        command += f" --link {link}"
    tuned = prior.validation or (prior.averaged if prior.averaged is not None and prior.averaged.n else None)
    if tuned is None:
        return f"tune the prior with labelled rows: {command}"
    if tuned.link != link:
        return f"the prior was tuned for {tuned.link}: {command}"
    if prior.validation is not None:
        if min(point.nll for point in prior.validation.curve) > prior.validation.map.nll:
            return f"it was worse on the tuning rows too, at every precision: average instead ({command})"
        return f"the tuning rows differ from these: average instead of choosing ({command})"
    return "tune on more rows (--limit), or predict with --link map"


@dataclass(frozen=True)
class Plan:
    """The methods to score.

    Attributes:
        methods: Methods, in the order of the table.
        everything: Whether ``all`` was requested; methods that are not possible are then left out, not refused.
        names: Names of the posteriors, at least one.
        links: Links of each posterior; none if Laplace is not scored.
        tuned_on: Split and digests of the rows that tuned a prior, by posterior.
        shifted: Tasks of out-of-distribution rows, and the folders of these rows.
        left_out: Messages about methods of ``all`` that are left out.
        passes: The names of the posteriors that are scored, in the order of their passes over the rows: those of one
            pass differ in their prior alone.
    """

    methods: tuple[Method, ...]
    everything: bool
    names: tuple[str, ...]
    links: tuple[Link, ...]
    tuned_on: dict[str, TuningRows]
    shifted: tuple[tuple[str, Path | None], ...] = ()
    left_out: tuple[str, ...] = ()
    passes: tuple[tuple[str, ...], ...] = ()

    @property
    def tuning_digests(self) -> frozenset[str]:
        """Digests of all rows that tuned a prior."""
        return frozenset(digest for record in self.tuned_on.values() for digest in record.rows)


def make_plan(model: ModelSettings, settings: EvalSettings, data: DataSettings = DataSettings()) -> Plan:
    """Resolve which methods are scored.

    Raises:
        UsageError: There is nothing to score, options contradict each other, or posteriors have different tasks.
        PosteriorError: A posterior is missing, damaged, or belongs to other weights.
    """
    everything = "all" in settings.methods
    methods = cast("tuple[Method, ...]", get_args(Method) if everything else _unique(settings.methods))
    if settings.ensemble and "ensemble" not in methods:
        methods = (*methods, "ensemble")
    if (settings.temperature_split or settings.temperature_oracle) and "temperature" not in methods:
        methods = (*methods, "temperature")
    if not methods:
        raise UsageError("nothing to evaluate; give --methods")
    if "ensemble" in methods and not settings.ensemble and not everything:
        raise UsageError("--methods ensemble needs --ensemble PATH: another adapter, or a folder of checkpoints")
    shifted = shifted_sources(settings)
    left_out: tuple[str, ...] = ()
    if not settings.ensemble:
        if everything:
            left_out = ("left out: ensemble: no --ensemble PATH was given, another adapter or a folder of checkpoints",)
        methods = tuple(method for method in methods if method != "ensemble")
    names = _unique(settings.names) or (tuple(saved_names(model.root)) if everything else ()) or ("default",)
    links: tuple[Link, ...] = _unique(settings.links)
    tuned_on = {}
    task: Task | None = None
    of_one_task = []
    passes: dict[str, list[str]] = {}
    for name in names:
        _, posterior = open_posterior(model, name)
        own = resolve_task(DataSettings(), posterior.manifest)
        likelihood = own.likelihood
        if task is not None and data.task is None and not task.renders_like(own):
            reason = f"other prompts, answers or labels (task {own.task}) than those of {names[0]} (task {task.task})"
            if not everything or settings.names:
                raise UsageError(
                    f"--name {name}: fitted on {reason}; score each in a run of its own, or give --data TASK"
                )
            left_out += (f"left out: {name}: fitted on {reason}; score it with --name {name}",)
            continue
        task = task or own
        of_one_task.append(name)
        passes.setdefault(posterior.digest_without_prior, []).append(name)
        check_likelihood(likelihood, settings)
        if not links:
            links = tuple(link for link in LINKS[likelihood] if link != "map") if everything else ("mc-joint",)
        record = posterior.prior.validation or posterior.prior.averaged
        if record is not None and record.rows:
            tuned_on[name] = TuningRows(record.split or "", tuple(record.rows))
    order = [method for method in get_args(Method) if method in methods]
    scored = tuple(tuple(each) for each in passes.values())
    if "laplace" not in order:
        links, scored = (), ((of_one_task[0],),)
    return Plan(tuple(order), everything, tuple(of_one_task), links, tuned_on, shifted, left_out, scored)


def _unique(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def shifted_sources(settings: EvalSettings) -> tuple[tuple[str, Path | None], ...]:
    """Return every ``--ood`` task with the folder of its rows.

    Raises:
        UsageError: The folders do not go with the tasks.
    """
    tasks, folders = settings.ood, settings.ood_data_dirs
    if folders and not tasks:
        raise UsageError("--ood-data-dir without --ood TASK: name the task of those rows")
    if len(folders) not in (0, 1, len(tasks)):
        raise UsageError(
            f"{len(folders)} --ood-data-dir for {len(tasks)} --ood: give one for all, or one for each in the same order"
        )
    if len(folders) == len(tasks):
        return tuple(zip(tasks, folders, strict=True))
    return tuple((task, folders[0] if folders else None) for task in tasks)


def load_shifted_rows(name: str, folder: Path | None, limit: int | None) -> tuple[Task, list[Row], str]:
    """Load the rows of an ``--ood`` task.

    Returns:
        The task, its rows, and the split's name.

    Raises:
        DataError: There is no such task, or it has no rows.
    """
    task = load_task(name)
    errors: list[DataError] = []
    for split in LABELLED_SPLITS:
        try:
            return task, load_rows(task, split, data_dir=folder, limit=limit), split
        except MissingSplitError as error:
            errors.append(error)
        except DataError as error:
            errors = [error]
            break
    reason = str(errors[0]).replace("--data-dir", "--ood-data-dir")
    raise DataError(f"--ood {name}: {reason}") from errors[0]


def _shifted_rows(fitted: Fitted, name: str, folder: Path | None, limit: int | None) -> LabelledRows:
    """Read the rows of an ``--ood`` task; the target of an unlabelled row is -1, or NaN if targets are vectors.

    They are scored over the adapter's own answers, so only the number of answers must be the same.

    Raises:
        DataError: There is no such task or no rows, or the number of answers differs.
    """
    task, rows, split = load_shifted_rows(name, folder, limit)
    own, likelihood = fitted.model.choices, fitted.model.likelihood
    choices = resolve_choices(task, rows, kind=fitted.model.kind if not own else "classifier")
    check_other_rows(task, fitted.posterior.manifest, choices)
    examples = render_all(task, rows, kind=fitted.model.kind, choices=choices, labels="optional")
    same = task.likelihood == likelihood.name and (choices == own or not own)
    unknown = (math.nan,) * likelihood.outputs if likelihood.name in ("gaussian", "multilabel") else -1
    examples = [replace(example, choices=own or example.choices) for example in examples]
    targets = [example.target if same and example.target is not None else unknown for example in examples]
    return LabelledRows(task, split, examples, likelihood.targets(targets), 0)


def shift_record(
    likelihood: Likelihood, inside: Sequence[Prediction], outside: Sequence[Prediction], rows: LabelledRows
) -> dict[str, Any]:
    """Return the uncertainty of each method on out-of-distribution rows, and its AUROC for detecting them.

    Args:
        likelihood: The likelihood of the predictions.
        inside: Predictions of in-distribution rows.
        outside: Predictions of out-of-distribution rows by the same methods.
        rows: The out-of-distribution rows.

    Returns:
        ``task``, ``split``, ``n`` and for each method: the likelihood's first score, if the labels are known and the
        answers the same; the mean of each uncertainty measure out of distribution, and in distribution as ``..._in``;
        and ``auroc`` by each measure, where out-of-distribution rows are positive. The measures are
        ``mutual_information`` (None for a single model) and those of :meth:`Likelihood.uncertainty`; ``confidence`` is
        1 - ``max_probability``.
    """
    results = []
    labelled = torch.isfinite(rows.targets).all(dim=1) if rows.targets.dim() > 1 else rows.targets >= 0
    for own, other in zip(inside, outside, strict=True):
        measures: list[dict[str, torch.Tensor | None]] = [
            {**likelihood.uncertainty(each.table), "mutual_information": each.mutual_information}
            for each in (other, own)
        ]
        result: dict[str, Any] = {**own.identity(), likelihood.score: None}
        if bool(labelled.any()):
            found = likelihood.scores(other.table[labelled], rows.targets[labelled])
            result[likelihood.score] = found[likelihood.score]
        auroc: dict[str, float | None] = {}
        for name, there in measures[0].items():
            here, known = measures[1][name], name.replace("max_probability", "confidence")
            for ending, values in (("", there), ("_in", here)):
                mean = None if values is None else float(values.mean())
                result[known + ending] = 1.0 - mean if mean is not None and known == "confidence" else mean
            auroc[name] = None if there is None or here is None else metrics.auroc(there, here)
        results.append({**result, "auroc": auroc})
    return {"task": rows.task.task, "split": rows.split, "n": len(rows.examples), "results": results}


def coverage_record(prediction: Prediction, targets: torch.Tensor, coverage: float) -> dict[str, float]:
    """Return the threshold that keeps a share of the rows, to be used as ``predict --abstain-below``."""
    found = metrics.threshold_for_coverage(prediction.table, targets, coverage)
    return {"asked": coverage, **found._asdict()}
