"""The Python API: the commands as functions, and a predictor that stays loaded.

Arguments have the names of the command line's options, and its defaults. The same workflows run as under the
commands, so the results are the same. ::

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
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lapora.config import (
    DataSettings,
    EvalSettings,
    FitSettings,
    ModelSettings,
    PredictSettings,
    PriorSettings,
    Progress,
)
from lapora.model.borrowed import borrowed
from lapora.model.hub import local_model
from lapora.tasks import Task
from lapora.workflows.evaluate import run_evaluation
from lapora.workflows.fit import FitResult
from lapora.workflows.fit import fit as run_fit
from lapora.workflows.in_memory import fit_in_memory
from lapora.workflows.predict import predict_rows
from lapora.workflows.session import Session, open_session
from lapora.workflows.tune_prior import TunedPrior
from lapora.workflows.tune_prior import tune_prior as run_tune_prior

_MODEL_OPTIONS = {field.name for field in fields(ModelSettings)} - {"adapter", "output_dir", "fetched"}


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


class Predictor:
    """A fitted adapter, loaded; made by :func:`load` and :func:`fit_model`.

    Attributes:
        session: Model, posterior and task, for :mod:`lapora.interop`.
        fitted: What the fit made, where :func:`fit_model` made this predictor.
    """

    def __init__(
        self, session: Session, fitted: FitResult | None = None, keeps: AbstractContextManager[Any] | None = None
    ) -> None:
        self.session = session
        self.fitted = fitted
        self._keeps = keeps

    def predict(
        self, rows: Iterable[Mapping[str, Any] | str], *, logits: bool = True, **options: Any
    ) -> list[RowPrediction]:
        """Predict rows, in order.

        Args:
            rows: Rows with the task's fields, or ready prompts.
            logits: Give the logits' mean and covariance too: C backward passes in place of C-1.
            options: ``link``, ``samples``, ``seed``: as of ``lapora predict``.

        Raises:
            DataError: A row lacks a field; the message names the row, counted from 0.
            NumericalError: The model makes NaN or infinity of a row.
        """
        settings = PredictSettings(name=self.session.posterior.folder.name, logits=logits, **options)
        given = ({"text": row} if isinstance(row, str) else row for row in rows)
        loaded = self.session.loaded
        with borrowed(loaded.model, loaded.pad_token_id):
            return [_row_prediction(record) for record in predict_rows(self.session, settings, given)]


def _row_prediction(record: Mapping[str, Any]) -> RowPrediction:
    logits = record.get("logits", {})
    return RowPrediction(
        prediction=record["prediction"],
        confidence=record["confidence"],
        entropy=record["entropy"],
        probabilities=record["probabilities"],
        map_probabilities=record["map_probabilities"],
        logit_mean=logits.get("mean"),
        logit_covariance=logits.get("covariance"),
        truncated=record.get("truncated", False),
    )


def load(
    adapter: str | Path, *, name: str = "default", output_dir: str | Path | None = None, **options: Any
) -> Predictor:
    """Load a fitted adapter.

    Args:
        adapter: The adapter's folder, or its id on the Hub.
        name: The posterior.
        output_dir: Where ``laplace/`` is, if not in the adapter's folder.
        options: ``base_model``, ``quantize``, ``dtype``, ``device``, ``batch_size``, ``trust_remote_code``,
            ``revision``.

    Raises:
        AdapterError: No such adapter, or its base model cannot be loaded.
        PosteriorError: No such posterior, or one of another adapter or base.
    """
    return Predictor(open_session(_model(adapter, output_dir, options), name))


def fit(
    adapter: str | Path,
    *,
    data: str | Path,
    data_dir: str | Path | None = None,
    split: str = "train",
    limit: int | None = None,
    output_dir: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> FitResult:
    """Fit the posterior of an adapter on disk; ``lapora fit``.

    Args:
        adapter: The adapter's folder, or its id on the Hub.
        data: A built-in task, or the path of a task's YAML.
        data_dir: Folder with ``SPLIT.jsonl``.
        split: The rows that the adapter was trained on.
        limit: Only the first so many.
        output_dir: Where ``laplace/`` goes, if not into the adapter's folder.
        progress: Told of rows done and rows in all.
        options: Fields of :class:`lapora.config.FitSettings`, and the options of :func:`load`.

    Raises:
        LaporaError: As the command; each kind has its class in :mod:`lapora.errors`.
    """
    model = _model(adapter, output_dir, options, writes=True)
    return run_fit(model, _data(str(data), data_dir, split, limit), FitSettings(**_rest(options)), progress)


def fit_model(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    task: Task | Mapping[str, Any] | str | Path,
    output_dir: str | Path | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Predictor:
    """Fit a PEFT model that stands in memory, on its own device, and predict with it without a reload.

    The model is left as it was found: training mode, ``requires_grad``, padding token, and no hook, after errors
    too. The posterior is that of the weights as they are now: after further training, fit again.

    Args:
        model: A PEFT model, unwrapped; its base not quantised.
        tokenizer: Its tokenizer.
        rows: The rows it was trained on, with the task's fields: a list, or a ``datasets.Dataset``.
        task: A task: a built-in name, a YAML's path, or its content as a mapping.
        output_dir: Where ``laplace/`` goes; by default into a temporary folder that goes with the predictor.
        batch_size: Rows per batch; by default a token budget.
        progress: Told of rows done and rows in all.
        options: Fields of :class:`lapora.config.FitSettings`.

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


def tune_prior(
    adapter: str | Path,
    *,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    output_dir: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> TunedPrior:
    """Choose the prior precision; ``lapora tune-prior``.

    Args:
        adapter: The adapter's folder, or its id on the Hub.
        data: Task of the validation rows, if not the recorded one.
        data_dir: Their folder.
        split: Their split.
        limit: How many of them; half of the split by default.
        output_dir: Where ``laplace/`` is, if not in the adapter's folder.
        progress: Told of rows done and rows in all.
        options: Fields of :class:`lapora.config.PriorSettings`, and the options of :func:`load`.

    Raises:
        LaporaError: As the command.
    """
    model = _model(adapter, output_dir, options, writes=True)
    return run_tune_prior(model, _data(data, data_dir, split, limit), PriorSettings(**_rest(options)), progress)


def evaluate(
    adapter: str | Path,
    *,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    output_dir: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score MAP, Laplace and other methods side by side; ``lapora eval``.

    Args:
        adapter: The adapter's folder, or its id on the Hub.
        data: Task, if not the recorded one.
        data_dir: Folder with ``SPLIT.jsonl``.
        split: The rows to score.
        limit: Only the first so many.
        output_dir: Where ``laplace/`` is, if not in the adapter's folder.
        progress: Told of rows done and rows in all.
        options: Fields of :class:`lapora.config.EvalSettings`, and the options of :func:`load`.

    Returns:
        What ``lapora eval --json`` prints, with ``warnings`` added.

    Raises:
        LaporaError: As the command.
    """
    model = _model(adapter, output_dir, options)
    done = run_evaluation(model, _data(data, data_dir, split, limit), EvalSettings(**_rest(options)), progress)
    return {**done.record, "warnings": done.warnings}


def _model(
    adapter: str | Path, output_dir: str | Path | None, options: Mapping[str, Any], *, writes: bool = False
) -> ModelSettings:
    chosen = {key: options[key] for key in _MODEL_OPTIONS if key in options}
    model = ModelSettings(str(adapter), output_dir=None if output_dir is None else Path(output_dir), **chosen)
    return local_model(model, writes=writes)


def _rest(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in _MODEL_OPTIONS}


def _data(task: str | Path | None, data_dir: str | Path | None, split: str | None, limit: int | None) -> DataSettings:
    folder = None if data_dir is None else Path(data_dir)
    return DataSettings(None if task is None else str(task), folder, split, limit)
