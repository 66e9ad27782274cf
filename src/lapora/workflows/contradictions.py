"""Check task, adapter, base model and posterior for contradictions, from their files and without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lapora.config import DataSettings, LikelihoodName
from lapora.errors import DataError
from lapora.models.adapter import Head
from lapora.tasks import Task, load_task

if TYPE_CHECKING:
    from lapora.storage.manifest import Manifest

_OF_ONE_OUTPUT: tuple[LikelihoodName, ...] = ("bernoulli", "preference")

_PROBLEM_TYPES: dict[str, tuple[LikelihoodName, ...]] = {
    "regression": ("gaussian", "preference"),
    "single_label_classification": ("categorical",),
    "multi_label_classification": ("multilabel", "bernoulli"),
}


def check_head(task: Task, head: Head, choices: Sequence[str] = ()) -> None:
    """Check a model's head against a task: kind of model, number of outputs and ``problem_type``.

    Args:
        task: The task.
        head: The head, as far as it is known.
        choices: Answers read from rows, if the task has none of its own.

    Raises:
        DataError: They contradict each other; both are named.
    """
    likelihood = task.likelihood
    what = f"task {task.task} has likelihood {likelihood}"
    if head.kind == "causal":
        if likelihood != "categorical":
            raise DataError(
                f"{what}, which is for classifiers (task_type SEQ_CLS), and the adapter is a causal language model "
                f"({head.source}): give a task with likelihood categorical, or a classifier's adapter"
            )
        return
    outputs = 1 if likelihood in _OF_ONE_OUTPUT else len(_choices(task, choices))
    if outputs and head.labels not in (None, outputs):
        of = "answers" if likelihood == "categorical" else f"outputs of likelihood {likelihood}"
        others = "; one output is for likelihood bernoulli, gaussian or preference" if head.labels == 1 else ""
        raise DataError(
            f"task {task.task} has {outputs} {of} and the adapter's head {head.labels} outputs; give the task the "
            f"adapter was trained on{others}"
        )
    known = _PROBLEM_TYPES.get(head.problem_type or "")
    if known and likelihood not in known:
        raise DataError(
            f"{what}, and the base model's config problem_type {head.problem_type}, which is {' or '.join(known)}: "
            "correct the one that is wrong"
        )


def _choices(task: Task, read: Sequence[str]) -> Sequence[str]:
    return task.doc_to_choice if isinstance(task.doc_to_choice, tuple) else read


def check_other_rows(task: Task, manifest: Manifest, choices: Sequence[str] = ()) -> None:
    """Check that the model of a posterior can predict the rows of another task.

    Args:
        task: The task of ``--ood``.
        manifest: The posterior's manifest.
        choices: Answers read from rows, if the task has none of its own.

    Raises:
        DataError: The rows are pairs of texts and the model reads single ones, or the reverse; or the number of
            answers differs.
    """
    own, likelihood = manifest.answers.choices, resolve_task(DataSettings(), manifest).likelihood
    choices = _choices(task, choices)
    task.prompt_templates("causal" if manifest.answers.causal else "classifier")
    if (task.likelihood == "preference") != (likelihood == "preference"):
        raise DataError(
            f"--ood {task.task}: its likelihood is {task.likelihood}, and the posterior's {likelihood}: the rows of a "
            "preference are pairs of texts, and those of other tasks are not"
        )
    if choices and own and likelihood != "gaussian" and len(choices) != len(own):
        raise DataError(
            f"--ood {task.task}: {len(choices)} answers ({', '.join(choices)}), and the adapter has {len(own)} "
            f"({', '.join(own)}); give a task with as many"
        )


def resolve_task(data: DataSettings, recorded: Manifest | None = None) -> Task:
    """Return the requested task, else the one recorded by ``fit``.

    Raises:
        DataError: There is neither, or the task has another likelihood than the recorded one.
    """
    if recorded is None:
        if not data.task:
            raise DataError("no task; give one with --data (see `lapora tasks`)")
        return load_task(data.task)
    own = Task.from_dict(recorded.task, source="the posterior's task")
    task = load_task(data.task) if data.task else own
    if task.likelihood != own.likelihood:
        raise DataError(
            f"task {task.task} has likelihood {task.likelihood}, and the posterior was fitted with {own.likelihood}; "
            "give a task of the same likelihood"
        )
    return task
