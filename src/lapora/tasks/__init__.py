"""Tasks: how a row of data becomes a prompt, the answers to choose from, and the right one."""

from lapora.tasks.answers import answer_token_ids
from lapora.tasks.encoding import EncodedExample, encode_all
from lapora.tasks.examples import Example, data_fingerprint, render, render_all, resolve_choices
from lapora.tasks.rows import load_rows
from lapora.tasks.task import Task, builtin_tasks, builtin_yaml, load_task

__all__ = [
    "EncodedExample",
    "Example",
    "Task",
    "answer_token_ids",
    "builtin_tasks",
    "builtin_yaml",
    "data_fingerprint",
    "encode_all",
    "load_rows",
    "load_task",
    "render",
    "render_all",
    "resolve_choices",
]
