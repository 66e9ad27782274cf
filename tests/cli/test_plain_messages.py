"""What is said of adapters, bases, tasks and rows that are not what they should be: one line, what and what to do."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import yaml

from tiny_adapter import command, fit_tiny, make_adapter

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
FIT = ("fit", "adapter", "--data", "task.yaml", "--data-dir", "data", "--device", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = make_adapter(tmp_path_factory.mktemp("messages"))
    fit_tiny(folder, name="first")
    return folder


@pytest.fixture
def tiny(made, tmp_path, monkeypatch) -> Path:
    """A copy, in which the commands run; the base is at its first place."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(folder: Path, **changes) -> None:
    file = folder / "adapter" / "adapter_config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def task(folder: Path, **changes) -> None:
    file = folder / "task.yaml"
    content = {**yaml.safe_load(file.read_text()), **changes}
    file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not ...}))


def split(folder: Path, place: str, content: bytes = b"x") -> None:
    (folder / "data" / "train.jsonl").unlink()
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).write_bytes(content)


def inside(folder: Path, *names: str) -> None:
    """Move the adapter into folders of its own folder."""
    (folder / "adapter").rename(folder / "moved")
    for name in names:
        shutil.copytree(folder / "moved", folder / "adapter" / name)


def shards(folder: Path) -> None:
    (folder / "adapter" / "adapter_model.safetensors").rename(
        folder / "adapter" / "adapter_model-00001-of-00002.safetensors"
    )


def rows_without(folder: Path, field: str) -> None:
    file = folder / "data" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if k != field}) + "\n" for row in rows))


CASES = {
    "a Git LFS pointer for the adapter": (
        lambda f: (f / "adapter" / "adapter_model.safetensors").write_bytes(LFS), FIT, 3, ["Git LFS", "git lfs pull"],
    ),
    "a Git LFS pointer for the base": (
        lambda f: (shutil.copytree(f / "base", f / "lfs"), (f / "lfs" / "model.safetensors").write_bytes(LFS)),
        (*FIT, "--base-model", "lfs"), 3, ["lfs/model.safetensors: a Git LFS pointer"],
    ),
    "the adapter in a folder of its folder": (
        lambda f: inside(f, "default"), FIT, 3, ["a folder of one: give adapter/default"],
    ),
    "a folder of checkpoints": (
        lambda f: inside(f, "checkpoint-10", "checkpoint-20"), FIT, 3,
        ["a folder of several", "adapter/checkpoint-10 or adapter/checkpoint-20"],
    ),
    "shards": (shards, FIT, 3, ["several files (shards)", "max_shard_size"]),
    "peft_type in lower case": (lambda f: settings(f, peft_type="lora"), FIT, 3, ["'lora'", '"peft_type": "LORA"']),
    "no peft_type": (lambda f: settings(f, peft_type=...), FIT, 3, ["no peft_type", '"peft_type": "LORA"']),
    "another peft_type": (lambda f: settings(f, peft_type="IA3"), FIT, 3, ["peft_type IA3 is not supported"]),
    "no base": (
        lambda f: settings(f, base_model_name_or_path=None), FIT, 3, ["names no base model", "--base-model"],
    ),
    "no folder of the base": (
        lambda f: settings(f, base_model_name_or_path="/none/at/all"), FIT, 3,
        ["base model /none/at/all: no such folder; give its folder"],
    ),
    "the base for the adapter": (
        lambda f: None, ("fit", "base", *FIT[2:]), 3, ["a full model, not an adapter", "with --base-model"],
    ),
    "no head": (
        lambda f: (settings(f, task_type="SEQ_CLS"), task(f, doc_to_inputs="story")), FIT, 3,
        ["score.weight", "modules_to_save"],
    ),
    "a file for the demo": (lambda f: None, ("demo", "task.yaml"), 2, ["task.yaml", "give a folder"]),
    "a folder that cannot be made": (
        lambda f: None, ("demo", "task.yaml/inside", "--offline"), 2, ["cannot be made", "give another folder"],
    ),
    "a superscript for a number": (lambda f: None, (*FIT, "--batch-size", "²"), 2, ["--batch-size", "²"]),
    "tab-separated rows": (lambda f: split(f, "data/train.tsv"), FIT, 5, ["train.tsv", "tab-separated", ".csv"]),
    "compressed rows": (
        lambda f: split(f, "data/train.jsonl.gz", gzip.compress(b"{}")), FIT, 5, ["train.jsonl.gz", "unpack"],
    ),
    "a data set of the Hub": (
        lambda f: split(f, "data/data/train-00000-of-00001.parquet"), FIT, 5,
        ["train-00000-of-00001.parquet", "data_files"],
    ),
    "a Git LFS pointer for rows": (lambda f: split(f, "data/train.jsonl", LFS), FIT, 5, ["git lfs pull"]),
    "a YAML tag": (
        lambda f: (f / "task.yaml").write_text((f / "task.yaml").read_text() + "metric: !!binary aGk=\n"), FIT, 5,
        ["tag !!binary is not supported", "leave it out"],
    ),
    "a mistyped key": (
        lambda f: task(f, doc_to_chioce=["a", "b"]), FIT, 5, ["doc_to_chioce", "did you mean doc_to_choice?"],
    ),
    "a file of rows for the task": (
        lambda f: None, ("fit", "adapter", "--data", "data/train.jsonl"), 5,
        ["a file of rows, not a task", "--data-dir"],
    ),
    "a csv file for the task": (
        lambda f: None, ("fit", "adapter", "--data", "rows.csv"), 5, ["a file of rows, not a task", "--data-dir ."],
    ),
    "a folder for the task": (
        lambda f: None, ("fit", "adapter", "--data", "data"), 5, ["a folder, not a task", "--data-dir data"],
    ),
    "a file for the folder": (
        lambda f: None, (*FIT[:4], "--data-dir", "data/train.jsonl"), 5, ["--data-dir data", "--split train"],
    ),
    "no such posterior": (
        lambda f: None, ("predict", "adapter", "--name", "other"), 4, ["adapter/laplace/other", "--name may be first"],
    ),
    "no field of the label": (
        lambda f: task(f, doc_to_target="{{ answer }}"), FIT, 5,
        ["no row has answer", "story, label", "--unlabelled"],
    ),
    "no field of the prompt": (lambda f: rows_without(f, "story"), FIT, 5, ["no value for story", "label"]),
    "no such device": (lambda f: None, (*FIT[:-1], "gpu"), 2, ["--device gpu: no such device", "cuda:0"]),
    "a wrong gate": (
        lambda f: None, ("eval", "adapter", "--name", "first", "--fail-if", "eec>0.1"), 2, ["eec"],
    ),
    "a chat template for a classifier": (
        lambda f: (settings(f, task_type="SEQ_CLS"), task(f, doc_to_inputs="story")), (*FIT, "--chat-template"), 2,
        ["--chat-template", "classifier"],
    ),
    "a task for the other kind of model": (
        lambda f: settings(f, task_type="SEQ_CLS"), FIT, 5, ["supports only causal models", "doc_to_inputs"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_is_wrong_and_what_to_do(case, tiny, monkeypatch, capfdbinary):
    prepare, arguments, status, words = CASES[case]
    if arguments[0] == "fit":
        shutil.rmtree(tiny / "adapter" / "laplace", ignore_errors=True)
    prepare(tiny)
    found, out, err = command(monkeypatch, capfdbinary, *arguments)
    said = [line for line in err.splitlines() if line.startswith("error")]
    assert (found, out, len(said)) == (status, b"", 1), err
    assert all(word in said[0] for word in words), said[0]
    assert arguments[0] != "fit" or not any((tiny / "adapter").rglob("laplace"))


def test_a_refused_fit_leaves_no_folder(tiny, monkeypatch, capfdbinary):
    """Refused while the lock is held: the tokenizer is that of another model."""
    shutil.rmtree(tiny / "adapter" / "laplace")
    task(tiny, doc_to_choice=["no", "absent"])
    status, _, err = command(monkeypatch, capfdbinary, *FIT)
    assert status == 5 and "absent" in err
    assert not (tiny / "adapter" / "laplace").exists()


def test_rows_without_labels_by_intent(tiny, monkeypatch, capfdbinary):
    rows_without(tiny, "label")
    status, _, err = command(monkeypatch, capfdbinary, *FIT, "--unlabelled")
    assert status == 0 and "rows without labels" in err


def test_some_rows_without_labels(tiny, monkeypatch, capfdbinary):
    """One of them would make the default prior, which is averaged by the labels, that of the marginal likelihood."""
    file = tiny / "data" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3]["label"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, err = command(monkeypatch, capfdbinary, *FIT)
    assert status == 5 and f"1 of {len(rows)} rows have no label, the first is row 3" in err and "--unlabelled" in err
    status, _, err = command(monkeypatch, capfdbinary, *FIT, "--unlabelled")
    assert status == 0 and "rows without labels" in err


def test_a_base_beside_the_adapter(tiny, monkeypatch, capfdbinary):
    settings(tiny, base_model_name_or_path="base")
    monkeypatch.chdir(tiny / "data")
    arguments = ("fit", tiny / "adapter", "--data", tiny / "task.yaml", "--data-dir", tiny / "data", "--device", "cpu")
    assert command(monkeypatch, capfdbinary, *arguments)[0] == 0
    status, out, _ = command(
        monkeypatch, capfdbinary, "predict", tiny / "adapter", "--device", "cpu", stdin=b'{"text": "is it ?"}'
    )
    assert status == 0 and out
