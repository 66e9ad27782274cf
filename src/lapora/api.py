"""The Python API: the commands as functions, and a predictor that stays loaded.

Options are the fields of the settings in :mod:`lapora.config`, with the defaults of the command line. The functions run
the same workflows as the commands, so the results are the same. An unknown option is a ``TypeError``, an invalid value
a :class:`lapora.errors.UsageError`.

    >>> import lapora
    >>> lapora.fit("adapter", data="task.yaml", data_dir="data").rows
    24
    >>> tuned = lapora.tune_prior("adapter", method="marglik")
    >>> tuned.method
    'marglik'
    >>> predictor = lapora.load("adapter")
    >>> answer = predictor.predict([{"story": "the cows are in the barn"}])[0]
    >>> list(answer.probabilities)
    ['no', 'yes']
    >>> len(answer.logit_covariance)
    2
    >>> record = lapora.evaluate("adapter", split="validation")
    >>> [result["method"] for result in record["results"]]
    ['constant', 'map', 'laplace']
"""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack, overload

from lapora.config import (
    DataSettings,
    EvalSettings,
    FitSettings,
    ModelSettings,
    PredictSettings,
    PriorSettings,
    Progress,
)
from lapora.models.adapter import local_model
from lapora.models.in_memory import outside_torch_contexts, prepared_for_fit
from lapora.options import (
    CalibrateOptions,
    CurvatureOptions,
    EvalOptions,
    FitOptions,
    LinkOptions,
    ModelOptions,
    PriorOptions,
    settings_of,
    takes,
)
from lapora.tasks import Row, Task, given_rows, is_one_row
from lapora.workflows.calibrate import Calibration
from lapora.workflows.calibrate import calibrate as run_calibrate
from lapora.workflows.evaluate import run_evaluation
from lapora.workflows.fit import FitResult, fit_in_memory
from lapora.workflows.fit import fit as run_fit
from lapora.workflows.predict import AdapterPool, predict_routed, predict_rows
from lapora.workflows.task_model import Fitted, open_fitted
from lapora.workflows.tune_prior import TunedPrior
from lapora.workflows.tune_prior import tune_prior as run_tune_prior


@dataclass(frozen=True)
class RowPrediction:
    """Prediction for one row.

    Attributes:
        prediction: The most probable answer; the labels of ``multilabel``; the mean of ``gaussian``; None for
            the reward of one text.
        confidence: Its probability; NaN where the likelihood has no answers.
        entropy: Entropy of the probabilities, in nats; NaN where the likelihood has no answers.
        probabilities: Probability of each answer, averaged over the posterior; a list in the order of ``answers`` where
            the row has its own.
        map_probabilities: The same under the plain adapter.
        logit_mean: Mean of the C logits; None without ``logits=True``.
        logit_covariance: Their C x C covariance; None without ``logits=True``.
        logits_averaged: Whether mean and covariance are those of an average over prior precisions and temperatures.
        truncated: Whether the row was truncated to the maximum length.
        record: All fields that ``lapora predict`` prints, those of the task's likelihood included.
        answers: The row's own answers; None where all rows have those of the task.
    """

    prediction: Any
    confidence: float
    entropy: float
    probabilities: dict[str, float] | list[float]
    map_probabilities: dict[str, float] | list[float]
    logit_mean: list[float] | None = None
    logit_covariance: list[list[float]] | None = None
    logits_averaged: bool = False
    truncated: bool = False
    record: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    answers: list[str] | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> RowPrediction:
        """Convert a record of ``lapora predict``."""
        logits = record.get("logits", {})
        return cls(
            prediction=record.get("prediction"),
            confidence=record.get("confidence", math.nan),
            entropy=record.get("entropy", math.nan),
            probabilities=record.get("probabilities", {}),
            map_probabilities=record.get("map_probabilities", {}),
            logit_mean=logits.get("mean"),
            logit_covariance=logits.get("covariance"),
            logits_averaged=logits.get("averaged", False),
            truncated=record.get("truncated", False),
            record=record,
            answers=record.get("answers"),
        )


class Predictor:
    """A loaded adapter with its posterior, returned by :func:`load` and :func:`fit_model`.

    Attributes:
        session: The adapter with its task and posterior, for :mod:`lapora.interop`.
        fitted: Result of the fit, if :func:`fit_model` returned this predictor.
    """

    def __init__(
        self, session: Fitted, fitted: FitResult | None = None, keeps: AbstractContextManager[Any] | None = None
    ) -> None:
        self.session = session
        self.fitted = fitted
        self._keeps = keeps

    @property
    def choices(self) -> tuple[str, ...]:
        """The answers; empty where each row has its own."""
        return self.session.model.choices

    @overload
    def predict(
        self, rows: str | Mapping[str, Any], *, logits: bool = True, **options: Unpack[LinkOptions]
    ) -> RowPrediction: ...
    @overload
    def predict(
        self, rows: Iterable[Any], *, logits: bool = True, **options: Unpack[LinkOptions]
    ) -> list[RowPrediction]: ...
    @takes(LinkOptions, PredictSettings)
    @outside_torch_contexts()
    def predict(
        self, rows: Any, *, logits: bool = True, **options: Unpack[LinkOptions]
    ) -> RowPrediction | list[RowPrediction]:
        """Predict one row, or several in order.

            >>> predictor = lapora.load("adapter")
            >>> predictor.predict("the cows are in the barn ?").prediction in ("no", "yes")
            True
            >>> answers = predictor.predict([{"story": "the cows are loud"}], link="probit", logits=False)
            >>> answers[0].logit_covariance is None
            True

        Args:
            rows: A row, which is answered by one prediction; or several: a list, a pandas DataFrame, a
                ``datasets.Dataset``. A row is a mapping with the task's fields, or a ready prompt; for a causal model
                also a mapping with a ``prompt`` and a list of ``answers``.
            logits: Add the mean and covariance of the logits: C backward passes instead of C-1.
            options: Link, samples and seed: :class:`lapora.options.LinkOptions`.

        Raises:
            TypeError: Something else than rows.
            DataError: A row lacks a field; the message names the row, counted from 0.
            NumericalError: The model returns NaN or infinity for a row.
        """
        settings = PredictSettings(name=self.session.posterior.folder.name, logits=logits, **options)
        given = given_rows(rows, texts=True)
        with prepared_for_fit(self.session.model.loaded):
            found = [RowPrediction.of(record) for record in predict_rows(self.session, settings, given)]
        return found[0] if is_one_row(rows) else found


@takes(ModelOptions, ModelSettings)
@outside_torch_contexts()
def load(adapter: str | Path, *, name: str = PredictSettings.name, **options: Unpack[ModelOptions]) -> Predictor:
    """Load a fitted adapter.

        >>> predictor = lapora.load("adapter", name="default", device="cpu")
        >>> predictor.choices
        ('no', 'yes')

    Args:
        adapter: Folder or Hub id of the adapter.
        name: Name of the posterior.
        options: How to load the model: :class:`lapora.options.ModelOptions`.

    Raises:
        AdapterError: No such adapter, or its base model cannot be loaded.
        PosteriorError: No such posterior, or a posterior of another adapter or base.
    """
    return Predictor(open_fitted(_model(adapter, options), name))


@takes(FitOptions, FitSettings, DataSettings, ModelSettings)
@outside_torch_contexts()
def fit(
    adapter: str | Path, *, data: str | Path, progress: Progress | None = None, **options: Unpack[FitOptions]
) -> FitResult:
    """Fit the posterior of an adapter on disk; ``lapora fit``.

        >>> done = lapora.fit("adapter", data="task.yaml", data_dir="data", structure="ekfac", name="second")
        >>> done.rows, done.parameters, done.folder.name
        (24, 384, 'second')

    Args:
        adapter: Folder or Hub id of the adapter.
        data: Built-in task, or path of a YAML file.
        progress: Progress callback: rows done, rows in total.
        options: Curvature, training rows (by default the split ``train``) and model:
            :class:`lapora.options.FitOptions`.

    Raises:
        LaporaError: As the command; one class per exit status, in :mod:`lapora.errors`.
    """
    settings = FitSettings(**settings_of(FitSettings, options))
    return run_fit(_model(adapter, options, writes=True), _data(data, options), settings, progress)


@takes(CurvatureOptions, FitSettings)
@outside_torch_contexts()
def fit_model(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any] | Row],
    *,
    task: Task | Mapping[str, Any] | str | Path,
    output_dir: str | Path | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    **options: Unpack[CurvatureOptions],
) -> Predictor:
    """Fit the posterior of a PEFT model in memory, on its own device, and return a predictor on it.

    The model is restored afterwards, after errors too: training mode, ``requires_grad``, padding token, hooks. After
    further training, fit again: the posterior belongs to the present weights.

        >>> from peft import PeftModel
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> base = AutoModelForCausalLM.from_pretrained("base")
        >>> model = PeftModel.from_pretrained(base, "adapter", is_trainable=True)
        >>> rows = [{"story": "the cows are loud", "label": 1}, {"story": "anna is quiet", "label": 0}]
        >>> predictor = lapora.fit_model(model, AutoTokenizer.from_pretrained("base"), rows, task="task.yaml")
        >>> predictor.fitted.rows, len(predictor.predict(rows))
        (2, 2)

    Args:
        model: A PEFT model, unwrapped, whose base is not quantized.
        tokenizer: Its tokenizer.
        rows: Training rows with the task's fields: a list, a pandas DataFrame, a ``datasets.Dataset``, or the result
            of ``lapora.tasks.load_rows``.
        task: Built-in task, path of a YAML file, or its content as a mapping.
        output_dir: Folder for ``laplace/``; by default a temporary folder that is deleted with the predictor.
        batch_size: Rows per batch; by default adapted to the memory.
        progress: Progress callback: rows done, rows in total.
        options: Curvature: :class:`lapora.options.CurvatureOptions`.

    Raises:
        TypeError: Something else than rows.
        LaporaError: As :func:`fit`.
    """
    keeps = tempfile.TemporaryDirectory(prefix="lapora-") if output_dir is None else None
    root = Path(keeps.name) if keeps is not None else Path(str(output_dir))
    session, fitted = fit_in_memory(
        model,
        tokenizer,
        rows,
        task,
        FitSettings(**options),
        root=root,
        batch_size=batch_size,
        progress=progress,
    )
    return Predictor(session, fitted, keeps)


@takes(CalibrateOptions, FitSettings, DataSettings, ModelSettings, PriorSettings)
@outside_torch_contexts()
def calibrate(
    adapter: str | Path, *, data: str | Path, progress: Progress | None = None, **options: Unpack[CalibrateOptions]
) -> Calibration:
    """Fit, tune the prior on half of the labelled rows, and score the other half; ``lapora calibrate``.

        >>> done = lapora.calibrate("adapter", data="task.yaml", data_dir="data", name="calibrated")
        >>> [result["method"] for result in done.evaluation.record["results"]]
        ['map', 'temperature', 'laplace']
        >>> done.verdict.better in (True, False, None)  # None: too few rows to judge
        True

    Args:
        adapter: Folder or Hub id of the adapter.
        data: Built-in task, or path of a YAML file.
        progress: Progress callback: rows done, rows in total, of each step.
        options: Curvature, training rows (by default the split ``train``), model and link:
            :class:`lapora.options.CalibrateOptions`.

    Raises:
        LaporaError: As the command.
    """
    return run_calibrate(
        _model(adapter, options, writes=True),
        _data(data, options),
        FitSettings(**settings_of(FitSettings, options)),
        PriorSettings(link=options.get("link", PriorSettings.link)),
        lambda _: nullcontext(progress),
    )


@takes(PriorOptions, PriorSettings, DataSettings, ModelSettings)
@outside_torch_contexts()
def tune_prior(
    adapter: str | Path,
    *,
    data: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[PriorOptions],
) -> TunedPrior:
    """Choose the prior precision, or average over it; ``lapora tune-prior``.

        >>> tuned = lapora.tune_prior("adapter", method="marglik", structure="kind")
        >>> sorted(tuned.precision.precisions)
        ['A', 'B']

    Args:
        adapter: Folder or Hub id of the adapter.
        data: Task of the validation rows, if not the recorded one.
        progress: Progress callback: rows done, rows in total.
        options: Method, validation rows (by default half of their split) and model:
            :class:`lapora.options.PriorOptions`.

    Raises:
        LaporaError: As the command.
    """
    settings = PriorSettings(**settings_of(PriorSettings, options))
    return run_tune_prior(_model(adapter, options, writes=True), _data(data, options), settings, progress)


@takes(EvalOptions, EvalSettings, DataSettings, ModelSettings)
@outside_torch_contexts()
def evaluate(
    adapter: str | Path,
    *,
    data: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[EvalOptions],
) -> dict[str, Any]:
    """Score MAP, Laplace and other methods side by side; ``lapora eval``.

        >>> record = lapora.evaluate("adapter", split="validation", methods=["map", "laplace"], links=["probit"])
        >>> record["n"], [result["method"] for result in record["results"]]
        (12, ['map', 'laplace'])

    Args:
        adapter: Folder or Hub id of the adapter.
        data: Task, if not the recorded one.
        progress: Progress callback: rows done, rows in total.
        options: Methods, rows and model: :class:`lapora.options.EvalOptions`.

    Returns:
        The record that ``lapora eval --json`` prints, with ``warnings``.

    Raises:
        LaporaError: As the command.
    """
    settings = EvalSettings(**settings_of(EvalSettings, options))
    done = run_evaluation(_model(adapter, options), _data(data, options), settings, progress)
    return {**done.record, "warnings": done.warnings}


def _model(adapter: str | Path, options: Mapping[str, Any], *, writes: bool = False) -> ModelSettings:
    return local_model(ModelSettings(str(adapter), **settings_of(ModelSettings, options)), writes=writes)


def _data(task: str | Path | None, options: Mapping[str, Any]) -> DataSettings:
    return DataSettings(None if task is None else str(task), **settings_of(DataSettings, options))


class RoutedPredictor:
    """Adapters on shared bases, each loaded at its first row; returned by :func:`load_many`."""

    def __init__(self, routes: AdapterPool, name: str) -> None:
        self._routes = routes
        self._name = name
        self._lock = threading.Lock()

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters; the first is used for rows without a name."""
        return self._routes.names

    @overload
    def predict(
        self, rows: str | Mapping[str, Any], *, logits: bool = False, **options: Unpack[LinkOptions]
    ) -> RowPrediction: ...
    @overload
    def predict(
        self, rows: Iterable[Any], *, logits: bool = False, **options: Unpack[LinkOptions]
    ) -> list[RowPrediction]: ...
    @takes(LinkOptions, PredictSettings)
    @outside_torch_contexts()
    def predict(
        self, rows: Any, *, logits: bool = False, **options: Unpack[LinkOptions]
    ) -> RowPrediction | list[RowPrediction]:
        """Predict one row, or several in order.

            >>> predictor = lapora.load_many("adapter", ["other=adapter"])
            >>> rows = [{"story": "the cows are in the barn ?"}, {"story": "anna is quiet ?", "adapter": "other"}]
            >>> [sorted(answer.probabilities) for answer in predictor.predict(rows)]
            [['no', 'yes'], ['no', 'yes']]

        Args:
            rows: A row or several, as for :meth:`Predictor.predict`; their field ``adapter`` names an adapter.
            logits: Add the mean and covariance of the logits.
            options: Link, samples and seed: :class:`lapora.options.LinkOptions`.

        Raises:
            TypeError: Something else than rows.
            DataError: A row lacks a field, or names an unknown adapter; the message names the row, counted from 0.
            AdapterError, PosteriorError: The adapter of a row cannot be used.
            NumericalError: The model returns NaN or infinity for a row.
        """
        settings = PredictSettings(name=self._name, logits=logits, **options)
        given = given_rows(rows, texts=True)
        with self._lock:
            found = [RowPrediction.of(record) for record in predict_routed(self._routes, settings, given)]
        return found[0] if is_one_row(rows) else found


@takes(ModelOptions, ModelSettings)
@outside_torch_contexts()
def load_many(
    adapter: str | Path,
    adapters: Sequence[str | Path],
    *,
    name: str = PredictSettings.name,
    adapter_field: str = PredictSettings.adapter_field,
    adapters_kept: int = PredictSettings.adapters_kept,
    **options: Unpack[ModelOptions],
) -> RoutedPredictor:
    """Load fitted adapters on the base models that they share; ``lapora predict --adapter``.

        >>> lapora.load_many("adapter", ["other=adapter"]).adapters
        ['adapter', 'other']

    Args:
        adapter: Adapter for rows without a name.
        adapters: Further adapters: folders, ``NAME=FOLDER``, Hub ids, or folders of adapters.
        name: Name of their posteriors.
        adapter_field: Field of a row that names its adapter.
        adapters_kept: Number of adapters kept in memory between calls.
        options: How to load the model: :class:`lapora.options.ModelOptions`.

    Raises:
        UsageError: Two adapters with the same name, or a folder without adapters.
        AdapterError: ``adapter`` cannot be loaded.
        PosteriorError: It has no posterior, or that of another adapter or base.
    """
    model = local_model(ModelSettings(str(adapter), **settings_of(ModelSettings, options)))
    settings = PredictSettings(
        name=name,
        adapters=tuple(map(str, adapters)),
        adapter_field=adapter_field,
        adapters_kept=adapters_kept,
    )
    return RoutedPredictor(AdapterPool(model, settings), name)
