"""Tasks: turn a row of data into a prompt, its answer choices and its label."""

from lapora.tasks.check import check_task, describe_task
from lapora.tasks.examples import (
    Example,
    data_fingerprint,
    render,
    render_all,
    required_fields,
    resolve_choices,
)
from lapora.tasks.given import given_rows, is_one_row
from lapora.tasks.rows import Row, SplitSource, load_rows, parse_json_line, split_source
from lapora.tasks.task import AnswerScore, Task, TaskKind, builtin_tasks, builtin_yaml, load_task
from lapora.tasks.tokens import AnswerEncoding, EncodedExample, answer_token_ids, encode, encode_all, resolve_answers

__all__ = [
    "AnswerEncoding",
    "AnswerScore",
    "EncodedExample",
    "Example",
    "Row",
    "SplitSource",
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
    "given_rows",
    "is_one_row",
    "load_rows",
    "load_task",
    "parse_json_line",
    "render",
    "render_all",
    "required_fields",
    "resolve_answers",
    "resolve_choices",
    "split_source",
]
