"""``lapora demo``: the whole pipeline, with an adapter on SmolLM2-135M-Instruct that comes with lapora.

The adapter classifies the source of a text: a web search, a school exam or a book of science facts. It has memorized
its 300 training rows and is overconfident on all others. :mod:`lapora.workflows.offline_demo` needs no network.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from lapora.config import DataSettings, EvalSettings, FitSettings, ModelSettings, PredictSettings, Progress
from lapora.errors import UsageError
from lapora.models.demo_base import fetch_demo_base
from lapora.models.loading import load_once
from lapora.workflows.evaluate import run_evaluation
from lapora.workflows.fit import fit
from lapora.workflows.offline_demo import OFFLINE_TASK, Step, make_offline_demo, record_base
from lapora.workflows.predict import predict_rows
from lapora.workflows.task_model import open_fitted
from lapora.workflows.tune_prior import tune_prior

_TASK = "source.yaml"
_TEXTS = (
    "who won the most medals at the 1996 olympics",
    "which of these is needed for a plant to grow toward the light",
    "a person wants their house to stay warm, so they",
)


@dataclass(frozen=True)
class Demo:
    """Result of the demo.

    Attributes:
        record: The record of ``eval``.
        answers: Records of ``predict`` for three texts, each with its ``text``; none offline.
    """

    record: dict[str, Any]
    answers: list[dict[str, Any]]


def _no_bar(label: str) -> AbstractContextManager[Progress | None]:
    return nullcontext()


def run_demo(
    directory: Path, print_message: Callable[[str], None], step: Step = _no_bar, *, offline: bool = False
) -> Demo:
    """Write the files of the demo to a folder and run the pipeline.

    Args:
        directory: Folder for the files: ``adapter/``, ``data/``, the task, offline ``base/``.
        print_message: Prints progress messages.
        step: Returns the progress callback of a step.
        offline: Train a small base model and an adapter instead of downloading.

    Raises:
        UsageError: The directory has other content than an earlier demo of this kind.
        AdapterError: The base model cannot be downloaded.
    """
    own, other = (OFFLINE_TASK, _TASK) if offline else (_TASK, OFFLINE_TASK)
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: a file; give a folder")
    if directory.exists() and any(directory.iterdir()) and not (directory / own).is_file():
        what = "the demo of another kind" if (directory / other).is_file() else "not empty, and not an earlier demo"
        raise UsageError(f"{directory}: {what}; give another folder")
    base = None if offline else fetch_demo_base(print_message, step)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{directory}: cannot be made ({error.strerror}); give another folder") from error
    if base is None:
        make_offline_demo(directory, print_message, step)
    else:
        with as_file(files("lapora") / "demo") as shipped:
            for source in sorted(file for file in shipped.rglob("*") if file.is_file()):
                target = directory / source.relative_to(shipped)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)
        record_base(directory / "adapter", base)

    load = load_once()
    model = ModelSettings(adapter=str(directory / "adapter"))
    data = DataSettings(task=str(directory / own), data_dir=directory / "data")
    with step("fitting the posterior") as progress:
        fitted = fit(model, data, FitSettings(overwrite=True), progress, load)
    print_message(f"posterior over {fitted.parameters:,} parameters: {fitted.folder}")
    with step("tuning the prior") as progress:
        tuned = tune_prior(model, progress=progress, load=load)
    print_message(f"tuned {tuned.reason}")
    with step("evaluating") as progress:
        record = run_evaluation(model, DataSettings(split="validation"), EvalSettings(), progress, load).record
    if offline:
        return Demo(record, [])
    opened = open_fitted(model, "default", load=load)
    answers = predict_rows(opened, PredictSettings(), [{"sentence": text} for text in _TEXTS])
    return Demo(record, [{"text": text, **answer} for text, answer in zip(_TEXTS, answers, strict=True)])
