"""A task: one YAML file in the vocabulary of lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lapora.errors import DataError

_LARGEST_FILE = 1_000_000
_DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class Task:
    """The resolved fields of a task file; see ``docs/tasks.md`` for each."""

    task: str
    doc_to_choice: list[str] | str
    doc_to_target: str | int | None = None
    doc_to_text: str | None = None
    doc_to_inputs: list[str] | None = None
    dataset_path: str | None = None
    dataset_name: str | None = None
    training_split: str = "train"
    validation_split: str = "validation"
    test_split: str | None = None
    keep_if: str | None = None
    metric: str = "acc"
    truncate_field: str | None = None
    max_length: int | dict[str, int] = _DEFAULT_MAX_LENGTH
    target_delimiter: str = " "

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as recorded in a posterior's manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, source: str) -> Task:
        """Check the fields of a task file.

        Raises:
            DataError: An unknown, missing or wrong-typed field; ``source`` names the file.
        """
        if not isinstance(values, dict):
            raise DataError(f"{source}: a task is a mapping of fields, such as `task:` and `doc_to_choice:`")
        known = {field.name for field in fields(cls)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise DataError(f"{source}: unknown field {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        missing = [name for name in ("task", "doc_to_choice") if name not in values]
        if missing:
            raise DataError(f"{source}: the field {', '.join(missing)} is missing")
        choice = values["doc_to_choice"]
        if not (isinstance(choice, str) or (isinstance(choice, list) and len(choice) >= 2)):
            raise DataError(f"{source}: doc_to_choice is a list of two answers or more, or a template of one")
        if isinstance(choice, list):
            values = values | {"doc_to_choice": [str(item) for item in choice]}
        inputs = values.get("doc_to_inputs")
        if inputs is not None and not (isinstance(inputs, list) and len(inputs) in (1, 2)):
            raise DataError(f"{source}: doc_to_inputs is a list of one or two templates")
        if values.get("metric", "acc") not in ("acc", "mcc"):
            raise DataError(f"{source}: metric is acc or mcc, not {values['metric']!r}")
        if not values.get("doc_to_text") and not inputs:
            raise DataError(f"{source}: give doc_to_text (causal models), doc_to_inputs (classifiers), or both")
        return cls(**values)

    def max_length_for(self, kind: str) -> int:
        """Tokens that a row may have, for a ``causal`` model or a ``classifier``."""
        if isinstance(self.max_length, dict):
            return int(self.max_length.get(kind, _DEFAULT_MAX_LENGTH))
        return int(self.max_length)


def builtin_tasks() -> list[str]:
    """Names of the built-in tasks."""
    folder = resources.files("lapora.tasks") / "builtin"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def builtin_yaml(name: str) -> str:
    """Text of a built-in task's file."""
    return (resources.files("lapora.tasks") / "builtin" / f"{name}.yaml").read_text(encoding="utf-8")


def load_task(name_or_path: str) -> Task:
    """Load a built-in task by name, or any task by the path of its YAML file.

    Raises:
        DataError: No such task, or a file that is not one.
    """
    if name_or_path in builtin_tasks():
        return Task.from_dict(yaml.safe_load(builtin_yaml(name_or_path)), name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        raise DataError(f"{name_or_path}: neither a built-in task ({', '.join(builtin_tasks())}) nor a task file")
    if path.stat().st_size > _LARGEST_FILE:
        raise DataError(f"{path}: larger than a task file can be ({_LARGEST_FILE} bytes)")
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise DataError(f"{path}: YAML aliases are not allowed in a task file")
        return Task.from_dict(yaml.safe_load(text), str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
