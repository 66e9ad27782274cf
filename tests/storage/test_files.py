"""Many `predict`s share one posterior, which none of them changes."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lapora.config import PredictSettings
from lapora.errors import PosteriorError
from lapora.storage.saved import SavedPosterior
from lapora.workflows.predict import predict
from tiny_adapter import fit_tiny, json_lines, make_adapter, model_of


@pytest.fixture
def tiny(tmp_path) -> Path:
    fit_tiny(make_adapter(tmp_path))
    return tmp_path


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _predict(folder: str, start, results) -> None:
    start.wait()
    results.put(json.dumps(list(predict(model_of(Path(folder)), PredictSettings(), json_lines(40)))))


def test_processes_at_once_give_the_same_bytes_and_change_nothing(tiny):
    before = contents(tiny)
    names = sorted(str(path) for path in tiny.rglob("*"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_adapter", "lapora.workflows.predict"])
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=_predict, args=(str(tiny), start, results)) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    found = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join(60)
    assert len(found) == 1 and [process.exitcode for process in processes] == [0] * 8
    assert contents(tiny) == before and sorted(str(path) for path in tiny.rglob("*")) == names


def _fit_again(folder: str, start, results) -> None:
    start.wait()
    for index in range(10):
        fit_tiny(Path(folder), overwrite=True, structure=("diag", "kron")[index % 2])
    results.put("done")


def test_reading_while_it_is_replaced_gives_one_or_the_other(tiny):
    """Every reading is of one fit, whole; or says that it was replaced meanwhile, or is not there yet."""
    lines = json_lines(4)
    whole = {}
    for structure in ("diag", "kron"):
        fit_tiny(tiny, overwrite=True, structure=structure)
        whole[structure] = json.dumps(list(predict(model_of(tiny), PredictSettings(), lines)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_adapter", "lapora.workflows.predict"])
    start, results = context.Event(), context.Queue()
    process = context.Process(target=_fit_again, args=(str(tiny), start, results))
    process.start()
    start.set()
    read = refused = 0
    while process.is_alive():
        try:
            assert json.dumps(list(predict(model_of(tiny), PredictSettings(), lines))) in whole.values()
            read += 1
        except PosteriorError as error:
            assert "replaced it while" in str(error) or "no posterior there" in str(error), error
            refused += 1
    process.join()
    assert results.get(timeout=10) == "done" and process.exitcode == 0 and read > 0


def test_a_folder_that_cannot_be_written(tiny):
    expected = json.dumps(list(predict(model_of(tiny), PredictSettings(), json_lines(4))))
    folders = [tiny / "adapter" / "laplace" / "default", tiny / "adapter" / "laplace", tiny / "adapter"]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert json.dumps(list(predict(model_of(tiny), PredictSettings(), json_lines(4)))) == expected
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_no_file_is_opened_for_writing(tiny, monkeypatch):
    """Root may write to a read-only folder; so the openings themselves are looked at."""
    opened = []

    def look(event: str, arguments: tuple) -> None:
        if looking and event == "open" and isinstance(arguments[0], str | os.PathLike):
            mode, flags = arguments[1], arguments[2]
            if (mode and set(str(mode)) & set("wax+")) or (flags and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                opened.append(str(arguments[0]))
        elif looking and event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            opened.append(f"{event} {arguments[0]}")

    looking = True
    sys.addaudithook(look)
    list(predict(model_of(tiny), PredictSettings(), json_lines(4)))
    looking = False
    assert not [name for name in opened if str(tiny) in name]


def test_a_cut_replacement_is_read_without_being_repaired(tiny):
    folder = tiny / "adapter" / "laplace" / "default"
    expected = SavedPosterior(folder).content
    folder.rename(folder.with_name(".default.previous"))
    assert SavedPosterior(folder).content == expected and not folder.exists()
    assert len(list(predict(model_of(tiny), PredictSettings(), json_lines(2)))) == 2
    fit_tiny(tiny, overwrite=True)
    assert folder.exists() and not folder.with_name(".default.previous").exists()


@pytest.mark.slow
def test_commands_at_once(tiny):
    text = b"".join(json_lines(200))
    command = [sys.executable, "-m", "lapora", "predict", str(tiny / "adapter"), "--device", "cpu"]
    before = contents(tiny)
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda _: subprocess.run(command, input=text, capture_output=True), range(6)))
    assert [each.returncode for each in done] == [0] * 6
    assert len({each.stdout for each in done}) == 1
    assert contents(tiny) == before
