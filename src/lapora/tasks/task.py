"""A task: how a row of data becomes a prompt, the answers to choose from, and the right one.

The vocabulary is lm-evaluation-harness's, with four keys of lapora's own: ``doc_to_inputs``, ``keep_if``,
``truncate_field`` and ``max_length``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from lapora.errors import DataError
from lapora.tasks.keys import KEY_PARSERS, kind_of, plain
from lapora.tasks.quoting import listed, quoted
from lapora.tasks.templates import CompiledTemplate, compiled_template

TaskKind = Literal["causal", "classifier"]

FILE_LOADERS = ("json", "csv", "parquet")
"""What `dataset_path` is for a task of files, as in `datasets`."""

DEFAULT_MAX_LENGTH = 512
"""Tokens of a row, where the task does not say."""


@dataclass(frozen=True)
class Task:
    """One task, validated.

    Attributes:
        task: Its name.
        dataset_path: Hub data set, or ``json``, ``csv``, ``parquet`` with ``dataset_kwargs.data_files``.
        dataset_name: Configuration of the Hub data set.
        dataset_kwargs: ``data_files`` and nothing else.
        training_split: The data set's split that ``train`` means.
        validation_split: The one that ``validation`` means.
        test_split: The one that ``test`` means.
        output_type: ``multiple_choice``.
        doc_to_text: Template of a causal model's prompt.
        doc_to_choice: The answers, or a template that yields them.
        doc_to_target: Template of the right answer, as index or as text; or a constant index.
        doc_to_inputs: Templates of the one or two texts that a sequence classifier reads.
        keep_if: Template; rows for which it is false are left out.
        metric: ``acc`` or ``mcc``.
        metric_list: As in the harness; ``metric`` is taken from it.
        truncate_field: The field that is shortened when a row is too long.
        max_length: Tokens of a row; one number, or one for each kind of model.
        target_delimiter: What stands between prompt and answer.
        tag: As in the harness; not used.
        metadata: As in the harness; not used.
    """

    task: str
    dataset_path: str | None = None
    dataset_name: str | None = None
    dataset_kwargs: Mapping[str, Any] = field(default_factory=dict)
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    output_type: str = "multiple_choice"
    doc_to_text: str | None = None
    doc_to_choice: tuple[str, ...] | str = ()
    doc_to_target: str | int | None = None
    doc_to_inputs: tuple[str, ...] | None = None
    keep_if: str | None = None
    metric: str = "acc"
    metric_list: tuple[Mapping[str, Any], ...] = ()
    truncate_field: str | None = None
    max_length: int | Mapping[str, int] | None = None
    target_delimiter: str = " "
    tag: Any = None
    metadata: Any = None

    @property
    def kinds(self) -> tuple[TaskKind, ...]:
        """The kinds of model that the task serves."""
        served: list[TaskKind] = []
        if self.doc_to_text is not None:
            served.append("causal")
        if self.doc_to_inputs is not None:
            served.append("classifier")
        return tuple(served)

    @property
    def reads_files(self) -> bool:
        """Whether its rows come from ``data_files`` rather than from a Hub data set."""
        return self.dataset_path in (None, *FILE_LOADERS) and "data_files" in self.dataset_kwargs

    @property
    def hub_source(self) -> str | None:
        """``path/configuration`` on the Hub, or None for a task of local files."""
        if self.dataset_path is None or self.dataset_path in FILE_LOADERS:
            return None
        return self.dataset_path if self.dataset_name is None else f"{self.dataset_path}/{self.dataset_name}"

    def max_length_for(self, kind: TaskKind) -> int:
        """Most tokens of a row for this kind of model."""
        if isinstance(self.max_length, Mapping):
            return self.max_length.get(kind, DEFAULT_MAX_LENGTH)
        return self.max_length or DEFAULT_MAX_LENGTH

    def source_split(self, split: str) -> str:
        """The data set's own name of a split: ``train``, ``validation`` and ``test`` are mapped."""
        named = {"train": self.training_split, "validation": self.validation_split, "test": self.test_split}
        return named.get(split) or split

    def prompt_templates(self, kind: TaskKind) -> tuple[CompiledTemplate, ...]:
        """The templates of what a model of this kind reads.

        Raises:
            DataError: The task does not serve this kind of model.
        """
        if kind not in self.kinds:
            needed, other = {
                "causal": ("doc_to_text", "classifier"),
                "classifier": ("doc_to_inputs", "causal"),
            }[kind]
            raise DataError(
                f"task {quoted(self.task)} serves only {other} models: its YAML has no {needed}; add one "
                "(`lapora tasks` lists the tasks with their kinds)"
            )
        sources = (cast(str, self.doc_to_text),) if kind == "causal" else cast(tuple, self.doc_to_inputs)
        return tuple(compiled_template(source) for source in sources)

    def to_dict(self) -> dict[str, Any]:
        """The task as plain JSON values, without what is at its default; `from_dict` reads it back."""
        values: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            default = {} if entry.name == "dataset_kwargs" else entry.default
            if entry.name == "task" or value != default:
                values[entry.name] = plain(value)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "the task") -> Task:
        """Validate a YAML file's or a manifest's values.

        Args:
            values: Key to value.
            source: The file, as an error message names it.

        Raises:
            DataError: An unknown key, a wrong type, a template that cannot be compiled, or keys that do not
                go together; the message names the key.
        """
        if not isinstance(values, Mapping):
            raise DataError(f"{source}: a task is a mapping of keys to values, not {kind_of(values)}")
        unknown = [key for key in values if key not in KEY_PARSERS]
        if unknown:
            raise DataError(
                f"{source}: unknown key {listed([str(key) for key in unknown])}; a task may have "
                f"{', '.join(KEY_PARSERS)}"
            )
        parsed: dict[str, Any] = {}
        for key, value in values.items():
            if value is None:
                continue
            try:
                parsed[key] = KEY_PARSERS[key](value)
            except DataError as error:
                raise DataError(f"{source}: {key}: {error}") from None
        if "task" not in parsed:
            raise DataError(f"{source}: no key 'task': give the task a name")
        task = cls(**parsed)
        if task.metric_list and "metric" not in parsed:
            task = cls(**{**parsed, "metric": _metric_of(task.metric_list, source)})
        _check_together(task, source)
        return task


def _check_together(task: Task, source: str) -> None:
    if not task.kinds:
        raise DataError(
            f"{source}: neither doc_to_text (for causal models) nor doc_to_inputs (for classifiers); add one"
        )
    if not task.doc_to_choice:
        raise DataError(f"{source}: no doc_to_choice: list the answers, or give a template that yields them")
    if isinstance(task.doc_to_target, int) and isinstance(task.doc_to_choice, tuple):
        count = len(task.doc_to_choice)
        if not 0 <= task.doc_to_target < count:
            raise DataError(f"{source}: doc_to_target: {task.doc_to_target} is no index into {count} choices")
    if task.truncate_field is not None:
        names: set[str] = set()
        for kind in task.kinds:
            for template in task.prompt_templates(kind):
                names |= template.fields | template.optional_fields
        if task.truncate_field not in names:
            raise DataError(
                f"{source}: truncate_field: {quoted(task.truncate_field)} is no field of doc_to_text or "
                f"doc_to_inputs, which use {listed(sorted(names))}"
            )


def _metric_of(metric_list: tuple[Mapping[str, Any], ...], source: str) -> str:
    named = [entry.get("metric") for entry in metric_list]
    for metric in ("mcc", "acc"):
        if metric in named:
            return metric
    raise DataError(
        f"{source}: metric_list: none of {listed([str(name) for name in named])} is one "
        "that lapora computes: acc or mcc"
    )
