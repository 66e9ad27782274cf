"""Task files: lm-evaluation-harness YAML as it stands, and each mistake named."""

from __future__ import annotations

import json
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapora.errors import DataError
from lapora.tasks import Task, load_rows, load_task, render_all
from lapora.tasks.task import MAX_YAML_BYTES, builtin_tasks, task_from_yaml

MINIMAL = "task: mine\ndoc_to_text: '{{question}}'\ndoc_to_choice: ['A', 'B']\n"

# As in lm-evaluation-harness: written for it, with none of the keys that are only lapora's.
HARNESS = """
tag: my_group
task: colours
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    train: rows/training.jsonl
    validation: rows/held_out.jsonl
output_type: multiple_choice
training_split: train
validation_split: validation
test_split: null
doc_to_text: "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nAnswer:"
doc_to_choice: ["A", "B"]
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
# The same task in lapora's words.
OWN = """
task: colours
training_split: train
validation_split: validation
doc_to_text: "{{question | trim}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nAnswer:"
doc_to_choice: "{{ ['A', 'B'] }}"
doc_to_target: "{{ 'AB'[answer] }}"
keep_if: "{{ true }}"
metric: acc
truncate_field: question
max_length: {causal: 100, classifier: 50}
"""
ROWS = [
    {"question": " Which is red? ", "choices": ["rose", "leaf"], "answer": 0},
    {"question": "Which is green?", "choices": ["rose", "leaf"], "answer": 1},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("training", "held_out", "train", "validation"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text(lines)
    (tmp_path / "harness.yaml").write_text(HARNESS)
    (tmp_path / "own.yaml").write_text(OWN)
    return tmp_path


def test_a_harness_file_and_ones_own_give_the_same_examples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")  # its data_files are relative to the file, not to where one stands
    harness, own = load_task(str(folder / "harness.yaml")), load_task(str(folder / "own.yaml"))
    ours: list[Any] = []
    for split in ("train", "validation"):
        by_file = render_all(harness, load_rows(harness, split), kind="causal")
        by_folder = render_all(own, load_rows(own, split, data_dir=folder / "rows"), kind="causal")
        seen = [[(e.text, e.choices, e.target) for e in examples] for examples in (by_file, by_folder)]
        assert seen[0] == seen[1]
        ours += seen[0]
    assert ours[0] == ("Which is red?\nA. rose\nB. leaf\nAnswer:", ("A", "B"), 0)
    assert ours[1][2] == 1


def test_data_files_without_splits_are_the_training_split(folder: Path) -> None:
    file = folder / "one.yaml"
    file.write_text(MINIMAL + "dataset_path: json\ndataset_kwargs: {data_files: rows/training.jsonl}\n")
    task = load_task(str(file))
    assert len(load_rows(task, "train")) == 2
    with pytest.raises(DataError, match="data_files has no split 'validation'; it has train"):
        load_rows(task, "validation")
    (folder / "rows" / "training.jsonl").unlink()
    with pytest.raises(DataError, match=r"no file .*training.jsonl'; fix its data_files"):
        load_rows(task, "train")


@pytest.mark.parametrize("name", ["harness.yaml", "own.yaml"])
def test_a_task_survives_its_manifest(folder: Path, name: str) -> None:
    task = load_task(str(folder / name))
    recorded = json.loads(json.dumps(task.to_dict()))
    assert Task.from_dict(recorded, source="posterior.json") == task


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("num_fewshot: 5\n", "num_fewshot: 5 examples in each prompt are not supported; set it to 0"),
        ("include: _base.yaml\n", "unknown key include"),
        ("prompt: !function utils.prompt\n", "prompt: needs the Python function utils.prompt"),
        (
            "process_docs: !function utils.process\n",
            "process_docs: needs the Python function utils.process, and no Python of task files is run; write its "
            "result to a file as columns of the data",
        ),
        ("metadata: !function {a: 1}\n", "tag '!function' is not supported"),
        ("metadata: !!python/object/apply:os.system ['true']\n", "'!!python/object/apply:os.system'"),
        ("metadata: &a [1]\ntag: *a\n", "anchors and aliases"),
        ("task: again\n", "duplicate key 'task'"),
        ("? [a]\n: b\n", "a key must be a scalar"),
        ("doc_to_continuation: {{text}}\n", "a key must be a scalar; put templates in quotes"),
        ("doc_to_continuation: Text: {{text}}\n", "mapping values are not allowed here; put templates in quotes"),
        ("output_type: generate_until\n", "output_type: must be multiple_choice, not 'generate_until'"),
        ("metric: bleu\n", "metric: must be one of acc, mcc, not 'bleu'"),
        ("metric_list: acc\n", "metric_list: must be a list of mappings"),
        ("max_length: long\n", "max_length: must be a number of tokens, not 'long'"),
        ("max_length: true\n", "max_length: must be a number of tokens, not True"),
        ("max_length: 0\n", "max_length: must be a number"),
        ("max_length: {causal: 3, seq2seq: 3}\n", "max_length: unknown kind of model"),
        ("keep_if: '{{ a'\n", "keep_if: unexpected end of template"),
        ("keep_if: [a]\n", "keep_if: must be text, not a list"),
        ("doc_to_inputs: [a, b, c]\n", "doc_to_inputs: must be one template, or a list of one or two"),
        ("doc_to_target: '{% include \"x\" %}'\n", "doc_to_target: statement 'include' is not supported"),
        ("doc_to_target: 2\n", "doc_to_target: index 2 is out of range for 2 choices"),
        ("doc_to_target: true\n", "doc_to_target: must be text"),
        ("truncate_field: passage\n", "truncate_field: 'passage' is not used by doc_to_text"),
        ("target_delimiter: 3\n", "target_delimiter: must be text, not a number"),
        ("dataset_path: ''\n", "dataset_path: must not be empty"),
        ("dataset_kwargs: {dataset_repo: x}\n", "dataset_kwargs: unknown key dataset_repo; use data_files"),
        ("dataset_kwargs: {data_files: 3}\n", "data_files: must be a path"),
        ("metadata: {at: 2024-01-01}\n", "metadata: must contain only text"),
        ("metadata: {x: .nan}\n", "metadata: must contain only text"),
        ("tag: " + "[" * 40 + "]" * 40 + "\n", "nested more than 20 levels deep"),
        ("tag: [\n", "expected the node content"),
        ("\x1b[31m: red\n", "special characters are not allowed"),
    ],
)
def test_each_mistake_is_named(added: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        task_from_yaml(MINIMAL + added, source="mine.yaml")
    message = str(caught.value)
    assert message.startswith("mine.yaml") and says in message and "\n" not in message and "\x1b" not in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty"),
        ("- a\n- b\n", "a mapping of keys to values, not a list"),
        ("just words", "a mapping of keys to values, not text"),
        ("doc_to_text: q\ndoc_to_choice: [a, b]\n", "missing key 'task'"),
        ("task: x\ndoc_to_choice: [a, b]\n", "missing both doc_to_text"),
        ("task: x\ndoc_to_text: q\n", "missing doc_to_choice"),
        ("task: x\ndoc_to_text: q\ndoc_to_choice: [no, yes]\n", "answer False is a boolean"),
        ("task: x\ndoc_to_text: q\ndoc_to_choice: [a]\n", "at least two answers are required, not 1"),
        ("task: x\ndoc_to_text: q\ndoc_to_choice: [a, b, a]\n", "duplicate answer 'a'"),
        ("task: x\ndoc_to_text: q\ndoc_to_choice: [a, '']\n", "an answer must be non-empty text"),
        ("task: x\ndoc_to_text: 3\ndoc_to_choice: [a, b]\n", "doc_to_text: must be text, not a number"),
    ],
)
def test_what_is_no_task_is_refused(text: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        task_from_yaml(text, source="mine.yaml")
    assert says in str(caught.value)


def test_a_bomb_of_aliases_and_a_huge_file_are_refused_at_once(tmp_path: Path) -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{after}: &{after} [{','.join(['*' + before] * 9)}]\n"
    (tmp_path / "bomb.yaml").write_text(bomb)
    with pytest.raises(DataError, match="anchors and aliases"):
        load_task(str(tmp_path / "bomb.yaml"))
    (tmp_path / "huge.yaml").write_text(MINIMAL + "#" * MAX_YAML_BYTES)
    with pytest.raises(DataError, match="larger than 65536 bytes"):
        load_task(str(tmp_path / "huge.yaml"))
    (tmp_path / "latin.yaml").write_bytes(MINIMAL.encode() + b"# caf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8 at byte"):
        load_task(str(tmp_path / "latin.yaml"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bolq", "no built-in task 'bolq': did you mean boolq?"),
        ("zzzzz", "the built-in tasks are ag_news, arc-c"),
        ("missing.yaml", "No such file or directory"),
        ("../boolq", "No such file or directory"),
        ("/usr/", "a folder, not a task"),
        ("a/\0", "cannot be read"),
        ("", "the built-in tasks are"),
    ],
)
def test_an_unknown_task_is_named(name: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        load_task(name)
    assert says in str(caught.value)


def test_what_the_harness_allows_is_allowed() -> None:
    task = task_from_yaml(
        MINIMAL.replace("['A', 'B']", "{a: 'no', b: 'yes'}")
        + "metric_list: [{metric: acc}, {metric: f1}]\ndoc_to_target: label\nkeep_if: true\n",
        source="x",
    )
    assert task.doc_to_choice == ("no", "yes") and task.metric == "acc" and task.keep_if == "{{ true }}"
    assert task_from_yaml(MINIMAL + "metric_list: [{metric: mcc}]\n", source="x").metric == "mcc"
    assert task_from_yaml(MINIMAL.replace("['A', 'B']", "[1, 2]"), source="x").doc_to_choice == ("1", "2")


def test_files_of_a_hub_repository_stay_relative(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(MINIMAL + "dataset_path: someone/data\ndataset_kwargs: {data_files: a.csv}\n")
    task = load_task(str(tmp_path / "x.yaml"))
    assert task.dataset_kwargs == {"data_files": "a.csv"} and task.hub_source == "someone/data"


def test_max_length_by_kind() -> None:
    task = load_task("boolq")
    assert (task.max_length_for("causal"), task.max_length_for("classifier")) == (300, 256)
    assert task_from_yaml(MINIMAL, source="x").max_length_for("causal") == 512


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    name=st.sampled_from(builtin_tasks()),
    key=st.sampled_from([*load_task("boolq").to_dict(), "target_delimiter", "keep_if", "metric_list", "zz"]),
    value=plain,
)
def test_a_damaged_manifest_is_a_data_error_or_a_task(name: str, key: str, value: Any) -> None:
    values = {**load_task(name).to_dict(), key: value}
    try:
        task = Task.from_dict(values, source="posterior.json")
    except DataError as error:
        assert str(error).startswith("posterior.json: ") and "\n" not in str(error)
    else:
        assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


@given(text=st.text(string.printable, max_size=60))
def test_any_text_is_a_data_error_or_a_task(text: str) -> None:
    try:
        task_from_yaml(text, source="x.yaml")
    except DataError as error:
        assert "\n" not in str(error)


def test_importing_the_room_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "peft", "datasets", "numpy", "pandas", "pyarrow", "typer", "rich"]
    code = f"import lapora.tasks, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


INCLUDED = """
include: base.yaml
task: child
task_alias: a child
doc_to_target: label
num_fewshot: 0
fewshot_config: {sampler: first_n, samples: !function utils.samples}
should_decontaminate: true
doc_to_decontamination_query: question
process_results: !function utils.results
metric_list: [{metric: !function utils.metric, aggregation: mean}, {metric: acc_norm}]
dataset_kwargs: {trust_remote_code: true}
"""


def test_included_keys_are_those_that_the_file_has_not(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text(MINIMAL + "target_delimiter: ''\ntask_list: [{task: x}]\n")
    (tmp_path / "middle.yaml").write_text("include: [shared/base.yaml]\ndescription: 'Answer.'\nmax_length: 7\n")
    (tmp_path / "child.yaml").write_text(INCLUDED.replace("base.yaml", "middle.yaml"))
    task = load_task(str(tmp_path / "child.yaml"))
    assert (task.task, task.target_delimiter, task.max_length, task.description) == ("child", "", 7, "Answer.")
    assert task.doc_to_text == "{{question}}" and task.metric == "acc" and task.dataset_kwargs == {}
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task
    example = render_all(task, [{"question": "Which?", "label": 1}], kind="causal")[0]
    assert example.text == "Answer.Which?" and example.target == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("include: child.yaml\n", "include: 'child.yaml' includes this file again"),
        ("include: gone.yaml\n", "gone.yaml': No such file or directory; child.yaml includes it"),
        ("include: {a: b}\n", "include: must be the path of a YAML file, not a mapping"),
        ("include: list.yaml\n", "list.yaml': a task must be a mapping of keys to values, not a list"),
    ],
)
def test_what_cannot_be_included_is_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "child.yaml").write_text(content + MINIMAL)
    (tmp_path / "list.yaml").write_text("[1]\n")
    with pytest.raises(DataError) as caught:
        load_task(str(tmp_path / "child.yaml"))
    assert says in str(caught.value)


def test_a_file_that_needs_python_names_the_built_in_task_in_its_place() -> None:
    with pytest.raises(DataError, match=r"doc_to_text: needs the Python function utils\.text.* the built-in task copa"):
        task_from_yaml("task: copa\ndoc_to_text: !function utils.text\ndoc_to_choice: [a, b]\n", source="x")


def test_description_and_prefix_stand_around_the_prompt() -> None:
    keys = 'description: "Of {{topic}}.\\n"\ngen_prefix: "So it is"\n'
    task = task_from_yaml(MINIMAL + keys, source="x")
    example = render_all(task, [{"question": "Which?", "topic": "cows"}], kind="causal", labels="optional")[0]
    assert example.text == "Of cows.\nWhich? So it is"
    with pytest.raises(DataError, match="row 0: no value for topic"):
        render_all(task, [{"question": "Which?"}], kind="causal", labels="optional")
