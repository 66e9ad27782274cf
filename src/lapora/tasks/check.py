"""Description of a task and its first rendered rows, for `lapora tasks`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lapora.tasks.examples import render_all, resolve_choices
from lapora.tasks.rows import Row
from lapora.tasks.task import Task, TaskKind
from lapora.tasks.tokens import AnswerEncoding, PromptEncoder, encode_all, resolve_answers


def describe_task(task: Task) -> dict[str, Any]:
    """Return a summary of a task as plain JSON values.

    Args:
        task: The task.

    Returns:
        ``task``, ``kinds``, ``choices`` (a list, or the template that returns them), ``metric``, ``hub``
        (``path/configuration``, or None) and ``splits`` (lapora's split names to the dataset's).
    """
    splits = {"train": task.training_split, "validation": task.validation_split, "test": task.test_split}
    choices = task.doc_to_choice
    return {
        "task": task.task,
        "kinds": list(task.kinds),
        "choices": choices if isinstance(choices, str) else list(choices),
        "metric": task.metric,
        "hub": task.hub_source,
        "splits": {split: source for split, source in splits.items() if source is not None},
    }


def check_task(
    task: Task,
    rows: Sequence[Row],
    *,
    kind: TaskKind,
    tokenizer: Any = None,
    n: int = 3,
    max_length: int | None = None,
    chat_template: bool = False,
) -> dict[str, Any]:
    """Render and encode rows, and return statistics and the first examples.

    Args:
        task: The task.
        rows: The rows to check, at least one.
        kind: Kind of model.
        tokenizer: The model's tokenizer; None leaves out the fields about tokens.
        n: Number of rendered rows to return.
        max_length: Maximum number of tokens per row; None is the task's.
        chat_template: Wrap prompts in the tokenizer's chat template.

    Returns:
        ``task``, ``kind``, ``likelihood``, ``rows`` (number of rows), ``labels`` (count of each answer, or of each
        index where rows have answers of their own), ``unlabelled``, ``max_length``, ``examples`` (index, text or
        inputs, answers of its own, target), and with a tokenizer ``truncated`` (number of rows), ``longest`` (tokens,
        after truncation) and, for a causal model, ``answer_tokens``. Where whole answers are scored: ``whole_answers``
        (why), ``answer_score``, ``answer_tokens`` of the first row, and ``merged`` (number of answers that change the
        prompt's last token, and are cut at the prompt's length).

    Raises:
        DataError: A row cannot be rendered or encoded, or two answers have the same tokens.
    """
    choices = resolve_choices(task, rows, kind=kind)
    examples = render_all(task, rows, kind=kind, labels="optional", choices=choices)
    length = max_length or task.max_length_for(kind)
    counts = Counter(example.target for example in examples)
    names = choices or [str(index) for index in range(max(len(example.choices) for example in examples))]
    report: dict[str, Any] = {
        "task": task.task,
        "kind": kind,
        "likelihood": task.likelihood,
        "rows": len(examples),
        "labels": _label_counts(counts, names),
        "unlabelled": counts[None],
        "max_length": length,
        "examples": [
            {
                "index": example.index,
                **({"text": example.text} if kind == "causal" else {"inputs": list(example.inputs or ())}),
                **({} if choices else {"answers": list(example.choices)}),
                "target": example.choices[example.target] if isinstance(example.target, int) else example.target,
            }
            for example in examples[:n]
        ],
    }
    if tokenizer is None:
        return report
    if chat_template:
        encoder = PromptEncoder(tokenizer, delimiter=task.target_delimiter, chat_template=True)
        for shown, example in zip(report["examples"], examples, strict=False):
            shown["text"] = encoder.context(example.text or "")[0]
    answers = AnswerEncoding()
    if kind == "causal":
        answers = resolve_answers(tokenizer, task, examples, choices, chat_template=chat_template)
    encoded = encode_all(
        examples,
        tokenizer,
        kind=kind,
        max_length=length,
        chat_template=chat_template,
        answer_score=answers.answer_score,
    )
    report["truncated"] = sum(row.truncated for row in encoded)
    report["longest"] = max(len(row) for row in encoded)
    if answers.token_ids is not None:
        tokens = tokenizer.convert_ids_to_tokens(answers.token_ids)
        report["answer_tokens"] = {
            choice: {"id": token_id, "token": token}
            for choice, token_id, token in zip(choices, answers.token_ids, tokens, strict=True)
        }
    if answers.answer_score is not None:
        report["whole_answers"] = answers.note
        report["answer_score"] = answers.answer_score
        report["merged"] = sum(answer.merged for row in encoded for answer in row.answers)
        report["answer_tokens"] = {
            choice: {"ids": list(ids), "tokens": tokenizer.convert_ids_to_tokens(list(ids))}
            for choice, ids in (
                (choice, answer.ids[len(answer.ids) - answer.scored :])
                for choice, answer in zip(encoded[0].choices, encoded[0].answers, strict=True)
            )
        }
    return report


def _label_counts(counts: Counter[Any], choices: Sequence[str]) -> dict[str, int]:
    """Return the number of rows of each answer, or with each label; nothing for numbers."""
    sets = [target for target in counts if isinstance(target, tuple)]
    if any(value not in (0, 1) for target in sets for value in target):
        return {}
    return {
        choice: counts[index] + sum(counts[target] for target in sets if target[index])
        for index, choice in enumerate(choices)
    }
