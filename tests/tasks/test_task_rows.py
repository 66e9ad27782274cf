"""Rows: the same from the Hub and from local files, and each broken source named."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from lapora.errors import DataError, UnreadableSourceError, UsageError
from lapora.tasks import Task, load_rows, load_task, parse_json_line, render_all, split_source
from lapora.tasks.rows import Row

RTE = [
    {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0, "idx": 0},
    {"sentence1": "NA", "sentence2": 'He said "no, never".', "label": 1, "idx": 1},
    {"sentence1": "Ünïcode — ok", "sentence2": "None", "label": 0, "idx": 2},
]
MINE = Task.from_dict({
    "task": "mine",
    "training_split": "train",
    "validation_split": "dev",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["A", "B"],
    "doc_to_target": "answer",
    "keep_if": "{{ kept | default(true) }}",
})  # fmt: skip


def write_each_way(rows: list[dict[str, Any]], folder: Path) -> None:
    (folder / "lines").mkdir()
    (folder / "lines" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for suffix, content in {"list": json.dumps(rows), "data": json.dumps({"data": rows})}.items():
        (folder / suffix).mkdir()
        (folder / suffix / "train.json").write_text(content)
    (folder / "named").mkdir()
    (folder / "named" / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = datasets.Dataset.from_list(rows)
    for suffix, save in {"csv": stored.to_csv, "parquet": stored.to_parquet}.items():
        (folder / suffix).mkdir()
        save(str(folder / suffix / f"train.{suffix}"))


def test_every_format_and_the_hub_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("rte")
    write_each_way(RTE, tmp_path)
    asked: list[tuple[Any, ...]] = []

    def stand_in(path: str, name: str | None = None, *, split: str, **kwargs: Any) -> datasets.Dataset:
        asked.append((path, name, split, kwargs))
        return datasets.Dataset.from_list(RTE)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    from_hub = load_rows(task, "train")
    assert asked == [("nyu-mll/glue", "rte", "train", {})]
    assert [dict(row.values) for row in from_hub] == RTE
    for kind in ("lines", "list", "data", "named", "csv", "parquet"):
        rows = load_rows(task, "train", data_dir=tmp_path / kind)
        assert rows == from_hub, kind
    targets = [example.target for example in render_all(task, from_hub, kind="classifier")]
    assert targets == [0, 1, 0]


def test_a_folder_of_the_hubs_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set folder as `datasets` itself reads it: features and all, with the split names mapped."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    repository = tmp_path / "someone" / "questions"
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["x", "y"])}
    )
    rows = {"question": ["Which?", "What?"], "answer": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(repository / "data" / "dev-0.parquet"))
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files:\n  - split: dev\n    path: data/dev-*\n---\n"
    )
    task = Task.from_dict({**MINE.to_dict(), "dataset_path": str(repository), "dataset_name": "first"})
    loaded = load_rows(task, "validation")
    assert [example.target for example in render_all(task, loaded, kind="causal")] == [1, 0]
    with pytest.raises(DataError, match=r"split test: Unknown split .*or give the rows as files with --data-dir"):
        load_rows(task, "test")
    wrong = Task.from_dict({**task.to_dict(), "dataset_name": "second"})
    with pytest.raises(DataError, match="BuilderConfig 'second' not found"):
        load_rows(wrong, "validation")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            ConnectionError("Couldn't reach 'google/boolq' on the Hub"),
            "cannot reach the Hub for google/boolq",
        ),
        (TimeoutError("timed out\nand more"), "cannot reach the Hub for google/boolq (timed out)"),
        (datasets.exceptions.DatasetNotFoundError("no"), "no dataset google/boolq on the Hub"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "needs a loading script"),
        (ValueError("Unknown split \x1b[31m"), "google/boolq, split train: Unknown split"),
    ],
)
def test_a_failing_hub_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def stand_in(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    with pytest.raises(DataError) as caught:
        load_rows(load_task("boolq"), "train")
    message = str(caught.value)
    assert says in message and "--data-dir DIR" in message and "\n" not in message and "\x1b" not in message
    assert caught.value.exit_status == 5


def test_a_connection_error_below_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(*_: Any, **__: Any) -> None:
        try:
            raise ConnectionError("no route")
        except ConnectionError as error:
            raise RuntimeError("while preparing") from error

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    with pytest.raises(DataError, match="cannot reach the Hub"):
        load_rows(load_task("boolq"), "train")


def test_an_empty_hub_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([]))
    with pytest.raises(DataError, match="google/boolq, split train: it has no rows; choose another split"):
        load_rows(load_task("boolq"), "train")


def test_split_names_locally(write_rows: Callable[..., Path]) -> None:
    folder = write_rows([{"question": "mapped", "answer": 0}], "dev.jsonl")
    assert load_rows(MINE, "validation", data_dir=folder)[0].values["question"] == "mapped"
    write_rows([{"question": "literal", "answer": 0}], "validation.jsonl")
    assert load_rows(MINE, "validation", data_dir=folder)[0].values["question"] == "literal"
    with pytest.raises(DataError, match=r"no test.jsonl .*the folder has dev.jsonl, validation.jsonl; choose with"):
        load_rows(MINE, "test", data_dir=folder)
    with pytest.raises(DataError, match="is not a valid file name"):
        load_rows(MINE, "../dev", data_dir=folder)
    with pytest.raises(DataError, match="no such folder"):
        load_rows(MINE, "train", data_dir=folder / "nowhere")


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder has no \.jsonl, \.json, \.csv or \.parquet file"):
        load_rows(MINE, "train", data_dir=tmp_path)


def test_no_source_at_all() -> None:
    with pytest.raises(DataError, match="task 'mine' has no data source; give --data-dir DIR"):
        load_rows(MINE, "train")


def test_limit_counts_rows_that_are_kept(write_rows: Callable[..., Path]) -> None:
    rows = [{"question": f"q{index}", "answer": 0, "kept": index % 2 == 1} for index in range(10)]
    folder = write_rows(rows)
    kept = load_rows(MINE, "train", data_dir=folder, limit=2)
    assert [row.index for row in kept] == [1, 3]
    assert [row.index for row in load_rows(MINE, "train", data_dir=folder)] == [1, 3, 5, 7, 9]
    with pytest.raises(UsageError, match="--limit 0"):
        load_rows(MINE, "train", data_dir=folder, limit=0)


def test_keep_if_that_leaves_nothing_or_is_no_condition(write_rows: Callable[..., Path]) -> None:
    folder = write_rows([{"question": "q", "kept": False}])
    with pytest.raises(DataError, match="keep_if excludes all 1 rows"):
        load_rows(MINE, "train", data_dir=folder)
    write_rows([{"question": "q", "kept": "perhaps"}])
    with pytest.raises(DataError, match="row 0: keep_if returned 'perhaps', which is neither true nor false"):
        load_rows(MINE, "train", data_dir=folder)
    needs = Task.from_dict({**MINE.to_dict(), "keep_if": "{{ wanted }}"})
    with pytest.raises(DataError, match="row 0: missing field wanted, used by keep_if; the row has question, kept"):
        load_rows(needs, "train", data_dir=folder)


GOOD = b'{"question": "q", "answer": 0}\n'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no rows; choose another split"),
        (b"\n  \r\n\n", "no rows"),
        (GOOD + b"{oops}\n", "line 2: not JSON: "),
        (GOOD + b"\n" + b"[1, 2]\n", "line 3: not a JSON object"),
        (GOOD + b'{"question": NaN}\n', "line 2: not JSON: NaN is not JSON"),
        (GOOD + b'{"question": "\xff"}\n', "line 2: not UTF-8 at byte 14"),
        (GOOD + b'{"a":' * 20_000 + b"\n", "line 2: JSON is nested too deeply"),
        (GOOD + b'{"a": ' + b"9" * 5000 + b"}\n", "line 2: not JSON"),
        (b"PAR1....", "line 1: not JSON: Expecting value at column 1; it looks like Parquet"),
        (gzip.compress(GOOD, mtime=0), "it looks like gzip: unpack it"),
        (pickle.dumps([1]), "it looks like a pickle, which lapora never reads"),
        (b"<!doctype html>\n", "it looks like HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (b"question,answer\n", "check that the file's suffix matches its format"),
    ],
)
def test_bad_json_lines(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows(MINE, "train", data_dir=tmp_path)
    assert says in str(caught.value) and "train.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_json_lines_with_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n" + GOOD.rstrip())
    rows = load_rows(MINE, "train", data_dir=tmp_path)
    assert rows == [Row(index, {"question": "q", "answer": 0}) for index in (0, 1)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train.json", b"{", "line 1: not JSON"),
        ("train.json", b"3", "not a list of JSON objects"),
        ("train.json", b'[{"question": "q"}, 3]', "row 1 is not a JSON object but 3"),
        ("train.json", b"\xff", "not JSON"),
        ("train.json", b"[NaN]", "NaN is not JSON"),
        ("train.csv", b"", "no rows"),
        ("train.csv", b"question,answer\n", "no rows"),
        ("train.csv", b"question,answer\na,0\nb,c,0\n", "line 3: not CSV: 3 fields, and the header has 2"),
        (
            "train.csv",
            b"question,answer\na,b,0\nb,c,0\n",
            "line 2: not CSV: more fields than the header 'question,answer'",
        ),
        ("train.csv", b"question\nok\na \xff\xfe\n", "line 3: not UTF-8 at byte 2; save the file as UTF-8"),
        ("train.csv", b"question;answer\na, b;0\na, b, c;0\n", "has no comma; separate columns by commas, not by ';'"),
        ("train.csv", b"question\tanswer\na, b\t0\na, b, c\t0\n", "separate columns by commas, not by '\\t'"),
        ("train.parquet", b"PAR1" + GOOD, "begins as a Parquet file, and is incomplete or damaged"),
        ("train.parquet", GOOD, "not Parquet"),
        ("train.parquet", b"", "not Parquet"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows(MINE, "train", data_dir=tmp_path)
    assert says in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_whose_name_has_other_capitals_is_named(tmp_path: Path) -> None:
    (tmp_path / "Train.CSV").write_text("question,answer\na,0\n")
    with pytest.raises(DataError, match=r"no train\.csv, but 'Train\.CSV'; rename it to train\.csv"):
        load_rows(MINE, "train", data_dir=tmp_path)


def test_a_row_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "validation.csv").write_text("question,answer\na,0\nb,7\n")
    rows = load_rows(MINE, "validation", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"^validation\.csv, row 1: unknown label 7"):
        render_all(MINE, rows, kind="causal")


def test_csv_of_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("question,answer\nNA,True\nnull,False\n,True\n")
    rows = load_rows(MINE, "train", data_dir=tmp_path)
    assert [row.values["question"] for row in rows] == ["NA", "null", ""]
    assert [row.values["answer"] for row in rows] == [True, False, True]


def test_nothing_is_written_and_no_network_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    write_each_way(RTE, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(datasets, "load_dataset", None)
    for kind in ("lines", "list", "csv", "parquet"):
        load_rows(load_task("rte"), "train", data_dir=tmp_path / kind)
    assert sorted(tmp_path.rglob("*")) == before


def test_one_line_of_json() -> None:
    assert parse_json_line(b'\xef\xbb\xbf{"text": "x"}\r\n', "line 1") == {"text": "x"}
    with pytest.raises(DataError, match="line 4: not a JSON object"):
        parse_json_line('"x"', "line 4")


def test_a_csv_file_and_json_lines_have_the_same_labels(tmp_path: Path) -> None:
    """What has been text stays text: numbers with leading zeros, and integers beside missing cells."""
    rows = [{"question": "007", "answer": "01"}, {"question": "x", "answer": "02"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "other.csv").write_text(" question , answer \n007,01\nx,02\n")
    (tmp_path / "missing.csv").write_text("question,answer\n1,\n2,1\n3,0\n")
    task = Task.from_dict({
        "task": "mine", "doc_to_text": "{{question}}", "doc_to_choice": ["01", "02"], "doc_to_target": "answer",
    })  # fmt: skip
    lines, table = (load_rows(task, split, data_dir=tmp_path) for split in ("train", "other"))
    assert lines == table
    assert [example.target for example in render_all(task, table, kind="causal")] == [0, 1]
    values = [dict(row.values) for row in load_rows(task, "missing", data_dir=tmp_path)]
    assert values == [{"question": 1, "answer": None}, {"question": 2, "answer": 1}, {"question": 3, "answer": 0}]


def test_a_csv_header_with_a_name_twice(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("question, question\na,b\n")
    with pytest.raises(DataError, match="the header has 'question' twice"):
        load_rows(MINE, "train", data_dir=tmp_path)


@pytest.mark.parametrize("source", ["hub", "parquet"])
def test_names_of_labels_must_not_contradict_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["Yes", "no"])}
    )
    stored = datasets.Dataset.from_dict({"question": ["a", "b"], "answer": [0, 1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stored)
    stored.to_parquet(tmp_path / "train.parquet")
    folder = tmp_path if source == "parquet" else None
    content = {"task": "mine", "dataset_path": "a/b", "doc_to_text": "{{question}}"}
    for target in ("answer", "{{ answer }}"):
        task = Task.from_dict({**content, "doc_to_choice": ["no", "yes"], "doc_to_target": target})
        with pytest.raises(DataError, match="label 0 of 'answer' is called 'Yes', which is answer 1"):
            load_rows(task, "train", data_dir=folder)
        for answers in (["yes", "no"], ["good", "bad"]):
            task = Task.from_dict({**content, "doc_to_choice": answers, "doc_to_target": target})
            assert [row.values["answer"] for row in load_rows(task, "train", data_dir=folder)] == [0, 1]


@pytest.mark.parametrize(
    ("one", "two", "overlaps"),
    [
        ("train", "train", True),
        ("train", "test", False),
        ("train", "train[:500]", True),
        ("train[:500]", "train[500:]", False),
        ("train[:501]", "train[500:]", True),
        ("train[:80%]", "train[80%:]", False),
        ("train[10%:20%]", "train[15%:]", True),
        ("train[:80%]", "train[900:]", True),  # which may overlap
        ("train[:-100]", "train[-100:]", True),
        ("train[:50%](pct1_dropremainder)", "train[50%:]", False),
        ("train+validation", "validation", True),
        ("train+validation", "test", False),
    ],
)
def test_splits_of_the_hub_that_share_rows(one: str, two: str, overlaps: bool) -> None:
    task = Task.from_dict(
        {"task": "t", "doc_to_text": "{{a}}", "doc_to_choice": ["x", "y"], "dataset_path": "some/data"}
    )
    assert split_source(task, one, None).overlaps(split_source(task, two, None)) is overlaps
    assert split_source(task, two, None).overlaps(split_source(task, one, None)) is overlaps


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSourceError, match="no such folder"):
        load_rows(load_task("boolq"), "validation", data_dir=tmp_path / "nowhere")
