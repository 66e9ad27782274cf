"""``lapora fit``: one pass over the training rows, then the posterior is written beside the adapter."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lapora._version import __version__
from lapora.config import DEFAULT_RANK, DataSettings, FitSettings, ModelSettings, Progress
from lapora.curvature.passes import CurvatureRun
from lapora.distributed import SINGLE_PROCESS, Processes
from lapora.errors import DataError, LaporaError, PosteriorError, UsageError
from lapora.models.adapter import Adapter, read_adapter
from lapora.models.batching import BatchFeed, BatchSize
from lapora.models.fingerprint import library_versions
from lapora.models.in_memory import adapter_in_memory, loaded_in_memory, prepared_for_fit
from lapora.models.loading import LoadedModel, load_model
from lapora.models.lora_layers import find_bayesian_layers
from lapora.models.outputs import OutputModel
from lapora.models.shared_base import BaseCache
from lapora.posterior.eigen import decompose
from lapora.posterior.gaussian import BlockPosterior, Posterior
from lapora.posterior.marglik import EvidenceMaximum, maximize_evidence
from lapora.posterior.structures import fit_structure
from lapora.storage.compatibility import adapter_settings, base_digests, tokenizer_digest
from lapora.storage.files import write_lock
from lapora.storage.partial import Checkpoint
from lapora.storage.saved import FORMAT_VERSION, SavedPosterior, posterior_exists, posterior_folder, write_posterior
from lapora.tasks import (
    EncodedExample,
    Example,
    Row,
    Task,
    answer_token_ids,
    data_fingerprint,
    encode_all,
    load_task,
    render_all,
    resolve_choices,
)
from lapora.workflows.task_model import Session, join_session, read_rows, translate_row_errors

if TYPE_CHECKING:
    from lapora.memory.estimate import MemoryEstimate


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` made.

    Attributes:
        folder: Where the posterior is.
        rows: Number of training rows.
        truncated: How many were cut to the greatest length.
        log_likelihood: ``log p(y|X, θ_MAP)`` in nats, or None without labels.
        parameters: Number of Bayesian parameters.
        prior: The prior precision by marginal likelihood.
        kept: Share of the curvature's trace that a truncated basis holds.
        notes: What the user should know.
    """

    folder: Path
    rows: int
    truncated: int
    log_likelihood: float | None
    parameters: int
    prior: EvidenceMaximum
    kept: float
    notes: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "folder": str(self.folder),
            "n": self.rows,
            "truncated": self.truncated,
            "parameters": self.parameters,
            "log_likelihood": self.log_likelihood,
            "prior": self.prior.describe(self.log_likelihood is not None),
            "kept": self.kept,
            "notes": list(self.notes),
        }


def fit(
    model: ModelSettings,
    data: DataSettings,
    settings: FitSettings,
    progress: Progress | None = None,
    bases: BaseCache | None = None,
) -> FitResult:
    """Fit the Laplace posterior of an adapter.

    Args:
        model: The adapter and how to run it.
        data: The rows it was trained on.
        settings: The curvature's choices.
        progress: Told of rows done.
        bases: Base models that stay loaded for other adapters.

    Raises:
        LaporaError: See the table of exit statuses; nothing half-written is left behind.
    """
    processes = model.processes
    settings = resolve_settings(model, settings)
    folder = posterior_folder(model.root, settings.name)
    with processes.raise_together():
        refuse_to_replace(folder, settings)
        read_adapter(model.folder)  # nothing is written where no adapter is
    with processes.on_main(write_lock(folder)):
        with processes.raise_together():
            prepared = prepare_fit(model, data, settings, bases)
        return _fit(prepared, settings, folder, progress)


def fit_several(
    models: Sequence[ModelSettings],
    data: DataSettings,
    settings: FitSettings,
    progress: Callable[[ModelSettings], AbstractContextManager[Progress]],
) -> Iterator[tuple[ModelSettings, FitResult | LaporaError]]:
    """Fit several adapters on the same rows; those of one base share it, and what is wrong with one stops no other.

    In a run of several processes it does stop the others.

    Args:
        models: The adapters and how to run them.
        data: The rows they were trained on.
        settings: The curvature's choices.
        progress: Gives, for each, who is told of rows done.

    Yields:
        Each adapter with what was made, or why nothing was.
    """
    bases = BaseCache()
    for model in models:
        try:
            with progress(model) as told:
                found: FitResult | LaporaError = fit(model, data, settings, told, bases)
        except LaporaError as error:
            if model.processes.count > 1:  # the others may be elsewhere by now
                raise
            found = error.with_traceback(None)
            found.__cause__ = found.__context__ = None
        yield model, found


def fit_prepared(
    prepared: PreparedFit, settings: FitSettings, root: Path, progress: Progress | None = None
) -> FitResult:
    """Fit a model that stands in memory with its rows.

    Args:
        prepared: Model and rows.
        settings: The curvature's choices.
        root: The folder that holds, or is to hold, ``laplace/``.
        progress: Told of rows done.

    Raises:
        LaporaError: As :func:`fit`.
    """
    settings = _resolve_engine(settings)
    folder = posterior_folder(root, settings.name)
    refuse_to_replace(folder, settings)
    with write_lock(folder):
        return _fit(prepared, settings, folder, progress)


def resolve_settings(model: ModelSettings, settings: FitSettings) -> FitSettings:
    """Settings as they will be used.

    Raises:
        UsageError: A combination that does not exist.
    """
    settings = _resolve_engine(settings)
    if model.gradient_checkpointing and settings.engine != "native":
        raise UsageError("--gradient-checkpointing goes with --engine native")
    if model.processes.count > 1 and settings.engine != "native":
        raise UsageError(f"--engine {settings.engine} runs in one process: start it without a launcher")
    return settings


def estimate_memory(
    model: ModelSettings, data: DataSettings, settings: FitSettings, *, device_memory: float | None = None
) -> MemoryEstimate:
    """Estimate the memory of a fit; see :func:`lapora.memory.estimate.estimate`."""
    from lapora.memory.estimate import estimate

    adapter = read_adapter(model.folder)
    task, rows, _ = read_rows(data, None, "train")
    return estimate(
        model,
        settings,
        adapter,
        classes=len(resolve_choices(task, rows)),
        rows=len(rows),
        length=settings.max_length or task.max_length_for(adapter.kind),
        device_memory=device_memory,
    )


def refuse_to_replace(folder: Path, settings: FitSettings) -> None:
    """Refuse a name that is taken.

    Raises:
        PosteriorError: The posterior is there, and may not be replaced.
    """
    if posterior_exists(folder) and not settings.overwrite:
        raise PosteriorError(f"{folder}: exists already; give --overwrite, or another --name")


def _fit(prepared: PreparedFit, settings: FitSettings, folder: Path, progress: Progress | None) -> FitResult:
    checkpoint = None
    run = prepared.run(settings, progress)
    if settings.engine == "native":
        with prepared.processes.raise_together():
            checkpoint = Checkpoint(
                folder,
                prepared.identity(settings),
                resume=settings.resume,
                every=settings.save_every,
                device=prepared.answers.device,
                rank=prepared.processes.rank,
            )
        run = replace(run, checkpoint=checkpoint)
    with translate_row_errors([example.where for example in prepared.examples]):
        posterior, log_likelihood = fit_posterior(run, settings)
    parameters = posterior.parameters()
    prior = maximize_evidence(
        [values.cpu().numpy() for values in posterior.eigenvalues], parameters, log_likelihood or 0.0
    )
    manifest = {
        **prepared.describe(),
        "structure": settings.structure,
        "weight_sharing": settings.weight_sharing,
        "engine": settings.engine,
        "fisher": settings.fisher,
        "subset": settings.subset,
        "rank": _rank(settings),
        "kept": _kept(posterior),
        "seed": settings.seed,
        "parameters": parameters,
        "log_likelihood": log_likelihood,
        "prior": prior.describe(log_likelihood is not None),
    }
    with prepared.processes.raise_together():  # nobody goes on, or tidies up, before it is written
        if prepared.processes.is_main:
            write_posterior(folder, manifest, posterior)
    notes = list(prepared.adapter.notes)
    if checkpoint is not None:
        if prepared.processes.is_main:
            checkpoint.remove()
        if settings.resume:
            notes.append(_resumed_note(prepared.processes.all_gather(checkpoint.resumed_rows), len(prepared.examples)))
    return FitResult(
        folder=folder,
        rows=len(prepared.examples),
        truncated=sum(row.truncated for row in prepared.encoded),
        log_likelihood=log_likelihood,
        parameters=sum(rows * columns for rows, columns in (parameter["shape"] for parameter in parameters)),
        prior=prior,
        kept=_kept(posterior),
        notes=tuple(notes),
    )


def _resumed_note(resumed: Sequence[int], rows: int) -> str:
    if not any(resumed):
        return "--resume: nothing was saved to go on from; all rows were read"
    return f"--resume: went on after {sum(resumed)} of {rows} rows of the last pass begun"


def _resolve_engine(settings: FitSettings) -> FitSettings:
    """``--weight-sharing asdl`` and ``--engine asdl`` are two names of one thing: the paper's stack.

    Raises:
        UsageError: A combination that does not exist.
    """
    structure, engine = settings.structure, settings.engine
    if settings.resume and (engine != "native" or settings.weight_sharing == "asdl"):
        raise UsageError("--resume goes with --engine native: laplace-torch's engines keep no sums to go on from")
    if settings.rank is not None and structure not in ("kron", "lowrank"):
        raise UsageError(f"--rank goes with --structure kron or lowrank, not {structure}")
    if settings.offload_factors and (engine != "native" or structure not in ("kron", "ekfac")):
        raise UsageError("--offload-factors goes with --structure kron or ekfac, and --engine native")
    if "asdl" in (engine, settings.weight_sharing):
        if engine == "curvlinops":
            raise UsageError("--engine curvlinops has no --weight-sharing asdl: use expand, reduce, or --engine asdl")
        if settings.weight_sharing == "reduce":
            raise UsageError("--engine asdl has no KFAC-reduce: its weight sharing is expand, divided by N")
        settings = replace(settings, engine="asdl", weight_sharing="asdl")
        engine = "asdl"
    if engine == "native":
        return settings
    if structure != "kron" or settings.rank is not None:
        raise UsageError(f"--engine {engine} computes --structure kron alone, without --rank")
    if settings.fisher != "exact":
        raise UsageError(f"--engine {engine} computes the exact Fisher alone, not --fisher {settings.fisher}")
    return settings


def fit_posterior(run: CurvatureRun, settings: FitSettings) -> tuple[Posterior, float | None]:
    """The posterior by the engine asked for, and ``log p(y|X, θ_MAP)`` where the rows have labels."""
    if settings.engine == "native":
        posterior, data = fit_structure(settings.structure, run)
        return posterior, data.log_likelihood
    from lapora.laplace_torch import asdl_factors, curvlinops_factors

    rows = (run.output_model, run.layers, run.batches(), run.targets)
    if settings.weight_sharing == "asdl":
        factors, log_likelihood = asdl_factors(*rows, run.progress)
    else:
        factors, log_likelihood = curvlinops_factors(*rows, settings.weight_sharing, run.progress)
    return BlockPosterior(decompose(run.layers, factors, rank=sys.maxsize)), log_likelihood


def _rank(settings: FitSettings) -> int | None:
    return settings.rank or (DEFAULT_RANK if settings.structure == "lowrank" else None)


def _kept(posterior: Posterior) -> float:
    """Share of the curvature's trace that the basis holds, the smallest of the layers'."""
    if isinstance(posterior, BlockPosterior):
        return min(block.kept for block in posterior.blocks)
    return posterior.kept


@dataclass(frozen=True)
class PreparedFit:
    """A loaded adapter and its training rows, ready for any structure of the curvature.

    Attributes:
        adapter: The adapter's files.
        loaded: Model and tokenizer.
        answers: The network to answer logits.
        task: The task.
        choices: The answers.
        token_ids: Their tokens, for a causal model.
        examples: The training rows.
        encoded: Their token ids.
        split: The split they came from.
        max_length: Tokens a row may have.
        data: What was asked for.
        batch_size: How large batches are; it learns what fits.
        chat_template: Whether prompts are wrapped in the tokenizer's chat template.
        processes: Those that share the rows.
    """

    adapter: Adapter
    loaded: LoadedModel
    answers: OutputModel
    task: Task
    choices: tuple[str, ...]
    token_ids: list[int] | None
    examples: list[Example]
    encoded: list[EncodedExample]
    split: str
    max_length: int
    data: DataSettings
    batch_size: BatchSize
    chat_template: bool
    processes: Processes

    def run(self, settings: FitSettings, progress: Progress | None = None) -> CurvatureRun:
        """The passes over the data that a structure is made of."""
        return CurvatureRun(
            output_model=self.answers,
            layers=find_bayesian_layers(self.loaded.model, settings.subset),
            batches=lambda: BatchFeed(self.answers, self.encoded, self.batch_size, self.processes),
            targets=[example.target for example in self.examples],
            classes=len(self.choices),
            fisher=settings.fisher,
            weight_sharing=settings.weight_sharing,
            rank=settings.rank,
            seed=settings.seed,
            progress=progress,
            processes=self.processes,
            offload=settings.offload_factors,
        )

    def identity(self, settings: FitSettings) -> dict[str, Any]:
        """Everything that decides the sums of a pass, for ``--resume``: its settings, its rows, its batches."""
        described = self.describe()
        del described["data"]["data_dir"], described["data"]["limit"]
        tokens = hashlib.sha256()
        for row in self.encoded:
            tokens.update(json.dumps([row.input_ids, row.token_type_ids]).encode("ascii"))
        chosen = ("structure", "weight_sharing", "fisher", "subset", "rank", "seed")
        return {
            **described,
            **{key: getattr(settings, key) for key in chosen},
            "batch_size": self.batch_size.rows,
            "tokens": tokens.hexdigest(),
            "device": self.answers.device.type,
            "processes": self.processes.count,
        }

    def describe(self) -> dict[str, Any]:
        """The manifest's fields about adapter, base model, task and data."""
        loaded = self.loaded
        return {
            "format_version": FORMAT_VERSION,
            "lapora_version": __version__,
            "libraries": library_versions(),
            "adapter": self.adapter.sha256,
            "adapter_config": adapter_settings(self.adapter),
            "tokenizer": tokenizer_digest(loaded.tokenizer, self.chat_template),
            "base_model": {
                "name": loaded.base_model,
                "revision": loaded.revision,
                "quantization": loaded.quantize,
                "dtype": loaded.dtype,
                "fingerprint": loaded.fingerprint,
                "digests": base_digests(loaded),
            },
            "task": self.task.to_dict(),
            "answers": {"choices": list(self.choices), "token_ids": self.token_ids},
            "data": {
                "split": self.split,
                "n": len(self.examples),
                "fingerprint": data_fingerprint(self.examples),
                "data_dir": str(Path(self.data.data_dir).resolve()) if self.data.data_dir else None,
                "limit": self.data.limit,
                "max_length": self.max_length,
                "chat_template": self.chat_template,
            },
        }


def prepare_fit(
    model: ModelSettings, data: DataSettings, settings: FitSettings, bases: BaseCache | None = None
) -> PreparedFit:
    """Load an adapter and the rows it was trained on.

    Args:
        model: The adapter and how to run it.
        data: The rows; the split ``train`` by default.
        settings: Greatest length, chat template, and whether labels are needed.
        bases: Base models that other adapters are put on too.

    Raises:
        AdapterError: The model cannot be loaded.
        DataError: The rows cannot be read, or their answers are not the head's.
    """
    adapter = read_adapter(model.folder)
    task, rows, split = read_rows(data, None, "train")

    def load() -> LoadedModel:
        return (load_model if bases is None else bases.load)(
            adapter,
            base_model=model.base_model,
            quantize=model.quantize,
            dtype=model.dtype or "auto",
            device=model.device,
            spread=model.spread,
            trust_remote_code=model.trust_remote_code,
        )

    data = replace(data, split=split)
    prepared = prepare_rows(adapter, load, task, rows, data, settings, model.batch_size, model.processes)
    prepared.answers.recompute_blocks |= model.gradient_checkpointing
    return prepared


def prepare_rows(
    adapter: Adapter,
    load: Callable[[], LoadedModel],
    task: Task,
    rows: Sequence[Row | Mapping[str, Any]],
    data: DataSettings,
    settings: FitSettings,
    batch_size: int | None,
    processes: Processes = SINGLE_PROCESS,
) -> PreparedFit:
    """Render rows, then load the model, then encode: what is wrong with the rows is said before anything slow.

    Args:
        adapter: The adapter's files.
        load: Gives the model.
        task: The task.
        rows: The training rows.
        data: Where they come from, with the split's name.
        settings: Greatest length, chat template, and whether labels are needed.
        batch_size: Rows per batch, or None for a token budget.
        processes: Those that share the rows.

    Raises:
        AdapterError: The model cannot be loaded.
        DataError: The rows cannot be read, or their answers are not the head's.
    """
    choices = resolve_choices(task, rows)
    examples = render_all(
        task,
        rows,
        kind=adapter.kind,
        choices=choices,
        labels="required" if settings.fisher == "empirical" else "optional",
    )
    loaded = load()
    token_ids = _answers(loaded, task, examples, choices, settings.chat_template)
    max_length = settings.max_length or task.max_length_for(adapter.kind)
    encoded = encode_all(
        examples,
        loaded.tokenizer,
        kind=adapter.kind,
        max_length=max_length,
        task=task,
        chat_template=settings.chat_template,
    )
    return PreparedFit(
        adapter=adapter,
        loaded=loaded,
        answers=OutputModel(loaded.model, loaded.kind, loaded.pad_token_id, token_ids),
        task=task,
        choices=choices,
        token_ids=token_ids,
        examples=examples,
        encoded=encoded,
        split=data.split or "train",
        max_length=max_length,
        data=data,
        batch_size=BatchSize(batch_size),
        chat_template=settings.chat_template,
        processes=processes,
    )


def _answers(
    loaded: LoadedModel, task: Task, examples: Sequence[Example], choices: Sequence[str], chat_template: bool
) -> list[int] | None:
    if loaded.kind == "causal":
        return answer_token_ids(
            loaded.tokenizer,
            [example.text or "" for example in examples],
            choices,
            delimiter=task.target_delimiter,
            chat_template=chat_template,
            labels=[example.where for example in examples],
        )
    if chat_template:
        raise UsageError("--chat-template wraps the prompt of a causal language model; this adapter is a classifier")
    if loaded.number_of_labels != len(choices):
        raise DataError(
            f"task {task.task} has {len(choices)} answers and the adapter's head {loaded.number_of_labels} outputs; "
            "give the task the adapter was trained on"
        )
    return None


def fit_in_memory(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any] | Row],
    task: Task | Mapping[str, Any] | str | Path,
    settings: FitSettings,
    *,
    root: Path,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[Session, FitResult]:
    """Fit a model as it stands, and join it with its posterior; see :func:`lapora.api.fit_model`.

    Raises:
        DataError: No rows, or one that is no mapping.
        LaporaError: As :func:`lapora.workflows.fit.fit`.
    """
    resolved = _task(task)
    given = [_values(row, number) for number, row in enumerate(rows)]
    if not given:
        raise DataError("no rows: give the rows that the adapter was trained on")
    with tempfile.TemporaryDirectory(prefix="lapora-") as folder:
        adapter = adapter_in_memory(model, Path(folder))
    loaded = loaded_in_memory(model, tokenizer, adapter)
    with prepared_for_fit(model, loaded.pad_token_id):
        prepared = prepare_rows(
            adapter, lambda: loaded, resolved, given, DataSettings(split="train"), settings, batch_size
        )
        fitted = fit_prepared(prepared, settings, root, progress)
        layers = find_bayesian_layers(loaded.model, settings.subset)
        return join_session(SavedPosterior(fitted.folder), loaded, layers, batch_size), fitted


def _values(row: Mapping[str, Any] | Row, number: int) -> dict[str, Any]:
    values = row.values if isinstance(row, Row) else row
    if not isinstance(values, Mapping):
        raise DataError(f"row {number}: a {type(row).__name__}; a row is a mapping with the task's fields")
    return dict(values)


def _task(task: Task | Mapping[str, Any] | str | Path) -> Task:
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return Task.from_dict(cast("Mapping[str, Any]", task))
    return load_task(str(task))
