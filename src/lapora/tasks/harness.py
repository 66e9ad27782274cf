"""Keys of lm-evaluation-harness beyond those of a task: ignored by name, or refused with what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lapora.errors import DataError, quoted

EVALUATION_ONLY = (
    "doc_to_decontamination_query",
    "fewshot_config",
    "fewshot_delimiter",
    "fewshot_split",
    "filter_list",
    "generation_kwargs",
    "group",
    "group_alias",
    "process_results",
    "repeats",
    "should_decontaminate",
    "task_alias",
    "unsafe_code",
)
"""Keys that change neither a prompt, nor an answer, nor a label of a task without examples in its prompts."""

_INSTEAD = {
    "custom_dataset": "write the rows to a file and give --data-dir",
    "doc_to_choice": "write a Jinja template that returns the list of answers",
    "doc_to_target": "write a Jinja template that returns the answer's index or text",
    "doc_to_text": "write the prompt as a Jinja template",
    "process_docs": "write its result to a file as columns of the data, give --data-dir, and remove process_docs",
}


class PythonFunction(str):
    """Name of a function after the tag ``!function``; it is never imported."""


def without_evaluation_keys(values: Mapping[str, Any], source: str, builtin: bool = False) -> dict[str, Any]:
    """Return the values of a task file without keys that only the harness's evaluation needs.

    Args:
        values: Values by key.
        source: Name of the file in error messages.
        builtin: Whether there is a built-in task of this name.

    Raises:
        DataError: A key needs a Python function, or examples in the prompts.
    """
    kept = {key: value for key, value in values.items() if key not in EVALUATION_ONLY}
    shots = kept.pop("num_fewshot", None)
    if shots not in (None, 0):
        raise DataError(
            f"{source}: num_fewshot: {quoted(shots)} examples in each prompt are not supported; set it to 0, or write "
            "the examples into description"
        )
    for key, value in kept.items():
        if isinstance(value, PythonFunction):
            instead = _INSTEAD.get(key, "write a value")
            ready = f", or use the built-in task {values.get('task')}" if builtin else ""
            raise DataError(
                f"{source}: {key}: needs the Python function {value}, and no Python of task files is run; "
                f"{instead}{ready}"
            )
    return kept
