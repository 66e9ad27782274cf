"""``lapora eval RUN_DIR --checkpoints``: fit, tune and score every checkpoint of a training run.

Results are stored in each checkpoint's ``laplace/``: posteriors by name, and scores with a digest of everything that
they depend on. An interrupted run resumes from these.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapora._version import __version__
from lapora.config import (
    LINKS,
    CheckpointSettings,
    DataSettings,
    EvalSettings,
    FitSettings,
    ModelSettings,
    PriorSettings,
    Progress,
    check_likelihood,
)
from lapora.errors import PosteriorError, UsageError
from lapora.storage.saved import SavedPosterior, open_posterior, posterior_folder
from lapora.tasks import load_rows, load_task
from lapora.workflows.baselines import checkpoint_folders
from lapora.workflows.evaluate import run_evaluation
from lapora.workflows.fit import fit
from lapora.workflows.tune_prior import tune_prior

POSTERIORS: dict[str, FitSettings] = {
    "la-kron": FitSettings(name="la-kron", overwrite=True),
    "la-diag": FitSettings(name="la-diag", structure="diag", overwrite=True),
    "llla-kron": FitSettings(name="llla-kron", subset="last-layer", overwrite=True),
    "llla-diag": FitSettings(name="llla-diag", structure="diag", subset="last-layer", overwrite=True),
}
"""Posteriors of the paper: LA over all LoRA weights and LLLA over the last layer, with KFAC and with a diagonal."""

CACHE_FILE = "checkpoint-scores.json"


def evaluate_checkpoints(
    model: ModelSettings,
    data: DataSettings,
    settings: EvalSettings,
    checkpoints: CheckpointSettings,
    print_message: Callable[[str], None],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every checkpoint.

    Args:
        model: ``adapter`` is the folder of the run.
        data: Task, folder and the split to score.
        settings: Links (by default all), samples and seed; posteriors are :data:`POSTERIORS`.
        checkpoints: How they are fitted.
        print_message: Prints progress messages.
        progress: Progress callback: rows done, rows in total.

    Returns:
        ``run``, ``task``, ``split``, ``n``, ``prior_method``, ``skipped`` (reason, by name of the posterior) and
        ``checkpoints``: ``step`` and evaluation record of each.

    Raises:
        UsageError: There are no checkpoints, or no task is given.
    """
    run = Path(model.adapter)
    folders = checkpoint_folders(run)
    if not folders:
        raise UsageError(f"{run}: no checkpoint-STEP folder with an adapter in it; give the folder of a training run")
    if data.task is None:
        raise UsageError("--data is missing: the task that the run was trained on")
    likelihood = load_task(data.task).likelihood
    check_likelihood(likelihood, settings)
    if not settings.links:
        settings = replace(settings, links=tuple(link for link in LINKS[likelihood] if link != "map"))
    rows_key = _rows_key(data, checkpoints)
    skipped: dict[str, str] = {}
    done = []
    for number, (step, folder) in enumerate(folders, 1):
        here = replace(
            model,
            adapter=str(folder),
            output_dir=None if model.output_dir is None else model.output_dir / folder.name,
        )
        heading = f"checkpoint {step} ({number} of {len(folders)})"
        one = _one_checkpoint(here, data, settings, checkpoints, rows_key, skipped, heading, print_message, progress)
        done.append({"step": step, **one})
    first = done[0]
    return {
        "run": str(run),
        **{key: first[key] for key in ("task", "split", "n")},
        "prior_method": checkpoints.prior_method,
        "skipped": skipped,
        "checkpoints": done,
    }


def _one_checkpoint(
    model: ModelSettings,
    data: DataSettings,
    settings: EvalSettings,
    checkpoints: CheckpointSettings,
    rows_key: str,
    skipped: dict[str, str],
    heading: str,
    print_message: Callable[[str], None],
    progress: Progress | None,
) -> dict[str, Any]:
    cache = model.root / "laplace" / CACHE_FILE
    asked = {
        "data": rows_key,
        "settings": repr(settings),
        "fit": repr(checkpoints),
        "base": _base(model),
        "version": __version__,
    }
    kept = _read_cache(cache)
    known = bool(kept and kept["key"] == _key(model, kept["names"], asked))
    kept = model.processes.all_gather(kept if known else None)[0]
    if kept:
        skipped |= {name: reason for name, reason in kept["skipped"].items() if name not in skipped}
        for name, reason in kept["skipped"].items():
            print_message(f"{heading}: {name} left out: {reason}")
        print_message(f"{heading}: already scored")
        return dict(kept["record"])
    names = []
    for name, fitting in POSTERIORS.items():
        if name in skipped:
            continue
        try:
            _fit_and_tune(
                model, data, settings, checkpoints, fitting, rows_key, f"{heading}: {name}", print_message, progress
            )
        except UsageError as error:
            # All checkpoints of a run have the same layers.
            if fitting.subset != "last-layer":
                raise
            skipped[name] = str(error)
            print_message(f"{heading}: {name} left out: {error}")
            continue
        names.append(name)
    print_message(f"{heading}: scoring")
    record = run_evaluation(model, data, replace(settings, names=tuple(names)), progress).record
    found = {"key": _key(model, names, asked), "names": names, "skipped": skipped, "record": record}
    if model.processes.is_main:
        partial = cache.with_name(f".{cache.name}.{os.getpid()}")
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.replace(cache)
    return record


def _fit_and_tune(
    model: ModelSettings,
    data: DataSettings,
    settings: EvalSettings,
    checkpoints: CheckpointSettings,
    fitting: FitSettings,
    rows_key: str,
    heading: str,
    print_message: Callable[[str], None],
    progress: Progress | None,
) -> None:
    """Fit and tune one posterior of one checkpoint, unless it is up to date.

    A file beside the posterior records the rows and settings of the fit and the tuning.
    """
    name = fitting.name
    fitting = replace(
        fitting,
        max_length=checkpoints.max_length,
        chat_template=checkpoints.chat_template,
        seed=settings.seed,
        prior_method="marglik" if checkpoints.prior_method == "marglik" else "averaged",
    )
    note = model.root / "laplace" / f".{name}.made-with"
    wanted = hashlib.sha256(f"{rows_key}{fitting!r}{checkpoints!r}{_base(model)}".encode()).hexdigest()
    made = note.is_file() and note.read_text(encoding="utf-8") == wanted and _usable(model, name)
    if model.processes.all_gather(made)[0]:
        return
    if model.processes.is_main:
        note.unlink(missing_ok=True)
    print_message(f"{heading}: fitting")
    training = DataSettings(data.task, data.data_dir, checkpoints.fit_split, checkpoints.fit_limit)
    fit(model, training, fitting, progress)
    if checkpoints.prior_method != "marglik":
        print_message(f"{heading}: tuning the prior")
        tuned = tune_prior(
            model,
            DataSettings(),
            PriorSettings(name=name, method=checkpoints.prior_method, seed=settings.seed),
            progress,
        )
        for line in (tuned.reason, *tuned.notes):
            print_message(f"{heading}: {line}")
    if model.processes.is_main:
        note.write_text(wanted, encoding="utf-8")


def _base(model: ModelSettings) -> str:
    """Return a string that identifies how the base model is loaded."""
    return repr((model.base_model, model.quantize, model.dtype))


def _usable(model: ModelSettings, name: str) -> bool:
    try:
        open_posterior(model, name)
    except PosteriorError:
        return False
    return True


def _rows_key(data: DataSettings, checkpoints: CheckpointSettings) -> str:
    """Return a digest of the task and of every row that is fitted or scored."""
    task = load_task(data.task or "")
    digest = hashlib.sha256(json.dumps(task.to_dict(), sort_keys=True, default=str).encode())
    for split in (checkpoints.fit_split, data.split or "validation"):
        for row in load_rows(task, split, data_dir=data.data_dir):
            digest.update(json.dumps(row.values, sort_keys=True, default=str).encode())
    digest.update(repr((data.split, data.limit)).encode())
    return digest.hexdigest()


def _key(model: ModelSettings, names: Sequence[str], asked: dict[str, str]) -> str | None:
    """Return a digest of everything that a checkpoint's scores depend on, or None if a posterior is missing."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for name in names:
        if not _usable(model, name):
            return None
        content = SavedPosterior(posterior_folder(model.root, name)).content
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _read_cache(file: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return kept if {"key", "names", "skipped", "record"} <= set(kept) else None
    except (OSError, ValueError, TypeError):
        return None
