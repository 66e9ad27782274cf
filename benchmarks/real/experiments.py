"""What is trained and scored: a base model, a task and how long it is trained on how many rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

FIVE = ("boolq", "arc-c", "arc-e", "obqa", "winogrande-s")
_QUESTION = {
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{ choices.text }}",
    "doc_to_target": "{{ choices.label.index(answerKey) }}",
    "truncate_field": "question",
}
CLOZE = {
    "arc-c": _QUESTION,
    "arc-e": _QUESTION,
    "obqa": _QUESTION | {"doc_to_text": "{{question_stem}}", "truncate_field": "question_stem"},
    "winogrande-s": {
        "doc_to_text": "{{ sentence.partition('_')[0] | trim }}",
        "doc_to_choice": "{{ [option1, option2] }}",
        "doc_to_continuation": "{{ sentence.partition('_')[2] | trim }}",
        "doc_to_target": "{{ answer | int - 1 }}",
    },
}
"""Tasks whose answers are texts of several tokens, by data set."""


@dataclass(frozen=True)
class Experiment:
    """One adapter, trained once for each seed.

    Attributes:
        name: Folder of its results.
        base: ``smollm2``, ``gemma3``, ``mpnet`` or ``minilm``.
        task: Built-in task; the data set of a task of :data:`CLOZE`, with ``-cloze`` behind it; or ``source2`` or
            ``source5``: which data set a text comes from.
        steps: Training steps; five checkpoints are kept.
        batch: Rows per step.
        rate: Learning rate, falling linearly to zero.
        max_length: Maximum tokens of a row.
        train: Rows that are trained on, from the start of the training file.
        scored: Rows of the validation file that tune or are scored.
        drawn: Whether the scores along training are measured, which fits a posterior at every checkpoint.
    """

    name: str
    base: str
    task: str
    steps: int
    batch: int
    rate: float
    max_length: int
    train: int
    scored: int
    drawn: bool = False

    @property
    def kind(self) -> Literal["causal", "classifier"]:
        """Kind of the model."""
        return "causal" if self.base in ("smollm2", "gemma3") else "classifier"

    @property
    def data(self) -> str:
        """Folder of its rows."""
        return self.task.removesuffix("-cloze")

    @property
    def targets(self) -> list[str]:
        """Modules with LoRA: queries, values and, of a decoder, the output head, as in the paper."""
        return {"minilm": ["query", "value"], "mpnet": ["q", "v"]}.get(self.base, ["q_proj", "v_proj", "lm_head"])

    def write_task(self, folder: Path) -> str:
        """Return the task's name; a task of this benchmark is written to a file first."""
        if self.task.endswith("-cloze"):
            content: dict[str, Any] = {"task": self.task, **CLOZE[self.data]}
        elif self.task.startswith("source"):
            classes = FIVE if self.task == "source5" else ("arc-e", "obqa")
            content = {
                "task": self.task,
                "doc_to_text": f"Text: {{{{text}}}}\nSource, A to {'ABCDE'[len(classes) - 1]}:",
                "doc_to_inputs": ["{{text}}"],
                "doc_to_choice": list("ABCDE"[: len(classes)]),
                "doc_to_target": "label",
                "truncate_field": "text",
            }
        else:
            return self.task
        file = folder / f"{self.task}.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return str(file)


def _decoders(base: str) -> list[Experiment]:
    sources = Experiment(f"{base}-source5", base, "source5", 60, 8, 2e-3, 64, 100, 120, drawn=True)
    cloze = []
    for data in CLOZE:
        steps, train, scored = (100, 300, 200) if data == "arc-e" else (60, 150, 120)
        cloze.append(Experiment(f"{base}-{data}-cloze", base, f"{data}-cloze", steps, 8, 1e-3, 96, train, scored))
    letters = [
        Experiment(f"{base}-{task}", base, task, 60, 8, 1e-3, 200 if task == "arc-c" else 160, 300, 150)
        for task in FIVE
    ]
    return [sources, *cloze, *letters]


def _encoders(base: str) -> list[Experiment]:
    steps, batch = (400, 32) if base == "minilm" else (60, 16)  # the small model learns five classes slowly
    return [
        Experiment(f"{base}-source2", base, "source2", 150, 32, 1e-3, 48, 300, 300, drawn=True),
        Experiment(f"{base}-source5", base, "source5", steps, batch, 1e-3, 48, 200, 200),
        Experiment(f"{base}-boolq", base, "boolq", 100, 16, 1e-3, 128, 300, 300),
    ]


FULL = (*_encoders("minilm"), *_encoders("mpnet"), *_decoders("smollm2"), *_decoders("gemma3"))
"""About 13 hours on two cores. WinoGrande-M has no rows here; WinoGrande-S stands for both."""

QUICK = (
    Experiment("quick-minilm-source2", "minilm", "source2", 50, 16, 2e-3, 48, 100, 80, drawn=True),
    Experiment("quick-smollm2-source5", "smollm2", "source5", 30, 4, 2e-3, 64, 40, 60),
    Experiment("quick-smollm2-arc-e-cloze", "smollm2", "arc-e-cloze", 20, 4, 1e-3, 64, 40, 50),
)
"""Too few rows to compare methods."""
