"""The task files of lm-evaluation-harness itself: its own prompt, answers and label, one row of each family.

The rows are made up, in the first form that both sides can render; no data set is fetched.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lapora.errors import DataError
from lapora.tasks import Task, load_task, render
from lapora.tasks.templates import compiled_template

pytestmark = pytest.mark.slow
OPTIONS = ["one red thing", "two blue things", "a third", "none of them"]
FORMS: list[Any] = [
    OPTIONS,
    "some words of it",
    {"text": OPTIONS, "label": ["A", "B", "C", "D"]},
    str(OPTIONS),
    {"A": OPTIONS[0], "B": OPTIONS[1], "C": OPTIONS[2], "D": OPTIONS[3]},
]
LABELS: list[Any] = [0, 1, "A", "B", "1", "0", OPTIONS[1], "true", "a", True]


@pytest.fixture(scope="module")
def tree() -> Path:
    lm_eval = pytest.importorskip("lm_eval")
    return Path(lm_eval.__file__).parent / "tasks"


def harness_task(path: Path, features: list[str], *, functions: bool = False) -> Any:
    """The harness's own task, without its data set; its Python functions are imported only where they are needed."""
    from lm_eval.api.task import ConfigurableTask, TaskConfig
    from lm_eval.tasks._yaml_loader import load_yaml

    config = {
        key: value for key, value in load_yaml(path, resolve_func=functions).items() if key not in ("group", "class")
    }
    task = ConfigurableTask.__new__(ConfigurableTask)
    task._config = TaskConfig(**config)
    task.OUTPUT_TYPE = task._config.output_type
    task.fewshot_cfg = task._config.fewshot_config
    task.features, task.prompt = features, None
    task.multiple_input = task.multiple_target = 0
    task._metric_fn_list = {}
    return task


def harness_requests(task: Any, row: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """Context and continuation of each answer, and the index of the right one."""
    choices, target, text = task.doc_to_choice(row), task.doc_to_target(row), task.doc_to_text(row)
    task.multiple_input = len(choices) if isinstance(text, int) else 0
    context = task.fewshot_context(row, 0, gen_prefix=task.doc_to_prefix(row))
    arguments = [each.args for each in task.construct_requests(row, context, metadata=("x", 0, 1))]
    gold = text if task.multiple_input else target
    return [tuple(pair[:2]) for pair in arguments], gold if isinstance(gold, int) else choices.index(gold)


def fields_of(task: Task) -> tuple[list[str], set[str]]:
    """Fields of a row, and which of them are read by the label alone."""
    names: set[str] = set()
    for template in task.prompt_templates("causal"):
        names |= template.fields | template.optional_fields
    if isinstance(task.doc_to_choice, str):
        template = compiled_template(task.doc_to_choice)
        names |= template.fields | template.optional_fields
    label: set[str] = set()
    if isinstance(task.doc_to_target, str):
        template = compiled_template(task.doc_to_target)
        label = set(template.fields | template.optional_fields)
    return sorted(names | label), label - names


def rows_of(task: Task) -> Iterator[dict[str, Any]]:
    names, labels = fields_of(task)
    forms = [LABELS if name in labels else FORMS for name in names]
    for values in itertools.islice(itertools.product(*forms), 20_000):
        yield dict(zip(names, values, strict=True))


def ours(task: Task, row: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
    example = render(task, row, kind="causal", labels="required")
    assert example.target is not None
    pairs = [(example.text or "", task.target_delimiter + choice) for choice in example.choices]
    return pairs, example.target


def compared(path: Path) -> str | None:
    """``equal``, a description of what differs, or None where no made-up row suits both."""
    task = load_task(str(path))
    harness = harness_task(path, fields_of(task)[0])
    for row in rows_of(task):
        try:
            found = ours(task, row)
        except DataError:
            continue
        try:
            expected = harness_requests(harness, row)
        except Exception:  # a row of another form
            continue
        if expected[1] >= len(found[0]):
            continue
        return "equal" if found == expected else f"{path}: {found} and {expected}"
    return None


def families(tree: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(tree.rglob("*.yaml")):
        found.setdefault(path.relative_to(tree).parts[0], []).append(path)
    return found


def test_forty_families_give_the_harness_s_own_prompt_answers_and_label(tree: Path) -> None:
    equal, different = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family, paths in families(tree).items():
            for path in paths[:12]:
                try:
                    found = compared(path)
                except DataError:  # not one of multiple choice, or one that needs Python
                    continue
                if found == "equal":
                    equal.append(family)
                elif found is not None:
                    different.append(found)
                if found is not None:
                    break
    assert not different, "\n".join(different)
    assert len(equal) >= 40, equal


def test_every_file_that_needs_no_python_loads(tree: Path) -> None:
    """One of ten: there are more than eight thousand."""
    loaded, refused = 0, []
    for path in sorted(tree.rglob("*.yaml"))[::10]:
        if "multiple_choice" not in path.read_text(encoding="utf-8") and "include" not in path.read_text(
            encoding="utf-8"
        ):
            continue
        try:
            load_task(str(path))
            loaded += 1
        except DataError as error:
            refused.append((path, str(error)))
    reasons = (
        "Python function",
        "num_fewshot",
        "output_type",
        "missing",
        "unknown key",
        "duplicate key",
        "includes it",
        "task: must be text",
    )
    assert loaded > 200
    assert not [each for each in refused if not any(reason in each[1] for reason in reasons)]


BUILTIN = {
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        [
            {
                "activity_label": "Baking",
                "ctx_a": "[header] How to bake [title] Take  a bowl. [step] Mix] it [now",
                "ctx_b": "he mixes",
                "endings": ["flour [substeps] and salt.", " an egg [title] Then wait.", "eats [a [b] c.", "sleeps"],
                "label": "2",
            },
        ],
    ),
    "winogrande": (
        "winogrande/default.yaml",
        [
            {
                "sentence": "The cup fell off the box as _ was too small .",
                "option1": "the cup",
                "option2": "the box",
                "answer": "2",
            }
        ],
    ),
    "copa": (
        "super_glue/copa/default.yaml",
        [
            {
                "premise": "It rained. ",
                "question": "effect",
                "choice1": "I got wet.",
                "choice2": "The sun shone.",
                "label": 0,
            },
            {
                "premise": "I slept.",
                "question": "cause",
                "choice1": "I was tired.",
                "choice2": "It was noon.",
                "label": 0,
            },
        ],
    ),
    "mnli": (
        "glue/mnli/default.yaml",
        [
            {"premise": "Anna sings.", "hypothesis": " Someone sings", "label": 0},
            {"premise": "Anna sings", "hypothesis": "Nobody sings. ", "label": 2},
        ],
    ),
    "race": (
        "race/race.yaml",
        [
            {
                "article": "A long text.\nOf two lines.",
                "problems": str(
                    [
                        {"question": "What is it?", "answer": "B", "options": ["a", "a 'text'", "c", "d"]},
                        {"question": "The text is  _  .", "answer": "A", "options": ["long", "short", "new", "old"]},
                        {"question": "How many lines?", "answer": "C", "options": ["none", "one", "two", "ten"]},
                    ]
                ),
            }
        ],
    ),
    "logiqa": (
        "logiqa/logiqa.yaml",
        [
            {
                "context": "All men err.",
                "question": "Who errs?",
                "options": ["Men", "Gods", "Dogs", "Cats"],
                "label": "a ",
            }
        ],
    ),
    "medmcqa": (
        "medmcqa/medmcqa.yaml",
        [{"question": "Which bone?", "opa": "femur", "opb": "ulna", "opc": "tibia", "opd": "rib", "cop": 2}],
    ),
    "pubmedqa": (
        "pubmedqa/pubmedqa.yaml",
        [{"CONTEXTS": ["First.", "Second."], "QUESTION": "Does it help?", "final_decision": "maybe"}],
    ),
    "social_iqa": (
        "siqa/siqa.yaml",
        [
            {
                "context": "Anna left.",
                "question": "Why?",
                "answerA": "to eat",
                "answerB": "to go",
                "answerC": "x",
                "label": "2",
            }
        ],
    ),
    "wsc": (
        "super_glue/wsc/default.yaml",
        [
            {
                "text": "Anna told Maria that ( so she said ) it did n't matter , and \" she ' left \" .",
                "span1_text": "Anna",
                "span2_text": "it",
                "span2_index": 9,
                "label": 1,
            }
        ],
    ),
}


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_built_in_tasks_are_the_harness_s_without_its_python(tree: Path, name: str) -> None:
    from benchmarks.harness import ROWS, pairs_of

    file, rows = BUILTIN[name]
    if name == "hellaswag":
        pytest.importorskip("datasets")
    task = load_task(name)
    for row in [*rows, *ROWS.get(name, [])]:
        harness = harness_task(tree / file, list(row), functions=True)
        process = harness.config.process_docs
        document = dict(row)
        if process is not None:
            import datasets

            document = dict(process(datasets.Dataset.from_list([row]))[0])
            harness.features = list(document)
        example = render(task, row, kind="causal", labels="required")
        pairs, gold = pairs_of(example), example.target
        if name == "copa":  # its label is the answer's text
            expected = harness.doc_to_choice(document)
            assert expected[gold] == harness.doc_to_target(document)
            assert pairs == [(harness.fewshot_context(document, 0), " " + choice) for choice in expected]
            continue
        if name == "hellaswag":
            document["label"] = int(document["label"])
        assert (pairs, gold) == harness_requests(harness, document)
