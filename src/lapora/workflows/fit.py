"""``lapora fit``: one pass over the training rows, then the posterior is written beside the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lapora._version import __version__
from lapora.config import DEFAULT_RANK, DataSettings, FitSettings, ModelSettings, Progress
from lapora.errors import DataError, PosteriorError, UsageError
from lapora.model.adapter import read_adapter
from lapora.model.answers import AnswerModel
from lapora.model.bayesian_layers import find_bayesian_layers
from lapora.model.loading import LoadedModel, library_versions, load_model
from lapora.posterior.artifact import FORMAT_VERSION, posterior_folder, write_posterior
from lapora.posterior.evidence import EvidenceMaximum, maximise_evidence
from lapora.posterior.gaussian import BlockPosterior, Posterior, decompose
from lapora.posterior.structures import CurvatureRun, fit_structure
from lapora.tasks import (
    Example,
    Task,
    answer_token_ids,
    data_fingerprint,
    encode_all,
    render_all,
    resolve_choices,
)
from lapora.workflows.session import make_batches, read_rows


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


def fit(model: ModelSettings, data: DataSettings, settings: FitSettings, progress: Progress | None = None) -> FitResult:
    """Fit the Laplace posterior of an adapter.

    Args:
        model: The adapter and how to run it.
        data: The rows it was trained on.
        settings: The curvature's choices.
        progress: Told of rows done.

    Raises:
        LaporaError: See the table of exit statuses; nothing half-written is left behind.
    """
    settings = _resolve_engine(settings)
    adapter = read_adapter(model.adapter)
    folder = posterior_folder(model.root, settings.name)
    if folder.exists() and not settings.overwrite:
        raise PosteriorError(f"{folder}: exists already; give --overwrite, or another --name")
    task, rows, split = read_rows(data, None, "train")
    choices = resolve_choices(task, rows)
    examples = render_all(
        task,
        rows,
        kind=adapter.kind,
        choices=choices,
        labels="required" if settings.fisher == "empirical" else "optional",
    )
    loaded = load_model(
        adapter,
        base_model=model.base_model,
        quantize=model.quantize or "none",
        dtype=model.dtype or "auto",
        device=model.device,
        trust_remote_code=model.trust_remote_code,
    )
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
    layers = find_bayesian_layers(loaded.model, settings.subset)
    answers = AnswerModel(loaded.model, loaded.kind, loaded.pad_token_id, token_ids)

    run = CurvatureRun(
        answers=answers,
        layers=layers,
        batches=lambda: make_batches(answers, encoded, model.batch_size),
        targets=[example.target for example in examples],
        classes=len(choices),
        fisher=settings.fisher,
        weight_sharing=settings.weight_sharing,
        rank=settings.rank,
        seed=settings.seed,
        progress=progress,
    )
    posterior, log_likelihood = _posterior(run, settings)
    parameters = posterior.parameters()
    prior = maximise_evidence(
        [values.cpu().numpy() for values in posterior.eigenvalues], parameters, log_likelihood or 0.0
    )
    manifest = {
        "format_version": FORMAT_VERSION,
        "lapora_version": __version__,
        "libraries": library_versions(),
        "adapter": adapter.sha256,
        "base_model": {
            "name": loaded.base_model,
            "revision": loaded.revision,
            "quantization": loaded.quantize,
            "dtype": loaded.dtype,
            "fingerprint": loaded.fingerprint,
        },
        "task": task.to_dict(),
        "answers": {"choices": list(choices), "token_ids": token_ids},
        "data": {
            "split": split,
            "n": len(examples),
            "fingerprint": data_fingerprint(examples),
            "data_dir": str(Path(data.data_dir).resolve()) if data.data_dir else None,
            "limit": data.limit,
            "max_length": max_length,
            "chat_template": settings.chat_template,
        },
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
    write_posterior(folder, manifest, posterior)
    return FitResult(
        folder=folder,
        rows=len(examples),
        truncated=sum(row.truncated for row in encoded),
        log_likelihood=log_likelihood,
        parameters=sum(rows * columns for rows, columns in (parameter["shape"] for parameter in parameters)),
        prior=prior,
        kept=_kept(posterior),
        notes=adapter.notes,
    )


def _resolve_engine(settings: FitSettings) -> FitSettings:
    """``--weight-sharing asdl`` and ``--engine asdl`` are two names of one thing: the paper's stack.

    Raises:
        UsageError: A combination that does not exist.
    """
    structure, engine = settings.structure, settings.engine
    if settings.rank is not None and structure not in ("kron", "lowrank"):
        raise UsageError(f"--rank goes with --structure kron or lowrank, not {structure}")
    if "asdl" in (engine, settings.weight_sharing):
        if engine == "curvlinops" or settings.weight_sharing == "reduce":
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


def _posterior(run: CurvatureRun, settings: FitSettings) -> tuple[Posterior, float | None]:
    """The curvature by the engine asked for, and the log-likelihood at the MAP."""
    if settings.engine == "native":
        posterior, data = fit_structure(settings.structure, run)
        return posterior, data.log_likelihood
    from lapora.curvature.laplace_torch import asdl_factors

    factors, log_likelihood = asdl_factors(run.answers, run.layers, run.batches(), run.targets, run.progress)
    return BlockPosterior(decompose(run.layers, factors)), log_likelihood


def _rank(settings: FitSettings) -> int | None:
    return settings.rank or (DEFAULT_RANK if settings.structure == "lowrank" else None)


def _kept(posterior: Posterior) -> float:
    """Share of the curvature's trace that the basis holds, the smallest of the layers'."""
    if isinstance(posterior, BlockPosterior):
        return min(block.kept for block in posterior.blocks)
    return posterior.kept


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
