"""Tasks: how a row of data becomes a prompt, the answers to choose from, and the right one."""

from lapora.tasks.examples import (
    Example,
    data_fingerprint,
    render,
    render_all,
    required_fields,
    resolve_choices,
)
from lapora.tasks.files import parse_json_line
from lapora.tasks.loader import builtin_tasks, builtin_yaml, load_task
from lapora.tasks.rows import Row, load_rows
from lapora.tasks.task import Task, TaskKind

__all__ = [
    "Example",
    "Row",
    "Task",
    "TaskKind",
    "builtin_tasks",
    "builtin_yaml",
    "data_fingerprint",
    "load_rows",
    "load_task",
    "parse_json_line",
    "render",
    "render_all",
    "required_fields",
    "resolve_choices",
]
