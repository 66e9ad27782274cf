"""``lapora fit``: compute the curvature in a pass over the training rows, and save the posterior beside the adapter."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec
from msgspec import structs

from lapora._version import __version__
from lapora.config import COMPLETE, DataSettings, FitSettings, ModelSettings, Progress, check_likelihood
from lapora.curvature.nystrom import TEST_MATRIX
from lapora.curvature.passes import CurvatureRun
from lapora.errors import AdapterError, DataError, LaporaError, UsageError, listed
from lapora.likelihoods import likelihood_of
from lapora.likelihoods.gaussian import Gaussian
from lapora.memory.estimate import MemoryEstimate, estimate
from lapora.models.adapter import Adapter, Head, read_adapter
from lapora.models.batching import is_out_of_memory
from lapora.models.fingerprint import library_versions
from lapora.models.in_memory import adapter_in_memory, loaded_in_memory, prepared_for_fit
from lapora.models.loading import Loader, load_model, tokenizer_and_embeddings
from lapora.models.lora_layers import find_bayesian_layers
from lapora.models.shared_base import BaseCache
from lapora.posterior.averaging import TrainingCurve
from lapora.posterior.eigen import decompose
from lapora.posterior.gaussian import BlockPosterior, Posterior
from lapora.posterior.marglik import EvidenceMaximum, maximize_evidence
from lapora.posterior.structures import fit_structure
from lapora.storage.compatibility import adapter_settings, base_digests, tokenizer_digest
from lapora.storage.files import write_lock
from lapora.storage.manifest import FORMAT_VERSION, Answers, BaseModel, Data, Manifest
from lapora.storage.partial import Checkpoint
from lapora.storage.saved import (
    SavedPosterior,
    posterior_folder,
    refuse_full_disk,
    refuse_to_replace,
    write_posterior,
)
from lapora.tasks import (
    AnswerEncoding,
    EncodedExample,
    Example,
    Row,
    Task,
    data_fingerprint,
    encode_all,
    given_rows,
    is_one_row,
    load_task,
    render_all,
    required_fields,
    resolve_answers,
    resolve_choices,
)
from lapora.tasks.examples import Labels, label_source, refuse_missing_labels
from lapora.tasks.rows import check_label_names
from lapora.workflows.averaging import average_without_rows, describe_averaged, training_curve
from lapora.workflows.contradictions import check_head
from lapora.workflows.rows import label_tensor, read_rows, row_digest
from lapora.workflows.scoring import forward_outputs
from lapora.workflows.task_model import (
    Fitted,
    TaskModel,
    join_posterior,
    require_embeddings,
    translate_row_errors,
)


@dataclass(frozen=True)
class TrainingRows:
    """An adapter's files and its rendered training rows; requires no weights.

    Attributes:
        adapter: The adapter's files.
        data: Source of the rows, with the name of the split.
        task: The task.
        choices: The C answers; empty where each row has its own.
        examples: The rows.
        max_length: Maximum number of tokens of a row.
    """

    adapter: Adapter
    data: DataSettings
    task: Task
    choices: tuple[str, ...]
    examples: list[Example]
    max_length: int

    @property
    def classes(self) -> int:
        """Number of answers C; the maximum over the rows, if each has its own."""
        return len(self.choices) or max(len(example.choices) for example in self.examples)


@dataclass(frozen=True)
class FitInputs:
    """The inputs of a fit: training rows, the loaded model, and the rows' token ids.

    Attributes:
        rows: The training rows.
        model: The adapter with its task.
        encoded: Token ids of the rows.
        notes: What the user should know.
    """

    rows: TrainingRows
    model: TaskModel
    encoded: list[EncodedExample]
    notes: tuple[str, ...] = ()

    def run(self, settings: FitSettings, progress: Progress | None = None) -> CurvatureRun:
        """Return the passes over the data from which a curvature structure is computed."""
        return CurvatureRun(
            output_model=self.model.outputs,
            layers=find_bayesian_layers(
                self.model.loaded.model, settings.subset, whole_answers=self.model.answer_score is not None
            ),
            batches=lambda: self.model.sharded_batches(self.encoded),
            targets=[example.target for example in self.rows.examples],
            classes=self.model.likelihood.outputs or self.rows.classes,
            fisher=settings.fisher,
            weight_sharing=settings.weight_sharing,
            rank=settings.basis_rank,
            seed=settings.seed,
            progress=progress,
            processes=self.model.processes,
            offload=settings.offload_factors,
            likelihood=self.model.likelihood,
        )


@dataclass(frozen=True)
class FitResult:
    """Result of ``fit``.

    Attributes:
        folder: Folder of the posterior.
        rows: Number of training rows.
        truncated: Number of rows that were truncated to the maximum length.
        log_likelihood: ``log p(y|X, θ_MAP)`` in nats, or None without labels.
        parameters: Number of Bayesian parameters.
        prior: The manifest's ``prior``.
        evidence: The prior precision by marginal likelihood.
        kept: Share of the curvature's trace within a truncated basis.
        notes: What the user should know.
        memory: The memory estimate, if it was requested and possible.
    """

    folder: Path
    rows: int
    truncated: int
    log_likelihood: float | None
    parameters: int
    prior: dict[str, Any]
    evidence: EvidenceMaximum
    kept: float
    notes: tuple[str, ...]
    memory: MemoryEstimate | None = None

    def describe(self) -> dict[str, Any]:
        """Return the JSON record of ``fit --json``."""
        return {
            "folder": str(self.folder),
            "n": self.rows,
            "truncated": self.truncated,
            "parameters": self.parameters,
            "log_likelihood": self.log_likelihood,
            "prior": self.prior,
            "kept": self.kept,
            "notes": list(self.notes),
            "budget": None if self.memory is None else self.memory.describe(),
        }


def fit(
    model: ModelSettings,
    data: DataSettings,
    settings: FitSettings,
    progress: Progress | None = None,
    load: Loader = load_model,
    on_estimate: Callable[[MemoryEstimate], None] | None = None,
) -> FitResult:
    """Fit the Laplace posterior of an adapter.

    Args:
        model: The adapter and how to load it.
        data: The rows it was trained on.
        settings: The curvature.
        progress: Progress callback.
        load: Loads the model.
        on_estimate: Called with the memory estimate, before any weight is loaded.

    Raises:
        LaporaError: See :mod:`lapora.errors`; no incomplete posterior is left behind.
    """
    processes = model.processes
    settings = resolve_settings(model, settings)
    folder = posterior_folder(model.root, settings.name)
    with processes.raise_together():
        refuse_to_replace(folder, overwrite=settings.overwrite)
        rows = read_training_rows(model, data, settings)
        lengths = _check_tokens(model, rows, settings)
    notes: list[str] = []
    memory = None
    if on_estimate is not None:
        memory = _estimate_or_note(model, rows, lengths, settings, notes)
        if memory is not None:
            on_estimate(memory)
            with processes.raise_together():
                refuse_full_disk(folder, memory.factors.artifact)
    with processes.on_main(write_lock(folder)):
        with processes.raise_together():
            refuse_to_replace(folder, overwrite=settings.overwrite)  # another process may have fitted it meanwhile
            inputs = load_inputs(model, rows, settings, load)
        result = _fit(inputs, settings, folder, progress)
    return replace(result, memory=memory, notes=(*notes, *result.notes))


def fit_several(
    models: Sequence[ModelSettings],
    data: DataSettings,
    settings: FitSettings,
    progress: Callable[[ModelSettings], AbstractContextManager[Progress]],
    on_estimate: Callable[[MemoryEstimate], None] | None = None,
) -> Iterator[tuple[ModelSettings, FitResult | LaporaError]]:
    """Fit several adapters on the same rows; adapters of one base share it. An error in one does not stop the others.

    In a run of several processes an error stops all of them.

    Args:
        models: The adapters and how to load them.
        data: The rows they were trained on.
        settings: The curvature.
        progress: Returns the progress callback of each adapter.
        on_estimate: Called with the memory estimate of the first adapter.

    Yields:
        Each adapter with its result or its error.
    """
    bases = BaseCache()
    for number, model in enumerate(models):
        try:
            with progress(model) as report:
                found: FitResult | LaporaError = fit(
                    model, data, settings, report, bases.load, None if number else on_estimate
                )
        except LaporaError as error:
            if model.processes.count > 1:  # the other processes may be at another step
                raise
            found = error.with_traceback(None)
            found.__cause__ = found.__context__ = None
        yield model, found


def fit_in_memory(
    model: Any,
    tokenizer: Any,
    rows: Any,
    task: Task | Mapping[str, Any] | str | Path,
    settings: FitSettings,
    *,
    root: Path,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[Fitted, FitResult]:
    """Fit a PEFT model in memory and combine it with its posterior; see :func:`lapora.api.fit_model`.

    Raises:
        TypeError: ``rows`` are not rows.
        DataError: There are no rows, or none has a field of the task.
        LaporaError: As :func:`fit`.
    """
    settings = _resolve_engine(settings)
    resolved = _task(task)
    if is_one_row(rows):
        raise TypeError(
            "rows: one row, or a mapping of columns; give a list of the rows that the adapter was trained on"
        )
    features = getattr(rows, "features", None)  # of a datasets.Dataset
    check_label_names(resolved, features if isinstance(features, Mapping) else {}, "the rows")
    given = list(given_rows(rows, texts=False))
    if not given:
        raise DataError("no rows: give the rows that the adapter was trained on")
    folder = posterior_folder(root, settings.name)
    refuse_to_replace(folder, overwrite=settings.overwrite)
    with tempfile.TemporaryDirectory(prefix="lapora-") as saved:
        adapter = adapter_in_memory(model, Path(saved))
    _refuse_other_rows(resolved, adapter, given)
    loaded = loaded_in_memory(model, tokenizer, adapter)
    how = ModelSettings(str(adapter.path), batch_size=batch_size)
    with prepared_for_fit(loaded):
        training = _render(adapter, DataSettings(split="train"), resolved, given, settings)
        inputs = load_inputs(how, training, settings, lambda *_: loaded)
        with write_lock(folder):
            refuse_to_replace(folder, overwrite=settings.overwrite)  # another process may have fitted it meanwhile
            result = _fit(inputs, settings, folder, progress)
        layers = inputs.run(settings).layers
        return join_posterior(SavedPosterior(result.folder), loaded, list(layers), how), result


def read_training_rows(model: ModelSettings, data: DataSettings, settings: FitSettings) -> TrainingRows:
    """Read an adapter's files and the rows it was trained on; the split ``train`` by default.

    Raises:
        AdapterError: There is no adapter, or it is not supported.
        DataError: The rows cannot be read.
    """
    adapter = read_adapter(model.folder)
    task, rows, split = read_rows(data, None, "train")
    return _render(adapter, replace(data, split=split), task, rows, settings)


def _render(
    adapter: Adapter,
    data: DataSettings,
    task: Task,
    rows: Sequence[Row | Mapping[str, Any]],
    settings: FitSettings,
) -> TrainingRows:
    check_likelihood(task.likelihood, settings)
    choices = resolve_choices(task, rows, kind=adapter.kind)
    check_head(task, adapter.head, choices)
    if not settings.unlabelled:
        refuse_missing_labels(task, rows)
    labels: Labels = "required" if settings.fisher == "empirical" else "optional"
    examples = render_all(task, rows, kind=adapter.kind, choices=choices, labels=labels)
    unlabelled = [index for index, example in enumerate(examples) if example.target is None]
    # A regression needs labels for its noise, which is checked with the noise.
    if 0 < len(unlabelled) < len(examples) and not settings.unlabelled and task.likelihood != "gaussian":
        raise DataError(
            f"{len(unlabelled)} of {len(examples)} rows have no label, the first is row {unlabelled[0]} "
            f"({label_source(task)}); leave them out, or give --unlabelled to use no label at all"
        )
    return TrainingRows(
        adapter, data, task, choices, examples, settings.max_length or task.max_length_for(adapter.kind)
    )


_LONGEST = 64
"""Number of rows, those with the most characters, that are tokenized to find the longest."""


@dataclass(frozen=True)
class _Lengths:
    """Numbers of tokens that the memory estimate assumes.

    Attributes:
        longest: Tokens of the longest row that the network reads.
        answers: Tokens of each answer of the row that has the most; empty if the answers are single tokens, or classes.
    """

    longest: int
    answers: tuple[int, ...] = ()


def _check_tokens(model: ModelSettings, rows: TrainingRows, settings: FitSettings) -> _Lengths:
    """Check, before weights are loaded, that whole answers can be scored, and that every token has an embedding.

    Returns:
        The lengths of the longest row.

    Raises:
        DataError: An answer has no tokens, or tokens without an embedding in the base model.
        UsageError: The engine does not support whole answers.
    """
    tokenizer, known = tokenizer_and_embeddings(rows.adapter, model)
    answers = _encode_answers(tokenizer, rows, settings)
    has_embeddings = known is None or max(tokenizer.get_vocab().values(), default=0) < known
    examples = rows.examples
    if answers.answer_score is None and has_embeddings:
        examples = sorted(examples, key=_characters, reverse=True)[:_LONGEST]
    encoded = encode_all(
        examples,
        tokenizer,
        kind=rows.adapter.kind,
        max_length=rows.max_length,
        chat_template=settings.chat_template,
        answer_score=answers.answer_score,
    )
    require_embeddings(examples, encoded, known)
    texts = [text for row in encoded for text in (row, row.second) if text is not None]
    most = max((tuple(len(answer.ids) for answer in row.answers) for row in encoded), key=sum)
    return _Lengths(max(len(text) for text in texts), most)


def _characters(example: Example) -> int:
    return sum(map(len, example.inputs or (example.text or "",)))


def _encode_answers(tokenizer: Any, rows: TrainingRows, settings: FitSettings) -> AnswerEncoding:
    """Find the token of each answer of a causal model, or decide that whole answers are scored.

    Raises:
        DataError: As :func:`lapora.tasks.resolve_answers`.
        UsageError: A chat template is requested for a classifier, or the engine does not support whole answers.
    """
    if rows.adapter.kind == "classifier":
        if settings.chat_template:
            raise UsageError(
                "--chat-template wraps the prompt of a causal language model; this adapter is a classifier"
            )
        return AnswerEncoding()
    answers = resolve_answers(tokenizer, rows.task, rows.examples, rows.choices, chat_template=settings.chat_template)
    if answers.answer_score is not None and settings.engine != "native":
        raise UsageError(f"--engine {settings.engine} has no scores of whole answers ({answers.note}); use native")
    return answers


def load_inputs(
    model: ModelSettings,
    rows: TrainingRows,
    settings: FitSettings,
    load: Loader = load_model,
) -> FitInputs:
    """Load the model and encode the rows.

    Raises:
        AdapterError: The model cannot be loaded.
        DataError: A row is too long, or the answers are not the head's.
    """
    loaded = load(rows.adapter, model)
    answers = _encode_answers(loaded.tokenizer, rows, settings)
    if loaded.kind == "classifier":
        problem_type = getattr(loaded.model.get_base_model().config, "problem_type", None)
        check_head(rows.task, Head(loaded.kind, loaded.number_of_labels, problem_type), rows.choices)
    task_model = TaskModel.build(
        loaded,
        rows.task,
        rows.choices,
        answers.token_ids,
        answer_score=answers.answer_score,
        max_length=rows.max_length,
        chat_template=settings.chat_template,
        how=model,
    )
    notes = (answers.note,) if answers.note else ()
    return FitInputs(rows, task_model, task_model.encode(rows.examples), notes)


def prepare_fit(model: ModelSettings, data: DataSettings, settings: FitSettings) -> FitInputs:
    """Read the rows and load the model of a fit.

    Raises:
        LaporaError: As :func:`fit`.
    """
    return load_inputs(model, read_training_rows(model, data, settings), settings)


def estimate_memory(
    model: ModelSettings, data: DataSettings, settings: FitSettings, *, device_memory: float | None = None
) -> MemoryEstimate:
    """Estimate the memory of a fit without loading a weight; ``lapora fit --dry-run``.

    Args:
        model: The adapter and how to load it; ``device`` may be one that this machine lacks.
        data: The rows it was trained on.
        settings: The curvature.
        device_memory: Free bytes of the device, if it is not a device of this machine.

    Raises:
        LaporaError: As :func:`fit`, for files and options.
    """
    settings = resolve_settings(model, settings)
    rows = read_training_rows(model, data, settings)
    try:
        lengths = _check_tokens(model, rows, settings)
    except AdapterError:  # no tokenizer: only the configuration of the base model is on this machine
        lengths = _Lengths(rows.max_length)
    return _estimate(model, rows, lengths, settings, device_memory)


def _estimate(
    model: ModelSettings,
    rows: TrainingRows,
    lengths: _Lengths,
    settings: FitSettings,
    device_memory: float | None = None,
) -> MemoryEstimate:
    likelihood = likelihood_of(rows.task.likelihood, rows.choices)
    return estimate(
        model,
        settings,
        rows.adapter,
        classes=likelihood.outputs or rows.classes,
        columns=likelihood.columns if rows.choices else rows.classes - 1,
        texts=2 if likelihood.name == "preference" else 1,
        rows=len(rows.examples),
        length=lengths.longest,
        answers=lengths.answers,
        device_memory=device_memory,
    )


def _estimate_or_note(
    model: ModelSettings, rows: TrainingRows, lengths: _Lengths, settings: FitSettings, notes: list[str]
) -> MemoryEstimate | None:
    """Estimate the memory; if that is not possible for this model, append the reason to ``notes``."""
    try:
        return _estimate(model, rows, lengths, settings)
    except AdapterError as error:
        notes.append(f"memory not estimated: {error}")
        return None


def resolve_settings(model: ModelSettings, settings: FitSettings) -> FitSettings:
    """Return the settings with defaults resolved.

    Raises:
        UsageError: The options cannot be combined.
    """
    settings = _resolve_engine(settings)
    if model.gradient_checkpointing and settings.engine != "native":
        raise UsageError("--gradient-checkpointing goes with --engine native")
    if model.processes.count > 1 and settings.engine != "native":
        raise UsageError(f"--engine {settings.engine} runs in one process: start it without a launcher")
    return settings


def _resolve_engine(settings: FitSettings) -> FitSettings:
    """Resolve engine and weight sharing; each value ``asdl`` implies the other.

    Raises:
        UsageError: The options cannot be combined.
    """
    structure, engine = settings.structure, settings.engine
    if settings.resume and (engine != "native" or settings.weight_sharing == "asdl"):
        raise UsageError("--resume goes with --engine native: laplace-torch's engines write no checkpoints")
    if settings.rank is not None and structure not in ("kron", "ekfac", "lowrank"):
        raise UsageError(f"--rank goes with --structure kron, ekfac or lowrank, not {structure}")
    if settings.rank == "full" and structure == "lowrank":
        raise UsageError("--rank full goes with --structure kron or ekfac; --structure full has all directions")
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


def _measure_noise(inputs: FitInputs) -> FitInputs:
    """Measure the noise of a regression on the training rows; other likelihoods have no noise.

    Raises:
        DataError: A row has no target, or the residuals are zero.
    """
    likelihood = inputs.model.likelihood
    if not likelihood.has_noise:
        return inputs
    bare = next((example for example in inputs.rows.examples if example.target is None), None)
    if bare is not None:
        raise DataError(f"{bare.where}: no target; likelihood {likelihood.name} measures its noise on labelled rows")
    with translate_row_errors([example.where for example in inputs.rows.examples]):
        outputs = forward_outputs(inputs.model, inputs.encoded)
    measured = likelihood.with_noise(outputs, label_tensor(inputs.rows.examples))
    return replace(inputs, model=replace(inputs.model, likelihood=measured))


def _fit(inputs: FitInputs, settings: FitSettings, folder: Path, progress: Progress | None) -> FitResult:
    inputs = _measure_noise(inputs)
    model, rows, processes = inputs.model, inputs.rows, inputs.model.processes
    checkpoint = None
    run = inputs.run(settings, progress)
    described = _describe(inputs, settings, run)
    if settings.engine == "native":
        with processes.raise_together():
            checkpoint = Checkpoint(
                folder,
                _resume_key(inputs, settings, described),
                resume=settings.resume,
                every=settings.save_every,
                device=model.outputs.device,
                rank=processes.rank,
            )
        run = replace(run, checkpoint=checkpoint)
    with translate_row_errors([example.where for example in rows.examples]):
        posterior, log_likelihood = fit_posterior(run, settings)
    parameters = posterior.parameters()
    evidence = maximize_evidence(posterior.spectra, parameters, log_likelihood or 0.0, residuals=described.residuals)
    notes = [*rows.adapter.notes, *inputs.notes]
    curve = None
    if settings.prior_method != "marglik":
        curve = _curve_or_note(inputs, posterior, run, progress, notes)
    if curve is None:
        prior = evidence.describe(log_likelihood is not None)
    else:
        prior = describe_averaged(
            average_without_rows(curve),
            evidence.prior,
            posterior.spectra,
            parameters,
            log_likelihood,
            described.residuals,
        )
    manifest = structs.replace(
        described, parameters=parameters, log_likelihood=log_likelihood, kept=_kept(posterior), training_curve=curve
    )
    with processes.raise_together():  # no process continues, or removes the checkpoint, before it is written
        if processes.is_main:
            digests = [row_digest(example) for example in rows.examples]
            write_posterior(folder, manifest, prior, posterior, digests)
    if checkpoint is not None:
        if processes.is_main:
            checkpoint.remove()
        if settings.resume:
            notes.append(_resumed_note(processes.all_gather(checkpoint.resumed_rows), len(rows.examples)))
    return FitResult(
        folder=folder,
        rows=len(rows.examples),
        truncated=sum(row.truncated for row in inputs.encoded),
        log_likelihood=log_likelihood,
        parameters=sum(rows * columns for rows, columns in (parameter["shape"] for parameter in parameters)),
        prior=prior,
        evidence=evidence,
        kept=_kept(posterior),
        notes=tuple(notes),
    )


def _curve_or_note(
    inputs: FitInputs, posterior: Posterior, run: CurvatureRun, progress: Progress | None, notes: list[str]
) -> TrainingCurve | None:
    """Compute the training curve; without labels or out of memory, return None and append a note."""
    reason = "without labels"
    try:
        curve = training_curve(inputs, posterior, run, progress)
        if curve is not None:
            return curve
    except (MemoryError, RuntimeError) as error:
        if inputs.model.processes.count > 1 or not is_out_of_memory(error):
            raise
        reason = "out of memory while the training rows were predicted (give --batch-size 1, or --structure kron):"
    notes.append(
        f"{reason} the prior precision is that of the marginal likelihood, which may be far too small for "
        "an adapter that is not overfitted: tune it with labelled rows (lapora tune-prior)"
    )
    return None


def _describe(inputs: FitInputs, settings: FitSettings, run: CurvatureRun) -> Manifest:
    """Return the manifest without the results: log-likelihood, kept trace, input bases of the parameters."""
    rows, loaded, likelihood = inputs.rows, inputs.model.loaded, inputs.model.likelihood
    return Manifest(
        format_version=FORMAT_VERSION,
        lapora_version=__version__,
        libraries=library_versions(),
        adapter=rows.adapter.sha256,
        adapter_config=adapter_settings(rows.adapter),
        tokenizer=tokenizer_digest(loaded.tokenizer, settings.chat_template),
        base_model=BaseModel(
            name=loaded.base_model,
            revision=loaded.revision,
            quantization=loaded.quantize,
            dtype=loaded.dtype,
            fingerprint=loaded.fingerprint,
            digests=base_digests(loaded),
        ),
        task=rows.task.to_dict(),
        answers=Answers(choices=list(rows.choices), token_ids=inputs.model.token_ids, score=inputs.model.answer_score),
        data=Data(
            split=rows.data.split or "train",
            n=len(rows.examples),
            fingerprint=data_fingerprint(rows.examples),
            data_dir=str(Path(rows.data.data_dir).resolve()) if rows.data.data_dir else None,
            limit=rows.data.limit,
            max_length=inputs.model.max_length,
            chat_template=settings.chat_template,
        ),
        structure=settings.structure,
        weight_sharing=settings.weight_sharing,
        engine=settings.engine,
        fisher=settings.fisher,
        subset=settings.subset,
        rank=None if settings.basis_rank == COMPLETE else settings.basis_rank,
        remainder="mean",
        seed=settings.seed,
        parameters=run.describe_parameters(),
        log_likelihood=None,
        noise_variance=list(likelihood.noise) if isinstance(likelihood, Gaussian) else None,
    )


def _resume_key(inputs: FitInputs, settings: FitSettings, manifest: Manifest) -> dict[str, Any]:
    """Return everything that the sums of a pass depend on: settings, rows, batches."""
    described = msgspec.to_builtins(manifest)
    for key in ("log_likelihood", "kept", "parameters", "engine", "noise_variance"):
        del described[key]
    del described["data"]["data_dir"], described["data"]["limit"]
    tokens = hashlib.sha256()
    for row in inputs.encoded:
        for text in (row, row.second):
            if text is not None:
                content: list[Any] = [text.input_ids, text.token_type_ids]
                content += [[answer.ids, answer.scored, answer.weight] for answer in text.answers]
                tokens.update(json.dumps(content).encode("ascii"))
    return {
        **described,
        "batch_size": inputs.model.batch_size.rows,
        "tokens": tokens.hexdigest(),
        "device": inputs.model.outputs.device.type,
        "processes": inputs.model.processes.count,
        "test_matrix": TEST_MATRIX,
    }


def _resumed_note(resumed: Sequence[int], rows: int) -> str:
    if not any(resumed):
        return "--resume: no checkpoint was found; all rows were read"
    return f"--resume: resumed after {sum(resumed)} of {rows} rows of the last pass begun"


def fit_posterior(run: CurvatureRun, settings: FitSettings) -> tuple[Posterior, float | None]:
    """Compute the posterior with the requested engine, and ``log p(y|X, θ_MAP)`` if the rows have labels."""
    if settings.engine == "native":
        posterior, data = fit_structure(settings.structure, run)
        return posterior, data.log_likelihood
    from lapora.laplace_torch import asdl_factors, curvlinops_factors

    rows = (run.output_model, run.layers, run.batches(), run.targets)
    if settings.weight_sharing == "asdl":
        factors, log_likelihood = asdl_factors(*rows, run.progress)
    else:
        factors, log_likelihood = curvlinops_factors(*rows, settings.weight_sharing, run.progress)
    return BlockPosterior(decompose(run.layers, factors, run.rank)), log_likelihood


def _kept(posterior: Posterior) -> float:
    """Return the share of the curvature's trace within the basis, the minimum over the layers."""
    if isinstance(posterior, BlockPosterior):
        return min(block.retained_trace for block in posterior.blocks)
    return posterior.retained_trace


def _refuse_other_rows(task: Task, adapter: Adapter, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that have none of the task's fields, which would all be read as ready prompts.

    Raises:
        DataError: No row has a field of the task.
    """
    fields = required_fields(task, adapter.kind)
    if fields and not any(row.get(field) is not None for row in rows for field in fields):
        raise DataError(
            f"no row has {' or '.join(fields)}, the fields of task {task.task}; the first row has "
            f"{listed(list(rows[0])) or 'no fields'}: rename them, or give a task with these fields"
        )


def _task(task: Task | Mapping[str, Any] | str | Path) -> Task:
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return Task.from_dict(cast("Mapping[str, Any]", task))
    return load_task(str(task))
