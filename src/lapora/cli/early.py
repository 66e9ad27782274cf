"""Checks that need no PyTorch: all mistakes are reported together, in under a second."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lapora.config import (
    DataSettings,
    EvalSettings,
    FitSettings,
    ModelSettings,
    PredictSettings,
    PriorSettings,
    check_likelihood,
)
from lapora.errors import DataError, LaporaError, SeveralError, UsageError
from lapora.models.adapter import CONFIG_FILE, check_adapter_files, read_head

if TYPE_CHECKING:
    from lapora.workflows.results import Gate


def check_fit(
    models: list[ModelSettings],
    data: DataSettings,
    settings: FitSettings,
    predictions: PredictSettings = PredictSettings(),
    *,
    dry_run: bool = False,
) -> None:
    """Check the files that a fit reads, the posterior that it would replace, and options against the likelihood.

    With several adapters only the data and options are checked: an error in one adapter stops no other. A dry run
    replaces nothing, and its device may be one that this machine lacks.

    Raises:
        LaporaError: What is wrong; several mistakes are one error, with the status of the first.
    """
    from lapora.storage.saved import posterior_folder, refuse_to_replace

    checks: list[Callable[[], object]] = [
        lambda: _check_device(models[0].device, here=not dry_run),
        lambda: _check_data(data, settings, predictions),
    ]
    if len(models) == 1:
        folder = posterior_folder(models[0].root, settings.name)
        checks.insert(0, lambda: check_adapter_files(models[0].folder))
        checks.append(lambda: refuse_to_replace(folder, overwrite=settings.overwrite or dry_run))
    _raise_together(checks)
    if len(models) == 1:
        _check_rows(models[0], data, settings)


def check_fitted(
    model: ModelSettings,
    names: Sequence[str],
    settings: PriorSettings | EvalSettings | PredictSettings,
    data: DataSettings | None = None,
    gates: Sequence[Gate] = (),
) -> None:
    """Check an adapter's files, its posteriors' manifests, the requested data, and options against the likelihood.

    Raises:
        LaporaError: What is wrong; several mistakes are one error, with the status of the first.
    """
    from lapora.storage.saved import posterior_folder

    if not (model.folder / CONFIG_FILE).is_file():  # it has no posterior either
        check_adapter_files(model.folder)
    checks: list[Callable[[], object]] = [
        lambda: check_adapter_files(model.folder),
        lambda: _check_device(model.device),
    ]
    for name in names:
        folder = posterior_folder(model.root, name)
        checks.append(functools.partial(_check_posterior, folder, settings, data or DataSettings(), gates))
    if data is not None:
        checks.append(lambda: _check_data(data))
    _raise_together(checks)


def check_rows(model: ModelSettings, data: DataSettings, settings: EvalSettings) -> None:
    """Check the device, the requested data, and options against the task's likelihood.

    Raises:
        LaporaError: What is wrong; several mistakes are one error, with the status of the first.
    """
    _raise_together([lambda: _check_device(model.device), lambda: _check_data(data, settings)])


def check_input(source: str) -> None:
    """Check that the file of rows exists.

    Raises:
        DataError: There is no such file, it is a folder, or standard input is closed.
    """
    if source == "-" and sys.stdin is None:
        raise DataError("standard input is closed; give a file of rows as INPUT")
    if source != "-" and not Path(source).exists():
        raise DataError(f"{source}: cannot be read (No such file or directory)")
    if Path(source).is_dir() and source != "-":
        raise DataError(f"{source}: a folder; give a file of rows")


_OTHER_FORMATS = (".csv", ".gz", ".htm", ".html", ".parquet", ".tsv", ".xls", ".xlsx")


def check_outputs(output: Path | None, report: Path | None, plots: Path | None) -> None:
    """Check that the files of ``eval`` can be written, and that ``output`` holds results if it holds anything.

    Raises:
        UsageError: The results would be JSON lines in a file of another format.
        DataError: A file or folder cannot be written, or has other content.
    """
    if output is not None and output.suffix.lower() in _OTHER_FORMATS:
        raise UsageError(f"--output {output}: results are JSON lines; give a name that ends in .jsonl")
    for option, file in (("--output", output), ("--report", report)):
        if file is not None:
            _check_writable(file, option)
    if plots is not None:
        existing = next(each for each in (plots, *plots.absolute().parents) if each.exists())
        if not existing.is_dir():
            raise DataError(f"{plots}: cannot be written ({existing} is not a folder); give another --plots")
        if not os.access(existing, os.W_OK):
            raise DataError(f"{plots}: cannot be written (Permission denied); give another --plots")
    if output is not None and output.is_file():
        from lapora.workflows.results import check_results_file

        check_results_file(output)


def _check_writable(file: Path, option: str) -> None:
    reason = None
    if file.is_dir():
        reason = "a folder"
    elif not file.parent.is_dir():
        reason = f"no folder {file.parent}"
    elif not os.access(file if file.exists() else file.parent, os.W_OK):
        reason = "Permission denied"
    if reason is not None:
        raise DataError(f"{file}: cannot be written ({reason}); give another {option}")


def _check_posterior(
    folder: Path,
    settings: PriorSettings | EvalSettings | PredictSettings,
    data: DataSettings,
    gates: Sequence[Gate],
) -> None:
    from lapora.storage.saved import SavedPosterior
    from lapora.tasks import load_task
    from lapora.workflows.contradictions import check_other_rows, resolve_task
    from lapora.workflows.results import check_gate_metrics

    manifest = SavedPosterior(folder, validate_prior=False).manifest
    task = resolve_task(data, manifest)
    check_likelihood(task.likelihood, settings)
    check_gate_metrics(gates, task.likelihood)
    for name in settings.ood if isinstance(settings, EvalSettings) else ():
        check_other_rows(load_task(name), manifest)


def _check_data(data: DataSettings, *settings: FitSettings | PredictSettings | EvalSettings) -> None:
    from lapora.tasks import load_task
    from lapora.tasks.rows import find_split_file

    task = load_task(data.task) if data.task is not None else None
    if task is not None:
        for each in settings:
            check_likelihood(task.likelihood, each)
    if data.data_dir is not None and data.split is not None:
        find_split_file(data.data_dir, [data.split, *([task.source_split(data.split)] if task else [])])


_DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu|hpu|npu|mlu|xla)(:\d+)?")
_ROWS_CHECKED = 1000


def _check_device(device: str, *, here: bool = True) -> None:
    if not _DEVICE.fullmatch(device):
        raise UsageError(f"--device {device}: no such device; use auto, cpu, or cuda:0 for the first GPU")
    if device.startswith("mps"):
        raise UsageError(f"--device {device}: not supported (it has no float64); use cpu")
    if here and _has_no_driver(device):
        raise UsageError(f"--device {device}: not available on this machine (it has no driver for it); use auto or cpu")


def _has_no_driver(device: str) -> bool:
    """Return whether a device is certainly absent; whether it works is known once PyTorch is loaded."""
    if not device.startswith("cuda") or sys.platform != "linux" or Path("/dev/kfd").exists():  # AMD's driver
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


def _check_rows(model: ModelSettings, data: DataSettings, settings: FitSettings) -> None:
    """Render the first rows of a local file, and check their fields, labels and answers against the adapter."""
    from lapora.tasks import load_rows, load_task, render_all, resolve_choices
    from lapora.tasks.examples import missing_label_fields, refuse_missing_labels
    from lapora.workflows.contradictions import check_head

    head = read_head(model)
    task = load_task(cast(str, data.task))
    check_head(task, head)
    kind = head.kind
    task.prompt_templates(kind)
    if settings.chat_template and kind == "classifier":
        raise UsageError("--chat-template wraps the prompt of a causal language model; this adapter is a classifier")
    if data.data_dir is None and not task.reads_files:
        return  # rows on the Hub
    limit = min(data.limit or _ROWS_CHECKED, _ROWS_CHECKED)
    rows = load_rows(task, data.split or "train", data_dir=data.data_dir, limit=limit)
    render_all(task, rows, kind=kind, choices=resolve_choices(task, rows, kind=kind), labels="optional")
    if not settings.unlabelled and missing_label_fields(task, rows):
        refuse_missing_labels(task, load_rows(task, data.split or "train", data_dir=data.data_dir, limit=data.limit))


def _raise_together(checks: list[Callable[[], object]]) -> None:
    found: list[LaporaError] = []
    for check in checks:
        try:
            check()
        except LaporaError as error:
            found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        raise SeveralError("; ".join(dict.fromkeys(map(str, found))), found[0].exit_status)
