"""Task definitions: templates of prompts, answer choices and labels, read from YAML.

The keys are those of lm-evaluation-harness, plus ``answer_score``, ``doc_to_continuation``, ``doc_to_inputs``,
``keep_if``, ``truncate_field`` and ``max_length``.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from lapora.config import LikelihoodName
from lapora.errors import DataError, first_line, listed, quoted
from lapora.tasks.harness import PythonFunction, without_evaluation_keys
from lapora.tasks.targets import CHOSEN, FIRST, REJECTED, SECOND
from lapora.tasks.templates import CompiledTemplate, compiled_template

TaskKind = Literal["causal", "classifier"]

AnswerScore = Literal["sum", "per_token", "per_byte"]
"""Score of a whole answer: its log-probability, or that divided by its number of tokens or UTF-8 bytes."""

FILE_LOADERS = ("json", "csv", "parquet")
"""Values of `dataset_path` for tasks that read local files, as in `datasets`."""

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""Suffixes of files of rows."""

DEFAULT_MAX_LENGTH = 512
"""Maximum number of tokens per row of a task without `max_length`."""


_OF_A_ROW = (
    *("description", "doc_to_text", "gen_prefix", "doc_to_inputs", "target_delimiter", "keep_if"),
    *("doc_to_choice", "doc_to_continuation", "answer_score", "doc_to_target", "likelihood"),
)
"""What the prompts, answers and labels of rows depend on."""


@dataclass(frozen=True)
class Task:
    """A validated task.

    Attributes:
        task: Name of the task.
        dataset_path: Hub dataset, or ``json``, ``csv``, ``parquet`` with ``dataset_kwargs.data_files``.
        dataset_name: Configuration of the Hub dataset.
        dataset_kwargs: ``data_files``, and for the Hub ``column_names``, ``header`` and ``revision``.
        training_split: The dataset's name of the split ``train``.
        validation_split: The dataset's name of the split ``validation``.
        test_split: The dataset's name of the split ``test``.
        output_type: Always ``multiple_choice``.
        description: Text before the prompt, or its template.
        doc_to_text: Prompt template, for causal models; may be empty.
        doc_to_choice: The answers, or a template that returns them; for causal models a row's own.
        gen_prefix: Text at the end of the prompt, behind the delimiter, or its template.
        doc_to_continuation: Template of a text behind the answer, which is scored in its place, for causal models.
        answer_score: Score of an answer of several tokens.
        doc_to_target: Label template, an answer's index or text; or a constant index.
        doc_to_inputs: Templates of the one or two input texts, for sequence classifiers.
        keep_if: Template; rows for which it is false are excluded.
        likelihood: ``categorical`` (one answer), ``bernoulli`` (one logit for two answers), ``multilabel`` (a logit for
            each of several labels), ``gaussian`` (regression) or ``preference`` (reward models).
        metric: ``acc`` or ``mcc``.
        metric_list: As in lm-evaluation-harness; ``mcc`` in it sets ``metric``, and other metrics are not used.
        truncate_field: Field to truncate if a row is too long.
        max_length: Maximum number of tokens per row; one number, or one per kind of model.
        target_delimiter: Text between prompt and answer.
        tag: As in lm-evaluation-harness; not used.
        metadata: As in lm-evaluation-harness; not used.
    """

    task: str
    dataset_path: str | None = None
    dataset_name: str | None = None
    dataset_kwargs: Mapping[str, Any] = field(default_factory=dict)
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    output_type: str = "multiple_choice"
    description: str | None = None
    doc_to_text: str | None = None
    doc_to_choice: tuple[str, ...] | str = ()
    gen_prefix: str | None = None
    doc_to_continuation: str | None = None
    answer_score: AnswerScore = "sum"
    doc_to_target: str | int | None = None
    doc_to_inputs: tuple[str, ...] | None = None
    keep_if: str | None = None
    likelihood: LikelihoodName = "categorical"
    metric: str = "acc"
    metric_list: tuple[Mapping[str, Any], ...] = ()
    truncate_field: str | None = None
    max_length: int | Mapping[str, int] | None = None
    target_delimiter: str = " "
    tag: Any = None
    metadata: Any = None

    @property
    def kinds(self) -> tuple[TaskKind, ...]:
        """Kinds of model that the task supports."""
        kinds: list[TaskKind] = []
        if self.doc_to_text is not None:
            kinds.append("causal")
        if self.doc_to_inputs is not None:
            kinds.append("classifier")
        return tuple(kinds)

    def renders_like(self, other: Task) -> bool:
        """Return whether the prompts, answers and labels of a row are the same under another task."""
        return all(getattr(self, name) == getattr(other, name) for name in _OF_A_ROW)

    @property
    def reads_files(self) -> bool:
        """Whether rows are read from ``data_files`` rather than from a Hub dataset."""
        return self.dataset_path in (None, *FILE_LOADERS) and "data_files" in self.dataset_kwargs

    @property
    def hub_source(self) -> str | None:
        """``path/configuration`` on the Hub, or None for local files."""
        if self.dataset_path is None or self.dataset_path in FILE_LOADERS:
            return None
        return self.dataset_path if self.dataset_name is None else f"{self.dataset_path}/{self.dataset_name}"

    def max_length_for(self, kind: TaskKind) -> int:
        """Return the maximum number of tokens per row for a kind of model."""
        if isinstance(self.max_length, Mapping):
            return self.max_length.get(kind, DEFAULT_MAX_LENGTH)
        return self.max_length or DEFAULT_MAX_LENGTH

    def source_split(self, split: str) -> str:
        """Return the dataset's own name of a split; ``train``, ``validation`` and ``test`` are mapped."""
        named = {"train": self.training_split, "validation": self.validation_split, "test": self.test_split}
        return named.get(split) or split

    def prompt_templates(self, kind: TaskKind) -> tuple[CompiledTemplate, ...]:
        """Return the templates of the text that a kind of model reads: the parts of one prompt, or one or two inputs.

        Raises:
            DataError: The task does not support this kind of model.
        """
        if kind not in self.kinds:
            needed, other = {
                "causal": ("doc_to_text", "classifier"),
                "classifier": ("doc_to_inputs", "causal"),
            }[kind]
            raise DataError(
                f"task {quoted(self.task)} supports only {other} models: its YAML has no {needed}; add one "
                "(`lapora tasks` lists the tasks with their kinds)"
            )
        if kind == "causal":
            parts = (_or_plain(self.description), self.doc_to_text, _or_plain(self.gen_prefix))
            sources = tuple(part for part in parts if part is not None)
        else:
            sources = cast(tuple, self.doc_to_inputs)
        return tuple(compiled_template(source) for source in sources)

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain JSON values, defaults omitted; the inverse of `from_dict`."""
        values: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            default = {} if entry.name == "dataset_kwargs" else entry.default
            if entry.name == "task" or value != default:
                values[entry.name] = plain(value)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "the task") -> Task:
        """Validate the values of a YAML file or a manifest, and build a task.

        Args:
            values: Values by key.
            source: Name of the file in error messages.

        Raises:
            DataError: A key is unknown, a value has the wrong type, a template cannot be compiled, or keys
                contradict each other; the message names the key.
        """
        if not isinstance(values, Mapping):
            raise DataError(f"{source}: a task must be a mapping of keys to values, not {kind_of(values)}")
        values = without_evaluation_keys(values, source, builtin=values.get("task") in builtin_tasks())
        unknown = [key for key in values if key not in KEY_PARSERS]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), KEY_PARSERS, n=1)
            raise DataError(
                f"{source}: unknown key {listed([str(key) for key in unknown])}; "
                + (f"did you mean {close[0]}? " if close else "")
                + f"the keys are {', '.join(KEY_PARSERS)}"
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
            raise DataError(f"{source}: missing key 'task'; give the task a name")
        task = cls(**_with_defaults(parsed))
        if "metric" not in parsed and any(entry.get("metric") == "mcc" for entry in task.metric_list):
            task = cls(**{**_with_defaults(parsed), "metric": "mcc"})
        _check_consistency(task, source)
        return task


_DEFAULT_CHOICES: dict[str, tuple[str, ...]] = {"gaussian": ("value",), "preference": (FIRST, SECOND)}


def _with_defaults(parsed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a task with those that its likelihood implies."""
    values = dict(parsed)
    likelihood = values.get("likelihood", "categorical")
    if likelihood in _DEFAULT_CHOICES:
        values.setdefault("doc_to_choice", _DEFAULT_CHOICES[likelihood])
    if likelihood == "preference":
        values.setdefault("doc_to_inputs", (CHOSEN, REJECTED))
    return values


def _check_likelihood(task: Task, source: str) -> None:
    """Check the keys of a task whose likelihood is not categorical."""
    if task.doc_to_text is not None:
        raise DataError(
            f"{source}: likelihood {task.likelihood} is for sequence classifiers, which read doc_to_inputs; remove "
            "doc_to_text"
        )
    if task.metric != "acc":
        raise DataError(f"{source}: metric {task.metric} goes with likelihood categorical, not {task.likelihood}")
    if not isinstance(task.doc_to_choice, tuple):
        raise DataError(f"{source}: doc_to_choice: likelihood {task.likelihood} needs a list, not a template")
    if task.likelihood == "bernoulli" and len(task.doc_to_choice) != 2:
        raise DataError(
            f"{source}: doc_to_choice: likelihood bernoulli has two answers, not {len(task.doc_to_choice)}; list two, "
            "the second being the positive one (probability sigmoid(logit))"
        )
    if task.likelihood == "multilabel" and len(task.doc_to_choice) < 2:
        raise DataError(f"{source}: doc_to_choice: likelihood multilabel has several labels; use bernoulli for one")
    if task.likelihood == "preference":
        if task.doc_to_choice != (FIRST, SECOND):
            raise DataError(f"{source}: doc_to_choice: likelihood preference has the answers first and second; omit it")
        if len(task.doc_to_inputs or ()) != 2:
            raise DataError(
                f"{source}: doc_to_inputs: likelihood preference compares two texts: give two templates, the better "
                "one first, or omit it for the fields chosen and rejected"
            )
        if task.doc_to_target is not None:
            raise DataError(
                f"{source}: doc_to_target: likelihood preference has none: the first text is the better one"
            )


def _or_plain(source: str | None) -> str | None:
    """Return the template of a text that is not a field's name; without Jinja marks the text is literal."""
    if source is None or any(mark in source for mark in ("{{", "{%", "{#")):
        return source
    return f"{{% raw %}}{source}{{% endraw %}}"


def _check_consistency(task: Task, source: str) -> None:
    if task.likelihood != "categorical":
        _check_likelihood(task, source)
    if not task.kinds:
        raise DataError(f"{source}: missing both doc_to_text (causal models) and doc_to_inputs (classifiers); add one")
    if not task.doc_to_choice:
        raise DataError(f"{source}: missing doc_to_choice; list the answers, or give a template that returns them")
    if isinstance(task.doc_to_choice, tuple) and len(task.doc_to_choice) < 2 and task.likelihood == "categorical":
        raise DataError(f"{source}: doc_to_choice: at least two answers are required, not {len(task.doc_to_choice)}")
    if isinstance(task.doc_to_target, int) and isinstance(task.doc_to_choice, tuple):
        count = len(task.doc_to_choice)
        if not 0 <= task.doc_to_target < count:
            raise DataError(f"{source}: doc_to_target: index {task.doc_to_target} is out of range for {count} choices")
    if task.truncate_field is not None:
        names: set[str] = set()
        for kind in task.kinds:
            for template in task.prompt_templates(kind):
                names |= template.fields | template.optional_fields
        if task.truncate_field not in names:
            raise DataError(
                f"{source}: truncate_field: {quoted(task.truncate_field)} is not used by doc_to_text or "
                f"doc_to_inputs; they use {listed(sorted(names))}"
            )


_METRICS = ("acc", "mcc")


def kind_of(value: object) -> str:
    """Return the type of a YAML value in words, for error messages."""
    if isinstance(value, Mapping):
        return "a mapping"
    names = {list: "a list", tuple: "a list", str: "text", bool: "true or false", int: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def plain(value: Any) -> Any:
    """Return a value with mappings and sequences converted to dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"must be text, not {kind_of(value)} ({quoted(value)}); put it in quotes")
    return value


def _name(value: object) -> str:
    if not _text(value).strip():
        raise DataError("must not be empty")
    return _text(value)


def _template(value: object) -> str:
    source = _name(value)
    compiled_template(source)
    return source


def _condition(value: object) -> str:
    return f"{{{{ {str(value).lower()} }}}}" if isinstance(value, bool) else _template(value)


def _target(value: object) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return _template(value)


def _choices(value: object) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return _template(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        raise DataError(f"must be a list of answers or a template, not {kind_of(value)}")
    return checked_choices(value, least=1)


def checked_choices(values: list[Any] | tuple[Any, ...], least: int = 2) -> tuple[str, ...]:
    """Convert answers to text, and check that there are at least two (or ``least``), distinct and not empty.

    Raises:
        DataError: They are not.
    """
    for value in values:
        if isinstance(value, bool):
            raise DataError(f"answer {value} is a boolean (as YAML reads yes and no); put it in quotes")
        if not isinstance(value, (str, int, float)) or value == "":
            raise DataError(f"an answer must be non-empty text, not {quoted(value)}")
    choices = tuple(str(value) for value in values)
    if len(choices) < least:
        raise DataError(f"at least two answers are required, not {len(choices)}")
    duplicates = [choice for index, choice in enumerate(choices) if choice in choices[:index]]
    if duplicates:
        raise DataError(f"duplicate answer {quoted(duplicates[0])}")
    return choices


def _prompt(value: object) -> str:
    return "" if value == "" else _template(value)


def _plain_or_template(value: object) -> str:
    source = _text(value)
    compiled_template(_or_plain(source) or "")
    return source


def _answer_score(value: object) -> AnswerScore:
    if value not in get_args(AnswerScore):
        raise DataError(f"must be one of {', '.join(get_args(AnswerScore))}, not {quoted(value)}")
    return cast(AnswerScore, value)


def _inputs(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_template(value),)
    if not isinstance(value, (list, tuple)) or len(value) not in (1, 2):
        raise DataError("must be one template, or a list of one or two")
    return tuple(_template(entry) for entry in value)


def _output_type(value: object) -> str:
    if value != "multiple_choice":
        raise DataError(f"must be multiple_choice, not {quoted(value)}; other output types are not supported")
    return "multiple_choice"


def _likelihood(value: object) -> str:
    if value not in get_args(LikelihoodName):
        raise DataError(f"must be one of {', '.join(get_args(LikelihoodName))}, not {quoted(value)}")
    return cast(str, value)


def _metric(value: object) -> str:
    if value not in _METRICS:
        raise DataError(f"must be one of {', '.join(_METRICS)}, not {quoted(value)}")
    return cast(str, value)


def _metric_list(value: object) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in value):
        raise DataError("must be a list of mappings, each with a key 'metric'")
    return tuple(_json(entry) for entry in value)


def _max_length(value: object) -> int | dict[str, int]:
    if isinstance(value, Mapping):
        if set(value) - {"causal", "classifier"}:
            raise DataError("unknown kind of model; use causal and classifier")
        return {str(kind): cast(int, _max_length(length)) for kind, length in value.items()}
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10_000_000:
        raise DataError(f"must be a number of tokens, not {quoted(value)}")
    return value


_DATASET_KEYS = ("data_files", "column_names", "header", "revision")


def _dataset_kwargs(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"must be a mapping, not {kind_of(value)}")
    value = {key: each for key, each in value.items() if key not in ("trust_remote_code", "streaming")}
    unknown = [str(key) for key in value if key not in _DATASET_KEYS]
    if unknown:
        raise DataError(f"unknown key {listed(unknown)}; use {', '.join(_DATASET_KEYS)}")
    if "data_files" not in value:
        return cast("dict[str, Any]", _json(value))
    files = value["data_files"]
    by_split = files if isinstance(files, Mapping) else {"train": files}
    for named in by_split.values():
        paths = named if isinstance(named, (list, tuple)) else [named]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise DataError("data_files: must be a path, a list of paths, or a mapping of splits to these")
    return _json(dict(value))


def _json(value: Any) -> Any:
    try:
        return json.loads(json.dumps(plain(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise DataError("must contain only text, numbers, lists and mappings, as in JSON") from None


KEY_PARSERS: dict[str, Callable[[Any], Any]] = {
    "task": _name,
    "dataset_path": _name,
    "dataset_name": _name,
    "dataset_kwargs": _dataset_kwargs,
    "training_split": _name,
    "validation_split": _name,
    "test_split": _name,
    "output_type": _output_type,
    "description": _plain_or_template,
    "doc_to_text": _prompt,
    "doc_to_choice": _choices,
    "gen_prefix": _plain_or_template,
    "doc_to_continuation": _template,
    "answer_score": _answer_score,
    "doc_to_target": _target,
    "doc_to_inputs": _inputs,
    "keep_if": _condition,
    "likelihood": _likelihood,
    "metric": _metric,
    "metric_list": _metric_list,
    "truncate_field": _name,
    "max_length": _max_length,
    "target_delimiter": _text,
    "tag": _json,
    "metadata": _json,
}
"""Parser of each key, in the order of a task file; parsers raise DataError without the key's name."""


MAX_YAML_BYTES = 65_536
"""Maximum size of a task file."""
_MAX_DEPTH = 20


def builtin_tasks() -> list[str]:
    """Return the names of the built-in tasks, sorted."""
    folder = resources.files("lapora.tasks") / "builtin"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def builtin_yaml(name: str) -> str:
    """Return the YAML of a built-in task with its comments, as a template for new tasks.

    Raises:
        DataError: There is no such task.
    """
    names = builtin_tasks()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the built-in tasks are {', '.join(names)}"
        raise DataError(f"no built-in task {quoted(name)}: {hint} (for your own task, give the path of its YAML file)")
    return (resources.files("lapora.tasks") / "builtin" / f"{name}.yaml").read_text(encoding="utf-8")


def load_task(name_or_path: str) -> Task:
    """Load a built-in task by name, or the task of a YAML file.

    Relative ``data_files`` are resolved against the file's folder.

    Args:
        name_or_path: Name of a built-in task, or path of a YAML file.

    Raises:
        DataError: There is no such task or file, or the file is not a valid task.
    """
    if name_or_path in builtin_tasks():
        return task_from_yaml(builtin_yaml(name_or_path), source=f"built-in task {name_or_path}")
    path = Path(name_or_path)
    if (name_or_path and path.is_dir()) or path.suffix.lower() in (*ROW_SUFFIXES, ".gz", ".tsv"):
        folder = path if path.is_dir() else path.parent
        raise DataError(
            f"--data {quoted(name_or_path, 200)}: {'a folder' if path.is_dir() else 'a file of rows'}, not a task; "
            "give --data TASK (a built-in task or a YAML file, see `lapora tasks`), and the rows with "
            f"--data-dir {folder}"
        )
    looks_like_a_path = path.suffix.lower() in (".yaml", ".yml") or len(path.parts) > 1
    if not looks_like_a_path and not path.is_file():
        builtin_yaml(name_or_path)  # raises with the names of the built-in tasks
    values = _read_values(path, name_or_path)
    return Task.from_dict(values, source=f"task file {quoted(name_or_path, 200)}")


def _read_values(path: Path, name: str, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a task file, those of the files that it includes where it has none of its own."""
    source = f"task file {quoted(name, 200)}"
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_YAML_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "cannot be read"
        if including:
            raise DataError(f"{source}: {reason}; {including[-1].name} includes it") from None
        raise DataError(
            f"{source}: {reason}; give the name of a built-in "
            "task (`lapora tasks` lists them) or the path of a YAML file"
        ) from None
    if len(content) > MAX_YAML_BYTES:
        raise DataError(f"{source}: larger than {MAX_YAML_BYTES} bytes; check that it is a task")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    values = _with_absolute_files(_yaml_values(text, source), path.resolve().parent)
    included = values.pop("include", None)
    merged: dict[str, Any] = {}
    for each in [] if included is None else included if isinstance(included, list) else [included]:
        if not isinstance(each, str):
            raise DataError(f"{source}: include: must be the path of a YAML file, not {kind_of(each)}")
        target = path.parent / each
        if target.resolve() in (resolved := tuple(file.resolve() for file in (*including, path))):
            raise DataError(f"{source}: include: {quoted(each)} includes this file again")
        if len(resolved) > _MAX_DEPTH:
            raise DataError(f"{source}: include: nested more than {_MAX_DEPTH} files deep")
        merged |= _read_values(target, str(target), (*including, path))
    merged.pop("task_list", None)
    return {**merged, **values}


def task_from_yaml(text: str, *, source: str) -> Task:
    """Parse and validate a task's YAML, which includes no other file.

    Args:
        text: The YAML.
        source: Name of the file in error messages.

    Raises:
        DataError: The text is not YAML, uses aliases or tags, or is not a valid task.
    """
    return Task.from_dict(_yaml_values(text, source), source=source)


def _yaml_values(text: str, source: str) -> dict[str, Any]:
    try:
        _check_events(text, source)
        values = yaml.load(text, Loader=_TaskLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        lines = text.splitlines()
        templated = mark is not None and mark.line < len(lines) and "{{" in lines[mark.line]
        remedy = "; put templates in quotes" if templated else ""
        raise DataError(f"{source}{where}: {error.problem or 'not YAML'}{remedy}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{source}: not YAML: {first_line(error)}") from None
    if values is None:
        raise DataError(f"{source}: the file is empty; `lapora tasks boolq` prints an example")
    if not isinstance(values, Mapping):
        raise DataError(f"{source}: a task must be a mapping of keys to values, not {kind_of(values)}")
    return dict(values)


class _TaskLoader(yaml.SafeLoader):
    """PyYAML's safe loader, rejecting duplicate keys (PyYAML drops the first value)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            problem = None
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be a scalar"
            elif key_node.value in seen:
                problem = f"duplicate key {quoted(key_node.value)}"
            if problem is not None:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _python_function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> PythonFunction:
    return PythonFunction(loader.construct_scalar(node))


_TaskLoader.add_constructor("!function", _python_function)


_SCALAR_TAGS = ("!function", *(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "null", "str")))


def _check_events(text: str, source: str) -> None:
    """Reject aliases (which allow exponential expansion), tags and deep nesting before constructing any value."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise DataError(f"{source}, line {line}: anchors and aliases are not supported; repeat the value")
        tag = getattr(event, "tag", None)
        if tag not in (None, "!") and not (tag in _SCALAR_TAGS and isinstance(event, yaml.ScalarEvent)):
            name = str(tag).replace("tag:yaml.org,2002:", "!!")
            content = text.splitlines()[line - 1].strip() if line <= len(text.splitlines()) else name
            if name.startswith("!!") and not name.startswith("!!python"):
                raise DataError(f"{source}, line {line}: tag {name} is not supported ({quoted(content)}); leave it out")
            raise DataError(
                f"{source}, line {line}: tag {quoted(name)} is not supported ({quoted(content)}): lapora runs "
                "no Python code of task files; use a template"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise DataError(f"{source}, line {line}: nested more than {_MAX_DEPTH} levels deep")


def _with_absolute_files(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    options = values.get("dataset_kwargs")
    if not isinstance(options, Mapping) or "data_files" not in options:
        return values
    if values.get("dataset_path") not in (None, *FILE_LOADERS):
        return values  # files of a Hub repository

    def absolute(named: Any) -> Any:
        if isinstance(named, str):
            return named if "://" in named else str(folder / named)
        if isinstance(named, list):
            return [absolute(entry) for entry in named]
        if isinstance(named, Mapping):
            return {split: absolute(entry) for split, entry in named.items()}
        return named

    values["dataset_kwargs"] = {**options, "data_files": absolute(options["data_files"])}
    return values
