"""A loaded adapter with its task and, once fitted, its posterior."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lapora.config import DataSettings, Dtype, ModelSettings
from lapora.distributed import SINGLE_PROCESS, Processes
from lapora.errors import AdapterError, DataError, LaporaWarning, NonFiniteRowError, NumericalError, listed
from lapora.likelihoods import likelihood_of
from lapora.likelihoods.base import Averaging, Likelihood
from lapora.models.adapter import Adapter, ModelKind
from lapora.models.batches import Batch
from lapora.models.batching import BatchFeed, BatchSize
from lapora.models.loading import LoadedModel, Loader, load_model
from lapora.models.lora_layers import BayesianLayer, find_bayesian_layers
from lapora.models.outputs import OutputModel
from lapora.models.padding_check import check_padding
from lapora.posterior.gaussian import Posterior
from lapora.posterior.prior import PriorPrecision
from lapora.predictive.moments import LinearisedPredictor
from lapora.storage.compatibility import (
    adapter_differences,
    answer_differences,
    model_differences,
    warn_of_other_versions,
)
from lapora.storage.manifest import BaseModel, Prior
from lapora.storage.saved import SavedPosterior, open_posterior
from lapora.tasks import (
    AnswerScore,
    EncodedExample,
    Example,
    Task,
    encode_all,
    render,
    resolve_choices,
)
from lapora.workflows.contradictions import resolve_task
from lapora.workflows.rows import read_rows


@dataclass(frozen=True)
class TaskModel:
    """A loaded adapter with its task: converts rows to batches of token ids, and these to C outputs per row.

    Attributes:
        loaded: Model and tokenizer.
        outputs: The network from batches to the logits or scores of the answers.
        task: The task.
        choices: The C answers; empty where each row has its own.
        likelihood: Maps outputs to predictions.
        token_ids: Token of each answer, for a causal model whose answers are single tokens; else None.
        answer_score: How whole answers are scored, for other causal models; else None.
        max_length: Maximum number of tokens of a row.
        chat_template: Whether prompts are wrapped in the tokenizer's chat template.
        batch_size: Rows per batch; adapts to what fits in memory.
        processes: The processes that share the rows.
    """

    loaded: LoadedModel
    outputs: OutputModel
    task: Task
    choices: tuple[str, ...]
    likelihood: Likelihood
    token_ids: list[int] | None
    answer_score: AnswerScore | None
    max_length: int
    chat_template: bool
    batch_size: BatchSize
    processes: Processes = SINGLE_PROCESS

    @classmethod
    def build(
        cls,
        loaded: LoadedModel,
        task: Task,
        choices: Sequence[str],
        token_ids: Sequence[int] | None,
        *,
        answer_score: AnswerScore | None = None,
        max_length: int,
        chat_template: bool,
        how: ModelSettings,
        noise: Sequence[float] | None = None,
    ) -> TaskModel:
        """Combine a loaded adapter and a task.

        Args:
            loaded: Model and tokenizer.
            task: The task.
            choices: The answers; empty where each row has its own.
            token_ids: Token of each answer, for a causal model whose answers are single tokens.
            answer_score: How whole answers are scored, for other causal models.
            max_length: Maximum number of tokens of a row.
            chat_template: Wrap prompts in the tokenizer's chat template.
            how: Batch size, processes, gradient checkpointing.
            noise: Residual variance of each output of a regression, once it was measured.
        """
        token_ids = None if token_ids is None else list(token_ids)
        outputs = OutputModel(loaded.model, loaded.kind, loaded.pad_token_id, token_ids)
        positions = outputs.max_positions if outputs.has_position_table else None
        if positions is not None and positions < max_length:
            warnings.warn(
                f"the maximum length is {positions} tokens, the positions of the base model, instead of {max_length}",
                LaporaWarning,
                stacklevel=2,
            )
            max_length = positions
        outputs.recompute_blocks |= how.gradient_checkpointing
        if loaded.kind == "classifier" and task.likelihood in ("categorical", "multilabel"):
            outputs.output_order = order_of_outputs(loaded, task, choices)
        check_padding(outputs, loaded.tokenizer, loaded.quantize != "none")
        return cls(
            loaded=loaded,
            outputs=outputs,
            task=task,
            choices=tuple(choices),
            likelihood=likelihood_of(task.likelihood, choices, noise),
            token_ids=token_ids,
            answer_score=answer_score,
            max_length=max_length,
            chat_template=chat_template,
            batch_size=BatchSize(how.batch_size),
            processes=how.processes,
        )

    @property
    def kind(self) -> ModelKind:
        """``causal`` or ``classifier``."""
        return self.loaded.kind

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Return token ids of examples of any task, truncated to the maximum length.

        Only examples of rows with answers of their own keep the texts of the answers.

        Raises:
            DataError: An example cannot be encoded, or has a token that the base model has no embedding for.
        """
        encoded = encode_all(
            examples,
            self.loaded.tokenizer,
            kind=self.kind,
            max_length=self.max_length,
            chat_template=self.chat_template,
            answer_score=self.answer_score,
        )
        require_embeddings(examples, encoded, self.loaded.embedding_rows)
        pairs = zip(examples, encoded, strict=True)
        return [coded if example.given or not self.choices else replace(coded, choices=()) for example, coded in pairs]

    @property
    def classes(self) -> int:
        """Number of outputs C; at least 2 where each row has its own answers."""
        return self.likelihood.outputs or 2

    def batches(self, encoded: Sequence[EncodedExample]) -> BatchFeed:
        """Return batches of rows of similar length, each padded independently of its neighbors, on the device."""
        return BatchFeed(self.outputs, encoded, self.batch_size, bucketed=True)

    def sharded_batches(self, encoded: Sequence[EncodedExample]) -> BatchFeed:
        """Return the batches of this process's shard of the rows, padded to their longest row."""
        return BatchFeed(self.outputs, encoded, self.batch_size, self.processes)


@dataclass(frozen=True, eq=False)
class PriorAverage:
    """Prior precisions that predictions are averaged over.

    Attributes:
        priors: The D prior precisions.
        averaging: Weights of each with each temperature.
    """

    priors: Sequence[PriorPrecision]
    averaging: Averaging

    @classmethod
    def single(cls, prior: PriorPrecision) -> PriorAverage:
        """Return one prior precision, at temperature 1."""
        return cls([prior], Averaging.single())

    @classmethod
    def saved(cls, prior: Prior) -> PriorAverage:
        """Return what a posterior's prior averages over: one precision, unless ``averaged``."""
        if prior.averaged is None:
            scale = torch.tensor([prior.noise_scale], dtype=torch.float64)
            return cls([prior.precisions], Averaging(scale, torch.ones(1, 1, dtype=torch.float64)))
        pruned = prior.averaged.pruned()
        temperatures, weights = (
            torch.tensor(each, dtype=torch.float64) for each in (pruned.temperatures, pruned.weights)
        )
        return cls(prior.precisions.on_grid(pruned.grid), Averaging(temperatures, weights))


@dataclass(frozen=True)
class Fitted:
    """A loaded adapter with its saved posterior.

    Attributes:
        model: The adapter with its task.
        posterior: The saved posterior.
        layers: The Bayesian layers, in the posterior's order.
        gaussian: The Gaussian over their weights, on the model's device.
    """

    model: TaskModel
    posterior: SavedPosterior
    layers: list[BayesianLayer]
    gaussian: Posterior

    @classmethod
    def build(cls, model: TaskModel, posterior: SavedPosterior, layers: list[BayesianLayer]) -> Fitted:
        """Combine an adapter and its posterior, without checking that they belong together."""
        working = torch.float64 if model.loaded.dtype == "float64" else torch.float32
        gaussian = posterior.gaussian().on_device(layers, model.outputs.device, working)
        return cls(model, posterior, layers, gaussian)

    def render(self, row: Mapping[str, Any], *, index: int, where: str) -> Example:
        """Render one row without looking at its label; see :func:`lapora.tasks.render`.

        Raises:
            DataError: The row is not one of the task, or has answers of its own that the posterior does not cover.
        """
        model = self.model
        found = render(
            model.task, row, kind=model.kind, index=index, labels="ignore", choices=model.choices, where=where
        )
        if found.given and any(layer.answer_rows_only for layer in self.layers):
            raise DataError(
                f"{where}: the posterior was fitted on answers of one token, and covers the output layer for these "
                f"alone ({listed(model.choices)}): it cannot score other answers; fit one on rows with whole answers"
            )
        return found

    @cached_property
    def prior(self) -> Prior:
        """The saved prior."""
        return self.posterior.prior

    @cached_property
    def average(self) -> PriorAverage:
        """The saved prior precisions that predictions are averaged over."""
        return PriorAverage.saved(self.prior)

    def predictor(
        self, *, every_class: bool, map_only: bool = False, priors: Sequence[PriorPrecision] = ()
    ) -> LinearisedPredictor:
        """Return the linearised predictive under the saved prior precisions, or under several others at once."""
        parameters = self.posterior.manifest.parameters
        per_layer = [prior.per_layer(parameters) for prior in priors or self.average.priors]
        return LinearisedPredictor(
            self.model.outputs,
            self.layers,
            self.gaussian,
            torch.tensor(np.stack(per_layer)),
            classes=self.model.classes,
            every_class=every_class or not self.model.likelihood.uses_differences,
            map_only=map_only,
        )


def require_embeddings(examples: Sequence[Example], encoded: Sequence[EncodedExample], rows: int | None) -> None:
    """Check that every token has an embedding.

    Args:
        examples: The examples, named in the error.
        encoded: Their token ids.
        rows: Number of token ids with an embedding; None if it is not known.

    Raises:
        DataError: The tokenizer has more tokens than the base model, and an example has one of these.
    """
    for example, row in zip(examples, encoded, strict=True):
        largest = max((*row.input_ids, *(token for answer in row.answers for token in answer.ids)), default=0)
        if rows is not None and largest >= rows:
            raise DataError(
                f"{example.where}: token id {largest}, and the base model has {rows} embeddings: the "
                "tokenizer has added tokens; save the adapter with save_embedding_layers=True after "
                "resize_token_embeddings, or give it the tokenizer of the base"
            )


def order_of_outputs(loaded: LoadedModel, task: Task, choices: Sequence[str]) -> list[int] | None:
    """Return for each answer the index of its output, by the names in the head's ``id2label``; None if in order.

    Raises:
        DataError: Some of the names are answers in another order, and others are not answers.
    """
    id2label = getattr(loaded.model.get_base_model().config, "id2label", None) or {}
    names = [str(id2label.get(index, id2label.get(str(index), ""))).strip().casefold() for index in range(len(choices))]
    answers = [choice.strip().casefold() for choice in choices]
    if not any(name in answers and answers.index(name) != index for index, name in enumerate(names)):
        return None
    order = ", ".join(str(label) for label in id2label.values())
    if sorted(names) != sorted(answers):
        raise DataError(
            f"task {task.task} has the answers {', '.join(choices)} in an order that the head's id2label contradicts "
            f"({order}); write doc_to_choice in the order of the head's outputs"
        )
    warnings.warn(
        f"the answers {', '.join(choices)} are matched to the head's outputs by name ({order}: id2label)",
        LaporaWarning,
        stacklevel=3,
    )
    return [names.index(answer) for answer in answers]


def open_fitted(
    model: ModelSettings,
    name: str,
    earlier: Fitted | None = None,
    data: DataSettings | None = None,
    load: Loader = load_model,
) -> Fitted:
    """Load an adapter and a posterior as ``fit`` recorded them.

    Args:
        model: The adapter and how to load it.
        name: Name of the posterior.
        earlier: The same adapter with another posterior; its loaded model is reused if the base is the same.
        data: Labelled rows that will be read; their answers are compared too.
        load: Loads the model.

    Raises:
        PosteriorError: The posterior is missing, damaged, or belongs to another adapter, base model or task; every
            difference is named.
        AdapterError: The model cannot be loaded.
    """
    with model.processes.raise_together():
        return _open_fitted(model, name, earlier, data, load)


def _open_fitted(
    model: ModelSettings,
    name: str,
    earlier: Fitted | None,
    data: DataSettings | None,
    load: Loader,
) -> Fitted:
    adapter, posterior = open_posterior(model, name)
    manifest = posterior.manifest
    recorded = manifest.base_model
    differences = [*adapter_differences(manifest, adapter), *differences_of_answers(posterior, data)]
    try:
        if earlier is not None and earlier.posterior.manifest.base_model == recorded:
            loaded = earlier.model.loaded
        else:
            as_recorded = replace(
                model,
                base_model=model.base_model or _other_base(recorded, adapter),
                quantize=model.quantize or recorded.quantization,
                dtype=model.dtype or cast(Dtype, recorded.dtype),
            )
            loaded = load(adapter, as_recorded)
        layers = find_bayesian_layers(loaded.model, manifest.subset, whole_answers=manifest.answers.score is not None)
    except AdapterError as error:
        if not differences:
            raise
        raise posterior.mismatch([*differences, str(error)]) from error
    outputs = likelihood_of(
        Task.from_dict(manifest.task, source=str(posterior.folder)).likelihood, manifest.answers.choices
    ).outputs
    differences += model_differences(manifest, loaded, layers, outputs)
    if differences:
        raise posterior.mismatch(differences)
    warn_of_other_versions(manifest)
    return join_posterior(posterior, loaded, layers, model)


def _other_base(recorded: BaseModel, adapter: Adapter) -> str | None:
    """Return the base model that ``fit`` was given instead of the adapter's own, or None.

    The adapter's own is loaded at its own revision. It is also taken if the recorded folder does not exist any more, or
    was recorded relative to another folder (before version 0.2): the weights are compared in any case.
    """
    name, own = recorded.name, adapter.base_model
    if name == own:
        return name if recorded.revision is None and adapter.revision is not None else None
    if own is not None and Path(own).is_dir() and not Path(name).is_dir():
        parts = Path(name).parts
        if Path(name).is_absolute() or Path(own).parts[-len(parts) :] == parts:
            return None
    return name


def join_posterior(
    posterior: SavedPosterior, loaded: LoadedModel, layers: list[BayesianLayer], how: ModelSettings
) -> Fitted:
    """Combine a loaded adapter and the posterior that was fitted to it."""
    manifest = posterior.manifest
    model = TaskModel.build(
        loaded,
        Task.from_dict(manifest.task, source=str(posterior.folder)),
        manifest.answers.choices,
        manifest.answers.token_ids,
        answer_score=manifest.answers.score,
        max_length=manifest.data.max_length,
        chat_template=manifest.data.chat_template,
        how=how,
        noise=manifest.noise_variance,
    )
    return Fitted.build(model, posterior, layers)


def differences_of_answers(posterior: SavedPosterior, data: DataSettings | None) -> list[str]:
    """Return how the answers of the requested rows differ from the posterior's."""
    if data is None:
        return []
    manifest = posterior.manifest
    task = resolve_task(data, manifest)
    rows: list[Any] = []
    if not manifest.answers.choices:
        return []
    if not isinstance(task.doc_to_choice, tuple):  # the answers come from the first row
        try:
            rows = read_rows(replace(data, limit=1), manifest, "validation")[1]
        except DataError:  # reading all of the rows raises it again
            return []
    kind: ModelKind = "causal" if manifest.answers.causal else "classifier"
    return answer_differences(manifest, task.task, resolve_choices(task, rows, kind=kind))


@contextmanager
def translate_row_errors(names: Sequence[str]) -> Iterator[None]:
    """Replace batch positions in errors by the names of the examples.

    Args:
        names: Names of the examples, by position.

    Raises:
        NumericalError: The error, with the example's name.
    """
    try:
        yield
    except NonFiniteRowError as error:
        raise NumericalError(f"{names[error.row]}: {error.reason}") from error


def require_finite(covariance: Tensor, batch: Batch) -> None:
    """Check a batch's covariances, which may be non-finite although the logits are finite.

    Raises:
        NonFiniteRowError: A row's covariance contains NaN or infinity.
    """
    finite = torch.isfinite(covariance).flatten(1).all(dim=1)
    if not bool(finite.all()):
        row = batch.rows[int((~finite).nonzero()[0])]
        raise NonFiniteRowError(row, "the covariance of its logits is not finite; try --dtype float32")
