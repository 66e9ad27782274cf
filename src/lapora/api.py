"""The Python API: the commands as functions, and a predictor that stays loaded.

Options are the fields of the settings in :mod:`lapora.config`, with the defaults that the command line has too. The
same workflows run as under the commands, so the results are the same. An option that does not exist is a ``TypeError``,
a choice that does not exist a :class:`lapora.errors.UsageError`.

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

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

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
from lapora.models.in_memory import prepared_for_fit
from lapora.options import (
    CurvatureOptions,
    EvalOptions,
    FitOptions,
    LinkOptions,
    ModelOptions,
    PriorOptions,
    settings_of,
    takes,
)
from lapora.tasks import Row, Task
from lapora.workflows.evaluate import run_evaluation
from lapora.workflows.fit import FitResult, fit_in_memory
from lapora.workflows.fit import fit as run_fit
from lapora.workflows.predict import AdapterPool, predict_routed, predict_rows
from lapora.workflows.task_model import Fitted, open_fitted
from lapora.workflows.tune_prior import TunedPrior
from lapora.workflows.tune_prior import tune_prior as run_tune_prior


@dataclass(frozen=True)
class RowPrediction:
    """What is answered to one row.

    Attributes:
        prediction: The most probable answer.
        confidence: Its probability.
        entropy: Of the probabilities, in nats.
        probabilities: Of every answer, averaged over the posterior.
        map_probabilities: The plain adapter's.
        logit_mean: The C logits at the MAP, or None unless asked for.
        logit_covariance: Their C x C covariance, or None unless asked for.
        truncated: Whether the row was cut to the greatest length.
    """

    prediction: str
    confidence: float
    entropy: float
    probabilities: dict[str, float]
    map_probabilities: dict[str, float]
    logit_mean: list[float] | None = None
    logit_covariance: list[list[float]] | None = None
    truncated: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> RowPrediction:
        """From a record of ``lapora predict``."""
        logits = record.get("logits", {})
        return cls(
            prediction=record["prediction"],
            confidence=record["confidence"],
            entropy=record["entropy"],
            probabilities=record["probabilities"],
            map_probabilities=record["map_probabilities"],
            logit_mean=logits.get("mean"),
            logit_covariance=logits.get("covariance"),
            truncated=record.get("truncated", False),
        )


class Predictor:
    """A fitted adapter, loaded; made by :func:`load` and :func:`fit_model`.

    Attributes:
        session: The adapter with its task and posterior, for :mod:`lapora.interop`.
        fitted: What the fit made, where :func:`fit_model` made this predictor.
    """

    def __init__(
        self, session: Fitted, fitted: FitResult | None = None, keeps: AbstractContextManager[Any] | None = None
    ) -> None:
        self.session = session
        self.fitted = fitted
        self._keeps = keeps

    @property
    def choices(self) -> tuple[str, ...]:
        """The answers."""
        return self.session.model.choices

    @takes(LinkOptions, PredictSettings)
    def predict(
        self, rows: Iterable[Mapping[str, Any] | str], *, logits: bool = True, **options: Unpack[LinkOptions]
    ) -> list[RowPrediction]:
        """Predict rows, in order.

            >>> predictor = lapora.load("adapter")
            >>> answers = predictor.predict(["the cows are in the barn ?"], link="probit", logits=False)
            >>> answers[0].logit_covariance is None
            True

        Args:
            rows: Rows with the task's fields, or ready prompts.
            logits: Give the logits' mean and covariance too: C backward passes in place of C-1.
            options: Link, points of the sampling links, seed: :class:`lapora.options.LinkOptions`.

        Raises:
            DataError: A row lacks a field; the message names the row, counted from 0.
            NumericalError: The model makes NaN or infinity of a row.
        """
        settings = PredictSettings(name=self.session.posterior.folder.name, logits=logits, **options)
        given = ({"text": row} if isinstance(row, str) else row for row in rows)
        loaded = self.session.model.loaded
        with prepared_for_fit(loaded.model, loaded.pad_token_id):
            return [RowPrediction.of(record) for record in predict_rows(self.session, settings, given)]


@takes(ModelOptions, ModelSettings)
def load(adapter: str | Path, *, name: str = "default", **options: Unpack[ModelOptions]) -> Predictor:
    """Load a fitted adapter.

        >>> predictor = lapora.load("adapter", name="default", device="cpu")
        >>> predictor.choices
        ('no', 'yes')

    Args:
        adapter: The adapter's folder, or its id on the Hub.
        name: The posterior.
        options: Base model, type, device, batch size, where ``laplace/`` is: :class:`lapora.options.ModelOptions`.

    Raises:
        AdapterError: No such adapter, or its base model cannot be loaded.
        PosteriorError: No such posterior, or one of another adapter or base.
    """
    return Predictor(open_fitted(_model(adapter, options), name))


@takes(FitOptions, FitSettings, DataSettings, ModelSettings)
def fit(
    adapter: str | Path, *, data: str | Path, progress: Progress | None = None, **options: Unpack[FitOptions]
) -> FitResult:
    """Fit the posterior of an adapter on disk; ``lapora fit``.

        >>> done = lapora.fit("adapter", data="task.yaml", data_dir="data", structure="ekfac", name="second")
        >>> done.rows, done.parameters, done.folder.name
        (24, 384, 'second')

    Args:
        adapter: The adapter's folder, or its id on the Hub.
        data: A built-in task, or the path of a task's YAML.
        progress: Told of rows done and rows in all.
        options: The curvature, the rows that the adapter was trained on (the split ``train`` by default), the
            model: :class:`lapora.options.FitOptions`.

    Raises:
        LaporaError: As the command; each kind has its class in :mod:`lapora.errors`.
    """
    settings = FitSettings(**settings_of(FitSettings, options))
    return run_fit(_model(adapter, options, writes=True), _data(data, options), settings, progress)


@takes(CurvatureOptions, FitSettings)
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
    """Fit a PEFT model that stands in memory, on its own device, and predict with it without a reload.

    The model is left as it was found: training mode, ``requires_grad``, padding token, and no hook, after errors
    too. The posterior is that of the weights as they are now: after further training, fit again.

        >>> from peft import PeftModel
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> base = AutoModelForCausalLM.from_pretrained("base")
        >>> model = PeftModel.from_pretrained(base, "adapter", is_trainable=True)
        >>> rows = [{"story": "the cows are loud", "label": 1}, {"story": "anna is quiet", "label": 0}]
        >>> predictor = lapora.fit_model(model, AutoTokenizer.from_pretrained("base"), rows, task="task.yaml")
        >>> predictor.fitted.rows, len(predictor.predict(rows))
        (2, 2)

    Args:
        model: A PEFT model, unwrapped; its base not quantised.
        tokenizer: Its tokenizer.
        rows: The rows it was trained on, with the task's fields: a list, a ``datasets.Dataset``, or what
            ``lapora.tasks.load_rows`` gives.
        task: A task: a built-in name, a YAML's path, or its content as a mapping.
        output_dir: Where ``laplace/`` goes; by default into a temporary folder that goes with the predictor.
        batch_size: Rows per batch; by default a token budget.
        progress: Told of rows done and rows in all.
        options: The curvature: :class:`lapora.options.CurvatureOptions`.

    Raises:
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


@takes(PriorOptions, PriorSettings, DataSettings, ModelSettings)
def tune_prior(
    adapter: str | Path,
    *,
    data: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[PriorOptions],
) -> TunedPrior:
    """Choose the prior precision; ``lapora tune-prior``.

        >>> tuned = lapora.tune_prior("adapter", method="marglik", structure="kind")
        >>> sorted(tuned.precision.precisions)
        ['A', 'B']

    Args:
        adapter: The adapter's folder, or its id on the Hub.
        data: Task of the validation rows, if not the recorded one.
        progress: Told of rows done and rows in all.
        options: The method, the validation rows (half of their split by default), the model:
            :class:`lapora.options.PriorOptions`.

    Raises:
        LaporaError: As the command.
    """
    settings = PriorSettings(**settings_of(PriorSettings, options))
    return run_tune_prior(_model(adapter, options, writes=True), _data(data, options), settings, progress)


@takes(EvalOptions, EvalSettings, DataSettings, ModelSettings)
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
        adapter: The adapter's folder, or its id on the Hub.
        data: Task, if not the recorded one.
        progress: Told of rows done and rows in all.
        options: What is scored, the rows, the model: :class:`lapora.options.EvalOptions`.

    Returns:
        What ``lapora eval --json`` prints, with ``warnings`` added.

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
    """Adapters of one base, opened when they are first asked for; made by :func:`load_many`."""

    def __init__(self, routes: AdapterPool, name: str) -> None:
        self._routes = routes
        self._name = name

    @property
    def adapters(self) -> list[str]:
        """The names that rows may give; the first answers rows that give none."""
        return self._routes.names

    @takes(LinkOptions, PredictSettings)
    def predict(
        self, rows: Iterable[Mapping[str, Any]], *, logits: bool = False, **options: Unpack[LinkOptions]
    ) -> list[RowPrediction]:
        """Predict rows, in order.

            >>> predictor = lapora.load_many("adapter", ["other=adapter"])
            >>> rows = [{"story": "the cows are in the barn ?"}, {"story": "anna is quiet ?", "adapter": "other"}]
            >>> [sorted(answer.probabilities) for answer in predictor.predict(rows)]
            [['no', 'yes'], ['no', 'yes']]

        Args:
            rows: Rows with their task's fields and, in ``adapter``, a name.
            logits: Give the logits' mean and covariance too.
            options: Link, points of the sampling links, seed: :class:`lapora.options.LinkOptions`.

        Raises:
            DataError: A row lacks a field, or names an adapter that is none; the message names the row, from 0.
            AdapterError, PosteriorError: The adapter that a row names cannot be used.
            NumericalError: The model makes NaN or infinity of a row.
        """
        settings = PredictSettings(name=self._name, logits=logits, **options)
        return [RowPrediction.of(record) for record in predict_routed(self._routes, settings, rows)]


@takes(ModelOptions, ModelSettings)
def load_many(
    adapter: str | Path,
    adapters: Sequence[str | Path],
    *,
    name: str = "default",
    adapter_field: str = "adapter",
    adapters_kept: int = 16,
    **options: Unpack[ModelOptions],
) -> RoutedPredictor:
    """Load fitted adapters on the base models that they share; ``lapora predict --adapter``.

        >>> lapora.load_many("adapter", ["other=adapter"]).adapters
        ['adapter', 'other']

    Args:
        adapter: Answers rows that name none.
        adapters: The others: folders, ``NAME=FOLDER``, ids on the Hub, or folders of adapters.
        name: Of their posteriors.
        adapter_field: The field in which rows name their adapter.
        adapters_kept: How many stay in memory between calls.
        options: Base model, type, device, batch size: :class:`lapora.options.ModelOptions`.

    Raises:
        UsageError: Two adapters of one name, or a folder without any.
        AdapterError: ADAPTER cannot be loaded.
        PosteriorError: It has no posterior, or one of something else.
    """
    model = local_model(ModelSettings(str(adapter), **settings_of(ModelSettings, options)))
    settings = PredictSettings(
        name=name,
        adapters=tuple(map(str, adapters)),
        adapter_field=adapter_field,
        adapters_kept=adapters_kept,
    )
    return RoutedPredictor(AdapterPool(model, settings), name)
