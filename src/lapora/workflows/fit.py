"""``lapora fit``: one pass over the training rows, then the posterior is written beside the adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lapora.config import DEFAULT_RANK, DataSettings, FitSettings, ModelSettings, Progress
from lapora.errors import LaporaError, PosteriorError, UsageError
from lapora.model.adapter import read_adapter
from lapora.model.bases import SharedBases
from lapora.posterior.artifact import posterior_exists, posterior_folder, write_posterior
from lapora.posterior.checkpoint import Checkpoint
from lapora.posterior.curvature_run import CurvatureRun
from lapora.posterior.decomposition import decompose
from lapora.posterior.evidence import EvidenceMaximum, maximise_evidence
from lapora.posterior.gaussian import BlockPosterior, Posterior
from lapora.posterior.lock import writing
from lapora.posterior.structures import fit_structure
from lapora.workflows.naming import naming_examples
from lapora.workflows.prepare import PreparedFit, prepare_fit


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
    bases: SharedBases | None = None,
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
    settings = settle(model, settings)
    folder = posterior_folder(model.root, settings.name)
    with processes.in_step():
        refuse_to_replace(folder, settings)
        read_adapter(model.folder)  # nothing is written where no adapter is
    with processes.only_first(writing(folder)):
        with processes.in_step():
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
    bases = SharedBases()
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
    with writing(folder):
        return _fit(prepared, settings, folder, progress)


def settle(model: ModelSettings, settings: FitSettings) -> FitSettings:
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
        with prepared.processes.in_step():
            checkpoint = Checkpoint(
                folder,
                prepared.identity(settings),
                resume=settings.resume,
                every=settings.save_every,
                device=prepared.answers.device,
                rank=prepared.processes.rank,
            )
        run = replace(run, checkpoint=checkpoint)
    with naming_examples([example.where for example in prepared.examples]):
        posterior, log_likelihood = fit_posterior(run, settings)
    parameters = posterior.parameters()
    prior = maximise_evidence(
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
    with prepared.processes.in_step():  # nobody goes on, or tidies up, before it is written
        if prepared.processes.first:
            write_posterior(folder, manifest, posterior)
    notes = list(prepared.adapter.notes)
    if checkpoint is not None:
        if prepared.processes.first:
            checkpoint.remove()
        if settings.resume:
            notes.append(_resumed_note(prepared.processes.gather(checkpoint.resumed_rows), len(prepared.examples)))
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
    from lapora.curvature.laplace_torch import asdl_factors, curvlinops_factors

    rows = (run.answers, run.layers, run.batches(), run.targets)
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
