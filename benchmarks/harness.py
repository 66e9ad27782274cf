"""Log-likelihoods of whole answers beside lm-evaluation-harness: the same numbers, and the time of both.

    python -m benchmarks.harness --base BASE --adapter ADAPTER --data DATA [--rows 100] [--dtype float64]
        [--softmax-dtype float64] [--json]

Needs ``lm_eval`` (PyPI) in the environment. Rows of ARC-Easy in cloze form are read from ``DATA/arc-e``; a few rows in
the formats of HellaSwag, WinoGrande, COPA, PIQA and CommitmentBank are in this file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapora.config import Dtype, ModelSettings
from lapora.models.adapter import read_adapter
from lapora.models.batching import run_batches
from lapora.models.loading import LoadedModel, load_model
from lapora.tasks import Example, Task, load_task, render
from lapora.tasks.rows import read_file
from lapora.workflows.task_model import TaskModel

ARC = {
    "task": "arc_easy",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices.text}}",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
}
PIQA = {
    "task": "piqa",
    "doc_to_text": "Question: {{goal}}\nAnswer:",
    "doc_to_choice": "{{[sol1, sol2]}}",
    "doc_to_target": "label",
}
CB = {
    "task": "cb",
    "doc_to_text": "{{premise}}\nQuestion: {{hypothesis}}. True, False, or Neither?\nAnswer:",
    "doc_to_choice": ["True", "False", "Neither"],
    "doc_to_target": "label",
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {
            "goal": "To keep a cut apple from turning brown",
            "sol1": "Rub lemon juice on the cut side.",
            "sol2": "Rub engine oil on the cut side.",
            "label": 0,
        },
        {
            "goal": "How do you dry wet boots?",
            "sol1": "Put them in the freezer over night.",
            "sol2": "Stuff them with newspaper and wait.",
            "label": 1,
        },
        {"goal": "Open a jar that sticks", "sol1": "hold the lid under hot water", "sol2": "ask the lid", "label": 0},
    ],
    "cb": [
        {"premise": "Anna said that she might come.", "hypothesis": "Anna came", "label": 2},
        {"premise": "Boris knows that the shop is closed.", "hypothesis": "the shop is closed", "label": 0},
        {"premise": "It is not true that the bus was late.", "hypothesis": "the bus was late", "label": 1},
    ],
    "copa": [
        {
            "premise": "The ground was wet.",
            "question": "cause",
            "choice1": "It had rained.",
            "choice2": "The sun shone.",
            "label": 0,
        },
        {
            "premise": "I dropped the glass. ",
            "question": "effect",
            "choice1": "It floated away.",
            "choice2": "It broke.",
            "label": 1,
        },
    ],
    "hellaswag": [
        {
            "activity_label": "Baking bread",
            "ctx_a": "A man kneads dough on a table.",
            "ctx_b": "he",
            "endings": [
                "puts it into the oven.",
                "paints [substeps] the fence.",
                "swims away.",
                "calls a taxi to Rome.",
            ],
            "label": "0",
        },
        {
            "activity_label": "Cleaning windows",
            "ctx_a": "[header] How to clean a window [title] Fill a bucket with water.",
            "ctx_b": "",
            "endings": ["Eat the bucket.", "Add soap and a sponge.", "Sing to it.", "Drive home."],
            "label": "1",
        },
    ],
    "winogrande": [
        {
            "sentence": "The cup did not fit into the box because _ was too large.",
            "option1": "the cup",
            "option2": "the box",
            "answer": "1",
        },
        {
            "sentence": "Anna called Maria, but _ was not at home.",
            "option1": "Anna",
            "option2": "Maria",
            "answer": "2",
        },
    ],
}


@dataclass(frozen=True)
class Compared:
    """Scores of one task's rows by both.

    Attributes:
        task: Name of the task.
        rows: Number of rows.
        answers: Number of answers of all rows.
        difference: Largest absolute difference of a log-likelihood, in nats.
        rounding: Largest absolute difference from lapora's log-likelihoods in float64: lapora's and the harness's.
        largest: Largest absolute log-likelihood in float64.
        accuracy: Share of rows whose best answer is right: lapora's and the harness's.
        accuracy_per_byte: The same by log-likelihood per byte.
        seconds: Time of scoring, without loading: lapora's, lapora's in separate sequences, and the harness's.
    """

    task: str
    rows: int
    answers: int
    difference: float
    rounding: tuple[float, float]
    largest: float
    accuracy: tuple[float, float]
    accuracy_per_byte: tuple[float, float]
    seconds: tuple[float, float, float]


def tasks_and_rows(data: Path, limit: int) -> list[tuple[Task, list[dict[str, Any]]]]:
    """Return the tasks with their rows."""
    arc = [row for _, row in zip(range(limit), read_file(data / "arc-e" / "validation.jsonl"), strict=False)]
    own = {"piqa": Task.from_dict(PIQA), "cb": Task.from_dict(CB)}
    others = [(own.get(name) or load_task(name), rows) for name, rows in ROWS.items()]
    return [(Task.from_dict(ARC), arc), *others]


def examples_of(task: Task, rows: Sequence[dict[str, Any]]) -> list[Example]:
    """Render rows for a causal model."""
    return [render(task, row, kind="causal", index=index, labels="required") for index, row in enumerate(rows)]


def lapora_scores(
    model: TaskModel, examples: Sequence[Example], *, packed: bool = True
) -> tuple[list[list[float]], float]:
    """Return the log-likelihood of every answer, and the seconds that it took."""
    model.outputs.packs_answers = None if packed else False  # None: as the check finds
    begun = time.perf_counter()
    found: dict[int, list[float]] = {}
    with torch.no_grad():
        for batch, scores in run_batches(model.batches(model.encode(examples)), model.outputs.logits):
            found |= zip(batch.rows, scores.tolist(), strict=True)
    return [found[row] for row in range(len(examples))], time.perf_counter() - begun


def harness_scores(model: Any, examples: Sequence[Example]) -> tuple[list[list[float]], float]:
    """Return the log-likelihood of every answer by the harness's model, and the seconds that it took."""
    from lm_eval.api.instance import Instance

    begun = time.perf_counter()
    requests = [
        Instance("loglikelihood", {}, arguments=pair, idx=0) for example in examples for pair in pairs_of(example)
    ]
    scores = iter(score for score, _ in model.loglikelihood(requests, disable_tqdm=True))
    return [[next(scores) for _ in example.choices] for example in examples], time.perf_counter() - begun


def pairs_of(example: Example) -> list[tuple[str, str]]:
    """Return context and continuation of each answer, as the harness would build them."""
    prompt, delimiter = example.text or "", example.task.target_delimiter
    if example.continuation is None:
        return [(prompt, delimiter + choice) for choice in example.choices]
    return [(prompt + choice, delimiter + example.continuation) for choice in example.choices]


def accuracy(scores: Sequence[Sequence[float]], examples: Sequence[Example], *, per_byte: bool = False) -> float:
    """Return the share of rows whose answer of the highest score is right."""
    right = 0
    for row, example in zip(scores, examples, strict=True):
        lengths = [len(choice.encode()) if per_byte else 1 for choice in example.choices]
        normed = [score / length for score, length in zip(row, lengths, strict=True)]
        right += normed.index(max(normed)) == example.target
    return right / len(examples)


def compare(
    base: str, adapter: str, data: Path, limit: int, dtype: Dtype = "float32", softmax_dtype: str | None = None
) -> list[Compared]:
    """Score all rows with both.

    Args:
        base: Base model.
        adapter: Folder of the adapter.
        data: Folder with ``arc-e``.
        limit: Number of rows of ARC-Easy.
        dtype: Of the weights.
        softmax_dtype: Of the harness's log-softmax; None is that of the logits.
    """
    from lm_eval.models.huggingface import HFLM

    def build(task: Task, dtype: Dtype) -> TaskModel:
        settings = ModelSettings(adapter, base_model=base, device="cpu", dtype=dtype)
        if dtype not in loaded:
            loaded[dtype] = load_model(read_adapter(Path(adapter)), settings)
        return TaskModel.build(
            loaded[dtype], task, (), None, answer_score="sum", max_length=512, chat_template=False, how=settings
        )

    loaded: dict[Dtype, LoadedModel] = {}
    harness = HFLM(pretrained=base, peft=adapter, device="cpu", dtype=dtype, softmax_dtype=softmax_dtype, batch_size=8)
    found = []
    for task, rows in tasks_and_rows(data, limit):
        examples = examples_of(task, rows)
        model = build(task, dtype)
        ours, seconds = lapora_scores(model, examples)
        _, separate_seconds = lapora_scores(model, examples, packed=False)
        theirs, their_seconds = harness_scores(harness, examples)
        exact, _ = (ours, 0.0) if dtype == "float64" else lapora_scores(build(task, "float64"), examples)
        one, other, reference = (
            torch.tensor([*chain.from_iterable(scores)], dtype=torch.float64) for scores in (ours, theirs, exact)
        )
        found.append(
            Compared(
                task.task,
                len(examples),
                len(one),
                _largest(one - other),
                (_largest(one - reference), _largest(other - reference)),
                _largest(reference),
                (accuracy(ours, examples), accuracy(theirs, examples)),
                (accuracy(ours, examples, per_byte=True), accuracy(theirs, examples, per_byte=True)),
                (seconds, separate_seconds, their_seconds),
            )
        )
    return found


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def main() -> None:
    """Print one line per task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--softmax-dtype", choices=["float32", "float64"], help="of the harness's log-softmax")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = compare(options.base, options.adapter, options.data, options.rows, options.dtype, options.softmax_dtype)
    if options.json:
        print(json.dumps([vars(each) for each in found], indent=2))
        return
    print(
        "task        rows  answers  largest |log p|  difference  from float64: both"
        "  accuracy (per byte): both  seconds: packed, separate, harness"
    )
    for each in found:
        (a, b), (c, d) = each.accuracy, each.accuracy_per_byte
        seconds = " ".join(f"{value:.1f}" for value in each.seconds)
        print(
            f"{each.task:<11} {each.rows:>4} {each.answers:>8} {each.largest:>16.1f} {each.difference:>11.1e}"
            f"  {each.rounding[0]:.1e}, {each.rounding[1]:.1e}"
            f"  {a:.3f} ({c:.3f}), {b:.3f} ({d:.3f})  {seconds}"
        )


if __name__ == "__main__":
    main()
