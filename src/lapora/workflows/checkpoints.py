"""``lapora eval RUN_DIR --checkpoints``: fit, tune and score every checkpoint of a training run.

Results are stored in each checkpoint's ``laplace/``: posteriors by name, and scores with a digest of everything that
they depend on. An interrupted run resumes from these. A file beside each posterior, ``.NAME.made-with``, has its
checksum and a digest of what it was made from; a posterior without one is the user's own, and is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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
from lapora.errors import DataError, NoSuchLayersError, PosteriorError, UsageError
from lapora.models.adapter import Adapter, read_adapter
from lapora.models.fingerprint import digest_of_folder
from lapora.storage.compatibility import adapter_differences, adapter_settings
from lapora.storage.files import write_json
from lapora.storage.saved import SavedPosterior, posterior_exists, posterior_folder
from lapora.tasks import Row, Task, load_rows, load_task
from lapora.workflows.baselines import checkpoint_folders, read_members
from lapora.workflows.evaluate import load_shifted_rows, run_evaluation, shifted_sources
from lapora.workflows.fit import fit
from lapora.workflows.rows import LABELLED_SPLITS
from lapora.workflows.tune_prior import ADVICE_ON_ROWS, tune_prior

POSTERIORS: dict[str, FitSettings] = {
    "la-kron": FitSettings(name="la-kron"),
    "la-diag": FitSettings(name="la-diag", structure="diag"),
    "llla-kron": FitSettings(name="llla-kron", subset="last-layer"),
    "llla-diag": FitSettings(name="llla-diag", structure="diag", subset="last-layer"),
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
        PosteriorError: A checkpoint has a posterior of one of the names that this command did not make.
    """
    run = Path(model.adapter)
    folders = checkpoint_folders(run)
    if not folders:
        raise UsageError(f"{run}: no checkpoint-STEP folder with an adapter in it; give the folder of a training run")
    if data.task is None:
        raise UsageError("--data is missing: the task that the run was trained on")
    task = load_task(data.task)
    check_likelihood(task.likelihood, settings)
    if not settings.links:
        settings = replace(settings, links=tuple(link for link in LINKS[task.likelihood] if link != "map"))
    rows = _RowDigests.of(task, data, settings, checkpoints)
    found = [
        _Checkpoint(
            step=step,
            model=replace(
                model,
                adapter=str(folder),
                output_dir=None if model.output_dir is None else model.output_dir / folder.name,
            ),
            adapter=read_adapter(folder),
            data=data,
            settings=settings,
            fitting=checkpoints,
            rows=rows,
            heading=f"checkpoint {step} ({number} of {len(folders)})",
            print_message=print_message,
            progress=progress,
        )
        for number, (step, folder) in enumerate(folders, 1)
    ]
    if others := [str(each) for checkpoint in found for each in checkpoint.other_posteriors()]:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise PosteriorError(
            f"{', '.join(others[:3])}{more}: not made by eval --checkpoints, which fits a posterior of this name; "
            "rename the folder, or give another place with --output-dir"
        )
    skipped: dict[str, str] = {}
    done = [{"step": checkpoint.step, **checkpoint.evaluate(skipped)} for checkpoint in found]
    first = done[0]
    return {
        "run": str(run),
        **{key: first[key] for key in ("task", "split", "n")},
        "prior_method": checkpoints.prior_method,
        "skipped": skipped,
        "checkpoints": done,
    }


@dataclass(frozen=True)
class _RowDigests:
    """Digests of the rows, and of other adapters that are scored on them.

    Attributes:
        fitted: Of the rows that posteriors are fitted to, and of those on which their priors may be tuned.
        scored: Of the rows that are scored, and of the members of the ensemble.
    """

    fitted: str
    scored: str

    @classmethod
    def of(cls, task: Task, data: DataSettings, settings: EvalSettings, checkpoints: CheckpointSettings) -> _RowDigests:
        """Read the rows.

        Raises:
            DataError: Rows cannot be read.
            AdapterError: A member of the ensemble cannot be read.
            UsageError: Folders of out-of-distribution rows do not go with the tasks.
        """

        def read(split: str, limit: int | None = None) -> list[object]:
            return _content(task, load_rows(task, split, data_dir=data.data_dir, limit=limit), split)

        fitted = read(checkpoints.fit_split, checkpoints.fit_limit)
        for split in LABELLED_SPLITS if checkpoints.prior_method != "marglik" else ():
            with suppress(DataError):  # tune_prior reads another one, or says what is wrong
                fitted += read(split)
        scored = read(data.split or "validation")
        if settings.temperature_split:
            scored += read(settings.temperature_split)
        for name, folder in shifted_sources(settings):
            scored += _content(*load_shifted_rows(name, folder, data.limit))
        scored += [_identity(member) for member in read_members(settings.ensemble)]
        return cls(_digest(fitted), _digest([data.limit, *scored]))


def _content(task: Task, rows: Sequence[Row], split: str) -> list[object]:
    return [[task.to_dict(), split], *(row.values for row in rows)]


def _identity(adapter: Adapter) -> dict[str, Any]:
    """Return what identifies an adapter: its weights, the settings of its forward pass, and its base model."""
    base = {key: adapter.config.get(key) for key in ("base_model_name_or_path", "revision")}
    return {"weights": adapter.sha256, "settings": adapter_settings(adapter), **base}


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode("ascii") + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """One checkpoint, and how it is fitted and scored.

    Attributes:
        step: Training step.
        model: The checkpoint and how to run it.
        adapter: Its files.
        data: Task, folder and the split to score.
        settings: Links, samples and seed.
        fitting: How posteriors are fitted.
        rows: Digests of the rows.
        heading: Beginning of each message.
        print_message: Prints progress messages.
        progress: Progress callback.
    """

    step: int
    model: ModelSettings
    adapter: Adapter
    data: DataSettings
    settings: EvalSettings
    fitting: CheckpointSettings
    rows: _RowDigests
    heading: str
    print_message: Callable[[str], None]
    progress: Progress | None

    def other_posteriors(self) -> list[Path]:
        """Return the folders of the posteriors with names of :data:`POSTERIORS` that this command did not make."""
        folders = [self._folder(name) for name in POSTERIORS]
        return [folder for folder in folders if posterior_exists(folder) and not _made_here(folder)]

    def evaluate(self, skipped: dict[str, str]) -> dict[str, Any]:
        """Return the evaluation record, from an earlier run if it is up to date.

        Args:
            skipped: Reasons by name of posteriors that no checkpoint of the run can have; extended.
        """
        cache = self.model.root / "laplace" / CACHE_FILE
        kept = _read_cache(cache)
        known = bool(kept and kept["key"] == self._key(kept["names"]))
        kept = self.model.processes.all_gather(kept if known else None)[0]
        if kept:
            skipped |= {name: reason for name, reason in kept["skipped"].items() if name not in skipped}
            for name, reason in kept["skipped"].items():
                self._say(f"{name} left out: {reason}")
            self._say("already scored")
            return dict(kept["record"])
        names = []
        for name, posterior in POSTERIORS.items():
            if name in skipped:
                continue
            try:
                self._fit_and_tune(posterior)
            except NoSuchLayersError as error:  # all checkpoints of a run have the same layers
                skipped[name] = str(error)
                self._say(f"{name} left out: {error}")
                continue
            names.append(name)
        self._say("scoring")
        settings = replace(self.settings, names=tuple(names))
        record = run_evaluation(self.model, self.data, settings, self.progress).record
        found = {"key": self._key(names), "names": names, "skipped": skipped, "record": record}
        if self.model.processes.is_main:
            partial = cache.with_name(f".{cache.name}.{os.getpid()}")
            partial.write_text(json.dumps(found), encoding="utf-8")
            partial.replace(cache)
        return record

    def _fit_and_tune(self, posterior: FitSettings) -> None:
        """Fit and tune one posterior, unless it is up to date."""
        name, model, method = posterior.name, self.model, self.fitting.prior_method
        posterior = replace(
            posterior,
            max_length=self.fitting.max_length,
            chat_template=self.fitting.chat_template,
            seed=self.settings.seed,
            prior_method="marglik" if method == "marglik" else "averaged",
        )
        folder, made_from = self._folder(name), _digest([self._fitted_to(), repr(posterior)])
        made = (_read_note(folder) or {}).get("made_from") == made_from and self._saved(name) is not None
        if model.processes.all_gather(made)[0]:
            return
        self._say(f"{name}: fitting")
        training = DataSettings(self.data.task, self.data.data_dir, self.fitting.fit_split, self.fitting.fit_limit)
        fit(model, training, replace(posterior, overwrite=_made_here(folder)), self.progress)
        if model.processes.is_main:
            _write_note(folder, None)
        if method != "marglik":
            self._say(f"{name}: tuning the prior")
            prior = PriorSettings(name=name, method=method, seed=self.settings.seed)
            tuned = tune_prior(model, DataSettings(), prior, self.progress)
            for line in (tuned.reason, *tuned.notes):
                if not line.startswith(ADVICE_ON_ROWS):  # the same rows tune the prior of every checkpoint
                    self._say(f"{name}: {line}")
        if model.processes.is_main:
            _write_note(folder, made_from)

    def _folder(self, name: str) -> Path:
        return posterior_folder(self.model.root, name)

    def _say(self, message: str) -> None:
        self.print_message(f"{self.heading}: {message}")

    def _fitted_to(self) -> dict[str, object]:
        """Return everything that the posteriors depend on."""
        return {
            "rows": self.rows.fitted,
            "adapter": _identity(self.adapter),
            "base": [repr((self.model.base_model, self.model.quantize, self.model.dtype)), self._base_files()],
            "settings": repr(self.fitting),
        }

    def _base_files(self) -> str | None:
        """Return a digest of the base model's files, or None if it is not a folder."""
        name = self.model.base_model or self.adapter.base_model
        return digest_of_folder(Path(name)) if name and Path(name).is_dir() else None

    def _saved(self, name: str) -> SavedPosterior | None:
        """Return a posterior, or None if it is missing, damaged, or of another adapter."""
        try:
            posterior = SavedPosterior(self._folder(name))
        except PosteriorError:
            return None
        return None if adapter_differences(posterior.manifest, self.adapter) else posterior

    def _key(self, names: Sequence[str]) -> str | None:
        """Return a digest of everything that the scores depend on, or None if a posterior cannot be used."""
        contents = []
        for name in names:
            posterior = self._saved(name)
            if posterior is None:
                return None
            contents.append(posterior.content)
        asked = {"scored": self.rows.scored, "settings": repr(self.settings), "version": __version__}
        return _digest([self._fitted_to(), asked, *contents])


def _note(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.made-with")


def _write_note(folder: Path, made_from: str | None) -> None:
    """Record that this command made a posterior; ``made_from`` is None until its prior is tuned."""
    write_json(_note(folder), {"posterior": _checksum(folder), "made_from": made_from})


def _read_note(folder: Path) -> dict[str, Any] | None:
    """Return what is recorded: None if this command did not make the posterior, empty if an earlier version did."""
    try:
        found = json.loads(_note(folder).read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _made_here(folder: Path) -> bool:
    """Return whether this command made the posterior, and no other fit has replaced it since."""
    note = _read_note(folder)
    return note is not None and len({note.get("posterior"), _checksum(folder)} - {None}) < 2


def _checksum(folder: Path) -> str | None:
    """Return the checksum of a posterior without its prior, or None if it is missing or damaged."""
    try:
        return SavedPosterior(folder, validate_prior=False).digest_without_prior
    except PosteriorError:
        return None


def _read_cache(file: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return kept if {"key", "names", "skipped", "record"} <= set(kept) else None
    except (OSError, ValueError, TypeError):
        return None
