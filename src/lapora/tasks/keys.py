"""The keys of a task file: what each may hold, and how it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from lapora.errors import DataError
from lapora.tasks.quoting import listed, quoted
from lapora.tasks.templates import compiled_template

_METRICS = ("acc", "mcc")
# Reported in any case, or meaningless with one token per answer: a harness file may list them beside `acc`.
_METRICS_BESIDE = ("acc_norm", "acc_mutual_info", "f1", "brier_score")


def kind_of(value: object) -> str:
    """What a YAML value is, in words."""
    if isinstance(value, Mapping):
        return "a mapping"
    names = {list: "a list", tuple: "a list", str: "text", bool: "true or false", int: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def plain(value: Any) -> Any:
    """A value with its mappings and sequences as dicts and lists."""
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
    return checked_choices(value)


def checked_choices(values: list[Any] | tuple[Any, ...]) -> tuple[str, ...]:
    """Answers as text: at least two, distinct, none empty.

    Raises:
        DataError: They are not.
    """
    for value in values:
        if isinstance(value, bool):
            raise DataError(f"the answer {value} is a truth value (as YAML reads yes and no): put it in quotes")
        if not isinstance(value, (str, int, float)) or value == "":
            raise DataError(f"an answer must be text, not {quoted(value)}")
    choices = tuple(str(value) for value in values)
    if len(choices) < 2:
        raise DataError(f"{len(choices)} answers; at least two are needed")
    twice = [choice for index, choice in enumerate(choices) if choice in choices[:index]]
    if twice:
        raise DataError(f"the answer {quoted(twice[0])} stands there twice")
    return choices


def _inputs(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_template(value),)
    if not isinstance(value, (list, tuple)) or len(value) not in (1, 2):
        raise DataError("must be one template, or a list of one or two")
    return tuple(_template(entry) for entry in value)


def _output_type(value: object) -> str:
    if value != "multiple_choice":
        raise DataError(f"must be multiple_choice, not {quoted(value)}: lapora scores a fixed set of answers")
    return "multiple_choice"


def _metric(value: object) -> str:
    if value not in _METRICS:
        raise DataError(f"must be one of {', '.join(_METRICS)}, not {quoted(value)}")
    return cast(str, value)


def _metric_list(value: object) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in value):
        raise DataError("must be a list of mappings, each with a key 'metric'")
    for entry in value:
        if entry.get("metric") not in (*_METRICS, *_METRICS_BESIDE):
            raise DataError(f"the metric {quoted(entry.get('metric'))} is not one that lapora knows")
    return tuple(_json(entry) for entry in value)


def _max_length(value: object) -> int | dict[str, int]:
    if isinstance(value, Mapping):
        if set(value) - {"causal", "classifier"}:
            raise DataError("the kinds of model are causal and classifier")
        return {str(kind): cast(int, _max_length(length)) for kind, length in value.items()}
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10_000_000:
        raise DataError(f"must be a number of tokens, not {quoted(value)}")
    return value


def _dataset_kwargs(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"must be a mapping, not {kind_of(value)}")
    unknown = [str(key) for key in value if key != "data_files"]
    if unknown:
        raise DataError(f"unknown key {listed(unknown)}; only data_files is taken")
    files = value.get("data_files")
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
        raise DataError("holds what JSON cannot: use text, numbers, lists and mappings") from None


KEY_PARSERS: dict[str, Callable[[Any], Any]] = {
    "task": _name,
    "dataset_path": _name,
    "dataset_name": _name,
    "dataset_kwargs": _dataset_kwargs,
    "training_split": _name,
    "validation_split": _name,
    "test_split": _name,
    "output_type": _output_type,
    "doc_to_text": _template,
    "doc_to_choice": _choices,
    "doc_to_target": _target,
    "doc_to_inputs": _inputs,
    "keep_if": _condition,
    "metric": _metric,
    "metric_list": _metric_list,
    "truncate_field": _name,
    "max_length": _max_length,
    "target_delimiter": _text,
    "tag": _json,
    "metadata": _json,
}
"""Each key's reader, in the order of a task file; it raises DataError without naming the key."""
