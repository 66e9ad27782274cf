"""Tasks: how a row of data becomes a prompt, the answers to choose from, and the right one."""

from lapora.tasks.answers import answer_token_ids
from lapora.tasks.checks import check_task, describe_task
from lapora.tasks.encoding import EncodedExample, encode, encode_all
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
from lapora.tasks.rows import Row, load_rows, split_source
from lapora.tasks.task import Task, TaskKind

__all__ = [
    "EncodedExample",
    "Example",
    "Row",
    "Task",
    "TaskKind",
    "answer_token_ids",
    "builtin_tasks",
    "builtin_yaml",
    "check_task",
    "data_fingerprint",
    "describe_task",
    "encode",
    "encode_all",
    "load_rows",
    "load_task",
    "parse_json_line",
    "render",
    "render_all",
    "required_fields",
    "resolve_choices",
    "split_source",
]
