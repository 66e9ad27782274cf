"""A model, its task and, once fitted, its posterior: what every command starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapora.config import DataSettings, ModelSettings
from lapora.distributed import SINGLE_PROCESS, Processes
from lapora.errors import AdapterError, DataError, NonFiniteRowError, NumericalError, PosteriorError
from lapora.models.adapter import Adapter, read_adapter
from lapora.models.batches import Batch
from lapora.models.batching import BatchFeed, BatchSize
from lapora.models.loading import LoadedModel, load_model
from lapora.models.lora_layers import BayesianLayer, find_bayesian_layers
from lapora.models.outputs import OutputModel
from lapora.models.shared_base import BaseCache
from lapora.posterior.gaussian import Posterior
from lapora.posterior.prior import PriorPrecision
from lapora.predictive.moments import LinearisedPredictor
from lapora.storage.compatibility import (
    adapter_differences,
    answer_differences,
    model_differences,
    warn_of_other_versions,
)
from lapora.storage.saved import SavedPosterior, posterior_folder
from lapora.tasks import (
    EncodedExample,
    Example,
    Task,
    encode_all,
    load_rows,
    load_task,
    resolve_choices,
    split_source,
)


@dataclass(frozen=True)
class Session:
    """Everything needed to run a fitted adapter.

    Attributes:
        posterior: The saved posterior.
        loaded: Model and tokenizer.
        answers: The network to answer logits.
        layers: The Bayesian layers, in the posterior's order.
        gaussian: The Gaussian over their weights, on the model's device.
        task: The recorded task.
        choices: The answers.
        max_length: Tokens a row may have.
        batch_size: How large batches are; it learns what fits.
        chat_template: Whether prompts are wrapped in the tokenizer's chat template.
        processes: Those that share the rows.
    """

    posterior: SavedPosterior
    loaded: LoadedModel
    answers: OutputModel
    layers: list[BayesianLayer]
    gaussian: Posterior
    task: Task
    choices: tuple[str, ...]
    max_length: int
    batch_size: BatchSize
    chat_template: bool
    processes: Processes = SINGLE_PROCESS

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Token ids of examples, cut as ``fit`` cut them."""
        return encode_all(
            examples,
            self.loaded.tokenizer,
            kind=self.loaded.kind,
            max_length=self.max_length,
            task=self.task,
            chat_template=self.chat_template,
        )

    def predictor(
        self, *, every_class: bool, map_only: bool = False, priors: Sequence[PriorPrecision] = ()
    ) -> LinearisedPredictor:
        """The linearised predictive at the saved prior precision, or at several others at once."""
        parameters = self.posterior.manifest["parameters"]
        per_layer = [prior.per_layer(parameters) for prior in priors or [self.posterior.prior]]
        return LinearisedPredictor(
            self.answers,
            self.layers,
            self.gaussian,
            torch.tensor(np.stack(per_layer)),
            classes=len(self.choices),
            every_class=every_class,
            map_only=map_only,
        )

    def batches(self, encoded: Sequence[EncodedExample]) -> BatchFeed:
        """Batches of like-long rows, each padded as it would be beside any others, on the model's device."""
        return BatchFeed(self.answers, encoded, self.batch_size, bucketed=True)


def open_posterior(model: ModelSettings, name: str) -> tuple[Adapter, SavedPosterior]:
    """Read the adapter and its saved posterior; whether they belong together, :func:`open_session` sees.

    Raises:
        AdapterError: No adapter.
        PosteriorError: No such posterior, or a damaged one.
    """
    return read_adapter(model.folder), SavedPosterior(posterior_folder(model.root, name))


def open_session(
    model: ModelSettings,
    name: str,
    earlier: Session | None = None,
    data: DataSettings | None = None,
    bases: BaseCache | None = None,
) -> Session:
    """Load what ``fit`` recorded.

    Args:
        model: The adapter and how to run it.
        name: The posterior.
        earlier: A session of the same adapter, whose loaded model serves again where the base is the same.
        data: Labelled rows that are to be read: their answers are compared, too.
        bases: Base models that other adapters are put on too.

    Raises:
        PosteriorError: The posterior is missing, damaged, or belongs to another adapter, base model or task; all
            that differs is named.
        AdapterError: The model cannot be loaded.
    """
    with model.processes.raise_together():
        return _open_session(model, name, earlier, data, load_model if bases is None else bases.load)


def _open_session(
    model: ModelSettings,
    name: str,
    earlier: Session | None,
    data: DataSettings | None,
    load: Callable[..., LoadedModel],
) -> Session:
    adapter, posterior = open_posterior(model, name)
    recorded = posterior.manifest["base_model"]
    differences = [*adapter_differences(posterior.manifest, adapter), *_answers_asked_for(posterior, data)]
    try:
        if earlier is not None and earlier.posterior.manifest["base_model"] == recorded:
            loaded = earlier.loaded
        else:
            loaded = load(
                adapter,
                # The adapter's own base is loaded in the revision that it names.
                base_model=model.base_model or (recorded["name"] if recorded["name"] != adapter.base_model else None),
                quantize=model.quantize or recorded["quantization"],
                dtype=model.dtype or recorded["dtype"],
                device=model.device,
                spread=model.spread,
                trust_remote_code=model.trust_remote_code,
            )
        layers = find_bayesian_layers(loaded.model, posterior.manifest["subset"])
    except AdapterError as error:
        if not differences:
            raise
        raise mismatch_error(posterior, [*differences, str(error)]) from error
    differences += model_differences(posterior.manifest, loaded, layers)
    if differences:
        raise mismatch_error(posterior, differences)
    warn_of_other_versions(posterior.manifest)
    session = join_session(posterior, loaded, layers, model.batch_size, model.processes)
    session.answers.recompute_blocks |= model.gradient_checkpointing
    return session


def join_session(
    posterior: SavedPosterior,
    loaded: LoadedModel,
    layers: list[BayesianLayer],
    batch_size: int | None,
    processes: Processes = SINGLE_PROCESS,
) -> Session:
    """Put a posterior and the model that it belongs to together."""
    gaussian = posterior.gaussian()
    answers = OutputModel(loaded.model, loaded.kind, loaded.pad_token_id, posterior.manifest["answers"]["token_ids"])
    working = torch.float64 if loaded.dtype == "float64" else torch.float32
    return Session(
        posterior=posterior,
        loaded=loaded,
        answers=answers,
        layers=layers,
        gaussian=gaussian.on_device(layers, answers.device, working),
        task=Task.from_dict(posterior.manifest["task"], source=str(posterior.folder)),
        choices=tuple(posterior.manifest["answers"]["choices"]),
        max_length=int(posterior.manifest["data"]["max_length"]),
        batch_size=BatchSize(batch_size),
        chat_template=bool(posterior.manifest["data"].get("chat_template", False)),
        processes=processes,
    )


def _answers_asked_for(posterior: SavedPosterior, data: DataSettings | None) -> list[str]:
    if data is None:
        return []
    manifest = posterior.manifest
    task = load_task(data.task) if data.task else Task.from_dict(manifest["task"], source="the posterior's task")
    rows: list[Any] = []
    if not isinstance(task.doc_to_choice, tuple):  # the first row says them
        try:
            rows = read_rows(replace(data, limit=1), manifest, "validation")[1]
        except DataError:  # reading all of them will say the same
            return []
    return answer_differences(manifest, task.task, resolve_choices(task, rows))


def mismatch_error(posterior: SavedPosterior, differences: Sequence[str]) -> PosteriorError:
    """The refusal of a posterior that belongs to something else."""
    return PosteriorError(
        f"{posterior.folder}: fitted to something else: {'; '.join(differences)}; give what it was fitted to, or fit "
        "again with --overwrite"
    )


def read_rows(data: DataSettings, recorded: dict[str, Any] | None, default_split: str) -> tuple[Task, list[Any], str]:
    """The rows a command works on: its own options first, then what ``fit`` recorded.

    Returns:
        The task, its rows, and the split's name.
    """
    recorded_data = (recorded or {}).get("data", {})
    if data.task:
        task = load_task(data.task)
    elif recorded:
        task = Task.from_dict(recorded["task"], source="the posterior's task")
    else:
        raise DataError("no task; give one with --data (see `lapora tasks`)")
    folder = data.data_dir or recorded_data.get("data_dir")
    split = data.split or default_split
    return task, load_rows(task, split, data_dir=Path(folder) if folder else None, limit=data.limit), split


def are_training_rows(manifest: dict[str, Any], data: DataSettings) -> bool:
    """Whether these are the rows that ``fit`` read, whatever they are called; ``data`` names a split."""
    return source_of(manifest, data) == source_of(manifest, DataSettings(split=manifest["data"]["split"]))


def source_of(manifest: dict[str, Any], data: DataSettings) -> tuple[str, ...]:
    """What identifies a split, whatever it is called: the folder or the task's own source, and the split there.

    Args:
        manifest: The posterior's, for what ``data`` does not say.
        data: The split.
    """
    recorded = manifest["task"]
    task = load_task(data.task) if data.task else Task.from_dict(recorded, source="the posterior's task")
    folder = data.data_dir or manifest["data"].get("data_dir")
    return split_source(task, data.split or "", folder)


@contextmanager
def translate_row_errors(names: Sequence[str]) -> Iterator[None]:
    """Name the example in place of its position.

    Args:
        names: The examples' names, by position.

    Raises:
        NumericalError: The error met, with the example's name.
    """
    try:
        yield
    except NonFiniteRowError as error:
        raise NumericalError(f"{names[error.row]}: {error.reason}") from error


def require_finite(covariance: Tensor, batch: Batch) -> None:
    """Logits may be finite where their gradients are not.

    Raises:
        NonFiniteRowError: A row's covariance holds NaN or infinity.
    """
    finite = torch.isfinite(covariance).flatten(1).all(dim=1)
    if not bool(finite.all()):
        row = batch.rows[int((~finite).nonzero()[0])]
        raise NonFiniteRowError(row, "the covariance of its logits is not finite; try --dtype float32")
