"""Paths that are not UTF-8, and texts with lone surrogates: they are saved, and read back as they were."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pandas
import pytest

from lapora.config import DataSettings, FitSettings
from lapora.errors import AdapterError
from lapora.models.adapter import read_adapter
from lapora.storage.files import write_json
from lapora.storage.saved import SavedPosterior
from lapora.tasks.rows import read_file
from lapora.workflows.fit import fit
from lapora.workflows.results import append_result, read_results
from tiny_adapter import command, make_adapter, make_rows, model_of

LONE = "\udce9"


@pytest.fixture
def odd(tmp_path) -> Path:
    """A folder whose name is not UTF-8."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9t"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    return folder


@pytest.fixture
def tiny(tmp_path) -> Path:
    return make_adapter(tmp_path / "tiny")


def test_json_keeps_every_text_and_stays_readable(tmp_path):
    content = {"plain": "été 空 😀", "lone": f"a{LONE}b\ud800", LONE: ['"', "\\udce9", "\n"]}
    write_json(tmp_path / "file.json", content)
    written = (tmp_path / "file.json").read_bytes()
    assert json.loads(written) == content
    assert '"été 空 😀"'.encode() in written and rb'"a\udce9b\ud800"' in written


def test_every_command_with_folders_whose_names_are_not_utf8(tiny, odd, monkeypatch, capfdbinary):
    shutil.copytree(tiny / "data", odd / "data")
    pandas.DataFrame(make_rows(3)).to_parquet(tiny / "rows.parquet")
    shutil.move(tiny / "rows.parquet", odd)
    data = ("--data", tiny / "task.yaml", "--data-dir", odd / "data")
    there = ("--output-dir", odd / "out", "--device", "cpu")
    adapter = tiny / "adapter"
    for words in (
        ("fit", adapter, *data, *there),
        ("tune-prior", adapter, *there),
        ("eval", adapter, *there, "--report", odd / "report.html", "--output", odd / "results.jsonl"),
        ("inspect", adapter, "--output-dir", odd / "out"),
        ("compare", odd / "results.jsonl"),
        ("predict", adapter, odd / "data" / "validation.jsonl", *there, "--output", odd / "out.parquet"),
        ("predict", adapter, odd / "rows.parquet", *there, "--output", odd / "out.csv"),
    ):
        status, _, errors = command(monkeypatch, capfdbinary, *words)
        assert status == 0, errors
    saved = SavedPosterior(odd / "out" / "laplace" / "default")
    assert saved.prior_is_sound() and saved.manifest.data.data_dir == str(odd / "data")
    assert len(list(read_file(odd / "out.parquet"))) == 12
    assert r"d\udce9t" in (odd / "report.html").read_text(encoding="utf-8")


def test_a_task_with_a_lone_surrogate(tiny):
    with (tiny / "task.yaml").open("a") as stream:
        stream.write('dataset_name: "caf\\ud800é"\n')
    data = DataSettings(str(tiny / "task.yaml"), tiny / "data")
    folder = fit(model_of(tiny), data, FitSettings(prior_method="marglik")).folder
    assert SavedPosterior(folder).manifest.task["dataset_name"] == "caf\ud800é"
    assert r'"caf\ud800é"' in (folder / "posterior.json").read_text(encoding="utf-8")


def test_results_keep_the_adapters_path_and_lines(tmp_path):
    file, adapter = tmp_path / "results.jsonl", f"/d{LONE}t/été\u2028\x85"
    for task in ("one", "two"):
        append_result(file, {"task": task, "split": "test", "n": 1, "results": []}, adapter)
    assert [(run["task"], run["adapter"]) for run in read_results([file])] == [("one", adapter), ("two", adapter)]


def test_standard_output_takes_every_path(tmp_path, monkeypatch):
    from lapora.cli.app import run

    file = tmp_path / "results.jsonl"
    results = [{"method": "map", "nll": 0.5}]
    append_result(file, {"task": "t", "split": "test", "n": 1, "results": results}, f"/d{LONE}t")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["lapora", "compare", str(file)])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 0 and rb"/d\udce9t" in stdout.detach().getvalue()


def test_an_adapter_whose_path_is_not_utf8_is_refused(tiny, odd):
    shutil.copytree(tiny / "adapter", odd / "adapter")
    with pytest.raises(AdapterError, match="not UTF-8, which safetensors cannot read; rename the folder"):
        read_adapter(odd / "adapter")
