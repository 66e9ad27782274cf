"""The built-in tasks: prompts written out by hand, labels, and how many rows are kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lapora.errors import DataError
from lapora.tasks import Task, builtin_tasks, builtin_yaml, load_rows, load_task, render, render_all

PAPER = [
    "winogrande-s",
    "winogrande-m",
    "arc-c",
    "arc-e",
    "obqa",
    "boolq",
    "rte",
    "mrpc",
    "wnli",
    "cola",
    "wic",
]

PROMPTS = {
    "arc-c": (
        "Select one of the choices that answers the following question: George wants to warm his hands "
        "quickly by rubbing them. Which skin surface will produce the most heat? Choices: A. dry palms. "
        "B. wet palms. C. palms covered with oil. D. palms covered with lotion. Answer:",
        "A",
    ),
    "arc-e": (
        "Select one of the choices that answers the following question: Which factor will most likely "
        "cause a person to develop a fever? Choices: A. a leg muscle relaxing after exercise. B. a "
        "bacterial population in the bloodstream. C. several viral particles on the skin. D. "
        "carbohydrates being digested in the stomach. Answer:",
        "B",
    ),
    "obqa": (
        "Select one of the choices that answers the following question: The sun is responsible for "
        "Choices: A. puppies learning new tricks. B. children growing up and getting old. C. flowers "
        "wilting in a vase. D. plants sprouting, blooming and wilting. Answer:",
        "D",
    ),
    "winogrande-s": (
        "Select one of the choices that answers the following question: Ian volunteered to eat Dennis's "
        "menudo after already having a bowl because _ despised eating intestine. Choices: A. Ian. B. "
        "Dennis. Answer:",
        "B",
    ),
}
# (file, rows in it, rows kept)
COUNTS = [
    ("arc-c", "train", 1119, 1117),
    ("arc-e", "train", 2251, 2241),
    ("obqa", "train", 3000, 3000),
    ("boolq", "train", 2301, 2301),
    ("boolq", "validation", 969, 969),
    ("winogrande-s", "train", 640, 640),
    ("winogrande-s", "validation", 1267, 1267),
]


@pytest.mark.parametrize("name", PROMPTS)
def test_first_row_reads_as_in_the_paper(shared_data: Path, name: str) -> None:
    task = load_task(name)
    rows = load_rows(task, "train", data_dir=shared_data / name, limit=1)
    example = render_all(task, rows, kind="causal")[0]
    prompt, answer = PROMPTS[name]
    assert example.text == prompt
    assert example.target is not None and example.choices[example.target] == answer


def test_boolq_reads_as_in_the_paper(shared_data: Path) -> None:
    task = load_task("boolq")
    rows = load_rows(task, "validation", data_dir=shared_data / "boolq", limit=1)
    prompt = (
        "Answer the question with only True or False: can the president pardon someone convicted of a "
        "state crime Context: The pardon power of the President extends only to an offense recognizable "
        "under federal law. However, the governors of most of the 50 states have the power to grant "
        "pardons or reprieves for offenses under state criminal law. In other states, that power is "
        "committed to an appointed agency or board, or to a board and the governor in some hybrid "
        "arrangement (in some states the agency is merged with that of the parole board, as in the "
        "Oklahoma Pardon and Parole Board).."
    )
    example = render_all(task, rows, kind="causal")[0]
    assert example.text == prompt
    assert example.choices == ("False", "True") and example.target == 0
    inputs = render_all(task, rows, kind="classifier")[0].inputs
    assert inputs == (rows[0].values["question"], rows[0].values["passage"])


@pytest.mark.parametrize(("name", "split", "lines", "kept"), COUNTS)
def test_rows_kept(shared_data: Path, name: str, split: str, lines: int, kept: int) -> None:
    path = shared_data / name / f"{split}.jsonl"
    assert sum(1 for _ in path.open(encoding="utf-8")) == lines
    rows = load_rows(load_task(name), split, data_dir=path.parent)
    assert len(rows) == kept
    assert len({row.index for row in rows}) == kept and rows[-1].index <= lines - 1


@pytest.mark.parametrize("name", ["arc-c", "arc-e", "obqa", "boolq", "winogrande-s"])
def test_every_shared_row_renders_with_its_own_label(shared_data: Path, name: str) -> None:
    task = load_task(name)
    for split in ("train", "validation"):
        for example in render_all(task, load_rows(task, split, data_dir=shared_data / name), kind="causal"):
            answer = example.row.get("answerKey", example.row.get("answer"))
            expected = {True: "True", False: "False", "1": "A", "2": "B"}.get(answer, answer)
            assert example.target is not None and example.choices[example.target] == expected


def arc_row(labels: list[str], answer: str) -> dict[str, Any]:
    return {
        "id": "q",
        "question": "Which?",
        "choices": {"text": ["one", "two", "three", "four"][: len(labels)], "label": labels},
        "answerKey": answer,
    }


@pytest.mark.parametrize("name", ["arc-c", "arc-e"])
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("labels", [list("ABCD"), list("1234")])
def test_labels_one_to_four_are_a_to_d(name: str, position: int, labels: list[str]) -> None:
    task = load_task(name)
    example = render(task, arc_row(labels, labels[position]), kind="causal", require_target=True)
    assert example.choices == ("A", "B", "C", "D") and example.target == position
    # A letter list with a digit answer, as in files that normalised one and not the other.
    mixed = render(task, arc_row(list("ABCD"), "1234"[position]), kind="causal", require_target=True)
    assert mixed.target == position


def test_unknown_arc_label_is_named() -> None:
    with pytest.raises(DataError, match=r"row 7: .*'E' is not in list"):
        render(load_task("arc-c"), arc_row(list("ABCD"), "E"), kind="causal", index=7)


def test_three_choices_are_refused_by_render_too() -> None:
    with pytest.raises(DataError, match="row 4: excluded by keep_if"):
        render(load_task("arc-c"), arc_row(list("ABC"), "A"), kind="causal", index=4)


GLUE_ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "rte": (
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1},
        ("It rains.", "It is wet."),
        "not_entailment",
    ),
    "mrpc": (
        {"sentence1": "He ran.", "sentence2": "He was running.", "label": 1},
        ("He ran.", "He was running."),
        "equivalent",
    ),
    "wnli": (
        {"sentence1": "It fell.", "sentence2": "The cup fell.", "label": 1},
        ("It fell.", "The cup fell."),
        "entailment",
    ),
    "cola": ({"sentence": "Him ran.", "label": 0}, ("Him ran.",), "unacceptable"),
    "sst2": ({"sentence": "a fine film", "label": 1}, ("a fine film",), "positive"),
    "qnli": ({"question": "Who?", "sentence": "She did.", "label": 0}, ("Who?", "She did."), "entailment"),
    "wic": (
        {
            "word": "place",
            "sentence1": "Do you want to come over to my place?",
            "sentence2": "A place of work.",
            "label": 0,
        },
        ("place: Do you want to come over to my place?", "A place of work."),
        "False",
    ),
    "trec": (
        {"text": "How far is it?", "label_coarse": 3, "label_coarse_original": "NUM"},
        ("How far is it?",),
        "NUM",
    ),
    "ag_news": ({"text": "Stocks fell.", "label": 2}, ("Stocks fell.",), "Business"),
}


@pytest.mark.parametrize("name", GLUE_ROWS)
def test_classifier_inputs(name: str) -> None:
    row, inputs, answer = GLUE_ROWS[name]
    example = render(load_task(name), row, kind="classifier", require_target=True)
    assert example.inputs == inputs and example.text is None
    assert example.target is not None and example.choices[example.target] == answer


def test_trec_reads_the_original_field_too() -> None:
    row = {"text": "Who?", "coarse_label": 3, "fine_label": 1}
    example = render(load_task("trec"), row, kind="classifier", require_target=True)
    assert example.choices[example.target or 0] == "HUM"


@pytest.mark.parametrize("name", builtin_tasks())
def test_builtin_files_are_valid_and_survive_a_manifest(name: str) -> None:
    task = load_task(name)
    assert task.task == name and task.hub_source is not None
    assert Task.from_dict(task.to_dict()) == task
    assert builtin_yaml(name).startswith("#")
    assert task.max_length_for("causal") in (128, 256, 300, 512, 1024)


def test_the_papers_twelve_are_there() -> None:
    assert set(PAPER) <= set(builtin_tasks())
    assert load_task("boolq").kinds == ("causal", "classifier")  # eleven files, twelve tasks
    assert load_task("cola").metric == "mcc"
    assert {load_task(name).metric for name in PAPER if name != "cola"} == {"acc"}


@pytest.mark.parametrize("name", ["source2", "source5"])
def test_a_task_of_ones_own(shared_data: Path, name: str) -> None:
    task = load_task(str(Path(__file__).parent / f"{name}.yaml"))
    rows = load_rows(task, "validation", data_dir=shared_data / name)
    examples = render_all(task, rows, kind="classifier")
    counts = Counter(example.target for example in examples)
    assert len(examples) == 500 and len(set(counts.values())) == 1
    assert task.max_length_for("classifier") == 48 and not any(example.ready for example in examples)
