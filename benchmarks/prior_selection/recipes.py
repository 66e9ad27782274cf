"""Rows and settings of each benchmark adapter, deterministic.

The rows come from public data sets kept outside this project (``--shared``) and are not copied. A task of
the kind ``sources`` asks which data set a question comes from; its texts are lower-cased and lose their final
punctuation, so style alone does not determine the answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Half = Literal["choose", "test"]
HELD_OUT_ROWS = 800
HELD_OUT_ROWS_OF_MANY = 500
"""For four classes and more, where each row costs more."""
HELD_OUT_PASSAGES = 300


@dataclass(frozen=True)
class Row:
    """One input text, or pair of texts, and its class."""

    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Recipe:
    """How one adapter was trained.

    Attributes:
        name: Folder of the adapter.
        task: ``sources``, ``boolq-question``, ``boolq-passage`` or ``file``.
        classes: For ``sources`` the data sets told apart, in the order of their labels; else the answers' names.
        rows: Training rows; the first of each class in the training file, interleaved.
        half: Whether criteria were chosen on this adapter or only tested on it; fixed before any was tried.
        rank: LoRA rank.
        learning_rate: AdamW's, falling linearly to zero.
        steps: Of ``batch`` rows.
        batch: Rows per step.
        seed: Of the initialisation, of the order of the rows and of the flipped labels.
        label_noise: Share of training labels replaced by the next class.
        max_length: Tokens after which a text is cut.
        shared: The adapter is one of the three that come with the data, not trained here.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    rows: int
    half: Half
    rank: int = 8
    learning_rate: float = 1e-3
    steps: int = 300
    seed: int = 0
    label_noise: float = 0.0
    max_length: int = 48
    shared: bool = False
    batch: int = 32

    def describe(self) -> dict[str, Any]:
        """Plain values, for the list of recipes; the seed of an adapter not trained here is not known."""
        return {key: value for key, value in asdict(self).items() if not (self.shared and key == "seed")}


_FIELDS = {
    "boolq": "question",
    "arc-c": "question",
    "arc-e": "question",
    "obqa": "question_stem",
    "winogrande-s": "sentence",
}
_FIVE = ("boolq", "arc-c", "arc-e", "obqa", "winogrande-s")
_FOUR = ("boolq", "arc-c", "obqa", "winogrande-s")
_FOUR_TOO = ("arc-c", "arc-e", "obqa", "winogrande-s")
_TWO = ("arc-e", "obqa")
_YES_NO = ("no", "yes")

RECIPES: tuple[Recipe, ...] = (
    Recipe("minilm-source2", "file", ("arc-e", "obqa"), 300, "choose", steps=350, shared=True),
    Recipe("minilm-boolq", "boolq-passage", _YES_NO, 1000, "choose", steps=500, max_length=128, shared=True),
    Recipe("minilm-source5", "file", _FIVE, 1000, "test", steps=400, shared=True),
    Recipe("sources5-under", "sources", _FIVE, 1000, "choose", 8, 1e-3, 120, seed=12),
    Recipe("sources2-arcs-over", "sources", ("arc-c", "arc-e"), 400, "choose", 8, 1e-3, 450, seed=1, batch=16),
    Recipe("sources3-fair", "sources", ("arc-c", "arc-e", "obqa"), 900, "test", 8, 1e-3, 160, seed=7, batch=16),
    Recipe("sources3-over", "sources", ("arc-c", "arc-e", "obqa"), 450, "choose", 8, 1e-3, 300, seed=6),
    Recipe("sources4-over", "sources", _FOUR, 600, "test", 8, 1e-3, 360, seed=9, batch=16),
    Recipe("sources4-fair", "sources", _FOUR_TOO, 1000, "choose", 4, 1e-3, 220, seed=10),
    Recipe("boolq-question-over", "boolq-question", _YES_NO, 1000, "test", 8, 1e-3, 300, seed=4, batch=16),
    Recipe("sources2-fair", "sources", _TWO, 600, "choose", 4, 1e-3, 120, seed=3, batch=16),
    Recipe("boolq-question-under", "boolq-question", _YES_NO, 600, "choose", 4, 1e-3, 60, seed=5, batch=16),
    Recipe("sources2-arcs-under", "sources", ("arc-c", "arc-e"), 400, "test", 8, 1e-3, 80, seed=2, batch=16),
    Recipe("sources5-few", "sources", _FIVE, 200, "choose", 4, 2e-3, 250, seed=13, batch=16),
    Recipe("sources2-noise", "sources", _TWO, 400, "test", 8, 1e-3, 200, seed=14, label_noise=0.15, batch=16),
)  # fmt: skip

FURTHER: tuple[Recipe, ...] = (
    Recipe("boolq-question-heart", "boolq-question", _YES_NO, 1000, "choose", 8, 1e-3, 500, seed=21),
    Recipe("sources2-heart", "sources", _TWO, 200, "test", 8, 2e-3, 300, seed=24, batch=16),
    Recipe("sources2-easy", "sources", ("boolq", "winogrande-s"), 300, "choose", 8, 1e-3, 300, seed=31, batch=16),
    Recipe("sources3-easy", "sources", ("boolq", "winogrande-s", "arc-e"), 450, "choose", steps=300, seed=33, batch=16),
    Recipe("boolq-obqa-easy", "sources", ("boolq", "obqa"), 300, "test", 8, 1e-3, 300, seed=32, batch=16),
)
"""Adapters for the averaged prior: they have learnt their rows by heart, without skill or on easy tasks. Their halves
were set before any was scored."""

DECODERS: dict[str, Half] = {"smollm2-source2": "choose", "smollm2-source5-over": "test", "smollm2-source5": "test"}
"""Shared adapters of SmolLM2-135M, and their halves."""


def recipe(name: str) -> Recipe:
    """The recipe of one adapter."""
    return next(one for one in (*RECIPES, *FURTHER) if one.name == name)


def training_rows(one: Recipe, data: Path) -> list[Row]:
    """The rows an adapter was trained on, flipped labels included.

    Args:
        one: The adapter.
        data: Folder of the data sets.
    """
    rows = _rows(one, data, "train", one.rows)
    chance = random.Random(one.seed)
    noisy = []
    for row in rows:
        flipped = chance.random() < one.label_noise
        noisy.append(Row(row.texts, (row.label + 1) % len(one.classes)) if flipped else row)
    return noisy


def held_out_rows(one: Recipe, data: Path) -> list[Row]:
    """Up to 800 rows of the validation files (500 where they cost more); :func:`halves` says which tune."""
    many = len(one.classes) >= 4
    if one.task == "boolq-passage":
        return _rows(one, data, "validation", HELD_OUT_PASSAGES)
    return _rows(one, data, "validation", HELD_OUT_ROWS_OF_MANY if many else HELD_OUT_ROWS)


def halves(rows: int, classes: int) -> tuple[list[int], list[int]]:
    """Positions for tuning and for scoring: rows are interleaved by class, so whole rounds alternate."""
    rounds = [position // classes for position in range(rows)]
    return [i for i in range(rows) if rounds[i] % 2 == 0], [i for i in range(rows) if rounds[i] % 2 == 1]


def _rows(one: Recipe, data: Path, split: str, count: int) -> list[Row]:
    if one.task == "sources":
        each = count // len(one.classes)
        columns = [
            [Row((_plain(line[_FIELDS[source]]),), label) for line in _read(data / source / f"{split}.jsonl")[:each]]
            for label, source in enumerate(one.classes)
        ]
        return [row for together in zip(*columns, strict=False) for row in together]
    if one.task == "file":
        lines = _read(data / one.name.removeprefix("minilm-") / f"{split}.jsonl")[:count]
        return [Row((line["text"],), line["label"]) for line in lines]
    lines = _read(data / "boolq" / f"{split}.jsonl")[:count]
    if one.task == "boolq-passage":
        return [Row((line["question"], line["passage"]), _boolq_label(line)) for line in lines]
    return [Row((line["question"],), _boolq_label(line)) for line in lines]


def _boolq_label(line: dict[str, Any]) -> int:
    return int(bool(line["answer"] if "answer" in line else line["label"]))


def _plain(text: str) -> str:
    return text.strip().rstrip(".?!").strip().lower()


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def texts_of(rows: Sequence[Row]) -> list[list[str]]:
    """Texts as a tokenizer takes them: one list per segment."""
    return [list(segment) for segment in zip(*(row.texts for row in rows), strict=True)]
