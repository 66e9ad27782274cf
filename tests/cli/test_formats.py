"""Formats of `predict`: every input gives the predictions of the same JSON lines, and every output holds them."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pandas
import pyarrow.parquet
import pytest

from lapora.cli.early import check_input
from lapora.cli.formats import count_rows, open_rows, resolve_format, write_records
from lapora.errors import DataError
from tiny_adapter import command, fit_tiny, json_lines, make_adapter, make_rows

ROWS = make_rows(7, 5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = make_adapter(tmp_path_factory.mktemp("formats"))
    fit_tiny(folder)
    return folder


@pytest.fixture
def predict(tiny, monkeypatch, capfdbinary):
    def call(*arguments: object, stdin: bytes | None = None) -> tuple[int, bytes, str]:
        words = ("predict", tiny / "adapter", *arguments, "--device", "cpu")
        return command(monkeypatch, capfdbinary, *words, stdin=stdin)

    return call


def write_inputs(folder: Path) -> dict[str, Path]:
    frame = pandas.DataFrame(ROWS)
    lines = b"".join(json_lines(7))
    text = "".join(f"{row['story']} ?\n" for row in ROWS).encode()
    paths = {
        name: folder / name for name in ("rows.jsonl", "rows.jsonl.gz", "rows.txt", "rows.txt.gz", "rows.csv", "other")
    }
    paths["rows.jsonl"].write_bytes(lines)
    paths["rows.jsonl.gz"].write_bytes(gzip.compress(lines))
    paths["rows.txt"].write_bytes(text)
    paths["rows.txt.gz"].write_bytes(gzip.compress(text))
    frame.to_csv(paths["rows.csv"], index=False)
    (folder / "rows.csv.gz").write_bytes(gzip.compress(paths["rows.csv"].read_bytes()))
    frame.to_parquet(folder / "rows.parquet")
    paths["other"].write_bytes(lines)
    (folder / "rows.json").write_text("\ufeff " + json.dumps(ROWS, indent=1), encoding="utf-8")
    (folder / "lines.json").write_bytes(lines)
    return {
        **paths,
        "rows.json": folder / "rows.json",
        "lines.json": folder / "lines.json",
        "rows.csv.gz": folder / "rows.csv.gz",
        "rows.parquet": folder / "rows.parquet",
    }


def test_every_input_gives_the_same_predictions(predict, tmp_path):
    inputs = write_inputs(tmp_path)
    expected = predict(inputs["rows.jsonl"])[1]
    assert len(expected.splitlines()) == 7
    for name, path in inputs.items():
        status, out, _ = predict(path)
        assert (status, out) == (0, expected), name
    assert predict("-", "--input-format", "text", stdin=inputs["rows.txt"].read_bytes())[1] == expected
    assert predict("-", "--input-format", "csv", stdin=inputs["rows.csv"].read_bytes())[1] == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.tsv", b"story\tlabel\na\t0\n", "tab-separated files are not read; save it as .csv"),
        ("rows.csv", b"story;label\na;0\n", "separate columns by commas, not by ';'"),
        ("rows.csv", b"story\tlabel\na\t0\n", "separate columns by commas, not by '\\t'"),
        ("rows.csv", "story,label\ncafé,0\n".encode("latin-1"), "save the file as UTF-8"),
        ("rows.jsonl", b'[{"story": "a"}]\n', "a list of rows is read from a file whose name ends in .json"),
        ("rows.jsonl", b'[{"story": "a"},\n', "or a list of rows to a file whose name ends in .json"),
        ("rows.jsonl", b'{\n"story": "a"}\n', "write each row as one line"),
        ("folder", None, "a folder; give a file of rows"),
    ],
)
def test_other_formats_are_named(predict, tmp_path, name, content, words):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    status, out, err = predict(path)
    assert status in (2, 5) and not out and words in err.splitlines()[-1], err


@pytest.mark.parametrize(
    ("line", "words"),
    [(b'caf\xc3\xa9 "quoted" \\ \t tab\n', None), (b"\xff\xfe\n", "line 2: not UTF-8"), (b"\x00\n", None)],
)
def test_lines_of_text_are_prompts(predict, line, words):
    status, out, err = predict("-", "--input-format", "text", "--on-error", "report", stdin=b"\n" + line)
    record = json.loads(out)
    assert (status == 5 and words in record["error"]) if words else (status == 0 and "prediction" in record), err


def test_text_keeps_its_characters():
    from lapora.cli.formats import _as_json

    text = 'caf\u00e9 "quoted" \\ \t\x01 \U0001f600'
    (line,) = _as_json(iter([text.encode() + b"\r\n"]), "text")
    assert json.loads(line) == {"text": text}


def test_outputs_hold_the_same(predict, tmp_path):
    lines = b"".join(json_lines(7)) + b'{"id": "x y", "story": "the cows are loud"}\n{"no": 1}\n'
    options = ("--on-error", "report", "--abstain-below", 0.6)
    _, out, _ = predict("-", *options, stdin=b'{"no": 0}\n' + lines)
    expected = [json.loads(line) for line in out.splitlines()]
    for name in ("out.csv", "out.parquet"):
        status, out, _ = predict("-", *options, "--output", tmp_path / name, stdin=b'{"no": 0}\n' + lines)
        assert (status, out) == (5, b"")
    frames = [pandas.read_csv(tmp_path / "out.csv"), pandas.read_parquet(tmp_path / "out.parquet")]
    for frame in frames:
        assert list(frame["index"]) == list(range(10)) and frame["id"].dropna().tolist() == ["x y"]
        for record, (_, row) in zip(expected, frame.iterrows(), strict=True):
            if "error" in record:
                assert row["error"] == record["error"]
                continue
            assert row["prediction"] == record["prediction"] and bool(row["abstained"]) == record["abstained"]
            assert {key: row[f"probabilities.{key}"] for key in record["probabilities"]} == record["probabilities"]
            assert row["confidence"] == record["confidence"]
    with (tmp_path / "out.csv").open() as file:
        assert next(csv.reader(file))[:3] == ["index", "id", "prediction"]


def test_what_came_before_an_error_can_be_read(predict, tmp_path):
    lines = b"".join(json_lines(3)) + b"{}\n"
    for name, read in (("out.csv", pandas.read_csv), ("out.parquet", pandas.read_parquet)):
        status, _, err = predict("-", "-o", tmp_path / name, "--batch-size", 1, stdin=lines)
        assert status == 5 and "line 4" in err
        assert len(read(tmp_path / name)) == 3


def test_a_run_without_an_answer_leaves_the_old_output(predict, tmp_path):
    for name in ("out.csv", "out.parquet"):
        (tmp_path / name).write_text("old")
        assert predict("-", "-o", tmp_path / name, stdin=b"{}\n")[0] == 5
        assert (tmp_path / name).read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("-", "--input-format", "parquet"), 2, "Parquet is read from an uncompressed file"),
        (("rows.parquet",), 5, "not Parquet"),
        (("rows.csv",), 5, "not CSV"),
        (("rows.jsonl.gz",), 5, "cannot be read"),
        (("missing.csv",), 5, "cannot be read"),
        (("missing.txt.gz",), 5, "cannot be read"),
        (("rows.csv", "--input-format", "xml"), 2, "one of text, csv, jsonl, parquet"),
        (("same.csv", "-o", "same.csv"), 2, "is the input file"),
        (("-", "-o", "x.csv", "--adapter", "a"), 2, "write JSON lines"),
    ],
)
def test_what_cannot_be_read_or_written(predict, tmp_path, monkeypatch, arguments, status, words):
    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").write_bytes(b"no")
    Path("rows.csv").write_bytes(b'"a\n')
    Path("rows.jsonl.gz").write_bytes(b"no")
    Path("same.csv").write_text("story\nthe cows are loud\n")
    found, _, err = predict(*arguments)
    assert found == status and words in err and len(err.splitlines()) <= 2, err


def test_formats_by_ending_and_counts(tmp_path):
    endings = {"a.txt": "text", "a.CSV": "csv", "a.csv.gz": "csv", "a": "jsonl", "a.json": "jsonl", "-": "jsonl"}
    assert {name: resolve_format(name, None) for name in endings} == endings
    assert resolve_format("a.csv", "text") == "text"
    inputs = write_inputs(tmp_path)
    counts = {name: count_rows(str(path), resolve_format(str(path), None)) for name, path in inputs.items()}
    counted = {"rows.jsonl", "rows.txt", "rows.parquet", "other", "lines.json"}
    assert {name for name, count in counts.items() if count == 7} == counted


def test_a_long_line_of_a_compressed_file_is_not_held(tmp_path):
    from lapora.config import LONGEST_LINE

    (tmp_path / "long.jsonl.gz").write_bytes(gzip.compress(b"x" * (3 * LONGEST_LINE) + b"\n{}\n", 1))
    with open_rows(str(tmp_path / "long.jsonl.gz"), "jsonl") as rows:
        assert [len(row) for row in rows] == [LONGEST_LINE + 1, 3]


@pytest.mark.slow
def test_on_a_terminal_it_says_what_it_waits_for_and_shows_rows(tiny, tmp_path):
    """Standard input and stderr are a terminal; predictions go to a file."""
    main, terminal = pty.openpty()
    words = [
        sys.executable,
        "-m",
        "lapora",
        "predict",
        tiny / "adapter",
        "--device",
        "cpu",
        "-o",
        tmp_path / "out.jsonl",
    ]
    process = subprocess.Popen(
        list(map(str, words)),
        stdin=terminal,
        stderr=terminal,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(terminal)
    seen = b""
    while b"waiting for rows" not in seen:
        seen += os.read(main, 4096)
    os.write(main, b'{"story": "the cows are loud"}\nmistyped\n{"story": "the cows are loud"}\n\x04')
    while process.poll() is None or b"rows" not in seen:
        try:
            seen += os.read(main, 4096)
        except OSError:
            break
    assert process.wait(120) == 5, seen
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ["error" in record for record in found] == [False, True, False], "a mistyped line does not end it"
    assert b"Ctrl-D ends" in seen and b"predict" in seen


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_lists_of_rows_with_their_own_answers_are_json(tmp_path, ending):
    record = {"index": 0, "prediction": "a b", "answers": ["a b", "c"], "probabilities": [0.75, 0.25]}
    target = tmp_path / f"out.{ending}"
    write_records(iter([record]), str(target))
    if ending == "csv":
        (row,) = csv.DictReader(target.open())
    else:
        (row,) = pyarrow.parquet.read_table(target).to_pylist()
    assert json.loads(row["answers"]) == ["a b", "c"] and json.loads(row["probabilities"]) == [0.75, 0.25]


def test_ids_of_parquet_files_are_text(predict, tmp_path):
    ids = [datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2, 3), decimal.Decimal("1.50"), b"caf\xc3\xa9"]
    for value, expected in zip(ids, ["2026-01-02", "2026-01-02 03:00:00", "1.50", "caf\u00e9"], strict=True):
        table = pyarrow.table({"id": [value], "story": ["anna is loud"]})
        pyarrow.parquet.write_table(table, tmp_path / "ids.parquet")
        status, out, _ = predict(tmp_path / "ids.parquet")
        assert status == 0 and json.loads(out)["id"] == expected
    pandas.DataFrame({"id": [float("nan")], "story": ["anna"]}).to_parquet(tmp_path / "ids.parquet")
    assert "id" not in json.loads(predict(tmp_path / "ids.parquet")[1])


@pytest.mark.parametrize("name", ["out.parquet", "out.csv"])
def test_half_a_surrogate_pair_in_an_id(predict, tmp_path, name):
    lines = b'{"id": "\\ud800x", "story": "the cows"}\n{"id": "b", "story": "the cows"}\n'
    status, _, err = predict("-", "--output", tmp_path / name, stdin=lines)
    assert status == 0, err
    read = pandas.read_parquet if name.endswith("parquet") else pandas.read_csv
    assert list(read(tmp_path / name)["id"]) == ["\\ud800x", "b"]
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_binary_columns_are_text(predict, tmp_path):
    stories = ["anna is loud", "boris is qui\u00e9t"]
    pyarrow.parquet.write_table(pyarrow.table({"story": stories}), tmp_path / "text.parquet")
    binary = pyarrow.table({"story": [each.encode() for each in stories], "other": [b"\xff", b""]})
    pyarrow.parquet.write_table(binary, tmp_path / "binary.parquet")
    assert predict(tmp_path / "text.parquet")[1] == predict(tmp_path / "binary.parquet")[1] != b""


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
@pytest.mark.parametrize("own_first", [False, True])
def test_rows_with_other_answers_do_not_lose_them(predict, tmp_path, name, own_first):
    rows = [*json_lines(1), b'{"prompt": "anna is", "answers": ["no", "yes"]}\n']
    status, _, err = predict("-", "-o", tmp_path / name, stdin=b"".join(rows[::-1] if own_first else rows))
    assert status == 5 and "row 1: " in err and "JSON lines" in err
    read = pandas.read_csv if name == "out.csv" else pandas.read_parquet
    assert len(read(tmp_path / name)) == 1


def test_an_input_without_rows_has_an_output_without_rows(predict, tmp_path):
    for name, read in (("out.csv", pandas.read_csv), ("out.parquet", pandas.read_parquet)):
        (tmp_path / name).write_text("old")
        assert predict("-", "-o", tmp_path / name, stdin=b"")[0] == 0
        found = read(tmp_path / name)
        assert len(found) == 0 and list(found.columns)[:2] == ["index", "id"]


def test_outputs_are_checked_before_rows_are_predicted(predict, tmp_path):
    for name in ("none/out.parquet", "none/out.csv"):
        status, _, err = predict("-", "-o", tmp_path / name, stdin=b"{}\n")
        assert status == 5 and "give another --output" in err, name
    status, _, err = predict("-", "-o", tmp_path / "out.csv.gz", stdin=b"")
    assert status == 2 and "not compressed" in err
    for name in ("out.xlsx", "out.TSV"):
        status, _, err = predict("-", "-o", tmp_path / name, stdin=b"")
        assert status == 2 and "this format is not written" in err and not (tmp_path / name).exists()


def test_a_terminated_run_leaves_the_old_parquet_file(tmp_path):
    target = tmp_path / "out.parquet"
    write_records(iter([{"index": 0, "prediction": "a"}]), str(target))
    before = target.read_bytes()

    def records():
        yield {"index": 0, "prediction": "b"}
        assert target.read_bytes() == before
        yield {"index": 1, "prediction": "b"}

    write_records(records(), str(target))
    assert len(pandas.read_parquet(target)) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["out.parquet"]


def test_a_column_that_is_there_twice_is_refused(predict, tmp_path):
    (tmp_path / "twice.csv").write_text("story,story\nanna,boris\n")
    status, _, err = predict(tmp_path / "twice.csv")
    assert status == 5 and "twice" in err
    assert predict("-", "--input-format", "csv", stdin=b"story, story\nanna,boris\n")[0] == 5


def test_a_closed_standard_input_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        check_input("-")
