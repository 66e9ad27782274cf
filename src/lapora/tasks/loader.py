"""From a name or a YAML file to a task."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lapora.errors import DataError, first_line
from lapora.tasks.quoting import quoted
from lapora.tasks.task import FILE_LOADERS, Task

MAX_YAML_BYTES = 65_536
"""Size of a task file."""
_MAX_DEPTH = 20


def builtin_tasks() -> list[str]:
    """Names of the built-in tasks, sorted."""
    folder = resources.files("lapora.tasks") / "builtin"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def builtin_yaml(name: str) -> str:
    """The text of a built-in task's file, comments and all, to start one's own from.

    Raises:
        DataError: There is no such task.
    """
    names = builtin_tasks()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the built-in tasks are {', '.join(names)}"
        raise DataError(f"no task {quoted(name)}: {hint} (a task of your own: the path of its YAML file)")
    return (resources.files("lapora.tasks") / "builtin" / f"{name}.yaml").read_text(encoding="utf-8")


def load_task(name_or_path: str) -> Task:
    """A built-in task by name, or the task of a YAML file.

    Relative ``data_files`` are resolved against the file's folder.

    Raises:
        DataError: There is no such task or file, or the file is not a task.
    """
    if name_or_path in builtin_tasks():
        return task_from_yaml(builtin_yaml(name_or_path), source=f"built-in task {name_or_path}")
    path = Path(name_or_path)
    looks_like_a_path = path.suffix.lower() in (".yaml", ".yml") or len(path.parts) > 1
    if not looks_like_a_path and not path.is_file():
        builtin_yaml(name_or_path)  # raises, naming what there is
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_YAML_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "cannot be read"
        raise DataError(
            f"task file {quoted(name_or_path, 200)}: {reason}; give a built-in "
            "name (`lapora tasks` lists them) or the path of a YAML file"
        ) from None
    if len(content) > MAX_YAML_BYTES:
        raise DataError(f"task file {quoted(name_or_path, 200)}: more than {MAX_YAML_BYTES} bytes is no task")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"task file {quoted(name_or_path, 200)}: not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from None
    return task_from_yaml(text, source=f"task file {quoted(name_or_path, 200)}", folder=path.resolve().parent)


def task_from_yaml(text: str, *, source: str, folder: Path | None = None) -> Task:
    """Parse and validate a task's YAML.

    Args:
        text: The YAML.
        source: The file, as an error message names it.
        folder: Where relative ``data_files`` are.

    Raises:
        DataError: It is not YAML, uses aliases or tags, or is not a task.
    """
    try:
        _check_events(text, source)
        values = yaml.load(text, Loader=_TaskLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise DataError(f"{source}{where}: {error.problem or 'not YAML'}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{source}: not YAML: {first_line(error)}") from None
    if values is None:
        raise DataError(f"{source}: it is empty; `lapora tasks boolq` prints a task to start from")
    if folder is not None and isinstance(values, Mapping):
        values = _with_absolute_files(dict(values), folder)
    return Task.from_dict(values, source=source)


class _TaskLoader(yaml.SafeLoader):
    """PyYAML's safe loader, refusing keys that stand twice (the first would be lost) and any tag."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            problem = None
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be a word"
            elif key_node.value in seen:
                problem = f"the key {quoted(key_node.value)} stands there twice"
            if problem is not None:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _check_events(text: str, source: str) -> None:
    """Refuse aliases (a bomb is made of them), tags and deep nesting before anything is built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise DataError(f"{source}, line {line}: anchors and aliases are not taken; write the value out")
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!":
            name = str(tag).replace("tag:yaml.org,2002:", "!!")
            called = text.splitlines()[line - 1].strip() if line <= len(text.splitlines()) else name
            raise DataError(
                f"{source}, line {line}: the tag {quoted(name)} is not taken ({quoted(called)}): lapora runs "
                "no Python of a task file; write it as a template"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise DataError(f"{source}, line {line}: nested more than {_MAX_DEPTH} deep")


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
