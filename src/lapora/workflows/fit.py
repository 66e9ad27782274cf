"""``lapora fit``: one pass over the training rows, then the posterior is written beside the adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapora._version import __version__
from lapora.config import DataSettings, FisherType, FitSettings, ModelSettings
from lapora.curvature.fisher import empirical_columns, exact_columns, monte_carlo_columns
from lapora.curvature.kron import KronObserver
from lapora.curvature.linearisation import Directions, Linearisation
from lapora.errors import DataError, PosteriorError, UsageError
from lapora.model.adapter import read_adapter
from lapora.model.answers import AnswerModel
from lapora.model.bayesian_layers import BayesianLayer, find_bayesian_layers
from lapora.model.loading import LoadedModel, library_versions, load_model
from lapora.posterior.artifact import FORMAT_VERSION, posterior_folder, write_posterior
from lapora.posterior.evidence import Evidence, EvidenceMaximum
from lapora.posterior.gaussian import EigenBlock, decompose
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

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


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
        notes: What the user should know.
    """

    folder: Path
    rows: int
    truncated: int
    log_likelihood: float | None
    parameters: int
    prior: EvidenceMaximum
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

    targets = [example.target for example in examples]
    batches = make_batches(answers, encoded, model.batch_size)
    if settings.engine == "asdl":
        from lapora.curvature.laplace_torch import asdl_factors

        factors, log_likelihood = asdl_factors(answers, layers, batches, targets, progress)
    else:
        observer = KronObserver(settings.weight_sharing)
        log_likelihood = collect(
            answers,
            layers,
            observer,
            batches,
            targets=targets,
            fisher=settings.fisher,
            seed=settings.seed,
            progress=progress,
        )
        factors = observer.factors(layers)
    blocks = decompose(layers, factors)
    prior = Evidence(
        [block.eigenvalues.cpu().numpy() for block in blocks],
        [block.squared_norm for block in blocks],
        log_likelihood or 0.0,
    ).maximise()
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
        "rank": None,
        "seed": settings.seed,
        "parameters": [_describe(block) for block in blocks],
        "log_likelihood": log_likelihood,
        "prior": prior.describe(log_likelihood is not None),
    }
    write_posterior(folder, manifest, blocks)
    return FitResult(
        folder=folder,
        rows=len(examples),
        truncated=sum(row.truncated for row in encoded),
        log_likelihood=log_likelihood,
        parameters=sum(block.shape[0] * block.shape[1] for block in blocks),
        prior=prior,
        notes=adapter.notes,
    )


def _resolve_engine(settings: FitSettings) -> FitSettings:
    """``--weight-sharing asdl`` and ``--engine asdl`` are two names of one thing: the paper's stack."""
    if "asdl" not in (settings.engine, settings.weight_sharing):
        return settings
    if settings.fisher != "exact":
        raise UsageError(f"--engine asdl computes the exact Fisher alone, not --fisher {settings.fisher}")
    if settings.weight_sharing == "reduce":
        raise UsageError("--engine asdl has no KFAC-reduce: its weight sharing is expand, divided by N")
    return replace(settings, engine="asdl", weight_sharing="asdl")


def collect(
    answers: AnswerModel,
    layers: Sequence[BayesianLayer],
    observer: KronObserver,
    batches: Any,
    *,
    targets: Sequence[int | None],
    fisher: FisherType = "exact",
    seed: int = 0,
    progress: Progress | None = None,
) -> float | None:
    """Show every batch to an observer of the curvature.

    Returns:
        ``log p(y|X, θ_MAP)`` in nats, or None where a row has no label.
    """
    generator = torch.Generator().manual_seed(seed)
    total, done = 0.0, 0
    labelled = all(target is not None for target in targets)
    with Linearisation(answers, layers, observer) as linearisation:
        for batch in batches:
            labels = torch.tensor([targets[row] for row in batch.rows]) if labelled else None
            logits = linearisation.run(batch, _columns(fisher, labels, generator))
            if labels is not None:
                log_p = torch.log_softmax(logits.double().cpu(), dim=1)
                total += float(log_p.gather(1, labels.unsqueeze(1)).sum())
            done += len(batch)
            if progress is not None:
                progress(done, len(targets))
    return total if labelled else None


def _columns(fisher: FisherType, labels: Tensor | None, generator: torch.Generator) -> Directions:
    if fisher == "exact":
        return exact_columns
    if fisher == "mc":
        return lambda logits: monte_carlo_columns(logits, generator)
    if labels is None:
        raise UsageError("--fisher empirical needs a label in every row; use --fisher exact")
    return lambda logits: empirical_columns(logits, labels.to(logits.device))


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


def _describe(block: EigenBlock) -> dict[str, Any]:
    return {
        "name": block.name,
        "shape": list(block.shape),
        "role": block.role,
        "input_of": block.leader,
        "squared_norm": block.squared_norm,
    }
